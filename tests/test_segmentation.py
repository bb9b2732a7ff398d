"""UperNet, its recipe and its ways of testing, and what training squares are."""

import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peak import PeakBytes
from PIL import Image
from sklearn.metrics import confusion_matrix
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import mimrefiner as mr
from mimrefiner.data import scenes
from mimrefiner.models import upernet
from mimrefiner.models.encoders import released_encoder
from mimrefiner.models.layouts import ReleasedViT, ViTShape
from mimrefiner.probes import segmentation
from mimrefiner.training import benchmark_cost, segment
from mimrefiner.training.checkpoints import Saving

# Of protocols.md, section 5.1, written down from there
PUBLISHED = {
    "steps": 160_000,
    "warmup": 1_500,
    "batch_size": 16,
    "min_lr": 1e-6,
    "layer_decay": 0.95,
    "weight_decay": 0.05,
    "betas": (0.9, 0.999),
    "auxiliary_weight": 0.4,
    "evaluate_every": 10_000,
    "ignore_zero": True,
    "seed": 0,
    "crop": {
        "size": 512,
        "long": 2048,
        "short": 512,
        "ratio": (0.5, 2.0),
        "max_share": 0.75,
        "jitter": (0.5, 0.5, 0.5, 0.25),
        "flip": 0.5,
    },
    "model": {
        "classes": 150,
        "size": 512,
        "taps": None,
        "drop_path": 0.2,
        "layer_scale": 1.0,
        "relative_positions": True,
        "pool_scales": (1, 2, 3, 6),
        "dropout": 0.1,
        "auxiliary_map": 2,
        "auxiliary_dim": 256,
    },
}
SMALL = upernet.UperNetConfig(3, 32, auxiliary_dim=8, drop_path=0.0)
RECIPE = segment.SegmentationRecipe(
    SMALL,
    ignore_zero=False,
    steps=6,
    batch_size=4,
    base_lr=0.05,
    warmup=1,
    crop=scenes.SceneCrop(32, 64, 32),
    evaluate_every=3,
)


def vit(depth=4, dim=16, **changes):
    return mr.build_vit(mr.ViTConfig(dim=dim, depth=depth, num_heads=2, **changes))


class Scenes(torch.utils.data.Dataset):
    """A bright square (class 1) or disc (class 2) on dark noise (class 0)."""

    def __init__(self, n=8, size=(40, 48)):
        rng, (height, width) = np.random.default_rng(0), size
        y, x = np.mgrid[:height, :width]
        self.pairs = []
        for i in range(n):
            cy, cx = rng.integers(10, 30, 2)
            disc = (y - cy) ** 2 + (x - cx) ** 2 < 100
            shape = (abs(y - cy) < 9) & (abs(x - cx) < 9) if i % 2 else disc
            pixels = rng.integers(0, 60, (height, width, 3)).astype(np.uint8)
            pixels[shape] = (220, 60, 60) if i % 2 else (60, 60, 220)
            mask = np.where(shape, 1 + i % 2, 0).astype(np.uint8)
            self.pairs.append((Image.fromarray(pixels), Image.fromarray(mask)))

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, i):
        return self.pairs[i]


def test_every_field_of_the_recipe_is_the_published_one():
    found = asdict(segment.SegmentationRecipe())
    rate = found.pop("base_lr")
    assert rate * 16 / 256 == pytest.approx(2e-5)  # an absolute rate at a batch of 16
    assert found == PUBLISHED
    whole, sliding = segmentation.WHOLE, segmentation.SLIDING
    assert (whole.size, whole.fit, whole.stride, whole.enlarge) == (512, "square", 512, "bilinear")
    assert (sliding.size, sliding.fit, sliding.stride) == (512, "short", 341)
    assert upernet.taps_of(12) == (3, 5, 7, 11)
    assert upernet.taps_of(24) == (7, 11, 15, 23)
    assert upernet.taps_of(32) == (7, 15, 23, 31)


