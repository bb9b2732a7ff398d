import hashlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

import mimrefiner as mr
from mimrefiner.__main__ import main
from mimrefiner.config import Crop, Views, ViTConfig
from mimrefiner.files import ASSETS, atomic_file
from mimrefiner.method.refiner import MIMRefiner
from mimrefiner.models.catalogue import CATALOGUE, PACKAGED, table
from mimrefiner.models.encoders import random_twin, released_encoder, row_shape
from mimrefiner.models.layouts import ReleasedViT, ViTShape
from mimrefiner.models.weights import read_encoder_file, save_encoder, sha256_of, vit_config


def test_save_and_load_give_the_same_encoder(vit, tmp_path):
    save_encoder(vit, tmp_path / "encoder.safetensors")
    again = mr.load_encoder(tmp_path / "encoder.safetensors")
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(vit(x), again(x))
    assert sha256_of(vit) == sha256_of(again)
    assert not again.training
    for key in ("mean", "std", "input_size", "interpolation", "crop_pct"):
        assert (
            vit.pretrained_cfg[key] == again.pretrained_cfg[key]
            or tuple(again.pretrained_cfg[key]) == vit.pretrained_cfg[key]
        )


def test_timm_names_save_and_load_too(tmp_path):
    encoder = mr.load_encoder("test_vit", pretrained=False)
    save_encoder(encoder, tmp_path / "e.safetensors")
    again = mr.load_encoder(tmp_path / "e.safetensors")
    x = torch.randn(1, 3, *encoder.pretrained_cfg["input_size"][1:])
    assert torch.equal(encoder(x), again(x))


@pytest.mark.parametrize(
    "row", [row for row in CATALOGUE if row.verified == PACKAGED], ids=lambda row: row.name
)
def test_packaged_checkpoints_are_what_the_table_says(row):
    encoder, file = mr.load_encoder(row.name), ASSETS / f"{row.name}.safetensors"
    assert hashlib.sha256(file.read_bytes()).hexdigest() == row.sha256
    assert row.sha256[:8] in table()
    shape = ViTConfig(row.image_size, row.patch, row.dim, row.depth, row.heads)
    assert vit_config(encoder) == shape
    assert encoder.pretrained_cfg["input_size"] == (3, row.image_size, row.image_size)
    plain = timm.models.VisionTransformer(
        row.image_size, row.patch, num_classes=0, embed_dim=row.dim, num_heads=row.heads
    ).eval()
    plain.load_state_dict(
        {name: x.float() for name, x in safetensors.torch.load_file(file).items()}
    )
    x = torch.randn(2, 3, row.image_size, row.image_size)
    torch.testing.assert_close(encoder(x), plain(x))


def test_every_packaged_checkpoint_is_a_row():
    assert {row.name for row in CATALOGUE if row.verified == PACKAGED} == {
        file.stem for file in ASSETS.glob("*.safetensors")
    }


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


@pytest.mark.parametrize("seed", [0, 3])
def test_a_random_twin_of_an_own_vit_is_what_its_training_began_with(vit, seed):
    """So that every untrained encoder of one seed is the same one, whoever asks for it."""
    trained = mr.build_vit(vit_config(vit), seed=9, mean=(0.1, 0.2, 0.3))
    start = mr.build_vit(vit_config(vit), seed=seed)
    state = torch.random.get_rng_state()
    twin = random_twin(trained, seed)
    assert sha256_of(twin) == sha256_of(start) != sha256_of(trained)
    assert twin.pretrained_cfg == trained.pretrained_cfg
    assert not twin.training and torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("name", ["test_vit", "convnext_atto", "hiera_tiny_224", "released"])
def test_a_random_twin_knows_nothing_of_the_model(name):
    if name == "released":
        encoder = released_encoder(ReleasedViT(ViTShape(28, 14, 32, 2, 2, 64, post_norm=True)))
    else:
        encoder = timm.create_model(name, num_classes=0)
    twin = random_twin(encoder)
    with torch.no_grad():
        for x in encoder.parameters():
            x += torch.rand_like(x)
    assert sha256_of(random_twin(encoder)) == sha256_of(twin) != sha256_of(random_twin(encoder, 1))


