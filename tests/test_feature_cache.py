import hashlib
import json
import multiprocessing
import os
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import mimrefiner as mr
from mimrefiner.data.datasets import data_hash
from mimrefiner.probes import feature_cache
from mimrefiner.probes.feature_cache import cached_features

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture
def images(digits):
    return digits["test"].subset(range(20))


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(feature_cache, "SHARD", 8)


@pytest.fixture
def extracted(monkeypatch):
    """The images that are asked for, in their order."""
    rows, real = [], feature_cache.feature_batches

    def batches(encoder, dataset, wanted, *args):
        rows.extend(wanted)
        return real(encoder, dataset, wanted, *args)

    monkeypatch.setattr(feature_cache, "feature_batches", batches)
    return rows


def before_each_batch(monkeypatch, hook):
    """Call ``hook(i)`` before the i-th batch of every extraction is handed on."""

    def batches(*args, run=feature_cache.feature_batches):
        for i, batch in enumerate(run(*args)):
            hook(i)
            yield batch

    monkeypatch.setattr(feature_cache, "feature_batches", batches)


def in_processes(*jobs):
    """Exit codes of the jobs, which run at the same time, each in a process of its own."""
    processes = [multiprocessing.get_context("fork").Process(target=job) for job in jobs]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def same(a, b):
    return torch.equal(a.y, b.y) and all(
        torch.allclose(x, y, atol=1e-5)
        for pool in b.x
        for x, y in zip(a.x[pool], b.x[pool], strict=True)
    )


def only_folder(cache):
    (found,) = cache.glob("features-*")
    return found


def whole_shards(cache):
    """[first image, last + 1] of the shards that have a note."""
    notes = sorted(only_folder(cache).glob("images_*.json"))
    return [json.loads(note.read_text())["settings"]["rows"] for note in notes]


def test_equal_to_features_in_memory_and_not_extracted_twice(vit, images, tmp_path, extracted):
    expected = mr.extract_features(vit, images)
    first = cached_features(vit, images, tmp_path, batch_size=3)
    assert same(first, expected)
    assert mr.knn_hits(first, first, k=1)["cls"].all()
    assert same(cached_features(vit, images, tmp_path), expected)
    assert extracted == list(range(20))


def test_features_are_mapped_and_their_files_stay_as_they_are(vit, images, tmp_path):
    features = cached_features(vit, images, tmp_path, pools=("cls",))
    file = only_folder(tmp_path) / "cls_block01.bin"
    before = file.read_bytes()
    x = features.x["cls"][1]
    assert before == x.numpy().tobytes()
    x.zero_()
    assert file.read_bytes() == before


def test_a_shard_is_noted_with_the_hash_of_its_rows(vit, images, tmp_path):
    cached_features(vit, images, tmp_path, pools=("cls",))
    digest, folder = hashlib.sha256(), only_folder(tmp_path)
    for name, width in (("labels.bin", 8), *((f"cls_block{b:02d}.bin", 4 * 32) for b in range(3))):
        digest.update((folder / name).read_bytes()[8 * width : 16 * width])
    note = json.loads((folder / "images_00000008.json").read_text())
    assert note["facts"] == {"sha256": digest.hexdigest()}


@pytest.mark.parametrize("batches", [1, 3, 6])
def test_goes_on_at_the_next_shard_after_a_kill(
    vit, images, tmp_path, monkeypatch, extracted, batches
):
    def kill(i):
        if i == batches:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        before_each_batch(patch, kill)
        with pytest.raises(KeyboardInterrupt):
            cached_features(vit, images, tmp_path, batch_size=3)
    whole = 3 * batches // 8
    assert whole_shards(tmp_path) == [[8 * i, 8 * i + 8] for i in range(whole)]
    extracted.clear()
    found = cached_features(vit, images, tmp_path, batch_size=3)
    assert same(found, mr.extract_features(vit, images))
    assert extracted == list(range(8 * whole, 20))


