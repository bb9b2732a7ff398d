from dataclasses import replace

import pytest
import torch

import mimrefiner as mr
from mimrefiner.data.augment import digit_views


@pytest.fixture
def config():
    return mr.RefineConfig(
        views=digit_views(32, 8, n_local=3),
        hidden_dim=24,
        out_dim=12,
        predictor_dim=20,
        queue_size=32,
        batch_size=8,
        refine_top_k=4,
    )


def make_views(config, batch=8):
    return [torch.randn(batch, 3, crop.size, crop.size) for crop in config.views.crops]


def test_default_is_the_last_third_of_the_blocks(config):
    assert config.resolve_blocks(24) == tuple(range(16, 24))
    assert config.resolve_blocks(12) == (8, 9, 10, 11)
    assert config.resolve_blocks(32) == tuple(range(21, 32))
    assert replace(config, blocks=(5, 2)).resolve_blocks(12) == (2, 5)


def test_forward_orders_heads_batch_and_views(vit, config):
    refiner = mr.MIMRefiner(vit, replace(config, blocks=(0, 2))).eval()
    views = make_views(config)
    with torch.no_grad():
        z, p = refiner(views)
        assert z.shape == p.shape == (2, 8, 5, 12)
        for v, view in enumerate(views):
            tokens = [
                t
                for (t,) in zip(
                    vit.forward_intermediates(
                        view, return_prefix_tokens=True, intermediates_only=True
                    )
                )
            ]
            # The last head reads the normed output
            cls = torch.stack([tokens[0][1][:, 0], vit.norm(tokens[2][1][:, 0])], 1)
            z_alone, p_alone = refiner.heads(cls)
            assert torch.allclose(z[:, :, v], z_alone.transpose(0, 1), atol=1e-5)
            assert torch.allclose(p[:, :, v], p_alone.transpose(0, 1), atol=1e-5)


def test_batch_norm_sees_all_views_together(vit, config):
    refiner = mr.MIMRefiner(vit, config)
    rows = []
    refiner.heads.projector[1].register_forward_hook(lambda m, i, o: rows.append(i[0].shape[0]))
    refiner(make_views(config))
    assert rows == [8 * 5]


def test_step_equals_the_public_pieces(vit, config):
    refiner = mr.MIMRefiner(vit, config)
    before = refiner.queue.z.clone()
    views, index, label = make_views(config), torch.arange(8), torch.arange(8) % 3
    with torch.no_grad():
        z, p = refiner(views)
        nn_z = refiner.queue.lookup(z[:, :, :2], index)
        expected = mr.multi_view_nna_loss(z[:, :, :2], nn_z, p, temperature=0.2)
        result = refiner.step(*refiner(views), index, label, top_k=1)
    assert torch.allclose(result.loss, expected, rtol=1e-5)
    assert torch.equal(refiner.queue.z[:, :8], z[:, :, 0])
    assert torch.equal(refiner.queue.z[:, 8:], before[:, 8:])
    assert torch.equal(refiner.queue.index[:8], index)
    assert torch.equal(refiner.queue.label[:8], label)


def test_metrics_read_what_they_say(vit, config):
    refiner = mr.MIMRefiner(vit, config).eval()
    views = make_views(config)
    label = torch.tensor([0, 0, 0, 0, 1, 1, 1, -1])
    refiner.step(*refiner(views), torch.arange(8), label, top_k=1)
    # Far away, so that neighbours are among the eight
    refiner.queue.z[:, 8:] = -refiner.queue.z[:, :1]
    refiner.queue._refresh_unit(None)
    # Other indices: every image finds itself
    result = refiner.step(*refiner(views), torch.arange(100, 108), label, top_k=1)
    first_view = 0.5  # of two global views
    assert (result.metrics["nn_similarity"] > first_view).all()
    assert (result.metrics["nn_accuracy"] >= first_view).all()
    assert torch.equal(result.metrics["nn_age"], torch.full((1,), 8.0))
    assert ((result.metrics["alignment"] > 0) & (result.metrics["alignment"] < 1)).all()


def test_gradient_reaches_encoder_and_heads_but_not_the_queue(vit, config):
    refiner = mr.MIMRefiner(vit, config)
    refiner.step(*refiner(make_views(config)), torch.arange(8), top_k=1).loss.sum().backward()
    assert all(x.grad is not None for x in refiner.heads.parameters())
    assert vit.patch_embed.proj.weight.grad.abs().sum() > 0
    assert not refiner.queue.z.requires_grad


def test_weights_follow_the_seed(vit, config):
    one, same, other = (mr.MIMRefiner(vit, replace(config, seed=seed)) for seed in (1, 1, 2))
    for a, b in zip(one.heads.parameters(), same.heads.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(one.queue.z, same.queue.z)
    assert not torch.equal(one.queue.z, other.queue.z)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": (3,)}, "block 3 is out of range"),
        ({"blocks": ()}, "one or more different blocks"),
        ({"blocks": (1, 1)}, "one or more different blocks"),
        ({"frozen_blocks": 3}, "frozen_blocks must be between 0 and 2"),
        ({"views": digit_views(36, 12)}, "crop size 36 is not divisible by the patch size 8"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_named(vit, config, change, message):
    with pytest.raises(mr.InputError, match=message):
        mr.MIMRefiner(vit, replace(config, **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"refine_top_k": 33}, "top_k must be between 1 and the queue size 32, got 33"),
        ({"heads_top_k": 0}, "top_k must be between 1"),
        ({"temperature": 0.0}, "temperature must be > 0 and finite, got 0"),
        ({"batch_size": 64}, "a batch of 64 does not fit a queue of 32"),
        ({"pool": "max"}, "unknown pool 'max'"),
        ({"pairing": "both"}, "unknown pairing 'both'"),
    ],
)
def test_impossible_settings_are_named(config, change, message):
    with pytest.raises(mr.InputError, match=message):
        replace(config, **change)


@pytest.mark.parametrize("name", ["hiera_tiny_224", "convnextv2_atto"])
def test_only_plain_vits_are_refined(name):
    encoder = mr.load_encoder(name, image_size=64, pretrained=False)
    with pytest.raises(mr.InputError, match="can be probed, not refined: expected a ViT"):
        mr.MIMRefiner(encoder, mr.load_preset("smoke").refine)