def test_a_random_twin_keeps_positions_that_no_training_made():
    shapes = [ViTShape(28, 14, 32, 1, 2, 64, fixed_positions=fixed) for fixed in (True, False)]
    for shape in shapes:
        encoder = released_encoder(ReleasedViT(shape))
        same = torch.equal(random_twin(encoder).pos_embed, encoder.pos_embed)
        assert same == shape.fixed_positions


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
    for size in (0, -8, 32.0):
        with pytest.raises(
            mr.InputError, match=f"image_size must be a whole number >= 1, got {size}"
        ):
            mr.load_encoder("test_vit", image_size=size, pretrained=False)
    with pytest.raises(mr.InputError, match="image size 30 is not divisible by the patch size 8"):
        mr.load_encoder("simmim_digits", image_size=30)
    with pytest.raises(mr.InputError, match="image size 30 is not divisible by the patch size 8"):
        mr.ViTConfig(image_size=30)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda tensors, metadata: tensors.pop("norm.weight"),
            r"norm\.weight should be \(32,\), got None",
        ),
        (
            lambda tensors, metadata: tensors.update(more=torch.zeros(2)),
            r"more should be None, got \(2,\)",
        ),
        (
            lambda tensors, metadata: tensors.update({"norm.bias": torch.zeros(8)}),
            r"norm\.bias should be \(32,\), got \(8,\)",
        ),
        (lambda tensors, metadata: metadata.pop("data"), "its metadata do not say what it holds"),
        (
            lambda tensors, metadata: metadata.update(vit="{}x"),
            "its metadata do not say what it holds",
        ),
        (
            lambda tensors, metadata: metadata.update(vit='{"width": 3}'),
            "its metadata do not say what it holds",
        ),
    ],
)
def test_damaged_files_of_the_package_are_named(vit, tmp_path, damage, message):
    path = tmp_path / "e.safetensors"
    save_encoder(vit, path)
    tensors, metadata = read_encoder_file(path)
    damage(tensors, metadata)
    safetensors.torch.save_file(tensors, path, metadata)
    with pytest.raises(mr.InputError, match=rf"e\.safetensors is damaged: {message}"):
        mr.load_encoder(path)


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


def test_the_table_is_printed_with_licences(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["models"]) == 0
    text = capsys.readouterr().out
    assert max(len(line) for line in text.splitlines()) <= 100
    sections = text.split("\n\n")[1:]
    for row in CATALOGUE:
        (section,) = (s for s in sections if f"\n  {row.name} " in s)  # once
        assert section.startswith(f"{row.family}: licence {row.licence}, {row.page}\n")
        assert row.verified in " ".join(section.split())
        assert (row.paper or "not in it") in " ".join(section.split())
    assert all(row.url or row.verified == PACKAGED or timm.is_model(row.name) for row in CATALOGUE)


def local_crop(encoder):
    """The smaller of the recipe's crops that the patch size divides, without memory or work."""
    patch = getattr(getattr(encoder, "patch_embed", None), "patch_size", (16,))[0]
    size = 98 if patch == 14 else 96
    with torch.no_grad():
        return encoder.to("meta")(torch.empty(2, 3, size, size, device="meta"))


@pytest.mark.parametrize(
    "name", [row.name for row in CATALOGUE if not row.dim and row.family != "Hiera"]
)
def test_every_timm_name_of_the_table_is_built_and_takes_local_crops(name):
    with torch.device("meta"):
        encoder = mr.load_encoder(name, pretrained=False)
    assert local_crop(encoder).shape == (2, encoder.num_features)


def test_every_plain_vit_of_the_table_takes_local_crops():
    for shape in {replace(row_shape(row), depth=1) for row in CATALOGUE if row.dim}:
        with torch.device("meta"):
            encoder = ReleasedViT(shape)
        assert local_crop(encoder).shape == (2, shape.dim)
        assert encoder(
            torch.empty(1, 3, shape.image_size, shape.image_size, device="meta")
        ).shape == (1, shape.dim)


def test_a_missing_file_is_no_timm_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(mr.InputError, match=r"vit_base_patch16_224\.pt does not exist"):
        mr.load_encoder("vit_base_patch16_224.pt")


def test_documentation_has_every_row():
    text = (Path(__file__).parent.parent / "docs" / "models.md").read_text()
    for row in CATALOGUE:
        assert f"| {row.name} | {row.family} | {row.licence} | {row.verified} |" in text


