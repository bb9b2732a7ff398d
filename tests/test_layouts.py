import argparse
import collections
import os
import pickle

import pytest
import timm
import torch

import mimrefiner as mr
from mimrefiner.layouts import PlainViT, load_published, read_tensors


@pytest.fixture(params=["hub_prenorm_vit", "hub_postnorm_vit"])
def official(request, golden):
    tensors = golden(request.param)
    state = {name[3:]: value for name, value in tensors.items() if name.startswith("sd.")}
    return request.param, tensors, state


def largest_errors(encoder, tensors):
    with torch.no_grad():
        found = encoder.forward_intermediates(tensors["x"], return_prefix_tokens=True, intermediates_only=True, output_fmt="NLC")
    tokens = [torch.cat([prefix, patches], 1) for patches, prefix in found]
    return [(x - tensors[f"block{i}"]).abs().max().item() for i, x in enumerate(tokens)]


def test_hub_files_equal_the_official_numbers_block_by_block(official, tmp_path):
    _, tensors, state = official
    torch.save({"state_dict": state}, tmp_path / "refined.th")
    encoder = mr.load_encoder(tmp_path / "refined.th", num_heads=3)
    assert max(largest_errors(encoder, tensors)) < 1e-5
    with torch.no_grad():
        assert torch.allclose(encoder.forward_features(tensors["x"]), tensors["tokens"], atol=1e-5)


def fairseq(state):
    """The golden post-norm tensors under the names fairseq gives them, with decoder and moving average beside them."""
    names = {
        "patch_embed.": "modality_encoders.IMAGE.local_encoder.", "cls_tokens.tokens": "modality_encoders.IMAGE.extra_tokens",
        "embed_norm.": "modality_encoders.IMAGE.context_encoder.norm.",
    }  # fmt: skip
    out = {"modality_encoders.IMAGE.fixed_positional_encoder.positions": state["pos_embed.embed"].flatten(1, 2)}
    for name, value in state.items():
        for old, new in names.items():
            name = name.replace(old, new)
        if name != "pos_embed.embed":
            out[name] = value
    return out | {
        "modality_encoders.IMAGE.decoder.blocks.0.0.weight": torch.zeros(3),
        "_ema.blocks.0.norm1.weight": torch.zeros(48),
    }


@pytest.mark.parametrize("prefix", ["", "model."])
def test_fairseq_files_equal_the_official_post_norm_numbers(golden, tmp_path, prefix):
    tensors = golden("hub_postnorm_vit")
    state = fairseq({name[3:]: value for name, value in tensors.items() if name.startswith("sd.")})
    content = {"model": {prefix + name: value for name, value in state.items()}, "args": argparse.Namespace(lr=1)}
    torch.save(content, tmp_path / "d2v2.pt")
    encoder = mr.load_encoder(tmp_path / "d2v2.pt", num_heads=3)
    assert max(largest_errors(encoder, tensors)) < 1e-5


VIT = PlainViT(image_size=32, patch_size=8, dim=48, depth=2, num_heads=3)
NO_CLS = PlainViT(image_size=32, patch_size=8, dim=48, depth=2, num_heads=3, cls_token=False, cls_position=False)


@pytest.mark.parametrize(
    ("spec", "wrap"),
    [
        (VIT, lambda s: {"model": s | {"mask_token": torch.zeros(1, 1, 16), "decoder_blocks.0.norm1.weight": torch.zeros(16)}}),
        (VIT, lambda s: {"teacher": {f"backbone.{k}": v for k, v in s.items()} | {"head.mlp.0.weight": torch.zeros(4, 4)}}),
        (VIT, lambda s: {"state_dict": {f"module.backbone.{k}": v for k, v in s.items()}}),
        (VIT, lambda s: {f"backbone.{k}": v for k, v in s.items()} | {"relation_blocks.0.weight": torch.zeros(2)}),
        (NO_CLS, lambda s: {"target_encoder": {f"module.{k}": v for k, v in s.items()}, "epoch": 3}),
    ],
    ids=["MAE", "iBOT", "DINO", "Mugs", "I-JEPA"],
)
def test_relatives_of_mae_round_trip(tmp_path, spec, wrap):
    original = spec.build()
    torch.save(wrap(original.state_dict()), tmp_path / "file.pth")
    encoder = mr.load_encoder(tmp_path / "file.pth", num_heads=3)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(encoder.forward_features(images), original.forward_features(images))