def test_decoder_and_auxiliary_head_equal_those_of_transformers():
    from transformers import UperNetConfig
    from transformers.models.upernet import modeling_upernet as reference

    dim, classes = 8, 5
    config = UperNetConfig(
        hidden_size=dim,
        pool_scales=[1, 2, 3, 6],
        num_labels=classes,
        auxiliary_channels=6,
        auxiliary_in_channels=dim,
        auxiliary_num_convs=1,
        auxiliary_concat_input=False,
    )
    head = reference.UperNetHead(config, [dim] * 4).eval()
    second = reference.UperNetFCNHead(config, [dim] * 4).eval()
    model = upernet.UperNet(
        vit(dim=dim), upernet.UperNetConfig(classes, 64, auxiliary_dim=6)
    ).eval()
    ours = model.decoder
    pairs = [
        *zip(ours.pooled, (block.layers[1] for block in head.psp_modules.blocks), strict=True),
        (ours.context, head.bottleneck),
        *zip(ours.lateral, head.lateral_convs, strict=True),
        *zip(ours.smooth, head.fpn_convs, strict=True),
        (ours.fuse, head.fpn_bottleneck),
        (ours.classify, head.classifier),
        (model.auxiliary[0], second.convs[0]),
        (model.auxiliary[2], second.classifier),
    ]
    for mine, theirs in pairs:
        for x, y in zip(mine.state_dict().values(), theirs.state_dict().values(), strict=True):
            if y.dtype.is_floating_point:
                y.copy_(torch.rand_like(y) - (0.5 if y.ndim > 1 else 0))
            x.copy_(y)
    maps = [torch.randn(2, dim, side, side) for side in (32, 16, 8, 4)]
    with torch.no_grad():
        assert torch.allclose(ours(maps), head(maps), atol=1e-5)
        assert torch.allclose(model.auxiliary(maps[2]), second(maps), atol=1e-5)


@pytest.mark.parametrize(("patch", "sides"), [(16, (16, 8, 4, 2)), (8, (16, 8, 4, 2))])
def test_maps_are_the_raw_blocks_at_four_scales(patch, sides):
    encoder = vit(image_size=64, patch_size=patch)
    config = replace(SMALL, size=4 * 16 if patch == 16 else 64, relative_positions=False)
    model = upernet.UperNet(encoder, config).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        raw = encoder.forward_intermediates(images, intermediates_only=True)
        maps = model.maps(images)
        assert [x.shape[-1] for x in maps] == list(sides)
        for x, scale, found in zip(raw, model.pyramid, maps, strict=True):
            assert torch.allclose(scale(x), found, atol=1e-5)
    kinds = [type(x) for x in model.pyramid]
    if patch == 16:
        assert kinds == [nn.Sequential, nn.ConvTranspose2d, nn.Identity, nn.MaxPool2d]
    else:
        assert kinds == [nn.ConvTranspose2d, nn.Identity, nn.MaxPool2d, nn.MaxPool2d]


@pytest.mark.parametrize("post_norm", [False, True])
def test_the_prepared_encoder_begins_as_the_encoder(post_norm):
    """Layer scales of 1 and tables of 0 change nothing; layer scales do."""
    shape = ViTShape(32, 8, 16, 4, 2, 32, post_norm=post_norm, final_norm=not post_norm)
    encoder = released_encoder(ReleasedViT(shape))
    tuned = upernet.prepared(encoder, SMALL).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        raw = encoder.forward_intermediates(images, intermediates_only=True)[-1]
        tokens = tuned.forward_features(images)[:, 1:]
        assert torch.allclose(tokens.mT.unflatten(2, (4, 4)), raw, atol=1e-5)
    names = dict(tuned.named_parameters())
    assert names["pos_embed"].requires_grad and "norm.weight" not in names
    table = names["blocks.0.attn.positions.relative_position_bias_table"]
    assert table.shape == (7 * 7 + 3, 2) and not table.any()
    assert names["blocks.0.ls1.gamma"].tolist() == [1.0] * 16
    with torch.no_grad():
        tuned.blocks[1].ls2.gamma.zero_()
        changed = tuned.forward_features(images)[:, 1:]
    assert not torch.allclose(changed, tokens, atol=1e-3)