def test_a_published_file_is_fetched_once_and_its_licence_told(tmp_path, monkeypatch, caplog):
    encoder = ReleasedViT(ViTShape(32, 8, 48, 2, 16, 192))
    fetched = []

    def download(url, path, sha256, progress):
        fetched.append(url)
        torch.save(encoder.state_dict(), path)

    monkeypatch.setenv("MIMREFINER_CACHE", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", download)
    with caplog.at_level("INFO", "mimrefiner"):
        for _ in range(2):
            mr.load_encoder("mae_l16")
    assert len(fetched) == 1
    assert "mae_l16: licence CC BY-NC 4.0, https://github.com/facebookresearch/mae" in caplog.text


def test_a_failed_download_leaves_nothing_and_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("MIMREFINER_CACHE", str(tmp_path))
    monkeypatch.setattr(
        "torch.hub.download_url_to_file",
        lambda *a, **k: (_ for _ in ()).throw(OSError("no route to host")),
    )
    with pytest.raises(
        mr.InputError, match=r"no route to host.*fetch it elsewhere and give its path"
    ):
        mr.load_encoder("d2v2_refined_h14")
    assert list((tmp_path / "weights").iterdir()) == []


def test_large_files_load_in_bfloat16_without_a_second_copy(tmp_path):
    """A scaled-down 6.5B: the process may grow by its bfloat16 weights and a little, not by the
    float32 file too.
    """
    with torch.device("meta"):
        tensors = ReleasedViT(ViTShape(224, 14, 1024, 3, 16, 4096)).state_dict()
    torch.save({name: torch.ones(x.shape) for name, x in tensors.items()}, tmp_path / "large.pt")
    code = """
import sys, torch
from mimrefiner import load_encoder
def anonymous():
    lines = open("/proc/self/status")
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024
peak, before, load = 0, anonymous(), torch.nn.Module.load_state_dict
def watched(*args, **kwargs):
    global peak
    peak = max(peak, anonymous())
    return load(*args, **kwargs)
torch.nn.Module.load_state_dict = watched
encoder = load_encoder(sys.argv[1], num_heads=16, dtype=torch.bfloat16)
assert all(x.dtype == torch.bfloat16 for x in encoder.parameters())
print(max(peak, anonymous()) - before, sum(x.nbytes for x in encoder.state_dict().values()))
"""
    path = tmp_path / "large.pt"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grown, weights = map(int, done.stdout.split())
    assert weights < path.stat().st_size / 1.9
    assert grown < 1.2 * weights + 20e6, f"{grown / weights:.2f} times the weights"


ATTACHED = {
    "registers": lambda: mr.load_encoder(
        "vit_small_patch14_reg4_dinov2", image_size=28, pretrained=False
    ),
    "no_cls": lambda: released_encoder(
        ReleasedViT(ViTShape(28, 14, 32, 3, 2, 64, cls_token=False))
    ),
    "patch14": lambda: released_encoder(ReleasedViT(ViTShape(28, 14, 32, 3, 2, 64))),
    "post_norm": lambda: released_encoder(
        ReleasedViT(ViTShape(28, 14, 32, 3, 2, 64, post_norm=True, final_norm=False))
    ),
}


@pytest.mark.parametrize("name", ATTACHED)
def test_heads_attach_to_any_vit(name):
    encoder = ATTACHED[name]().train()
    depth, pool = len(encoder.blocks), "mean" if name == "no_cls" else "cls"
    views = Views((Crop(28, (0.5, 1)),) * 2, Crop(14, (0.1, 0.5)), 2)
    config = mr.RefineConfig(
        views,
        (depth - 2, depth - 1),
        pool,
        hidden_dim=16,
        out_dim=8,
        predictor_dim=16,
        queue_size=32,
        batch_size=4,
    )
    refiner = MIMRefiner(encoder, config)
    images = [torch.randn(4, 3, crop.size, crop.size) for crop in views.crops]
    loss = refiner.step(*refiner(images), torch.arange(4), top_k=1).loss
    loss.sum().backward()
    assert loss.shape == (2,) and loss.isfinite().all()
    assert all(block.attn.qkv.weight.grad.abs().sum() > 0 for block in encoder.blocks)
