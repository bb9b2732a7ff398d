import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import mimrefiner as mr
from mimrefiner.probes import feature_cache
from mimrefiner.probes.feature_cache import cached_features


@pytest.fixture
def images(digits):
    return digits["test"].subset(range(20))


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(feature_cache, "SHARD", 8)


def same(a, b):
    return torch.equal(a.y, b.y) and all(
        torch.allclose(x, y, atol=1e-5)
        for pool in b.x
        for x, y in zip(a.x[pool], b.x[pool], strict=True)
    )


def test_equal_to_features_in_memory_and_not_extracted_twice(vit, images, tmp_path, monkeypatch):
    expected = mr.extract_features(vit, images)
    first = cached_features(vit, images, tmp_path / "f", batch_size=3)
    assert same(first, expected)
    assert mr.knn_hits(first, first, k=1)["cls"].all()
    monkeypatch.setattr(feature_cache, "feature_batches", None)
    assert same(cached_features(vit, images, tmp_path / "f"), expected)


def written(folder):
    """(first, last + 1) of the pieces that the first process noted."""
    return [
        (piece["start"], piece["stop"])
        for piece in json.loads((folder / "pieces_0.json").read_text())
    ]


@pytest.mark.parametrize("batches", [1, 3, 4])
def test_goes_on_at_the_next_image_after_a_kill(vit, images, tmp_path, monkeypatch, batches):
    def until_killed(*args, run=feature_cache.feature_batches, **options):
        for i, batch in enumerate(run(*args, **options)):
            if i == batches:
                raise KeyboardInterrupt
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(feature_cache, "feature_batches", until_killed)
        with pytest.raises(KeyboardInterrupt):
            cached_features(vit, images, tmp_path / "f", batch_size=3)
    # A new checksum after 8 images
    assert written(tmp_path / "f") == [(0, min(3 * batches, 9)), (9, 12)][: 1 + (batches > 3)]
    started = []
    real = feature_cache.feature_batches
    monkeypatch.setattr(
        feature_cache, "feature_batches", lambda *a, **o: started.append(a[2][0]) or real(*a, **o)
    )
    assert same(
        cached_features(vit, images, tmp_path / "f", batch_size=3), mr.extract_features(vit, images)
    )
    assert started == [3 * batches]


def test_other_weights_data_or_version_are_announced_and_filled_anew(vit, images, tmp_path, capsys):
    folder = tmp_path / "f"
    cached_features(vit, images, folder)
    other = mr.build_vit(mr.ViTConfig(dim=32, depth=3, num_heads=2), seed=3)
    assert same(cached_features(other, images, folder), mr.extract_features(other, images))
    assert "holds features of other weights_sha256: extracting anew" in capsys.readouterr().err
    cached_features(other, images.subset(range(5)), folder)
    assert "other data_sha256, images" in capsys.readouterr().err
    state = json.loads((folder / "state.json").read_text())
    state["made_of"]["format"] = "mimrefiner-features-0"
    (folder / "state.json").write_text(json.dumps(state))
    cached_features(other, images.subset(range(5)), folder)
    assert "other format" in capsys.readouterr().err
    (folder / "state.json").write_text("{")
    cached_features(other, images.subset(range(5)), folder)
    assert "other state.json" in capsys.readouterr().err


def test_a_flipped_byte_or_a_short_file_is_found_and_mended(vit, images, tmp_path, capsys):
    folder = tmp_path / "f"
    cached_features(vit, images, folder, batch_size=4)
    expected = mr.extract_features(vit, images)
    file = folder / "mean_block01.bin"
    content = bytearray(file.read_bytes())
    content[10 * 32 * 4] ^= 1  # image 10, in the shard that starts at 8
    file.write_bytes(content)
    assert same(cached_features(vit, images, folder), expected)
    assert "damaged at the images 8 to 15: extracting them again" in capsys.readouterr().err
    labels = bytearray((folder / "labels.bin").read_bytes())
    labels[8] ^= 1
    (folder / "labels.bin").write_bytes(labels)
    assert same(cached_features(vit, images, folder), expected)
    assert "damaged at the images 0 to 7:" in capsys.readouterr().err
    os.truncate(file, 100)
    assert same(cached_features(vit, images, folder), expected)
    assert "damaged at the images 0 to 7, 8 to 15, 16 to 19:" in capsys.readouterr().err
    cached_features(vit, images, folder)
    assert capsys.readouterr().err == ""


