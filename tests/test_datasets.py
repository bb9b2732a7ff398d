import pickle

import numpy as np
import pytest
import torch
from PIL import Image

import mimrefiner as mr
from mimrefiner.data import datasets


def content(dataset):
    return [np.asarray(dataset[i][0]).tobytes() for i in range(len(dataset))]


def test_digits_are_split_without_a_common_row(digits):
    rows = {split: set(dataset.rows.tolist()) for split, dataset in digits.items()}
    assert not rows["train"] & rows["val"]
    assert not rows["trainval"] & rows["test"]
    assert rows["train"] | rows["val"] == rows["trainval"]
    assert len(rows["trainval"] | rows["test"]) == 1797


def test_splits_are_fixed_by_their_seed():
    assert content(mr.load_dataset("digits", split="val")) == content(
        mr.load_dataset("digits", split="val")
    )
    assert content(mr.load_dataset("digits", split="val")) != content(
        mr.load_dataset("digits", split="val", seed=1)
    )


def test_every_class_has_its_share(digits):
    for dataset in digits.values():
        counts = np.bincount(dataset.labels)
        assert counts.max() - counts.min() <= 0.1 * counts.max() + 2


def test_digits_are_rgb_images_with_int_labels(digits):
    image, label = digits["test"][0]
    assert image.size == (32, 32)
    assert image.mode == "RGB"
    assert isinstance(label, int)


def test_take_keeps_the_classes_even(digits):
    some = digits["train"].take(100)
    assert len(some) == 100
    assert np.bincount(some.labels).min() >= 9
    assert digits["train"].take(None) is digits["train"]


def test_image_folder_calls_the_official_val_test(image_folder):
    sizes = {
        split: len(mr.load_dataset(f"imagefolder:{image_folder}", split=split))
        for split in datasets.SPLITS
    }
    assert sizes == {"train": 18, "val": 2, "test": 6, "trainval": 20}
    parts = {
        split: set(content(mr.load_dataset(f"imagefolder:{image_folder}", split=split)))
        for split in ("train", "val", "test")
    }
    assert not parts["train"] & parts["val"]
    assert not (parts["train"] | parts["val"]) & parts["test"]


def test_image_folder_with_three_official_splits(image_folder):
    (image_folder / "test").mkdir()
    (image_folder / "val" / "bee").rename(image_folder / "test" / "bee")
    parts = {
        split: mr.load_dataset(f"imagefolder:{image_folder}", split=split)
        for split in datasets.SPLITS
    }
    assert {split: len(part) for split, part in parts.items()} == {
        "train": 20,
        "val": 3,
        "test": 3,
        "trainval": 23,
    }
    # A class may be missing in a split; labels keep their meaning
    assert set(parts["test"].labels) == {1}
    assert content(parts["trainval"]) == content(parts["train"]) + content(parts["val"])


def test_image_folder_without_splits_is_split(image_folder):
    parts = {
        split: mr.load_dataset(f"imagefolder:{image_folder}/train", split=split)
        for split in ("train", "val", "test")
    }
    assert sum(len(part) for part in parts.values()) == 20
    assert len(parts["test"]) == 6


@pytest.mark.parametrize("part", ["val", "test"])
def test_held_out_folders_that_are_no_class_are_named(image_folder, part):
    (image_folder / "val").rename(image_folder / part)
    # Tiny-ImageNet's own val/images
    (image_folder / part / "ant").rename(image_folder / part / "images")
    message = rf"{part} must hold one folder per class, named as in .*train, which has no images$"
    for split in datasets.SPLITS:
        with pytest.raises(mr.InputError, match=message):
            mr.load_dataset(f"imagefolder:{image_folder}", split=split)