@forks
def test_a_killed_process_loses_no_whole_shard(
    vit, images, tmp_path, monkeypatch, caplog, extracted
):
    def kill(i):
        if i == 4:  # twelve images are written
            os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        before_each_batch(patch, kill)
        job = lambda: cached_features(vit, images, tmp_path, batch_size=3)  # noqa: E731
        assert in_processes(job) == [-signal.SIGKILL]
    assert whole_shards(tmp_path) == [[0, 8]]
    found = cached_features(vit, images, tmp_path, batch_size=3)
    assert same(found, mr.extract_features(vit, images))
    assert extracted == list(range(8, 20))
    assert caplog.text == ""  # neither damaged nor locked


@forks
def test_equal_runs_share_the_work(vit, images, tmp_path, monkeypatch, extracted):
    before_each_batch(monkeypatch, lambda i: time.sleep(0.05))  # so that they meet
    expected = mr.extract_features(vit, images)

    def job(name):
        assert same(cached_features(vit, images, tmp_path / "c", batch_size=3), expected)
        (tmp_path / name).write_text(str(len(extracted)))

    assert in_processes(lambda: job("a"), lambda: job("b")) == [0, 0]
    assert sorted((tmp_path / name).read_text() for name in "ab") == ["0", "20"]
    only_folder(tmp_path / "c")


@forks
def test_different_runs_never_meet(vit, images, tmp_path, monkeypatch):
    """Other weights and other settings at the same time, in one cache folder."""
    before_each_batch(monkeypatch, lambda i: time.sleep(0.05))
    other = mr.build_vit(mr.ViTConfig(dim=32, depth=3, num_heads=2), seed=3)

    def job(encoder, **settings):
        expected = mr.extract_features(encoder, images, **settings)
        found = cached_features(encoder, images, tmp_path, batch_size=3, **settings)
        assert same(found, expected)

    jobs = [lambda: job(vit), lambda: job(other), lambda: job(vit, final_norm=True)]
    assert in_processes(*jobs) == [0, 0, 0]
    assert len(list(tmp_path.glob("features-*"))) == 3
    for encoder in (vit, other):
        assert same(
            cached_features(encoder, images, tmp_path), mr.extract_features(encoder, images)
        )


def test_every_setting_has_a_folder_of_its_own(vit, images, tmp_path, monkeypatch, extracted):
    other = mr.build_vit(mr.ViTConfig(dim=32, depth=3, num_heads=2), seed=3)
    calls = [
        (vit, images, {}),
        (other, images, {}),
        (vit, images.subset(range(19)), {}),
        (vit, images, {"blocks": (0, 2)}),
        (vit, images, {"pools": ("mean",)}),
        (vit, images, {"final_norm": True}),
        (vit, images, {"dtype": "float16"}),
        (vit, images, {"autocast": torch.bfloat16}),
    ]
    for encoder, data, settings in calls:
        cached_features(encoder, data, tmp_path, **settings)
    assert len(list(tmp_path.glob("features-*"))) == len(calls)
    with monkeypatch.context() as patch:
        patch.setattr(feature_cache, "FORMAT", "mimrefiner-features-0")
        cached_features(vit, images, tmp_path)
    assert len(list(tmp_path.glob("features-*"))) == len(calls) + 1
    for encoder, data, settings in calls:
        cached_features(encoder, data, tmp_path, **settings)
    assert len(extracted) == 20 * 8 + 19


def test_a_flipped_byte_or_a_short_file_is_found_and_mended(
    vit, images, tmp_path, caplog, extracted
):
    expected = mr.extract_features(vit, images)
    cached_features(vit, images, tmp_path, batch_size=4)
    folder = only_folder(tmp_path)

    def mended(damaged):
        extracted.clear()
        caplog.clear()
        assert same(cached_features(vit, images, tmp_path), expected)
        assert extracted == [image for first, last in damaged for image in range(first, last + 1)]
        where = ", ".join(f"{first} to {last}" for first, last in damaged)
        said = f"damaged at the images {where}: extracting them again" in caplog.text
        return said if damaged else caplog.text == ""

    def flip(name, place):
        content = bytearray((folder / name).read_bytes())
        content[place] ^= 1
        (folder / name).write_bytes(content)

    flip("mean_block01.bin", 10 * 32 * 4)
    assert mended([(8, 15)])
    flip("labels.bin", 8)
    assert mended([(0, 7)])
    os.truncate(folder / "mean_block01.bin", 100)
    assert mended([(0, 7), (8, 15), (16, 19)])
    (folder / "cls_block00.bin").unlink()
    assert mended([(0, 7), (8, 15), (16, 19)])
    (folder / "images_00000016.json").write_text("{")
    assert mended([(16, 19)])
    assert mended([])