def test_attention_adds_the_table_by_offset():
    encoder = vit(dim=8)
    layer = upernet.BiasedAttention(encoder.blocks[0].attn, (2, 3), 1).eval()
    table = layer.positions.relative_position_bias_table
    with torch.no_grad():
        table.copy_(torch.randn_like(table))
        x = torch.randn(1, 7, 8)
        inner = layer.attention
        q, k, v = inner.qkv(x).reshape(1, 7, 3, 2, 4).permute(2, 0, 3, 1, 4)
        bias = torch.zeros(2, 7, 7)
        places = [(row, column) for row in range(2) for column in range(3)]
        for i in range(7):
            for j in range(7):
                if i and j:  # 3 x 5 offsets, rows before columns
                    rows, columns = (
                        a - b for a, b in zip(places[i - 1], places[j - 1], strict=True)
                    )
                    entry = (rows + 1) * 5 + columns + 2
                else:  # cls to patch, patch to cls, cls to itself
                    entry = 15 + (0 if j else 1) if i != j else 17
                bias[:, i, j] = table[entry]
        weights = (q @ k.mT / math.sqrt(4) + bias).softmax(-1)
        expected = inner.proj((weights @ v).transpose(1, 2).reshape(1, 7, 8))
        assert torch.allclose(layer(x), expected, atol=1e-5)


def test_drop_path_grows_to_the_last_block():
    config = replace(SMALL, drop_path=0.3)
    blocks = upernet.prepared(vit(), config).blocks
    rates = [block.drop_path1.rate for block in blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])
    assert rates == [block.drop_path2.rate for block in blocks]


@pytest.mark.parametrize(("post_norm", "decays"), [(False, 0.0), (True, 0.05)])
def test_groups_have_the_published_decays(post_norm, decays):
    shape = ViTShape(32, 8, 16, 4, 2, 32, post_norm=post_norm, final_norm=not post_norm)
    model = upernet.UperNet(released_encoder(ReleasedViT(shape)), SMALL)
    groups = segment.parameter_groups(model, RECIPE, decay_tables=post_norm)
    found = {
        id(x): (group.get("lr_scale", 1.0), group["weight_decay"])
        for group in groups
        for x in group["params"]
    }
    assert len(found) == sum(len(group["params"]) for group in groups)
    named = dict(model.named_parameters())
    assert found.keys() == {id(x) for x in named.values()}
    of = {name: found[id(x)] for name, x in named.items()}
    decay = 0.95
    assert of["encoder.pos_embed"] == of["encoder.cls_token"] == (pytest.approx(decay**5), 0)
    assert of["encoder.patch_embed.proj.weight"] == (pytest.approx(decay**5), 0.05)
    qkv = "encoder.blocks.1.attn.attention.qkv"
    assert of[f"{qkv}.weight"] == (pytest.approx(decay**3), 0.05)
    assert of[f"{qkv}.bias"] == of["encoder.blocks.1.ls1.gamma"] == (pytest.approx(decay**3), 0)
    table = "encoder.blocks.3.attn.positions.relative_position_bias_table"
    assert of[table] == (pytest.approx(decay), decays)
    assert of["decoder.classify.weight"] == of["pyramid.0.weight"] == (1, 0.05)
    assert of["decoder.classify.bias"] == of["decoder.fuse.1.weight"] == (1, 0)


def test_the_rate_is_2e_5_at_its_peak_and_ends_at_1e_6():
    recipe = segment.SegmentationRecipe()
    stage = segment.stage_of(recipe, images=20_210)
    assert stage.lr(0) == pytest.approx(2e-5 / 1501)
    assert stage.lr(1500) == pytest.approx(2e-5)
    middle = 1500 + (160_000 - 1500) // 2
    assert stage.lr(middle) == pytest.approx((2e-5 + 1e-6) / 2)
    assert stage.lr(159_999) == pytest.approx(1e-6, rel=1e-3)