def test_a_flat_test_folder_is_left_out(image_folder):
    sizes = {
        split: len(mr.load_dataset(f"imagefolder:{image_folder}", split=split))
        for split in datasets.SPLITS
    }
    (image_folder / "test").mkdir()
    Image.new("RGB", (8, 8)).save(image_folder / "test" / "0.png")
    assert sizes == {
        split: len(mr.load_dataset(f"imagefolder:{image_folder}", split=split))
        for split in datasets.SPLITS
    }


@pytest.mark.parametrize("name", ["fashion_mnist", "cifar10", "cifar100", "stl10"])
def test_no_network_is_said_in_one_line(name, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setenv("MIMREFINER_DATA", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(mr.InputError, match=r"could not be downloaded .*check the network"):
        mr.load_dataset(name, split="train")


def test_bad_input_is_named(tmp_path, image_folder):
    for name, message in [
        ("mnits", "unknown data set 'mnits': choose one of digits"),
        (f"{image_folder}", r"unknown data set .*; for the path give imagefolder:/.*"),
        ("digits,label=y", "digits takes no label: parquet:PATH and hf:NAME do"),
        ("parquet:x,config=y", "parquet:x takes no config: expected column, label"),
        ("digits:", "unknown data set 'digits:'"),
        (
            f"cifar10:{tmp_path}/none",
            "none does not exist: expected the folder that holds cifar-10",
        ),
        (
            f"cifar10:{image_folder}",
            "does not hold cifar10 as torchvision has it, the folder cifar-10-batches-py: files "
            "are missing there, or have other checksums than the original ones$",
        ),
        ("imagefolder:~nosuchuser/a", "~nosuchuser/a: no home folder is known here"),
        ("~nosuchuser/a", "~nosuchuser/a: no home folder is known here"),
        (f"imagefolder:{tmp_path}/none", "does not exist"),
        (f"parquet:{tmp_path}/train", "holds no .parquet files: expected train-"),
    ]:
        with pytest.raises(mr.InputError, match=message):
            mr.load_dataset(name, split="train")
    with pytest.raises(mr.InputError, match="expected a data set by name"):
        mr.load_dataset(image_folder, split="train")
    with pytest.raises(mr.InputError, match="seed must be >= 0, got -1"):
        mr.load_dataset("digits", split="train", seed=-1)
    with pytest.raises(
        mr.InputError, match="expected a number of images >= 1, or None for all, got -1"
    ):
        mr.load_dataset("digits", split="train").take(-1)
    with pytest.raises(mr.InputError, match="unknown split 'valid'"):
        mr.load_dataset("digits", split="valid")
    (tmp_path / "empty").mkdir()
    with pytest.raises(mr.InputError, match="holds no images"):
        mr.load_dataset(f"imagefolder:{tmp_path}/empty", split="train")
    (image_folder / "val" / "ant" / "0.png").write_bytes(b"no image")
    broken = mr.load_dataset(f"imagefolder:{image_folder}", split="test")
    with pytest.raises(mr.InputError, match=r"^[^:]*0\.png cannot be decoded as an image"):
        content(broken)


CIFAR = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}


def write_cifar(root, name):
    """Files as the authors' archives have them, with fewer images."""
    folder, key = root / CIFAR[name], "fine_labels" if name == "cifar100" else "labels"
    folder.mkdir(parents=True)
    files = {"train": 40, "test": 8}
    if name == "cifar10":
        files = {f"data_batch_{i}": 8 for i in range(1, 6)} | {"test_batch": 8}
    for i, (file, n) in enumerate(files.items()):
        pixels = np.full((n, 3072), i, dtype=np.uint8)
        pixels[:, 1024:2048] = 100  # green
        entry = {"data": pixels, key: [row % 2 for row in range(n)]}
        (folder / file).write_bytes(pickle.dumps(entry))
    names = {"label_names": ["ant", "bee"], "fine_label_names": ["ant", "bee"]}
    (folder / ("meta" if name == "cifar100" else "batches.meta")).write_bytes(pickle.dumps(names))


@pytest.mark.parametrize("name", CIFAR)
def test_the_own_folders_of_cifar_need_no_network(name, tmp_path, monkeypatch):
    import torchvision.datasets

    builder = getattr(torchvision.datasets, name.upper())
    for part in ("train_list", "test_list"):  # checksums are of the real images
        files = [[file, None] for file, _ in getattr(builder, part)]
        monkeypatch.setattr(builder, part, files)
    monkeypatch.setattr(builder, "meta", builder.meta | {"md5": None})
    monkeypatch.setattr("urllib.request.urlopen", lambda *args, **kwargs: pytest.fail("network"))
    write_cifar(tmp_path, name)
    monkeypatch.setenv("MIMREFINER_DATA", str(tmp_path))
    for data in (name, f"{name}:{tmp_path}", f"{name}:{tmp_path}/{CIFAR[name]}"):
        train, test = (mr.load_dataset(data, split=split) for split in ("trainval", "test"))
        assert (len(train), len(test), test.classes) == (40, 8, ["ant", "bee"])
        last = {"cifar10": 5, "cifar100": 1}[name]
        assert test[1][0].getpixel((0, 0)) == (last, 100, last) and test[1][1] == 1
    with pytest.raises(mr.InputError, match=f"holds the files of {name}: give {name}:"):
        mr.load_dataset(f"imagefolder:{tmp_path}/{CIFAR[name]}", split="train")


def test_short_names():
    names = ["cifar10:/data/x", "parquet:/d/c100,label=fine", "hf:uoft-cs/cifar100", "digits"]
    found = [datasets.short_name(name) for name in names]
    assert found == ["cifar10", "c100,label=fine", "cifar100", "digits"]


def test_any_map_style_data_set_works(vit):
    pairs = [(Image.new("RGB", (32, 32), (i, 2 * i, 3 * i)), i % 3) for i in range(12)]
    tensors = [
        (torch.from_numpy(np.array(image)).permute(2, 0, 1), torch.tensor(label))
        for image, label in pairs
    ]
    a, b = mr.extract_features(vit, pairs), mr.extract_features(vit, tensors)
    assert torch.equal(a.x["cls"], b.x["cls"])
    assert torch.equal(a.y, b.y)


def test_fruit64_comes_with_the_package_and_never_shares_a_photo():
    parts = {split: mr.load_dataset("fruit64", split=split) for split in ("train", "val", "test")}
    assert [len(part) for part in parts.values()] == [659, 73, 661]
    photos = [{part[i][0].tobytes() for i in range(len(part))} for part in parts.values()]
    assert len(set.union(*photos)) == sum(len(part) for part in photos) == 1393
    for part in parts.values():
        assert set(part.labels) == set(range(14))
        assert part[0][0].size == (64, 64)


def test_in_memory_images_are_the_same_and_decoded_once(image_folder):
    data_set = mr.load_dataset(f"imagefolder:{image_folder}", split="train").take(6)
    kept = data_set.in_memory()
    expected = [(np.asarray(image), label) for image, label in data_set]
    for file in (image_folder / "train").rglob("*.png"):
        file.unlink()
    for (image, label), (pixels, expected_label) in zip(kept, expected, strict=True):
        assert np.array_equal(np.asarray(image), pixels) and label == expected_label
    assert np.array_equal(np.asarray(kept.subset([3])[0][0]), expected[3][0])


@pytest.mark.parametrize("name", ["digits", "fruit64", "folder"])
def test_a_data_set_can_be_sent_to_a_process(name, image_folder):
    """As loaders ask for where processes are not forked."""
    data = mr.load_dataset(
        f"imagefolder:{image_folder}" if name == "folder" else name, split="train"
    ).take(4)
    for kept in (data, data.in_memory()):
        sent = pickle.loads(pickle.dumps(kept))
        assert [np.asarray(image).tolist() for image, _ in sent] == [
            np.asarray(image).tolist() for image, _ in data
        ]