def test_a_full_disk_is_one_line_and_leaves_no_features(vit, images, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    message = r"need 0\.0 MiB, which .* has not \(No space left on device\)"
    for _ in range(2):
        with pytest.raises(mr.InputError, match=message):
            cached_features(vit, images, tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["locks"]


def test_a_disk_that_fills_up_later_loses_no_whole_shard(
    vit, images, tmp_path, monkeypatch, extracted
):
    def full(files, name, rows, x, write=feature_cache._Files.write):
        if rows[0] >= 9:
            raise OSError(28, "No space left on device")
        write(files, name, rows, x)

    message = r"takes no more features \(No space left on device\); whole shards are kept"
    with monkeypatch.context() as patch:
        patch.setattr(feature_cache._Files, "write", full)
        with pytest.raises(mr.InputError, match=message):
            cached_features(vit, images, tmp_path, batch_size=3)
    assert whole_shards(tmp_path) == [[0, 8]]
    extracted.clear()
    found = cached_features(vit, images, tmp_path, batch_size=3)
    assert same(found, mr.extract_features(vit, images))
    assert extracted == list(range(8, 20))


def test_room_is_asked_for_where_it_cannot_be_taken(vit, images, tmp_path, monkeypatch):
    """macOS has no posix_fallocate."""
    monkeypatch.delattr(os, "posix_fallocate")
    assert same(cached_features(vit, images, tmp_path / "f"), mr.extract_features(vit, images))
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=100))
    with pytest.raises(mr.InputError, match="No space left"):
        cached_features(vit, images, tmp_path / "g")


def test_other_files_in_the_folder_are_left_alone(vit, images, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert same(cached_features(vit, images, tmp_path), mr.extract_features(vit, images))
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_file_in_the_place_of_the_folder_is_named(vit, images, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(mr.InputError, match="file is a file: features are kept in a folder"):
            cached_features(vit, images, folder)


def test_an_empty_data_set_is_refused(vit, images, tmp_path):
    with pytest.raises(mr.InputError, match="the data set is empty"):
        cached_features(vit, images.subset([]), tmp_path)


def test_half_the_space(vit, images, tmp_path):
    features = cached_features(vit, images, tmp_path, dtype="float16")
    assert features.x["cls"][0].dtype == torch.float16
    assert torch.allclose(
        features.x["cls"][2].float(), mr.extract_features(vit, images).x["cls"][2], atol=1e-2
    )


def test_plain_poolings_stay_on_the_disk(vit, images, tmp_path):
    features = cached_features(vit, images, tmp_path)
    joined = features.joined(("cls", "cls+mean"))
    assert [x.data_ptr() for x in joined.x["cls"]] == [x.data_ptr() for x in features.x["cls"]]
    assert torch.equal(
        joined.x["cls+mean"][1], torch.cat([features.x["cls"][1], features.x["mean"][1]], -1)
    )


def test_the_hash_of_a_data_set_sees_pixels_and_labels_of_any_kind(digits):
    """Its value for our own data sets is part of what identifies trained models."""
    assert data_hash(digits["test"]).startswith("00c62870")
    pixels = np.zeros((4, 8, 8, 3), np.uint8)
    plain = [(x, i % 2) for i, x in enumerate(pixels)]
    brighter = [(x + (i == 3), label) for i, (x, label) in enumerate(plain)]
    swapped = [(x, 1 - label) for x, label in plain]
    tensors = [(torch.zeros(3, 8, 8), label) for _, label in plain]
    hashes = [data_hash(data) for data in (plain, brighter, swapped, tensors, plain[:3])]
    assert len(set(hashes)) == 5
    assert data_hash(list(plain)) == hashes[0]
