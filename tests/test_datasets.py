import io
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import mimrefiner as mr
from mimrefiner.data import datasets
from mimrefiner.data.views import to_pil


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


def write_parquet(path, n, labels, seed=0, column="image"):
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(buffer, "PNG")
        rows.append({"bytes": buffer.getvalue(), "path": f"{i}.png"})
    pq.write_table(pa.table({column: rows, "label": labels}), path)


def test_parquet_images_may_be_called_img(tmp_path):
    for column in ("image", "img"):
        (tmp_path / column).mkdir()
        write_parquet(tmp_path / column / "train-0.parquet", 20, [0, 1] * 10, column=column)
    image, img = (
        mr.load_dataset(f"parquet:{tmp_path}/{column}", split="train")
        for column in ("image", "img")
    )
    assert content(image) == content(img) and len(img) == 13
    (tmp_path / "other").mkdir()
    write_parquet(tmp_path / "other" / "train-0.parquet", 20, [0, 1] * 10, column="picture")
    with pytest.raises(mr.InputError, match=r"image\{bytes, path\} \(or img\) .*\"image\""):
        mr.load_dataset(f"parquet:{tmp_path}/other", split="train")


def test_parquet_shards(tmp_path):
    write_parquet(tmp_path / "train-00000-of-00002.parquet", 20, [5, 7] * 10)
    write_parquet(tmp_path / "train-00001-of-00002.parquet", 20, [5, 7] * 10, seed=1)
    write_parquet(tmp_path / "val-00000-of-00001.parquet", 6, [5] * 6, seed=2)
    parts = {
        split: mr.load_dataset(f"parquet:{tmp_path}", split=split)
        for split in ("train", "val", "test")
    }
    assert {split: len(part) for split, part in parts.items()} == {"train": 36, "val": 4, "test": 6}
    assert set(parts["train"].labels) == {5, 7}
    assert parts["test"][0][0].size == (8, 8)
    assert not set(content(parts["train"])) & set(content(parts["val"]))


def test_labels_that_do_not_start_at_zero_work_from_folder_to_knn(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", 40, [5, 7] * 20)
    write_parquet(tmp_path / "val-0.parquet", 6, [5] * 6, seed=1)
    train, test = (
        mr.pixel_features(mr.load_dataset(f"parquet:{tmp_path}", split=s), 8)
        for s in ("train", "test")
    )
    assert mr.knn_hits(train, test)["pixels"].shape == (1, 6)


def test_withheld_labels_are_none(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", 20, [0, 1] * 10)
    write_parquet(tmp_path / "val-0.parquet", 6, [0, 1] * 3, seed=1)
    write_parquet(tmp_path / "test-0.parquet", 6, [-1] * 6, seed=2)
    assert len(mr.load_dataset(f"parquet:{tmp_path}", split="test")) == 6
    # The labelled val is what is measured
    assert mr.load_dataset(f"parquet:{tmp_path}", split="test").labels is not None


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            [0, None] * 10,
            r"column label must be whole numbers \(-1: none\), got 10 of 20 missing: convert it",
        ),
        ([0.0, 1.0] * 10, "must be whole numbers .*, got double"),
        (["ant", "bee"] * 10, "must be whole numbers .*, got string"),
    ],
)
def test_parquet_labels_are_whole_numbers(tmp_path, labels, message):
    write_parquet(tmp_path / "train-0.parquet", 20, labels)
    with pytest.raises(mr.InputError, match=message):
        mr.load_dataset(f"parquet:{tmp_path}", split="train")


def test_parquet_images_of_plain_bytes_are_named(tmp_path):
    pq.write_table(
        pa.table({"image": [b"x"] * 4, "label": [0, 1] * 2}), tmp_path / "train-0.parquet"
    )
    message = r"expected parquet files with columns image\{bytes, path\} .*: column image is binary"
    with pytest.raises(mr.InputError, match=message):
        mr.load_dataset(f"parquet:{tmp_path}", split="train")


@pytest.mark.parametrize(
    "image", [torch.full((3, 8, 8), 1.1), torch.full((3, 8, 8), -0.1), torch.full((3, 8, 8), 200.0)]
)
def test_tensors_outside_of_0_to_1_are_refused(image):
    with pytest.raises(mr.InputError, match=r"expected an image tensor in 0\.\.1 or of uint8, got"):
        to_pil(image)
    assert to_pil(torch.full((3, 8, 8), 1 + 1e-6)).getpixel((0, 0)) == (255, 255, 255)


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
        (f"imagefolder:{tmp_path}/none", "does not exist"),
        (f"parquet:{tmp_path}", "holds no train-"),
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
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "train-0.parquet").write_bytes(b"PAR1")
    with pytest.raises(mr.InputError, match="expected parquet files"):
        mr.load_dataset(f"parquet:{tmp_path}/bad", split="train")


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
