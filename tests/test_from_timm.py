"""Encoders that timm builds, with the weights of a file or a folder."""

import json
import logging

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from test_keys import transformers_4

import mimrefiner as mr
from mimrefiner.__main__ import main
from mimrefiner.models.blocks import depth_of, pooled_blocks
from mimrefiner.models.encoders import eval_transform
from mimrefiner.models.weights import save_encoder


def random(name, **arguments):
    """A timm model whose weights all differ from those it begins with."""
    encoder = timm.create_model(name, num_classes=0, **arguments).eval()
    for x in encoder.parameters():
        torch.nn.init.normal_(x, std=0.1)
    return encoder


def written(folder, state, name="file.pth"):
    torch.save(state, folder / name)
    return folder / name


def same(one, other, size):
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        found, expected = (
            pooled_blocks(encoder, images, range(depth_of(encoder)), ("mean",))["mean"]
            for encoder in (one, other)
        )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["test_vit", "test_vit4", "test_convnext", "test_mambaout"])
def test_any_timm_model_takes_a_local_file(name, tmp_path):
    theirs = random(name)
    head = {"head.fc.weight": torch.zeros(5, 8), "fc.bias": torch.zeros(5)}
    state = {f"module.{key}": x for key, x in theirs.state_dict().items()}
    file = written(tmp_path, {"state_dict": state | head})
    size = theirs.pretrained_cfg["input_size"][-1]
    same(mr.load_encoder(name, file=file), theirs, size)
    again = mr.load_encoder(f"timm/{name}@{file}")
    same(again, theirs, size)
    for key in ("mean", "std", "crop_pct", "interpolation", "input_size"):
        assert again.pretrained_cfg[key] == theirs.pretrained_cfg[key]
    assert "state_dict" not in again.pretrained_cfg


@pytest.mark.parametrize("name", ["test_vit", "test_vit3"])
def test_a_model_of_another_size_keeps_the_size_of_its_file(name, tmp_path):
    theirs = random(name, img_size=64)
    encoder = mr.load_encoder(name, file=written(tmp_path, theirs.state_dict()))
    assert encoder.pretrained_cfg["input_size"] == (3, 64, 64)
    same(encoder, theirs, 64)


def test_positions_are_resized_as_the_official_codes_do(tmp_path):
    theirs = random("test_vit", img_size=160)
    patch, prefix = theirs.patch_embed.patch_size[0], theirs.num_prefix_tokens
    file = written(tmp_path, theirs.state_dict())
    encoder = mr.load_encoder("test_vit", file=file, image_size=4 * patch)
    grid = theirs.pos_embed[:, prefix:].unflatten(1, (160 // patch,) * 2).permute(0, 3, 1, 2)
    small = torch.nn.functional.interpolate(grid, (4, 4), mode="bicubic", antialias=False)
    expected = torch.cat([theirs.pos_embed[:, :prefix], small.flatten(2).mT], 1)
    torch.testing.assert_close(encoder.pos_embed, expected)
    by_file, direct = (mr.load_encoder("test_vit", file=file, image_size=n) for n in (None, 160))
    assert torch.equal(by_file.pos_embed, direct.pos_embed)


DINOV2 = {"embed_dim": 64, "depth": 2, "num_heads": 2, "img_size": 70}


def test_dinov2_needs_no_name(tmp_path, caplog):
    """timm's file and the original one, with and without registers and the gated MLP."""
    caplog.set_level(logging.INFO)
    for name in ("vit_small_patch14_dinov2", "vit_giant_patch14_dinov2"):
        more = {"mlp_ratio": 4.0} if "giant" in name else {}
        theirs = random(name, **DINOV2, **more)
        state = theirs.state_dict()
        original = {
            key.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3")
            if "giant" in name
            else key: x
            for key, x in state.items()
        } | {"mask_token": torch.zeros(1, 64)}
        teacher = {"teacher": {f"backbone.{key}": x for key, x in original.items()}}
        for held in (state, original, teacher):
            file = written(tmp_path, held)
            encoder = mr.load_encoder(file, num_heads=2)
            assert encoder.pretrained_cfg["mean"] == theirs.pretrained_cfg["mean"]
            assert encoder.pretrained_cfg["input_size"] == (3, 70, 70)
            same(encoder, theirs, 70)
        with pytest.raises(mr.InputError, match=r"DINOv2 has no model of width 64; give num_heads"):
            mr.load_encoder(file)
        save_encoder(encoder, tmp_path / "own.safetensors")
        same(mr.load_encoder(tmp_path / "own.safetensors"), theirs, 70)
    assert "holds a DINOv2 model of width 64" in caplog.text


def test_dinov2_with_registers_by_its_original_names(tmp_path):
    theirs = random("vit_small_patch14_reg4_dinov2", **DINOV2)
    state = theirs.state_dict()
    of_cls = torch.randn(1, 1, 64)
    original = {
        **{key: x for key, x in state.items() if key != "reg_token"},
        "register_tokens": state["reg_token"],
        "mask_token": torch.zeros(1, 64),
        "cls_token": state["cls_token"] - of_cls,
        "pos_embed": torch.cat([of_cls, state["pos_embed"]], 1),
    }
    for held in (state, original):
        encoder = mr.load_encoder(written(tmp_path, held), num_heads=2)
        assert encoder.num_prefix_tokens == 5
        same(encoder, theirs, 70)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("test_vit", {"blocks.0.attn.qkv.weight": None}, "does not fit timm's test_vit: .*Missing"),
        ("test_vit", {"blocks.9.norm1.weight": torch.zeros(3)}, "Unexpected key"),
        ("test_vit", {"norm.weight": torch.zeros(3)}, "size mismatch for norm.weight"),
        ("test_vit", {"patch_embed.proj.weight": torch.zeros(64, 3, 8, 8)}, "its patches are"),
        ("test_convnext", {"stages.0.blocks.0.norm.weight": None}, "Missing key"),
    ],
)
def test_weights_that_do_not_fit_are_one_line(name, change, message, tmp_path):
    """None of them stays random without a word."""
    state = dict(random(name).state_dict()) | change
    file = written(tmp_path, {key: x for key, x in state.items() if x is not None})
    with pytest.raises(mr.InputError, match=message) as said:
        mr.load_encoder(name, file=file)
    assert "\n" not in str(said.value)


