import json

import pytest
import timm
import torch

import mimrefiner as mr
from mimrefiner.__main__ import main
from mimrefiner.models.encoders import released_encoder
from mimrefiner.models.export import export
from mimrefiner.models.layouts import ReleasedViT, ViTShape
from mimrefiner.models.weights import save_encoder

SHAPES = {
    "cls": ViTShape(32, 8, 48, 2, 3, 192),
    "no_cls": ViTShape(32, 8, 48, 2, 3, 96, cls_token=False),
    "no_final_norm": ViTShape(28, 14, 32, 2, 2, 128, final_norm=False),
}


def released(shape):
    return released_encoder(ReleasedViT(shape))


@pytest.mark.parametrize("name", [*SHAPES, "own"])
def test_timm_builds_the_same_model(name, vit, tmp_path):
    encoder = vit if name == "own" else released(SHAPES[name])
    export(encoder, tmp_path / "e.safetensors")
    written = json.loads((tmp_path / "e.json").read_text())
    overlay = {**written["pretrained_cfg"], "file": str(tmp_path / "e.safetensors")}
    again = timm.create_model(
        written["architecture"],
        pretrained=True,
        pretrained_cfg_overlay=overlay,
        **written["model_args"],
    ).eval()
    x = torch.randn(2, 3, *encoder.pretrained_cfg["input_size"][1:])
    torch.testing.assert_close(
        again.forward_features(x), encoder.forward_features(x), atol=1e-6, rtol=1e-5
    )
    assert tuple(again.pretrained_cfg["mean"]) == tuple(encoder.pretrained_cfg["mean"])


@pytest.mark.parametrize("post_norm", [False, True])
def test_the_hub_layout_round_trips(post_norm, tmp_path):
    encoder = released(
        ViTShape(32, 8, 48, 2, 3, 192, post_norm=post_norm, final_norm=not post_norm)
    )
    export(encoder, tmp_path / "e.th", "hub")
    file = torch.load(tmp_path / "e.th", weights_only=True)["state_dict"]
    assert file["pos_embed.embed"].shape == (1, 4, 4, 48)
    again = mr.load_encoder(tmp_path / "e.th", num_heads=3)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(again.forward_features(x), encoder.forward_features(x))


def test_own_files_of_released_models_round_trip(tmp_path):
    encoder = released(ViTShape(28, 14, 32, 2, 2, 64, post_norm=True, final_norm=False))
    encoder.set_input_size(42)
    save_encoder(encoder, tmp_path / "e.safetensors")
    again = mr.load_encoder(tmp_path / "e.safetensors")
    x = torch.randn(2, 3, 42, 42)
    assert torch.equal(again(x), encoder(x))
    assert again.pretrained_cfg["crop_pct"] == 0.875


def test_what_can_not_be_exported_is_said(tmp_path, capsys):
    post = released(ViTShape(28, 14, 32, 1, 2, 64, post_norm=True, final_norm=False))
    with pytest.raises(mr.InputError, match=r"load this model with mimrefiner\.load_encoder"):
        export(post, tmp_path / "e.safetensors")
    registers = mr.load_encoder("test_vit2", pretrained=False)
    with pytest.raises(mr.InputError, match="only plain ViTs can be exported"):
        export(registers, tmp_path / "e.safetensors")
    assert main(["export", "simmim_digits", "--to", str(tmp_path / "e.x"), "--format", "onnx"]) == 2
    assert "unknown format 'onnx'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert main(["export", "simmim_digits", "--to", str(tmp_path / "e.safetensors")]) == 0


@pytest.mark.parametrize(
    ("format", "name", "message"),
    [
        ("timm", "e.json", r"a file that ends in \.safetensors, got"),
        ("timm", "folder", r"a file that ends in \.safetensors, got"),
        ("hub", "e.safetensors", r"ends in \.th or \.pth or \.pt, got"),
        ("mimrefiner", "e.th", r"ends in \.safetensors, got"),
    ],
)
def test_a_file_has_the_suffix_of_its_format(vit, tmp_path, format, name, message):
    with pytest.raises(mr.InputError, match=message):
        export(vit, tmp_path / name, format)
    assert list(tmp_path.iterdir()) == []


def test_a_file_for_timm_keeps_its_normalisation(tmp_path):
    vit = mr.build_vit(mr.ViTConfig(dim=32, depth=3, num_heads=2), mean=(0.1, 0.2, 0.3))
    vit.pretrained_cfg["interpolation"] = "bilinear"
    export(vit, tmp_path / "e.safetensors")
    again = mr.load_encoder(tmp_path / "e.safetensors", num_heads=2).pretrained_cfg
    for key in ("mean", "std", "interpolation", "crop_pct", "input_size"):
        expected = vit.pretrained_cfg[key]
        assert again[key] == expected or tuple(again[key]) == expected


def test_half_precision_makes_the_packaged_file(vit, tmp_path, capsys):
    save_encoder(vit, tmp_path / "full.safetensors")
    asked = [
        "export",
        str(tmp_path / "full.safetensors"),
        "--to",
        str(tmp_path / "half.safetensors"),
        "--format",
        "mimrefiner",
    ]
    assert main([*asked, "--dtype", "float16"]) == 0
    assert "mimrefiner.load_encoder('half.safetensors')" in capsys.readouterr().out
    assert (tmp_path / "half.safetensors").stat().st_size < 0.6 * (
        tmp_path / "full.safetensors"
    ).stat().st_size
    half = mr.load_encoder(tmp_path / "half.safetensors").state_dict()
    for name, x in vit.state_dict().items():
        torch.testing.assert_close(half[name].float(), x.half().float(), rtol=0, atol=0)
    assert main([*asked, "--dtype", "float8"]) == 2
    assert (
        "unknown dtype 'float8': choose one of float32, bfloat16, float16"
        in capsys.readouterr().err
    )
