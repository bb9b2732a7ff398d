"""Which token is the class token, which axis holds the channels, and what cannot be probed."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import mimrefiner as mr
from mimrefiner.models.blocks import depth_of, pooled_blocks
from mimrefiner.models.pools import available_pools, blocks_with_cls
from mimrefiner.models.tokens import input_size, split_tokens

# Families that keep a class token, or add it late: name, arguments, blocks with the token
WITH_TOKEN = {
    "deit_tiny_distilled_patch16_224": ({"img_size": 32, "depth": 2}, (0, 1)),
    "beit_base_patch16_224": (
        {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 2},
        (0, 1),
    ),
    "eva02_tiny_patch14_224": ({"img_size": 28, "depth": 2}, (0, 1)),
    "vit_tiny_patch16_dinov3_qkvb": ({"img_size": 32, "depth": 2}, (0, 1)),
    "vit_relpos_small_patch16_224": (
        {"img_size": 32, "depth": 2, "class_token": True, "global_pool": "token"},
        (0, 1),
    ),
    "tnt_s_legacy_patch16_224": ({"depth": 2}, (0, 1)),
    "naflexvit_base_patch16_gap": (
        {"depth": 2, "embed_dim": 48, "num_heads": 2, "class_token": True, "global_pool": "token"},
        (0, 1),
    ),
    "cait_xxs24_224": ({"img_size": 32, "depth": 2}, ()),
    "xcit_nano_12_p16_224": ({"img_size": 32, "depth": 2}, ()),
    "convit_tiny": ({"img_size": 32, "depth": 3, "local_up_to_layer": 1}, (1, 2)),
}


def with_random_weights(encoder):
    """timm begins with small layer scales, so that blocks would hardly differ."""
    for x in encoder.parameters():
        torch.nn.init.normal_(x, mean=float(x.ndim == 1), std=0.05)
    return encoder.eval()


def check_close(found, expected):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def by_hand(encoder, images):
    """Patches as maps and class tokens after every block, None without one.

    They come from timm's own ``forward_intermediates``, which for ConViT knows no class token: its
    few lines are written out.
    """
    if type(encoder).__name__ != "ConVit":
        return zip(
            *encoder.forward_intermediates(
                images, intermediates_only=True, return_prefix_tokens=True
            ),
            strict=True,
        )
    x, maps, prefix = encoder.patch_embed(images) + encoder.pos_embed, [], []
    for i, block in enumerate(encoder.blocks):
        late = i >= encoder.local_up_to_layer
        if i == encoder.local_up_to_layer:
            x = torch.cat([encoder.cls_token.expand(len(x), -1, -1), x], 1)
        x = block(x)
        maps.append(x[:, int(late) :].mT)
        prefix.append(x[:, :1] if late else None)
    return maps, prefix


@pytest.mark.parametrize("name", WITH_TOKEN)
def test_the_class_token_is_found_where_it_is(name):
    """The blocks are called by hand as each family's own code does, and read without our rules."""
    arguments, blocks = WITH_TOKEN[name]
    encoder = with_random_weights(timm.create_model(name, num_classes=0, **arguments))
    assert blocks_with_cls(encoder) == blocks
    everywhere = len(blocks) == depth_of(encoder)
    assert available_pools(encoder) == (("cls", "mean") if everywhere else ("mean",))
    images = torch.randn(2, *input_size(encoder))
    with torch.no_grad():
        if blocks:
            maps, prefix = by_hand(encoder, images)
        else:
            maps = encoder.forward_intermediates(images, intermediates_only=True)
        pooled = pooled_blocks(encoder, images, range(depth_of(encoder)), ("mean",))
        cls = pooled_blocks(encoder, images, blocks, ("cls",))["cls"] if blocks else []
    for found, expected in zip(pooled["mean"], maps, strict=True):
        check_close(found, expected.flatten(2).mean(-1))
    for block, found in zip(blocks, cls, strict=True):
        check_close(found, prefix[block][:, 0])


def test_convits_class_token_is_offered_where_it_is(digits):
    arguments, _ = WITH_TOKEN["convit_tiny"]
    encoder = timm.create_model("convit_tiny", num_classes=0, **arguments)
    images = digits["test"].take(3)
    assert list(mr.extract_features(encoder, images).x) == ["mean"]
    assert list(mr.extract_features(encoder, images, blocks=(1, 2)).x) == ["cls", "mean"]
    with pytest.raises(mr.InputError, match=r"which this model has only after blocks 1, 2"):
        mr.extract_features(encoder, images, pools=("cls",))
    with pytest.raises(mr.InputError, match=r"block 0 \(0-based\) has no cls token"):
        pooled_blocks(encoder.eval(), torch.zeros(1, 3, 32, 32), (0,), ("cls",))


MAPS = {  # families whose blocks or stages give maps: arguments that cut them down
    "swin_tiny_patch4_window7_224": {"img_size": 56, "depths": (1, 1), "num_heads": (2, 4)},
    "convnext_atto": {"depths": (1, 1, 1, 1)},
    "test_mambaout": {},
    "pvt_v2_b0": {},
    "test_efficientnet": {},
    "mixer_s32_224": {"img_size": 64},
    "nest_tiny_jx": {},
    "sequencer2d_s": {"layers": (1, 1, 1, 1)},
    "samvit_base_patch16_224": {"depth": 2, "img_size": 64},
    "levit_128s": {},
    "mvitv2_tiny": {},
}