def test_npz_files_load_by_timms_own_reader(tmp_path):
    np.savez(tmp_path / "weights.npz", embedding=np.zeros(2))
    with pytest.raises(mr.InputError, match="does not fit timm's vit_tiny_patch16_224"):
        mr.load_encoder("vit_tiny_patch16_224", file=tmp_path / "weights.npz")


# ---- folders


def timm_folder(folder, theirs, name, **config):
    folder.mkdir()
    tensors = {key: x.contiguous() for key, x in theirs.state_dict().items()}
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": name, **config}), "utf-8")
    return folder


def test_a_callers_own_model_is_saved_with_its_sizes(tmp_path):
    sizes = {"img_size": 64, "depth": 2, "embed_dim": 96, "num_heads": 2}
    theirs = random("vit_tiny_patch16_224", **sizes)
    save_encoder(theirs, tmp_path / "own.safetensors")
    same(mr.load_encoder(tmp_path / "own.safetensors"), theirs, 64)


def test_a_folder_as_timm_writes_it(tmp_path):
    theirs = random("test_vit", img_size=64, depth=2)
    settings = {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1], "crop_pct": 1.0, "unknown": 3}
    settings |= {"input_size": [3, 64, 64], "num_classes": 7}
    more = {"pretrained_cfg": settings, "model_args": {"img_size": 64, "depth": 2}}
    folder = timm_folder(tmp_path / "model", theirs, "test_vit", **more)
    for source in (folder, f"local-dir:{folder}", str(folder), folder / "model.safetensors"):
        encoder = mr.load_encoder(source)
        same(encoder, theirs, 64)
        assert tuple(encoder.pretrained_cfg["mean"]) == (0.1, 0.2, 0.3)
        assert tuple(encoder.pretrained_cfg["input_size"]) == (3, 64, 64)
    save_encoder(encoder, tmp_path / "own.safetensors")
    same(mr.load_encoder(tmp_path / "own.safetensors"), theirs, 64)
    assert depth_of(mr.load_encoder(folder, pretrained=False)) == 2


