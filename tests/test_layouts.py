"""Every published layout, with random weights, gives the numbers of an independent computation."""

import argparse
import functools
import math

import pytest
import timm
import torch
import torch.nn.functional as F

import mimrefiner as mr
from mimrefiner.models.layouts import LAYOUTS, ReleasedViT, ViTShape, find_layout

DIM, DEPTH, HEADS, PATCH, SIDE = 48, 2, 3, 8, 4


def blocks_of(encoder, images):
    """Raw outputs of every block, and of the whole encoder."""
    outputs = []
    handles = [
        block.register_forward_hook(lambda m, i, o: outputs.append(o)) for block in encoder.blocks
    ]
    with torch.no_grad():
        tokens = encoder.forward_features(images)
    for handle in handles:
        handle.remove()
    return outputs, tokens


def plain_tensors(cls=True, cls_position=True, norm=True):
    """A random ViT in the plain layout."""

    def linear(name, o, i):
        return {
            f"{name}.weight": torch.randn(o, i) / math.sqrt(i),
            f"{name}.bias": 0.1 * torch.randn(o),
        }

    def layer_norm(name):
        return {
            f"{name}.weight": 1 + 0.1 * torch.randn(DIM),
            f"{name}.bias": 0.1 * torch.randn(DIM),
        }

    tensors = {
        "patch_embed.proj.weight": 0.1 * torch.randn(DIM, 3, PATCH, PATCH),
        "patch_embed.proj.bias": torch.randn(DIM),
    }
    tensors["pos_embed"] = torch.randn(1, SIDE**2 + (cls and cls_position), DIM)
    if cls:
        tensors["cls_token"] = torch.randn(1, 1, DIM)
    for i in range(DEPTH):
        tensors |= layer_norm(f"blocks.{i}.norm1") | layer_norm(f"blocks.{i}.norm2")
        tensors |= linear(f"blocks.{i}.attn.qkv", 3 * DIM, DIM) | linear(
            f"blocks.{i}.attn.proj", DIM, DIM
        )
        tensors |= linear(f"blocks.{i}.mlp.fc1", 4 * DIM, DIM) | linear(
            f"blocks.{i}.mlp.fc2", DIM, 4 * DIM
        )
    return tensors | (layer_norm("norm") if norm else {})