def test_new_convolutions_are_xavier():
    model = upernet.UperNet(vit(dim=32), SMALL)
    for layer, fans in ((model.decoder.fuse[0], 5 * 32 * 9), (model.decoder.lateral[0][0], 2 * 32)):
        bound = math.sqrt(6 / fans)
        assert bound * 0.95 < layer.weight.abs().max() <= bound
    assert not model.decoder.classify.bias.any()


def test_mean_iou_equals_sklearn_on_random_maps():
    """Images of different sizes, ignored pixels, and a class that occurs nowhere."""
    rng, classes = np.random.default_rng(0), 5
    maps = [rng.integers(4, size=(2, *size)) for size in ((9, 12), (7, 7), (12, 8))]
    images, table = [], 0
    for truth, guess in maps:
        mask = truth.astype(np.uint8)
        mask[rng.random(mask.shape) < 0.2] = scenes.IGNORE
        pixels = np.repeat(guess[..., None], 3, 2).astype(np.uint8)  # the image shows the guess
        images.append((Image.fromarray(pixels), Image.fromarray(mask)))
        counted = mask != scenes.IGNORE
        table += confusion_matrix(mask[counted], guess[counted], labels=range(classes))

    def model(x):
        return F.one_hot((255 * x[:, 0]).round().long(), classes).permute(0, 3, 1, 2)[None].float()

    window = segmentation.Window("keep", 6, "keep", 4, "nearest")
    labels = scenes.Labels(classes)
    found = segmentation.mean_iou(model, images, labels, window, ((0.0,) * 3, (1.0,) * 3))
    right, union = np.diag(table), table.sum(0) + table.sum(1) - np.diag(table)
    assert union[4] == 0
    assert found.item() == pytest.approx(np.mean(right[:4] / union[:4]))


@pytest.mark.parametrize("fit", ["square", "short"])
def test_both_ways_of_testing(fit):
    """``square`` shows one squashed window; ``short`` keeps the aspect and slides."""
    seen = []

    def model(x):
        seen.append(x)
        return x.mean((2, 3), keepdim=True).expand(-1, -1, 8, 8)[None]

    image = torch.rand(1, 3, 30, 60)
    window = segmentation.Window(fit, 16, fit, 16 if fit == "square" else 11)
    (logits,) = segmentation.segmented(model, image, window)
    assert logits.shape == (1, 3, 30, 60)
    assert {x.shape[-2:] for x in seen} == {(16, 16)}
    if fit == "square":
        assert len(seen) == 1
        resized = F.interpolate(image, size=(16, 16), mode="bilinear", align_corners=False)
        assert torch.equal(seen[0], resized)
    else:
        wide = F.interpolate(image, size=(16, 32), mode="bilinear", align_corners=False)
        assert len(seen) == 3  # at 0, 11 and 16 of 32 columns
        assert all(
            torch.equal(x, wide[..., left : left + 16])
            for x, left in zip(seen, (0, 11, 16), strict=True)
        )


def test_squares_keep_image_and_mask_together():
    """The red channel tells the class, so that every pixel of a square can be checked."""
    rng = np.random.default_rng(0)
    mask = np.repeat(np.repeat(rng.integers(5, size=(3, 6)), 20, 0), 20, 1).astype(np.uint8)
    image = np.zeros((60, 120, 3), np.uint8)
    image[..., 0] = 50 * mask
    pair = Image.fromarray(image), Image.fromarray(mask)
    crop = scenes.SceneCrop(32, 64, 32, max_share=0.6)
    sizes = set()
    for draw in range(40):
        square, classes = scenes.cut(*pair, crop, np.random.default_rng(draw))
        assert square.size == classes.size
        sizes.add(square.size)
        red, classes = np.asarray(square)[..., 0] / 50, np.asarray(classes)
        near = np.abs(red - classes) < 0.5  # all but the edges between classes
        assert near.mean() > 0.6
        x, y = scenes.padded(
            *scenes.tensors(square, Image.fromarray(classes), ((0.5,) * 3, (0.5,) * 3)), 32
        )
        assert x.shape == (3, 32, 32) and y.shape == (32, 32)
        outside = y == scenes.IGNORE
        assert (x[:, outside] == 0).all() and outside.sum() == 1024 - classes.size
    assert (32, 32) in sizes and len(sizes) > 1  # small draws are padded