def test_a_full_disk_is_one_line_and_leaves_nothing(vit, images, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        mr.InputError, match=r"need 0\.0 MiB, which .* has not \(No space left on device\)"
    ):
        cached_features(vit, images, tmp_path / "f")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "f").mkdir()
    with pytest.raises(mr.InputError, match="No space left"):
        cached_features(vit, images, tmp_path / "f")
    assert list((tmp_path / "f").iterdir()) == []


def test_a_disk_that_fills_up_later_loses_nothing(vit, images, tmp_path, monkeypatch):
    def full(files, arrays, rows, pieces, write=feature_cache._write):
        if rows[0] >= 6:
            raise OSError(28, "No space left on device")
        write(files, arrays, rows, pieces)

    with monkeypatch.context() as patch:
        patch.setattr(feature_cache, "_write", full)
        with pytest.raises(
            mr.InputError,
            match=r"takes no more features \(No space left on device\); those .* are kept",
        ):
            cached_features(vit, images, tmp_path / "f", batch_size=3)
    assert written(tmp_path / "f") == [(0, 6)]
    assert same(
        cached_features(vit, images, tmp_path / "f", batch_size=3), mr.extract_features(vit, images)
    )


def test_room_is_asked_for_where_it_cannot_be_taken(vit, images, tmp_path, monkeypatch):
    """macOS has no posix_fallocate."""
    monkeypatch.delattr(os, "posix_fallocate")
    assert same(cached_features(vit, images, tmp_path / "f"), mr.extract_features(vit, images))
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=100))
    with pytest.raises(mr.InputError, match="No space left"):
        cached_features(vit, images, tmp_path / "g")


def test_other_files_in_the_folder_are_left_alone(vit, images, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(mr.InputError, match="holds files but no features"):
        cached_features(vit, images, tmp_path)
    cached_features(vit, images, tmp_path / "f")
    (tmp_path / "f" / "notes.txt").write_text("mine")
    cached_features(vit, images.subset(range(5)), tmp_path / "f")
    assert "extracting anew" in capsys.readouterr().err
    assert (tmp_path / "f" / "notes.txt").read_text() == "mine"


SCRIPT = """
import os, signal, sys, torch
import mimrefiner as mr
from mimrefiner import feature_cache
def killed(run, *a, **k):
    for i, batch in enumerate(run(*a, **k)):
        if i == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch
run = feature_cache.feature_batches
feature_cache.feature_batches = lambda *a, **k: killed(run, *a, **k)
vit = mr.build_vit(mr.ViTConfig(dim=32, depth=3, num_heads=2))
feature_cache.cached_features(vit, mr.load_dataset("digits", split="test").subset(range(20)), sys.argv[1], batch_size=3)
"""


def test_a_killed_process_loses_nothing_that_was_written(vit, images, tmp_path, capsys):
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path / "f")])
    assert done.returncode == -signal.SIGKILL
    assert written(tmp_path / "f") == [(0, 6)]
    assert same(
        cached_features(vit, images, tmp_path / "f", batch_size=3), mr.extract_features(vit, images)
    )
    assert capsys.readouterr().err == ""  # neither damaged nor of something else


def test_half_the_space(vit, images, tmp_path):
    features = cached_features(vit, images, tmp_path / "f", dtype="float16")
    assert features.x["cls"][0].dtype == torch.float16
    assert torch.allclose(
        features.x["cls"][2].float(), mr.extract_features(vit, images).x["cls"][2], atol=1e-2
    )


def test_plain_poolings_stay_on_the_disk(vit, images, tmp_path):
    features = cached_features(vit, images, tmp_path / "f")
    joined = features.joined(("cls", "cls+mean"))
    assert [x.data_ptr() for x in joined.x["cls"]] == [x.data_ptr() for x in features.x["cls"]]
    assert torch.equal(
        joined.x["cls+mean"][1], torch.cat([features.x["cls"][1], features.x["mean"][1]], -1)
    )