def reference(t, x):
    """The plain pre-norm ViT written out with functions, from tensors in the plain layout: blocks
    and normed tokens.
    """
    x = (
        F.conv2d(x, t["patch_embed.proj.weight"], t["patch_embed.proj.bias"], stride=PATCH)
        .flatten(2)
        .mT
    )
    positions = t["pos_embed"]
    if "cls_token" in t:
        if positions.shape[1] == SIDE**2:
            positions = torch.cat([torch.zeros(1, 1, DIM), positions], 1)
        x = torch.cat([t["cls_token"].expand(len(x), -1, -1), x], 1)
    x, outputs = x + positions, []
    for i in range(DEPTH):
        p = {
            key.removeprefix(f"blocks.{i}."): value
            for key, value in t.items()
            if key.startswith(f"blocks.{i}.")
        }

        def norm(name, x, p=p):
            return F.layer_norm(x, (DIM,), p[f"{name}.weight"], p[f"{name}.bias"], 1e-6)

        def linear(name, x, p=p):
            return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])

        q, k, v = (
            linear("attn.qkv", norm("norm1", x))
            .unflatten(-1, (3, HEADS, -1))
            .permute(2, 0, 3, 1, 4)
        )
        attention = (q @ k.mT / math.sqrt(DIM // HEADS)).softmax(-1) @ v
        x = x + linear("attn.proj", attention.transpose(1, 2).flatten(2))
        x = x + linear("mlp.fc2", F.gelu(linear("mlp.fc1", norm("norm2", x))))
        outputs.append(x)
    return outputs, F.layer_norm(
        x, (DIM,), t["norm.weight"], t["norm.bias"], 1e-6
    ) if "norm.weight" in t else x


def prefixed(prefix, tensors):
    return {prefix + key: x for key, x in tensors.items()}


def extra(*keys):
    return {key: torch.randn(3, 3) for key in keys}


DECODER = (
    "mask_token",
    "decoder_embed.weight",
    "decoder_pos_embed",
    "decoder_blocks.0.attn.qkv.weight",
    "decoder_norm.weight",
)
FILES = {  # name -> (what the plain ViT has, how the file holds it, name of the layout)
    "mae": ({}, lambda t: {"model": t}, "MAE or dBOT without decoder"),
    "mae_decoder": (
        {},
        lambda t: {"model": t | extra(*DECODER, "decoder_pred.weight")},
        "MAE or dBOT",
    ),
    "dbot_decoder": (
        {},
        lambda t: {"model": t | extra(*DECODER, "decoder_predp.weight"), "epoch": 3},
        "MAE or dBOT",
    ),
    "crossmae": (
        {"norm": False},
        lambda t: {"model": t | extra(*DECODER, "wfm.linear.weight", "dec_norms.0.weight")},
        "CrossMAE",
    ),
    "ijepa": (
        {"cls": False},
        lambda t: {
            "target_encoder": prefixed("module.", t),
            "encoder": extra("module.x"),
            "epoch": 1,
        },
        "I-JEPA",
    ),
    "ibot": (
        {},
        lambda t: {
            "student": prefixed("module.backbone.", extra("masked_embed")),
            "teacher": prefixed("backbone.", t)
            | extra("head.mlp.0.weight", "head.last_layer.weight_g"),
        },
        "iBOT or DINO teacher",
    ),
    "mugs": (
        {},
        lambda t: {
            "state_dict": prefixed("module.backbone.", t | extra("relation_blocks.0.norm1.weight"))
            | extra("module.group_head.mlp.0.weight", "module.instance_head.mlp.0.weight")
        },
        "Mugs",
    ),
    "dino": ({}, lambda t: t, "plain ViT (DINO, MAWS, MAE-CT)"),
    "maws": ({}, lambda t: t, "plain ViT (DINO, MAWS, MAE-CT)"),
    "maect": ({"cls_position": False}, lambda t: {"state_dict": t}, "MAE-CT"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_random_file_in_the_layout_gives_the_reference_block_by_block(name, tmp_path):
    has, hold, layout = FILES[name]
    tensors = plain_tensors(**has)
    torch.save(hold(tensors), tmp_path / "file.pth")
    encoder = mr.load_encoder(tmp_path / "file.pth", num_heads=HEADS)
    assert find_layout(hold(tensors), "file")[0].name == layout
    x = torch.randn(2, 3, SIDE * PATCH, SIDE * PATCH)
    expected, tokens = reference(tensors, x)
    outputs, got = blocks_of(encoder, x)
    for a, b in zip([*outputs, got], [*expected, tokens], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert encoder(torch.randn(1, 3, 24, 24)).shape == (1, DIM)  # a local crop


def test_a_timm_model_under_every_plain_container_gives_timms_numbers(tmp_path):
    model = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=DIM, depth=DEPTH, num_heads=HEADS, num_classes=0
    )
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    torch.save({"model": model.state_dict()}, tmp_path / "mae.pth")
    x = torch.randn(2, 3, 32, 32)
    expected = model.eval().forward_intermediates(
        x, output_fmt="NLC", intermediates_only=True, return_prefix_tokens=True
    )
    for name in ("plain.pt", "mae.pth"):
        outputs, tokens = blocks_of(mr.load_encoder(tmp_path / name, num_heads=HEADS), x)
        torch.testing.assert_close(tokens, model.forward_features(x), atol=1e-5, rtol=1e-5)
        for output, (patches, cls) in zip(outputs, expected, strict=True):
            torch.testing.assert_close(output, torch.cat([cls, patches], 1), atol=1e-5, rtol=1e-5)


def huggingface(tensors):
    """The same tensors by the names of transformers' ViTs (version 5)."""
    names = {
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "pos_embed": "embeddings.position_embeddings",
    }
    names |= {
        "cls_token": "embeddings.cls_token",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
    }
    names |= {"attn.proj": "attention.o_proj"}
    renamed = {}
    for key, x in tensors.items():
        if key.startswith("norm."):
            renamed[key.replace("norm.", "layernorm.")] = x
            continue
        for old, new in names.items():
            key = key.replace(old, new)
        key = key.replace("blocks.", "layers.")
        if "attn.qkv" in key:
            for part, y in zip("qkv", x.chunk(3), strict=True):
                renamed[key.replace("attn.qkv", f"attention.{part}_proj")] = y
        else:
            renamed[key] = x
    return renamed


@pytest.mark.parametrize("name", ["mae", "ijepa"])
def test_layouts_agree_with_transformers(name, tmp_path):
    """ViTMAE with every patch visible, and I-JEPA, from the same tensors."""
    import transformers  # here, because it takes seconds

    has, hold, _ = FILES[name]
    tensors = plain_tensors(**has)
    torch.save(hold(tensors), tmp_path / "file.pth")
    sizes = {
        "hidden_size": DIM,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
        "intermediate_size": 4 * DIM,
    }
    sizes |= {"image_size": SIDE * PATCH, "patch_size": PATCH, "layer_norm_eps": 1e-6}
    x, more = torch.randn(2, 3, SIDE * PATCH, SIDE * PATCH), {}
    if name == "mae":
        theirs = transformers.ViTMAEModel(transformers.ViTMAEConfig(mask_ratio=0.0, **sizes))
        # Keeps the patches in their places
        more["noise"] = torch.arange(SIDE**2).expand(2, -1).float()
    else:
        theirs = transformers.IJepaModel(transformers.IJepaConfig(**sizes), add_pooling_layer=False)
    theirs.load_state_dict(huggingface(tensors))
    with torch.no_grad():
        expected = theirs.eval()(x, output_hidden_states=True, **more)
    outputs, tokens = blocks_of(mr.load_encoder(tmp_path / "file.pth", num_heads=HEADS), x)
    torch.testing.assert_close(tokens, expected.last_hidden_state, atol=1e-5, rtol=1e-5)
    for ours, other in zip(outputs, expected.hidden_states[1:], strict=True):
        torch.testing.assert_close(ours, other, atol=1e-5, rtol=1e-5)


def dinov2_names(tensors):
    """Tensors of transformers' Dinov2 (version 5) by the names of the original files."""
    names = {
        "embeddings.patch_embeddings.projection": "patch_embed.proj",
        "embeddings.position_embeddings": "pos_embed",
    }
    names |= {
        "embeddings.": "",
        "encoder.layer.": "blocks.",
        "layernorm.": "norm.",
        "attention.o_proj": "attn.proj",
    }
    names |= {
        "attention.q_proj": "attn.qkv",
        "mlp.gate_proj": "mlp.w12",
        "mlp.down_proj": "mlp.w3",
        "layer_scale": "ls",
    }
    renamed = {}
    for key, x in tensors.items():
        for part, rest in (("q_proj", ("k_proj", "v_proj")), ("gate_proj", ("up_proj",))):
            if part in key:
                x = torch.cat([x, *(tensors[key.replace(part, other)] for other in rest)])
        if not any(part in key for part in ("k_proj", "v_proj", "up_proj")):
            for old, new in names.items():
                key = key.replace(old, new)
            renamed[key.replace("lambda1", "gamma")] = x
    return renamed


@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize("size", ["base", "giant"])
def test_dinov2_agrees_with_transformers(size, registers, monkeypatch):
    """Models cut down to two blocks, from random weights under the original names; "giant" has the
    gated MLP (SwiGLU).
    """
    import transformers

    small = functools.partial(timm.create_model, embed_dim=DIM, depth=DEPTH, num_heads=HEADS)
    monkeypatch.setattr("timm.create_model", small)
    name = f"vit_{size}_patch14_{'reg4_' if registers else ''}dinov2"
    ours = mr.load_encoder(name, image_size=56, pretrained=False)
    kind = "Dinov2WithRegisters" if registers else "Dinov2"
    sizes = {
        "hidden_size": DIM,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
        "image_size": 56,
        "patch_size": 14,
    }
    config = getattr(transformers, f"{kind}Config")(**sizes, use_swiglu_ffn=size == "giant")
    theirs = getattr(transformers, f"{kind}Model")(config).eval()
    for x in theirs.parameters():
        torch.nn.init.normal_(x, std=0.2)
    file = dinov2_names(theirs.state_dict())
    ours.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(file, ours))
    x = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        expected = theirs(x, output_hidden_states=True)
    outputs, tokens = blocks_of(ours, x)
    for a, b in zip(
        [*outputs, tokens], [*expected.hidden_states[1:], expected.last_hidden_state], strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_post_norm_blocks_are_torchs_encoder_layers():
    """transformers' Data2VecVision is data2vec 1.0, with pre-norm blocks; torch's own layer has
    data2vec 2.0's form.
    """
    encoder = ReleasedViT(
        ViTShape(32, 8, DIM, DEPTH, HEADS, 4 * DIM, post_norm=True, final_norm=False)
    ).eval()
    names = {
        "attn.qkv.": "self_attn.in_proj_",
        "attn.proj": "self_attn.out_proj",
        "mlp.fc": "linear",
    }
    x = torch.randn(2, 17, DIM)
    for block in encoder.blocks:
        for parameter in block.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        layer = torch.nn.TransformerEncoderLayer(
            DIM,
            HEADS,
            4 * DIM,
            dropout=0,
            activation="gelu",
            layer_norm_eps=1e-6,
            batch_first=True,
            norm_first=False,
        ).eval()
        renamed = {}
        for key, value in block.state_dict().items():
            for old, new in names.items():
                key = key.replace(old, new)
            renamed[key] = value
        layer.load_state_dict(renamed)
        with torch.no_grad():
            x, expected = block(x), layer(x)
        torch.testing.assert_close(x, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", ["pre", "post"])
def test_released_files_give_the_official_numbers(form, golden, tmp_path):
    g = golden(f"hub_{form}norm_vit")
    tensors = {key.removeprefix("sd."): x for key, x in g.items() if key.startswith("sd.")}
    torch.save({"state_dict": tensors}, tmp_path / "file.th")
    check_golden(mr.load_encoder(tmp_path / "file.th", num_heads=3), g)


def check_golden(encoder, g):
    outputs, tokens = blocks_of(encoder, g["x"])
    for i, output in enumerate(outputs):
        assert (output - g[f"block{i}"]).abs().max() < 1e-5
    assert (tokens - g["tokens"]).abs().max() < 1e-5


def fairseq_file(g):
    """The official post-norm tensors under fairseq's names, with what else such a file holds."""
    image = "modality_encoders.IMAGE."
    names = {
        "patch_embed.proj": image + "local_encoder.proj",
        "cls_tokens.tokens": image + "extra_tokens",
        "pos_embed.embed": image + "fixed_positional_encoder.positions",
        "embed_norm": image + "context_encoder.norm",
    }
    tensors = {}
    for key, x in g.items():
        if key.startswith("sd."):
            key = key.removeprefix("sd.")
            for old, new in names.items():
                key = key.replace(old, new)
            tensors[key] = x.flatten(1, 2) if key.endswith("positions") else x
    rest = extra(image + "decoder.blocks.0.0.weight", image + "decoder.proj.weight")
    return tensors | rest | {"_ema": extra("blocks.0.norm1.weight")}


@pytest.mark.parametrize("prefix", ["", "model."])
def test_fairseq_layout_gives_the_official_numbers(prefix, golden, tmp_path):
    g = golden("hub_postnorm_vit")
    # Runs no code: tests/test_weights.py
    settings = {"args": argparse.Namespace(lr=0.1), "cfg": None}
    torch.save({**settings, "model": prefixed(prefix, fairseq_file(g))}, tmp_path / "file.pt")
    check_golden(mr.load_encoder(tmp_path / "file.pt", num_heads=3), g)


def test_positions_are_resized_as_the_official_code_does(golden, tmp_path):
    shape = ViTShape(32, 8, 48, 1, 3, 192)
    encoder = ReleasedViT(shape)
    x = torch.zeros(1, 3, 3, 48)  # patches, channels last
    grid = encoder.pos_embed.unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=(3, 3), mode="bicubic").flatten(2).mT
    torch.testing.assert_close(encoder._pos_embed(x)[:, 1:], expected)
    encoder.set_input_size(64)
    assert encoder.pos_embed.shape == (1, 64, 48)
    assert "pos_embed" in dict(encoder.named_buffers())


def test_positions_train_only_where_they_were_trained(tmp_path):
    torch.save({"model": plain_tensors()}, tmp_path / "mae.pth")
    torch.save(plain_tensors(), tmp_path / "dino.pth")
    for name, trained in (("mae", False), ("dino", True)):
        encoder = mr.load_encoder(tmp_path / f"{name}.pth", num_heads=HEADS)
        assert ("pos_embed" in dict(encoder.named_parameters())) == trained
        assert "pos_embed" in encoder.state_dict()


WRONG = [
    (
        {"model": plain_tensors() | extra("blocks.0.attn.rel_pos")},
        "MAE or dBOT without decoder.*unexpected blocks.0.attn.rel_pos",
    ),
    (
        {"embeddings.patch_embeddings.weight": torch.zeros(1)},
        "looks like a Hugging Face transformers ViT",
    ),
    ({"visual.conv1.weight": torch.zeros(1)}, "looks like an OpenCLIP model"),
    (
        {"state_dict": {"fc.weight": torch.zeros(1)}},
        "looks like no layout that is known, with keys state_dict, fc.weight",
    ),
    ({k: x for k, x in plain_tensors().items() if "fc2" not in k}, "missing blocks.0.mlp.fc2.bias"),
    (plain_tensors() | {"pos_embed": torch.zeros(1, 12, DIM)}, "a square grid"),
    (
        plain_tensors() | {"blocks.0.norm1.weight": torch.zeros(3)},
        "blocks.0.norm1.weight should be \\(48,\\), got \\(3,\\)",
    ),
]


@pytest.mark.parametrize(("file", "message"), WRONG)
def test_a_wrong_file_is_named(file, message, tmp_path):
    torch.save(file, tmp_path / "file.pth")
    with pytest.raises(mr.InputError, match=message):
        mr.load_encoder(tmp_path / "file.pth", num_heads=HEADS)


def test_heads_come_from_the_table_or_the_caller(tmp_path):
    torch.save(plain_tensors(), tmp_path / "file.pth")
    with pytest.raises(mr.InputError, match="no ViT of width 48 and 2 blocks; give num_heads="):
        mr.load_encoder(tmp_path / "file.pth")
    with pytest.raises(mr.InputError, match="width 48 is not divisible by num_heads=5"):
        mr.load_encoder(tmp_path / "file.pth", num_heads=5)


def test_layouts_have_their_own_names():
    assert len({layout.name for layout in LAYOUTS}) == len(LAYOUTS)