@pytest.mark.parametrize("name", MAPS)
def test_maps_are_pooled_over_their_pixels(name):
    encoder = with_random_weights(timm.create_model(name, num_classes=0, **MAPS[name]))
    assert available_pools(encoder) == ("mean",)
    images = torch.randn(1, *input_size(encoder))
    with torch.no_grad():
        pooled = pooled_blocks(encoder, images, range(depth_of(encoder)), ("mean",))["mean"]
        maps = encoder.forward_intermediates(images, intermediates_only=True)[-len(pooled) :]
    for found, expected in zip(pooled, maps, strict=True):
        check_close(found, expected.flatten(2).mean(-1))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("resnet18", "ResNet has neither blocks nor stages"),
        ("crossvit_tiny_240", "CrossVit cannot be probed: a block gives a list, expected tokens"),
        ("twins_svt_small", "Twins cannot be probed: its blocks are not called one by one"),
    ],
)
def test_what_cannot_be_probed_is_said_in_one_line(name, why, digits):
    encoder = timm.create_model(name, num_classes=0)
    with pytest.raises(mr.InputError, match=why):
        mr.extract_features(encoder, digits["test"].take(1))


class Toy(torch.nn.Module):
    """A network whose single block gives what the test says."""

    def __init__(self, output, **attributes):
        super().__init__()
        self.output = output
        self.blocks = torch.nn.ModuleList([torch.nn.Identity()])
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward_features(self, images):
        return self.blocks[0](self.output)


def test_the_number_of_tokens_tells_where_no_attribute_does():
    x, image = torch.randn(1, 12, 5), torch.zeros(1, 3, 32, 24)
    cls, patches = split_tokens(Toy(x), x, image)
    assert cls is None and patches.shape == (1, 12, 5)
    tokens = torch.cat([x[:, :1], x], 1)  # a class token and 4 x 3 patches
    token = torch.nn.Parameter(x[:, :1])
    cls, patches = split_tokens(Toy(x, cls_token=token), tokens, image)
    assert torch.equal(cls, x[:, 0]) and torch.equal(patches, x)
    cls, patches = split_tokens(Toy(x, cls_token=token), x, image)
    assert cls is None and torch.equal(patches, x)
    registers = torch.cat([x[:, :1], torch.randn(1, 4, 5), x], 1)
    dinov2 = Toy(x, cls_token=token, num_register_tokens=4)  # attributes of DINOv2's own code
    assert torch.equal(split_tokens(dinov2, registers, image)[1], x)
    with pytest.raises(mr.InputError, match="14 tokens of an image of 32 x 24 px do not tell"):
        split_tokens(Toy(x, cls_token=token), torch.randn(1, 14, 5), image)


@pytest.mark.parametrize("height", [4, 6])
def test_the_form_of_the_image_tells_the_channels(height):
    image, x = torch.zeros(1, 3, 8 * height, 32), torch.randn(1, 5, height, 4)
    expected = x.flatten(2).mean(-1)
    for output in (x, x.permute(0, 2, 3, 1)):
        patches = split_tokens(Toy(x), output, image)[1]
        torch.testing.assert_close(patches.mean(1), expected)
    square = torch.randn(1, 4, 4, 4)
    for kind, patches in (("NCHW", square.flatten(2).mT), ("NHWC", square.flatten(1, 2))):
        found = split_tokens(Toy(x, output_fmt=kind), square, torch.zeros(1, 3, 32, 32))[1]
        assert torch.equal(found, patches)


def test_final_norms_that_do_not_fit_are_said(digits):
    encoder = timm.create_model("convnext_atto", num_classes=0)
    with pytest.raises(mr.InputError, match=r"ConvNeXt has no final LayerNorm that fits block 0"):
        mr.extract_features(encoder, digits["test"].take(1), final_norm=True)


@pytest.mark.parametrize(
    ("name", "size"), [("vit_tiny_patch16_224", 96), ("hiera_tiny_224", 64), ("test_vit3", 48)]
)
def test_the_size_that_a_model_has_now_decides(name, size):
    """A caller's own model: its pretrained_cfg keeps the size of pre-training."""
    encoder = timm.create_model(name, img_size=size, num_classes=0)
    assert input_size(encoder) == (3, size, size) != encoder.pretrained_cfg["input_size"]
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 150, 3), np.uint8))
    features = mr.extract_features(encoder, [(image, 0)], blocks=(0,))
    assert len(features.x["mean"][0]) == 1


def test_a_network_that_does_not_say_its_size_is_named(digits):
    silent = Toy(torch.zeros(1, 4, 3))
    silent.weight = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(mr.InputError, match=r"Toy does not say which images it takes: set"):
        mr.extract_features(silent, digits["test"].take(1))
    grey = timm.create_model("test_vit", in_chans=1, num_classes=0)
    with pytest.raises(mr.InputError, match="images have 3 channels here, and this encoder takes"):
        mr.extract_features(grey, digits["test"].take(1))
