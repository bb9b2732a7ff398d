import functools
import itertools

import group_workers
import pytest
import timm
import torch
from peak import PeakBytes

import mimrefiner as mr
from mimrefiner.models.blocks import block_modules, hooked, pooled_blocks
from mimrefiner.models.catalogue import CATALOGUE
from mimrefiner.models.encoders import eval_transform
from mimrefiner.models.pools import available_pools

PLAIN = {"depth": 2, "embed_dim": 48, "num_heads": 3}


def oracle(encoder, images, norm=False):
    out = encoder.forward_intermediates(
        images, return_prefix_tokens=True, intermediates_only=True, output_fmt="NLC", norm=norm
    )
    # No tuple without prefix tokens
    return [torch.cat([x[1], x[0]], 1) if isinstance(x, tuple) else x for x in out]


@pytest.fixture
def images(digits):
    return digits["test"].subset(range(10))


def stacked(encoder, dataset):
    transform = eval_transform(encoder)
    return torch.stack([transform(dataset[i][0]) for i in range(len(dataset))])


@pytest.mark.parametrize("final_norm", [False, True])
def test_every_block_equals_forward_intermediates(vit, images, final_norm):
    features = mr.extract_features(vit, images, batch_size=4, final_norm=final_norm)
    with torch.no_grad():
        tokens = oracle(vit, stacked(vit, images), final_norm)
    assert features.x["cls"].shape == (3, 10, 32)
    assert features.blocks == (0, 1, 2)
    assert torch.equal(features.y, torch.tensor(images.labels))
    for block, expected in enumerate(tokens):
        assert torch.allclose(features.x["cls"][block], expected[:, 0], atol=1e-5)
        assert torch.allclose(features.x["mean"][block], expected[:, 1:].mean(1), atol=1e-5)


TIMM_NAMES = (
    "test_vit",
    "test_vit2",
    "test_vit3",
    "test_vit4",
    "eva02_tiny_patch14_224",
    "beit_base_patch16_224",
)


@pytest.mark.parametrize("name", TIMM_NAMES)
def test_timm_families(name, images):
    if name.startswith(("eva", "beit")):
        size = 56 if "14" in name else 32
        encoder = timm.create_model(name, num_classes=0, img_size=size, depth=2)
        encoder.pretrained_cfg = {**encoder.pretrained_cfg, "input_size": (3, size, size)}
    else:
        encoder = mr.load_encoder(name, pretrained=False, image_size=32)
    encoder.eval()
    features = mr.extract_features(encoder, images)
    with torch.no_grad():
        tokens = oracle(encoder, stacked(encoder, images))
    assert tuple(features.x) == available_pools(encoder)
    for block, expected in enumerate(tokens):
        patches = expected[:, encoder.num_prefix_tokens :]
        assert torch.allclose(features.x["mean"][block], patches.mean(1), atol=1e-4)
        if "cls" in features.x:
            assert torch.allclose(features.x["cls"][block], expected[:, 0], atol=1e-4)


FAMILIES = {  # name -> (arguments that cut the model down, image sizes that one model takes)
    "vit_giant_patch14_dinov2.lvd142m": (PLAIN, (56, 42)),
    "vit_gigantic_patch14_clip_224.laion2b": (PLAIN, (56, 42)),
    "eva02_large_patch14_224.mim_m38m": (PLAIN, (56, 42)),
    "beit3_large_patch16_224.pt": (PLAIN, (64, 48)),
    "aimv2_large_patch14_224.apple_pt": (PLAIN, (56, 42)),
    "vit_large_patch16_siglip_256.webli": (PLAIN, (64, 48)),
    "vit_large_patch16_dinov3.lvd1689m": (PLAIN, (64, 48)),
    "hiera_large_224.mae": ({"embed_dim": 48, "num_heads": 1, "stages": (1, 1, 2, 1)}, (64,)),
    "convnextv2_large.fcmae": ({"depths": (1, 1, 2, 1), "dims": (8, 16, 32, 64)}, (64, 50)),
}