def test_a_square_with_one_class_too_much_is_drawn_again():
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 56:] = 1
    pair = Image.new("RGB", (64, 64)), Image.fromarray(mask)
    shares = {}
    for limit in (0.75, 1.1):
        crop = scenes.SceneCrop(16, 64, 64, ratio=(1, 1), max_share=limit)
        cuts = [np.asarray(scenes.cut(*pair, crop, np.random.default_rng(i))[1]) for i in range(60)]
        shares[limit] = np.mean([cut.any() and cut.mean() > 0.25 for cut in cuts])
    assert shares[0.75] > 2 * shares[1.1]


def test_jitter_changes_colours_within_its_strengths():
    grey = Image.new("RGB", (4, 4), (100, 100, 100))
    values = [
        np.asarray(scenes.jittered(grey, (0.5,), np.random.default_rng(i)))[0, 0, 0]
        for i in range(200)
    ]
    assert 50 <= min(values) < 60 and 140 < max(values) <= 150
    photo = Scenes(1)[0][0]
    some = [
        np.asarray(scenes.jittered(photo, (0.5, 0.5, 0.5, 0.25), np.random.default_rng(i)))
        for i in (0, 0, 1)
    ]
    assert (some[0] == some[1]).all() and (some[0] != some[2]).any()


def test_upernet_learns_and_goes_on_exactly_after_a_stop(tmp_path):
    data, val, encoder = Scenes(), Scenes(4, (40, 70)), vit()
    recipe = replace(RECIPE, model=replace(SMALL, drop_path=0.2))  # draws that must repeat
    rows, whole = segmentation.fine_tuned(encoder, data, val, recipe)
    assert rows["metric"].eq("mIoU").all() and rows["protocol"].eq("upernet").all()
    assert rows["setting"].tolist() == [
        "whole, last",
        "sliding, last",
        "whole, best of 2 evaluations on test",
    ]
    assert whole.scores["step"].tolist() == [3, 6]
    assert rows["value"][2] == whole.scores["score"].max()
    assert rows["value"][0] == whole.scores["score"].iloc[-1]
    assert whole.history["loss"].iloc[-1] < whole.history["loss"].iloc[0]
    again = replace(recipe, seed=1)
    assert not segmentation.fine_tuned(encoder, data, val, again)[0]["value"].equals(rows["value"])

    class Interrupted(Exception):
        pass

    def stop(model):
        raise Interrupted

    saving = Saving(tmp_path / "checkpoints", every=2)
    with pytest.raises(Interrupted):
        segment.segment(encoder, data, recipe, stop, saving=saving)
    saving = replace(saving, resume=True)
    resumed, result = segmentation.fine_tuned(encoder, data, val, recipe, saving=saving)
    assert resumed.equals(rows)
    for x, y in zip(
        whole.model.state_dict().values(), result.model.state_dict().values(), strict=True
    ):
        assert torch.equal(x, y)


def test_a_batch_in_which_no_pixel_counts_changes_nothing():
    masks = torch.full((2, 4, 4), scenes.IGNORE)
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = segment.pixel_loss(logits, masks)
    loss.backward()
    assert loss == 0 and not logits.grad.any()