def test_a_folder_as_transformers_writes_it(tmp_path):
    """Heads and positions come from config.json, mean and crop from preprocessor_config.json."""
    vit = mr.build_vit(mr.ViTConfig(dim=32, depth=2, num_heads=4))
    folder = tmp_path / "vit"
    folder.mkdir()
    safetensors.torch.save_file(transformers_4(vit.state_dict()), folder / "model.safetensors")
    config = {"model_type": "vit", "num_attention_heads": 4, "architectures": ["ViTModel"]}
    processor = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "resample": 2}
    processor |= {"do_normalize": True, "size": {"height": 224, "width": 224}}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    (folder / "preprocessor_config.json").write_text(json.dumps(processor), "utf-8")
    encoder = mr.load_encoder(folder)
    same(encoder, vit, 32)
    assert encoder.blocks[0].attn.num_heads == 4
    cfg = encoder.pretrained_cfg
    assert cfg["mean"] == (0.5, 0.5, 0.5) and cfg["std"] == (0.25, 0.25, 0.25)
    assert cfg["interpolation"] == "bilinear" and cfg["crop_mode"] == "squash"
    processor |= {"do_center_crop": True, "size": {"shortest_edge": 256}}
    processor |= {"crop_size": {"height": 224, "width": 224}, "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor), "utf-8")
    cfg = mr.load_encoder(folder).pretrained_cfg
    assert cfg["interpolation"] == "bicubic" and cfg["crop_pct"] == 0.875


def test_folders_that_lack_something_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(mr.InputError, match="has no config"):
        mr.load_encoder(tmp_path / "empty")
    for name, text, message in (
        ("broken", "{", "is no JSON"),
        ("list", "[]", "expected a dictionary, got list"),
        ("other", '{"model_type": "bert"}', "holds transformers' 'bert': of transformers' models"),
        ("unknown", '{"architecture": "no_such_net"}', "expected an architecture of timm's, got"),
        ("bare", '{"architecture": "test_vit"}', "expected one file of weights such as"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text, "utf-8")
        with pytest.raises(mr.InputError, match=message):
            mr.load_encoder(tmp_path / name)
    (tmp_path / "bare" / "model.safetensors.index.json").write_text("{}", "utf-8")
    with pytest.raises(mr.InputError, match="weights in several parts"):
        mr.load_encoder(tmp_path / "bare")
    with pytest.raises(mr.InputError, match="is no folder: expected one with"):
        mr.load_encoder(f"local-dir:{tmp_path / 'nowhere'}")


# ---- how images are prepared


def test_a_timm_file_is_prepared_like_its_model(tmp_path, caplog):
    """vit_tiny_patch16_224 has mean 0.5 and crop 0.9, where a file alone says nothing."""
    theirs = random("vit_tiny_patch16_224", img_size=32, depth=2)
    theirs.pretrained_cfg["architecture"] = "vit_tiny_patch16_224"
    file = written(tmp_path, theirs.state_dict())
    alone = mr.load_encoder(file, num_heads=3)
    assert alone.pretrained_cfg["mean"] == (0.485, 0.456, 0.406)
    assert "does not say how its images are prepared: assumed are ImageNet's" in caplog.text
    caplog.clear()
    like = mr.load_encoder(file, num_heads=3, like="vit_tiny_patch16_224")
    assert like.pretrained_cfg["mean"] == (0.5, 0.5, 0.5) and like.pretrained_cfg["crop_pct"] == 0.9
    assert not caplog.records
    image = Image.new("RGB", (32, 32), (128, 0, 255))
    white = eval_transform(like)(image)[2]
    torch.testing.assert_close(white, torch.ones_like(white))  # (1 - 0.5) / 0.5
    with pytest.raises(mr.InputError, match="must be a timm model name, got 'nothing_like_it'"):
        mr.load_encoder(file, num_heads=3, like="nothing_like_it")
    with pytest.raises(mr.InputError, match="timm has no weights"):
        mr.load_encoder(file, num_heads=3, like="vit_tiny_patch16_224.no_tag")


def test_names_are_read_as_people_write_them(tmp_path, monkeypatch):
    plain = mr.load_encoder("timm/test_vit", pretrained=False)
    assert plain.pretrained_cfg["architecture"] == "test_vit"
    for name, message in (
        ("timm/no_such_net", "could not load hf-hub:timm/no_such_net"),
        ("hf_hub:nobody/nothing", "could not load hf_hub:nobody/nothing"),
        (
            "test_vit.no_tag",
            "timm has no weights 'test_vit.no_tag'; of test_vit it has test_vit.r160",
        ),
        ("no_such_net@file.pth", "unknown model 'no_such_net'"),
        ("runs/e@mail.pth", "runs/e@mail.pth does not exist"),
    ):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(mr.InputError, match=message):
            mr.load_encoder(name)
    with pytest.raises(mr.InputError, match=r"test_vit has \d attention heads, got num_heads=5"):
        mr.load_encoder("test_vit", pretrained=False, num_heads=5)
    with pytest.raises(mr.InputError, match="does not exist or is no file: expected weights of"):
        mr.load_encoder("test_vit", file=tmp_path / "none.pth")


def test_a_size_that_a_network_does_not_take_is_said():
    with pytest.raises(mr.InputError, match=r"Levit\w* does not take images of 100 px"):
        mr.load_encoder("levit_128s", pretrained=False, image_size=100)


# ---- the command line


def test_commands_take_heads_and_like(tmp_path, capsys):
    theirs = mr.build_vit(mr.ViTConfig(dim=32, depth=2, num_heads=2))
    file = written(tmp_path, theirs.state_dict())
    probe = ["probe", str(file), "digits", "--no-baselines", "--blocks", "1", "--out"]
    assert main([*probe, str(tmp_path / "a")]) == 2
    assert "give num_heads= (--num-heads)" in capsys.readouterr().err
    more = ["--num-heads", "2", "--like", "vit_tiny_patch16_224"]
    assert main([*probe, str(tmp_path / "a"), *more]) == 0
    assert "file.pth on digits" in capsys.readouterr().out
    assert main([*probe, str(tmp_path / "a"), "--resume", "--num-heads", "2"]) == 2
    assert "transform" in capsys.readouterr().err
    assert main(["plan", str(file), "1000", "--preset", "smoke"]) == 2
    assert "(--num-heads)" in capsys.readouterr().err
    assert main(["plan", str(file), "1000", "--preset", "smoke", "--num-heads", "2"]) == 0
    assert "M parameters" in capsys.readouterr().out