@pytest.mark.parametrize("name", [row.name for row in CATALOGUE if not row.dim])
def test_families_of_the_table(name, monkeypatch):
    """Every timm name of the table without sizes of its own, cut down: all blocks, at the size it
    was built for and another one.
    """
    cut, sizes = FAMILIES[name]
    monkeypatch.setattr("timm.create_model", functools.partial(timm.create_model, **cut))
    encoder = mr.load_encoder(name, pretrained=False, image_size=sizes[0])
    assert encoder.pretrained_cfg["input_size"] == (3, sizes[0], sizes[0])
    for x in encoder.parameters():
        # So that blocks differ, where timm begins with small layer scales
        torch.nn.init.normal_(x, std=0.2)
    depth, pools = len(block_modules(encoder)), available_pools(encoder)
    for size in sizes:
        images = torch.randn(2, 3, size, size)
        options = {"coarse": False} if name.startswith("hiera") else {}
        with torch.no_grad():
            pooled = pooled_blocks(encoder, images, range(depth), pools)
            if name.startswith(("hiera", "convnext")):
                maps = encoder.forward_intermediates(images, intermediates_only=True, **options)
                expected = {"mean": [x.flatten(2).mean(-1) for x in maps]}
            else:
                tokens = oracle(encoder, images)
                expected = {
                    "cls": [x[:, 0] for x in tokens],
                    "mean": [x[:, encoder.num_prefix_tokens :].mean(1) for x in tokens],
                }
        assert len(expected["mean"]) == depth
        for pool in pools:
            for found, right in zip(pooled[pool], expected[pool], strict=True):
                torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-5)
        for one, next_ in itertools.pairwise(pooled["mean"]):
            assert one.shape != next_.shape or (one - next_).abs().max() > 1e-2


def test_a_size_that_a_family_does_not_take_is_said():
    for name, message in (
        ("hiera_tiny_224", "image size 48 is not divisible by the last stage's stride 32"),
        ("eva02_tiny_patch14_224", "image size 48 is not divisible by the patch size 14"),
    ):
        with pytest.raises(mr.InputError, match=message):
            mr.load_encoder(name, image_size=48, pretrained=False)


def test_some_blocks_and_pools(vit, images):
    features = mr.extract_features(vit, images, blocks=(2, 0), pools=("mean",))
    whole = mr.extract_features(vit, images)
    assert features.blocks == (0, 2)
    assert list(features.x) == ["mean"]
    assert torch.equal(features.x["mean"], whole.x["mean"][[0, 2]])


def test_no_hook_stays_and_the_mode_comes_back(vit, images):
    vit.train()
    with pytest.raises(RuntimeError):
        pooled_blocks(vit, torch.zeros(1, 4, 32, 32), (0, 1), ("cls",))
    vit.pos_embed.requires_grad_(False)
    mr.extract_features(vit, images)
    assert vit.training
    # As it was
    assert [name for name, x in vit.named_parameters() if not x.requires_grad] == ["pos_embed"]
    assert not any(block._forward_hooks for block in vit.blocks)


def test_half_precision_is_close(vit, images):
    full, half = (
        mr.extract_features(vit, images, autocast=dtype).x["cls"]
        for dtype in (None, torch.bfloat16)
    )
    assert half.dtype == torch.float32
    assert 0 < (full - half).abs().max() < 0.1


def test_only_pooled_features_stay_alive(vit):
    """No tensor with a token axis outlives its block."""
    pooled = pooled_blocks(vit, torch.randn(2, 3, 32, 32), range(3), ("cls", "mean"))
    assert all(x.shape == (2, 32) for per_block in pooled.values() for x in per_block)
    assert all(
        x.untyped_storage().nbytes() == 2 * 32 * 4
        for per_block in pooled.values()
        for x in per_block
    )


def test_features_take_their_own_memory_and_that_of_one_batch(vit, digits):
    """Nothing of a batch is kept beside them: small tensors between the large ones of forward
    passes make a process grow.
    """
    with PeakBytes() as measured:
        features = mr.extract_features(vit, digits["train"], batch_size=4)
    assert measured.peak < 1.5 * sum(x.nbytes for x in features.x.values())


def test_bad_input_is_named(vit, images):
    with pytest.raises(
        mr.InputError, match=r"block 3 is out of range: the model has blocks 0 to 2"
    ):
        mr.extract_features(vit, images, blocks=(1, 3))
    for blocks in ("1,2", 1, (0.5,)):
        with pytest.raises(mr.InputError, match=r"expected 0-based blocks such as \(8, 9\), got"):
            mr.extract_features(vit, images, blocks=blocks)
    with pytest.raises(mr.InputError, match="expected one or more poolings of cls, mean, got none"):
        mr.extract_features(vit, images, pools=())
    with pytest.raises(
        mr.InputError,
        match=r"expected batch_size >= 1 and loader processes \(workers\) >= 0, got 256 and -1",
    ):
        mr.extract_features(vit, images, num_workers=-1)
    with pytest.raises(mr.InputError, match="unknown pooling 'max'"):
        mr.extract_features(vit, images, pools=("max",))
    without_cls = mr.load_encoder("test_vit2", pretrained=False)
    if available_pools(without_cls) == ("mean",):
        with pytest.raises(mr.InputError, match="needs a cls token"):
            mr.extract_features(without_cls, images, pools=("cls",))
    with pytest.raises(mr.InputError, match="empty"):
        mr.extract_features(vit, images.subset([]))


