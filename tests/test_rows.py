"""Data sets that somebody else made: what a row may be, and the one line for what it may not."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

import mimrefiner as mr
from mimrefiner.data.datasets import data_hash
from mimrefiner.data.rows import row_of

RED = Image.new("RGB", (8, 8), (200, 0, 0))


@pytest.mark.parametrize(
    ("row", "label"),
    [
        ((RED, 3), 3),
        ([RED, 3], 3),
        ((RED, 3, {"path": "x"}), 3),
        ((np.asarray(RED), np.int8(3)), 3),
        ((np.asarray(RED).transpose(2, 0, 1), np.array([3])), 3),
        ((torch.from_numpy(np.array(RED)).permute(2, 0, 1), torch.tensor(3)), 3),
        ((torch.from_numpy(np.array(RED)).permute(2, 0, 1) / 255, torch.tensor([3.0])), 3),
        ((RED, True), 1),
        ((RED, None), -1),
        ((RED,), -1),
        (RED, -1),
        (np.asarray(RED), -1),
        ({"image": RED, "label": 3}, 3),
        ({"img": RED, "fine_label": 3, "coarse_label": 1}, 3),
        ({"Image": RED, "Target": 3}, 3),
        ({"pixel_values": torch.from_numpy(np.array(RED)).permute(2, 0, 1), "labels": 3}, 3),
        ({"photograph": RED, "id": 9}, -1),
    ],
)
def test_rows_that_are_understood(row, label):
    image, found = row_of([row], 0)
    assert image.mode == "RGB" and image.size == (8, 8) and image.getpixel((3, 3)) == (200, 0, 0)
    assert found == label and type(found) is int


def test_paths_and_bytes_are_read(tmp_path):
    RED.save(tmp_path / "red.png")
    file = tmp_path / "red.png"
    for image in (file, str(file), file.read_bytes(), {"bytes": file.read_bytes(), "path": "r"}):
        assert row_of([(image, 1)], 0)[0].getpixel((0, 0)) == (200, 0, 0)
        assert row_of([{"image": image, "label": 1}], 0)[1] == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((RED, "ant"), "a whole number as label .* got class 'ant': number the classes, the same"),
        ((RED, 0.5), "got float 0.5"),
        ((RED, float("nan")), "got float nan"),
        ((RED, torch.tensor([0, 1, 0])), r"got Tensor of shape \(3,\)"),
        ((RED, {"boxes": []}), "got dict {'boxes': .*"),
        ({"text": "a", "id": 1}, r"expected a row \(image, label\) or {.*}, got one with text, id"),
        ({}, "got one with nothing"),
        ((), "got tuple"),
        (7, "got int"),
        ((7, 1), "expected a PIL image, .* got int"),
        (("nowhere.png", 1), "nowhere.png cannot be read: No such file"),
        ((RED, 10**30), "image 1: label 10+ is too large: number the classes 0, 1, ..."),
    ],
)
def test_other_rows_are_one_line(row, message):
    with pytest.raises(mr.InputError, match=message) as found:
        row_of([RED, row], 1)
    assert "\n" not in str(found.value)


def test_the_same_pictures_give_the_same_features_in_every_form(vit):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (12, 32, 32, 3), dtype=np.uint8)
    y = np.arange(12) % 3
    chw = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    forms = [
        [(Image.fromarray(x), int(label)) for x, label in zip(pixels, y, strict=True)],
        [(x.transpose(2, 0, 1), label) for x, label in zip(pixels, y, strict=True)],
        [{"img": x, "label": label, "id": 0} for x, label in zip(pixels, y, strict=True)],
        [(x.astype(np.uint16) * 257, label, "more") for x, label in zip(pixels, y, strict=True)],
        TensorDataset(chw, torch.from_numpy(y)),
        Subset(TensorDataset(chw / 255, torch.from_numpy(y)), range(12)),
    ]
    found = [mr.extract_features(vit, form) for form in forms]
    for features in found[1:]:
        assert torch.equal(features.x["cls"], found[0].x["cls"])
        assert features.y.tolist() == y.tolist()
    assert mr.pixel_features(forms[2], 8).y.tolist() == y.tolist()
    assert len({data_hash(form) for form in forms[:2]}) == 2  # of what is there, before any rule
    assert data_hash(forms[0]) == data_hash(forms[2])


def test_what_others_call_their_attributes_does_no_harm():
    """Data sets of other people have names, rows and labels of their own."""

    class Own(list):
        name, rows, labels = Path("a"), [("a", 1), ("b",)], ["ant", "bee"]

    changed = Own([(RED, 0), (RED, 0)])
    same = [data_hash(Own([(RED, 0), (RED, 1)])) for _ in range(2)]
    assert same[0] == same[1] != data_hash(changed)


def test_training_takes_dict_rows(vit):
    rows = [{"image": np.full((32, 32), 20 * i, np.uint8), "label": i % 2} for i in range(8)]
    config = mr.PretrainConfig(epochs=1, batch_size=4)
    plain = [(Image.fromarray(row["image"]), row["label"]) for row in rows]
    losses = [mr.pretrain(vit, data, config).history["loss"].tolist() for data in (rows, plain)]
    assert losses[0] == losses[1] and len(losses[0]) == 2


def test_a_stream_is_no_data_set(vit):
    class Stream(IterableDataset):
        def __iter__(self):
            yield RED, 0

    class Sized(Stream):
        def __len__(self):
            return 1

    table = pd.DataFrame({"image": [RED], "label": [0]})
    loader = DataLoader([(RED, 0)], collate_fn=list)
    for data in (
        Stream(),
        Sized(),
        iter([(RED, 0)]),
        7,
        {"train": [(RED, 0)]},
        "digits",
        table,
        loader,
    ):
        with pytest.raises(mr.InputError, match=r"expected a map-style data set, .* got "):
            mr.extract_features(vit, data)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_row_is_one_line_from_loader_processes_too(workers, vit, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"x" * 50)
    rows = [(RED, 0), (RED, 1), (tmp_path / "bad.png", 0), (RED, 1)]
    with pytest.raises(mr.InputError) as found:
        mr.extract_features(vit, rows, num_workers=workers)
    assert str(found.value).startswith(f"{tmp_path}/bad.png cannot be decoded as an image: ")
    assert "\n" not in str(found.value)
