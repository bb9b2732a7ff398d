"""Wrappers come off, heads stay behind, and other names become timm's."""

import logging

import pytest
import torch

import mimrefiner as mr
from mimrefiner.models.keys import by_timm_names, find_encoder

CONFIG = mr.ViTConfig(image_size=32, patch_size=8, dim=32, depth=2, num_heads=2)


@pytest.fixture(scope="module")
def state():
    """Weights of a small ViT by timm's names."""
    return {name: x.clone() for name, x in mr.build_vit(CONFIG).state_dict().items()}


def under(prefix, state):
    return {prefix + name: x for name, x in state.items()}


HEAD = {"weight": torch.zeros(10, 32), "bias": torch.zeros(10)}
WRONG = {name: torch.full((1,), 9.0) for name in ("a", "b")}


def other(state):
    return {name: x + 1 for name, x in state.items()}


def wrapped(state):
    """What training code of many projects writes: name -> (file, how many tensors are left out)."""
    head, projector = under("head.", HEAD), under("projector.0.", HEAD)
    return {
        "DDP": ({"model": under("module.", state)}, 0),
        "torch.compile": ({"state_dict": under("_orig_mod.", state)}, 0),
        "both": (under("module._orig_mod.", state), 0),
        "compiled blocks": (
            {k.replace("blocks.0.", "blocks.0._orig_mod."): x for k, x in state.items()},
            0,
        ),
        "Lightning": (
            {
                "epoch": 3,
                "pytorch-lightning_version": "2.0",
                "state_dict": under("model.", state) | under("criterion.", WRONG),
                "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}}],
                "hyper_parameters": {"lr": 0.1},
            },
            2,
        ),
        "encoder": (under("encoder.", state) | under("decoder.", WRONG), 2),
        "net": (under("net.", state), 0),
        "model.encoder": (under("model.encoder.", state) | under("model.decoder.", WRONG), 2),
        "solo-learn": (
            {
                "state_dict": under("backbone.", state)
                | under("momentum_backbone.", other(state))
                | under("classifier.", HEAD)
                | projector
            },
            len(state) + 4,
        ),
        "lightly DINO": (
            under("student_backbone.vit.", other(state))
            | under("teacher_backbone.vit.", state)
            | under("student_head.layers.", HEAD),
            len(state) + 2,
        ),
        "DINO": (
            {
                "student": under("module.backbone.", other(state)),
                "teacher": under("backbone.", state) | under("head.mlp.0.", HEAD),
            },
            2,
        ),
        "DINOv2's training": (
            {"model": under("student.backbone.", other(state)) | under("teacher.backbone.", state)},
            len(state),
        ),
        "timm with an average": ({"state_dict": other(state), "state_dict_ema": state}, 0),
        "fine-tuned": (state | head | under("fc.", HEAD) | under("head.1.", HEAD), 6),
        "NumPy": ({name: x.numpy() for name, x in state.items()}, 0),
    }


NAMES = tuple(wrapped({}))


@pytest.mark.parametrize("name", NAMES)
def test_wrappers_come_off_and_heads_stay_behind(name, state):
    file, left_out = wrapped(state)[name]
    for expected in ((), state.keys()):
        found = find_encoder(file, expected)
        assert found.tensors.keys() == state.keys()
        assert all(torch.equal(found.tensors[key], x) for key, x in state.items())
        assert sum(found.left_out.values()) == left_out


@pytest.mark.parametrize("name", NAMES)
def test_such_files_load_with_and_without_a_name(name, state, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    file, left_out = wrapped(state)[name]
    torch.save(file, tmp_path / "last.ckpt")
    encoder = mr.load_encoder(tmp_path / "last.ckpt", num_heads=2)
    plain = mr.build_vit(CONFIG)
    plain.load_state_dict(state)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(encoder(images), plain(images), atol=1e-5, rtol=1e-5)
    if left_out and name not in ("DINO",):  # a layout of its own, known before
        assert "left out:" in caplog.text


def test_what_stays_behind_is_counted(state):
    file, _ = wrapped(state)["solo-learn"]
    found = find_encoder(file)
    assert found.where == "backbone."
    assert found.left_out == {"momentum_backbone": len(state), "classifier": 2, "projector": 2}


def test_nothing_is_found_where_nothing_is():
    assert find_encoder({"epoch": 1, "state_dict": {"conv1.weight": torch.zeros(1)}}) is None


# ---- transformers


def transformers_4(state):
    """timm's names to those of transformers' ViT, as its files hold them."""
    names = {
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "pos_embed": "embeddings.position_embeddings",
        "cls_token": "embeddings.cls_token",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
        "blocks.": "encoder.layer.",
    }
    renamed = {}
    for key, x in state.items():
        if key.startswith("norm."):
            renamed["layer" + key] = x
            continue
        for old, new in names.items():
            key = key.replace(old, new)
        if "attn.qkv" not in key:
            renamed[key] = x
            continue
        for part, piece in zip(("query", "key", "value"), x.chunk(3), strict=True):
            renamed[key.replace("attn.qkv", f"attention.attention.{part}")] = piece.clone()
    return renamed


def transformers_5(state):
    """The same by the names of version 5's modules."""
    names = {
        "attention.attention.query": "attention.q_proj",
        "attention.attention.key": "attention.k_proj",
        "attention.attention.value": "attention.v_proj",
        "attention.output.dense": "attention.o_proj",
        "intermediate.dense": "mlp.fc1",
        ".output.dense": ".mlp.fc2",
        "encoder.layer.": "layers.",
    }
    renamed = {}
    for key, x in transformers_4(state).items():
        for old, new in names.items():
            key = key.replace(old, new)
        renamed[key] = x
    return renamed


@pytest.mark.parametrize("version", [transformers_4, transformers_5])
def test_transformers_names_become_timms(version, state):
    back = by_timm_names(version(state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], x) for name, x in state.items())


@pytest.mark.parametrize("kind", ["ViTModel", "ViTForImageClassification", "ViTMAEForPreTraining"])
def test_transformers_files_load(kind, state, tmp_path):
    file = transformers_4(state)
    if kind == "ViTModel":
        file |= under("pooler.dense.", HEAD)
    elif kind == "ViTForImageClassification":
        file = under("vit.", file) | under("classifier.", HEAD)
    else:
        decoder = {"decoder.mask_token": torch.zeros(1, 1, 16)}
        file = under("vit.", file) | under("decoder.decoder_embed.", HEAD) | decoder
    torch.save(file, tmp_path / "pytorch_model.bin")
    encoder = mr.load_encoder(tmp_path / "pytorch_model.bin", num_heads=2)
    plain = mr.build_vit(CONFIG)
    plain.load_state_dict(state)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(encoder(images), plain(images), atol=1e-5, rtol=1e-5)
    # MAE's positions are sines and cosines, which no training changes
    assert isinstance(encoder.pos_embed, torch.nn.Parameter) == (kind != "ViTMAEForPreTraining")