def test_a_model_without_cls_token_is_refused_for_cls(images):
    encoder = timm.models.VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=2,
        num_classes=0,
        class_token=False,
        global_pool="avg",
    )
    encoder.pretrained_cfg = mr.build_vit(mr.ViTConfig()).pretrained_cfg
    assert available_pools(encoder) == ("mean",)
    with pytest.raises(mr.InputError, match="needs a cls token"):
        mr.extract_features(encoder, images, pools=("cls",))
    assert list(mr.extract_features(encoder, images).x) == ["mean"]


@pytest.mark.parametrize("name", ["convnext_atto", "hiera_tiny_224"])
def test_other_families_pool_their_stages_and_blocks(name, images):
    size = {"img_size": 64} if name.startswith("hiera") else {}
    encoder = timm.create_model(name, num_classes=0, **size).eval()
    encoder.pretrained_cfg = {**encoder.pretrained_cfg, "input_size": (3, 64, 64)}
    features = mr.extract_features(encoder, images.subset(range(3)))
    options = {"coarse": False} if name.startswith("hiera") else {}
    with torch.no_grad():
        maps = encoder.forward_intermediates(
            stacked(encoder, images.subset(range(3))), intermediates_only=True, **options
        )
    assert len(maps) == features.depth == len(features.blocks)
    for found, expected in zip(features.x["mean"], maps, strict=True):
        assert torch.allclose(found, expected.flatten(2).mean(-1), atol=1e-4)
    assert mr.knn_hits(features, features, k=1)["mean"].all()


def test_joined_poolings_and_subsets(vit, images):
    features = mr.extract_features(vit, images)
    joined = features.joined(("cls_last2", "cls+mean", "cls+mean_last2", "mean"))
    assert list(joined.x) == ["cls_last2", "cls+mean", "cls+mean_last2", "mean"]
    last = torch.cat(
        [features.x["cls"][1], features.x["mean"][1], features.x["cls"][2], features.x["mean"][2]],
        -1,
    )
    assert torch.equal(joined.x["cls+mean_last2"][2], last)
    assert torch.equal(joined.x["cls+mean_last2"][0], joined.x["cls+mean"][0])
    assert joined.x["cls+mean"].shape == (3, 10, 64)
    for pool, message in (
        ("max", "unknown pooling 'max'"),
        ("cls_last0", "unknown pooling"),
        ("cls+cls", "unknown pooling"),
    ):
        with pytest.raises(mr.InputError, match=message):
            features.joined((pool,))
    with pytest.raises(mr.InputError, match="needs 'cls', and there are mean"):
        mr.extract_features(vit, images, pools=("mean",)).joined(("cls+mean",))
    with pytest.raises(mr.InputError, match="of block 2 needs block 1, which was not extracted"):
        mr.extract_features(vit, images, blocks=(0, 2)).joined(("cls_last2",))
    part = features.subset([3, 1])
    assert torch.equal(part.y, features.y[[3, 1]])
    assert torch.equal(part.x["cls"], features.x["cls"][:, [3, 1]])


def test_processes_share_the_images_and_all_return_the_whole(vit, digits, tmp_path):
    torch.multiprocessing.spawn(
        group_workers.extract, (2, tmp_path / "rendezvous", tmp_path), nprocs=2
    )
    alone = mr.extract_features(vit, digits["test"].subset(range(7)))
    for rank in range(2):
        there = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert torch.equal(there["y"], alone.y)
        for pool, x in alone.x.items():
            assert torch.allclose(there["x"][pool], x, atol=1e-5)


def test_a_long_extraction_says_what_it_takes(vit, images, caplog, monkeypatch):
    caplog.set_level("INFO", "mimrefiner")
    mr.extract_features(vit, images)
    assert caplog.text == ""
    monkeypatch.setattr("mimrefiner.probes.features.LONG_SECONDS", 0)
    mr.extract_features(vit, images)
    assert "features of 10 images: 0.0 MiB as float32, about 0 minutes" in caplog.text


def test_a_hook_leaves_with_an_error_too(vit):
    seen = []

    def fail(i, module, inputs, output):
        seen.append((i, module))
        if i == 2:
            raise ArithmeticError

    with pytest.raises(ArithmeticError), hooked(vit.blocks, fail):
        vit.forward_features(torch.zeros(1, 3, 32, 32))
    assert seen == list(enumerate(vit.blocks))
    assert not any(block._forward_hooks for block in vit.blocks)
