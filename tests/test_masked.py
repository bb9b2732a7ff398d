import pytest
import timm
import torch

import mimrefiner as mr
from mimrefiner.models import masked


def test_patchify_keeps_rows_first_and_inverts():
    x = torch.randn(2, 3, 32, 32)
    patches = masked.patchify(x, 8)
    assert patches.shape == (2, 16, 192)
    assert torch.equal(patches[:, 1].view(2, 8, 8, 3), x[:, :, :8, 8:16].permute(0, 2, 3, 1))
    assert torch.equal(masked.unpatchify(patches, 8), x)


def test_masks_have_the_ratio_and_follow_the_generator():
    mask = masked.random_mask(50, 16, 0.6, torch.Generator().manual_seed(0))
    assert (mask.sum(1) == 10).all()
    assert torch.equal(mask, masked.random_mask(50, 16, 0.6, torch.Generator().manual_seed(0)))
    assert masked.random_mask(500, 16, 0.5).float().mean(0).std() < 0.05


@pytest.fixture(params=["simmim", "mae"])
def model(request, vit):
    return masked.build_masked_model(
        vit, mr.PretrainConfig(method=request.param, decoder_dim=16, decoder_heads=2)
    ).eval()


def test_masked_pixels_are_not_seen(model):
    """The prediction does not change when masked pixels do, and changes when visible ones do."""
    x, mask = torch.randn(2, 3, 32, 32), masked.random_mask(2, 16, 0.5)
    hidden = masked.unpatchify(mask[..., None].float().expand(-1, -1, 192), 8).bool()
    with torch.no_grad():
        before = model.predict(x, mask)
        assert torch.allclose(
            before, model.predict(torch.where(hidden, torch.randn_like(x), x), mask), atol=1e-5
        )
        assert not torch.allclose(
            before, model.predict(torch.where(hidden, x, torch.randn_like(x)), mask), atol=1e-3
        )


def test_only_masked_patches_count(model):
    x, mask = torch.randn(2, 3, 32, 32), masked.random_mask(2, 16, 0.5)
    target = masked.patchify(x, 8)
    wrong = torch.where(mask[..., None], 0.0, 100.0)
    if isinstance(model, masked.MAE):
        model.predict = lambda images, m: masked.normalise_patches(target) + wrong
    else:
        model.predict = lambda images, m: target + wrong
    assert model(x, mask).item() == pytest.approx(0, abs=1e-6)


def test_mae_encoder_sees_visible_patches_only(vit):
    model = masked.build_masked_model(
        vit, mr.PretrainConfig(method="mae", decoder_dim=16, decoder_heads=2)
    )
    lengths = []
    vit.blocks[0].register_forward_hook(lambda m, i, o: lengths.append(o.shape[1]))
    model(torch.randn(2, 3, 32, 32), masked.random_mask(2, 16, 0.75))
    assert lengths == [1 + 4]


def test_mae_keeps_patches_where_they_were(vit):
    """With a decoder of no blocks, every visible patch's output depends on its own token and
    position only.
    """
    model = masked.MAE(vit, decoder_depth=0, decoder_dim=16, decoder_heads=2).eval()
    vit.blocks = torch.nn.Sequential()
    x, mask = torch.randn(1, 3, 32, 32), masked.random_mask(1, 16, 0.5)
    changed = x.clone()
    changed[:, :, :8, 8:16] += 1  # patch 1
    mask[0, 1] = False
    with torch.no_grad():
        moved = (model.predict(x, mask) - model.predict(changed, mask)).abs().sum(-1)[0] > 1e-6
    assert moved.nonzero()[:, 0].tolist() == [1]


def test_every_parameter_learns(model):
    model(torch.randn(4, 3, 32, 32), masked.random_mask(4, 16, 0.5)).backward()
    without = [
        name for name, x in model.named_parameters() if x.grad is None or x.grad.abs().sum() == 0
    ]
    assert without == []


def test_rotary_models_are_refused():
    eva = timm.create_model("eva02_tiny_patch14_224", num_classes=0, depth=1)
    with pytest.raises(mr.InputError, match="added positions"):
        masked.SimMIM(eva)
