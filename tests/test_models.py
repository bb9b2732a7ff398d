import shutil
import subprocess
import sys

import pytest
import safetensors.torch
import torch

import mimrefiner as mr
from mimrefiner.checkpoint import atomic_file, save_encoder, sha256_of


def test_save_and_load_give_the_same_encoder(vit, tmp_path):
    save_encoder(vit, tmp_path / "encoder.safetensors")
    again = mr.load_encoder(tmp_path / "encoder.safetensors")
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(vit(x), again(x))
    assert sha256_of(vit) == sha256_of(again)
    assert not again.training
    for key in ("mean", "std", "input_size", "interpolation", "crop_pct"):
        assert vit.pretrained_cfg[key] == again.pretrained_cfg[key] or tuple(again.pretrained_cfg[key]) == vit.pretrained_cfg[key]


def test_timm_names_save_and_load_too(tmp_path):
    encoder = mr.load_encoder("test_vit", pretrained=False)
    save_encoder(encoder, tmp_path / "e.safetensors")
    again = mr.load_encoder(tmp_path / "e.safetensors")
    x = torch.randn(1, 3, *encoder.pretrained_cfg["input_size"][1:])
    assert torch.equal(encoder(x), again(x))


def test_packaged_checkpoint_loads():
    encoder = mr.load_encoder("simmim_digits")
    assert len(encoder.blocks) == 12
    assert encoder.pretrained_cfg["input_size"] == (3, 32, 32)


def test_other_image_sizes_work(vit):
    assert vit(torch.randn(1, 3, 16, 16)).shape == vit(torch.randn(1, 3, 32, 32)).shape
    bigger = mr.load_encoder("simmim_digits", image_size=64)
    assert bigger.patch_embed.grid_size == (8, 8)
    assert bigger.pretrained_cfg["input_size"] == (3, 64, 64)


def test_random_weights_follow_the_seed():
    config = mr.ViTConfig(dim=32, depth=1, num_heads=2)
    state = torch.random.get_rng_state()
    one, same, other = (mr.build_vit(config, seed=seed) for seed in (1, 1, 2))
    assert sha256_of(one) == sha256_of(same) != sha256_of(other)
    assert torch.equal(state, torch.random.get_rng_state())


def test_bad_input_is_named(tmp_path):
    with pytest.raises(mr.InputError, match="unknown model 'vit_huge_patch3'"):
        mr.load_encoder("vit_huge_patch3")
    with pytest.raises(mr.InputError, match="does not exist"):
        mr.load_encoder(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"12345678")
    with pytest.raises(mr.InputError, match="damaged or no safetensors file"):
        mr.load_encoder(tmp_path / "bad.safetensors")
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(mr.InputError, match="looks like no layout that is known"):
        mr.load_encoder(tmp_path / "other.safetensors")
    with pytest.raises(mr.InputError, match="image size 30 is not divisible by the patch size 8"):
        mr.load_encoder("simmim_digits", image_size=30)
    with pytest.raises(mr.InputError, match="image size 30 is not divisible by the patch size 8"):
        mr.ViTConfig(image_size=30)


def test_no_network_is_said(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("timm.create_model", refuse)
    with pytest.raises(mr.InputError, match="without a network use pretrained=False"):
        mr.load_encoder("vit_base_patch16_224.mae")


def test_a_file_is_whole_or_absent(tmp_path):
    def write_half():
        with atomic_file(tmp_path / "x.txt") as temporary:
            temporary.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk"):
        write_half()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "x.txt").write_text("old")
    with pytest.raises(OSError, match="disk"):
        write_half()
    assert (tmp_path / "x.txt").read_text() == "old"


@pytest.mark.parametrize("fails", [False, True])
def test_torchvision_schemas_are_declared_only_where_the_plain_import_fails(tmp_path, fails):
    """A stand-in torchvision: the first import succeeds (as beside a CUDA torch), or fails as beside a CPU-only one."""
    (tmp_path / "torchvision").mkdir()
    body = "import torch\ntorch.library.register_fake('torchvision::nms')(lambda a, b, c: a)\n" if fails else ""
    (tmp_path / "torchvision" / "__init__.py").write_text(body)
    shutil.copy(mr._torchvision.__file__, tmp_path / "shim.py")
    code = "import shim; print(shim._schemas is not None)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == str(fails), done.stderr