def test_bad_input_is_one_line():
    encoder = vit()
    with pytest.raises(mr.InputError, match="image size 50 is not divisible by the patch size 8"):
        upernet.UperNet(encoder, replace(SMALL, size=50))
    with pytest.raises(mr.InputError, match="four blocks, this encoder has 3"):
        upernet.UperNet(vit(depth=3), SMALL)
    with pytest.raises(mr.InputError, match="patch size of 8, 14 or 16 pixels, got 4"):
        upernet.UperNet(vit(patch_size=4), SMALL)
    with pytest.raises(mr.InputError, match="plain timm ViT"):
        upernet.UperNet(nn.Linear(2, 2), SMALL)
    few = replace(RECIPE, model=replace(SMALL, classes=2))
    with pytest.raises(mr.InputError, match="a mask holds class 2, expected classes 0 to 1"):
        segment.segment(encoder, Scenes(), few, lambda model: 0.0)
    with pytest.raises(mr.InputError, match="steps must be >= 1, got 0"):
        replace(RECIPE, steps=0)
    with pytest.raises(mr.InputError, match="stride must be between 1 and the window of 16"):
        segmentation.Window("a", 16, "keep", 17)
    with pytest.raises(mr.InputError, match="a mask holds class 4, expected classes 1 to 3 and 0"):
        scenes.Labels(3, ignore_zero=True).of(np.array([[4]], np.uint8))


SHAPES = [
    ViTShape(32, 8, 16, 4, 2, 32),
    ViTShape(64, 16, 16, 4, 4, 64, cls_token=False, fixed_positions=False),
    ViTShape(56, 14, 16, 4, 2, 32, post_norm=True, final_norm=False),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_and_operations_are_those_of_the_network(shape):
    size = 8 * shape.patch_size
    config = replace(SMALL, size=size, auxiliary_dim=6)
    model = upernet.UperNet(released_encoder(ReleasedViT(shape)), config).eval()
    counted = sum(x.numel() for x in model.parameters())
    assert benchmark_cost.upernet_parameters(shape, config) == counted
    images = torch.zeros(1, 3, size, size)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    # The patch embedding is a convolution whose input needs no gradient
    assert benchmark_cost.upernet_flops(shape, config) == counter.get_total_flops()


def test_fine_tuning_takes_the_memory_that_the_plan_says():
    """The second step, when gradients and moments exist; the plan may be cautious, not too low."""
    shape, config = ViTShape(64, 16, 192, 4, 3, 768), upernet.UperNetConfig(20, 128)
    recipe = segment.SegmentationRecipe(config, batch_size=4)
    model = upernet.UperNet(released_encoder(ReleasedViT(shape)), config).train()
    optimizer = torch.optim.AdamW(segment.parameter_groups(model, recipe), lr=1e-4)
    images, masks = torch.randn(4, 3, 128, 128), torch.randint(20, (4, 128, 128))
    with PeakBytes() as measured:
        measured.add([*model.parameters(), *model.buffers(), images, masks])
        for _ in range(2):
            optimizer.zero_grad()
            model.draw_paths(4, torch.default_generator)
            with torch.autocast("cpu", torch.bfloat16):
                loss = sum(segment.pixel_loss(x, masks) for x in model(images))
            loss.backward()
            optimizer.step()
    assert 1 < benchmark_cost.segmentation_bytes(shape, recipe) / measured.peak < 1.35


def test_upernet_l_has_the_parameters_of_beit_l_with_upernet():
    """transformers has that network; its 441 M differ by positions and some biases."""
    from transformers import BeitConfig, BeitForSemanticSegmentation

    shape, config = ViTShape(224, 16, 1024, 24, 16, 4096), upernet.UperNetConfig()
    found = benchmark_cost.upernet_parameters(shape, config)
    reference = BeitConfig(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        image_size=512,
        use_relative_position_bias=True,
        out_indices=[7, 11, 15, 23],
        num_labels=150,
    )
    with torch.device("meta"):
        beit = BeitForSemanticSegmentation(reference)
    theirs = sum(x.numel() for x in beit.parameters())
    assert found == pytest.approx(theirs, rel=0.01)
    assert found / 1e6 == pytest.approx(441, abs=1.5)
    assert benchmark_cost.upernet_flops(shape, config) / 1e9 == pytest.approx(2_498, abs=1)