def test_mae_agrees_with_timm(tmp_path):
    original = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
    torch.save({"model": original.state_dict()}, tmp_path / "mae.pth")
    encoder = mr.load_encoder(tmp_path / "mae.pth")  # heads from the published size
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.allclose(encoder.forward_features(images), original.forward_features(images), atol=1e-5)


@pytest.mark.parametrize("size", [96, 98])
def test_other_image_sizes_work(tmp_path, size):
    patch = 16 if size == 96 else 14
    spec = PlainViT(image_size=14 * patch, patch_size=patch, dim=48, depth=2, num_heads=3, cls_position=False, post_norm=True)
    encoder = spec.build()
    assert encoder(torch.randn(1, 3, size, size)).shape == (1, 48)


def test_own_files_keep_post_norm_and_missing_cls(tmp_path):
    for spec in (NO_CLS, PlainViT(32, 8, 48, 2, 3, cls_position=False, post_norm=True)):
        encoder = spec.build()
        mr.checkpoint.save_encoder(encoder, tmp_path / "own.safetensors")
        again = mr.load_encoder(tmp_path / "own.safetensors")
        images = torch.randn(1, 3, 32, 32)
        with torch.no_grad():
            assert torch.equal(again.forward_features(images), encoder.forward_features(images))


@pytest.mark.parametrize(
    "spec", [NO_CLS, PlainViT(32, 8, 48, 3, 3, cls_position=False, post_norm=True)], ids=["no cls", "post-norm"]
)
def test_heads_attach_to_every_kind(spec, digits):
    smoke = mr.load_preset("smoke").refine
    config = mr.RefineConfig(
        **{**smoke.__dict__, "pool": "cls" if spec.cls_token else "mean", "refine_epochs": 0.5, "heads_epochs": 0.5}
    )
    result = mr.refine(spec.build(), digits["train"].take(64), config)
    assert torch.isfinite(torch.tensor(result.history["loss"].to_numpy())).all()


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_file_that_would_run_code_is_refused(tmp_path):
    torch.save({"model": VIT.build().state_dict(), "args": Attack(str(tmp_path / "harm"))}, tmp_path / "evil.pth")
    with pytest.raises(mr.InputError, match="is not loaded, as it might run code"):
        mr.load_encoder(tmp_path / "evil.pth")
    with (tmp_path / "evil2.pth").open("wb") as file:
        pickle.dump(Attack(str(tmp_path / "harm")), file, protocol=2)
    with pytest.raises(mr.InputError):
        mr.load_encoder(tmp_path / "evil2.pth")
    assert not (tmp_path / "harm").exists()


def test_wrong_files_name_what_does_not_fit(tmp_path):
    state = VIT.build().state_dict()
    del state["blocks.1.mlp.fc2.bias"]
    state["surprise"] = torch.zeros(1)
    torch.save({"model": state}, tmp_path / "part.pth")
    with pytest.raises(
        mr.InputError, match=r"looks like MAE and its relatives.*missing blocks\.1\.mlp\.fc2\.bias.*addition surprise"
    ):
        mr.load_encoder(tmp_path / "part.pth", num_heads=3)
    with pytest.raises(mr.InputError, match="width 48 and depth 2 is no published size: give num_heads"):
        mr.load_encoder(tmp_path / "part.pth")
    torch.save(collections.OrderedDict(conv=torch.zeros(2)), tmp_path / "cnn.pth")
    with pytest.raises(mr.InputError, match=r"of no known layout .* its keys begin with conv"):
        mr.load_encoder(tmp_path / "cnn.pth")
    torch.save({"optimizer": {}, "epoch": 3}, tmp_path / "none.pth")
    with pytest.raises(mr.InputError, match="holds no model: it has optimizer, epoch"):
        mr.load_encoder(tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    with pytest.raises(mr.InputError):
        mr.load_encoder(tmp_path / "text.pth")


def test_settings_objects_are_loaded_as_nothing(tmp_path):
    torch.save({"cfg": argparse.Namespace(a=1), "model": {"w": torch.ones(2)}}, tmp_path / "f.pt")
    assert read_tensors(tmp_path / "f.pt")["w"].tolist() == [1, 1]
    assert load_published.__doc__
