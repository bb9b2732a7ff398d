"""Data sets of the hub: with a stand-in for the library ``datasets``, and with it where it is."""

import io
import json
import logging
import pickle
import sys
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

import mimrefiner as mr
from mimrefiner.data import datasets


class Table:
    """What :mod:`mimrefiner.data.hub` asks of a table of the library."""

    def __init__(self, table, form=None):
        self.table, self.form = table, form
        hub = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
        kinds = {name: HubImage() if one["_type"] == "Image" else one for name, one in hub.items()}
        self.features = Features(kinds)
        self.features.arrow_schema = table.schema

    def __len__(self):
        return len(self.table)

    def __getitem__(self, key):
        if self.form == "arrow":
            return self.table[key]
        return self.table.slice(key, 1).to_pylist()[0]

    def select_columns(self, names):
        kept = self.table.select(names)
        return Table(kept.replace_schema_metadata(self.table.schema.metadata), self.form)

    def with_format(self, form):
        return Table(self.table, form)

    def cast_column(self, name, kind):
        assert isinstance(self.features[name], HubImage) and kind.decode is False
        return self


class Features(dict):
    arrow_schema: pa.Schema


class HubImage:
    def __init__(self, decode=True):
        self.decode = decode


def table(n, first=0, value=lambda grey: np.uint8(grey), names=("ant", "bee")):
    images = []
    for i in range(n):
        buffer = io.BytesIO()
        Image.fromarray(np.full((8, 8), value(first + i))).save(buffer, "PNG")
        images.append({"bytes": buffer.getvalue(), "path": None})
    features = {"img": {"_type": "Image"}, "fine_label": {"names": names, "_type": "ClassLabel"}}
    labels = [i % 2 for i in range(n)]
    found = pa.table(
        {"id": ["x"] * n, "img": images, "fine_label": labels, "coarse_label": [0] * n}
    )
    metadata = json.dumps({"info": {"features": features}})
    return Table(found.replace_schema_metadata({"huggingface": metadata}))


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the library: ``hub.sets`` is what it loads, ``hub.asked`` what it was asked."""

    def load(name, config):
        library.asked.append((name, config))
        if isinstance(library.sets, Exception):
            raise library.sets
        return library.sets

    library = SimpleNamespace(load_dataset=load, Image=HubImage, asked=[], sets={})
    monkeypatch.setitem(sys.modules, "datasets", library)
    return library


def greys(data):
    return [(image.getpixel((0, 0))[0], label) for image, label in data]


def test_splits_classes_and_columns(hub, caplog):
    caplog.set_level(logging.INFO, "mimrefiner")
    datasets._tell.cache_clear()
    hub.sets = {"train": table(20), "validation": table(6, 100), "extra": table(2)}
    test = mr.load_dataset("hf:someone/photos,config=small", split="test")
    assert hub.asked == [("someone/photos", "small")]
    assert greys(test) == [(100 + i, i % 2) for i in range(6)] and test.classes == ["ant", "bee"]
    assert caplog.messages == [
        "hf:someone/photos,config=small: 18 train, 2 val (drawn from train), 6 test (its "
        "validation) images; 2 classes: ant, bee; columns img and fine_label; left out: extra"
    ]
    train = mr.load_dataset("hf:someone/photos", split="trainval", label="coarse_label")
    assert set(train.labels) == {0} and greys(train)[3] == (3, 0)
    assert datasets.data_hash(train) == datasets.data_hash(train)


def test_one_set_is_split_and_sixteen_bits_are_scaled(hub):
    hub.sets = {"all": table(10, value=lambda grey: np.uint16(50_000))}
    parts = [mr.load_dataset("hf:x/y", split=split) for split in ("trainval", "test")]
    assert [len(part) for part in parts] == [7, 3]
    assert {grey for part in parts for grey, _ in greys(part)} == {195}


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("no route\nto host"), r"hf:x/y could not be loaded \(ConnectionError: no"),
        (FileNotFoundError("no such data set"), "check the name, give ,config=NAME where"),
        (ValueError("Config name is missing"), "check the name, give ,config=NAME where"),
        ({"test": table(4), "validation": table(4)}, "holds no split train, only test, validation"),
        (
            {"train": table(4), "train_b": table(4)},
            "several splits are called train: train, train_b",
        ),
    ],
)
def test_what_cannot_be_loaded_is_one_line(error, message, hub):
    hub.sets = error
    with pytest.raises(mr.InputError, match=message) as found:
        mr.load_dataset("hf:x/y", split="test")
    assert "\n" not in str(found.value)


def test_an_unexpected_error_keeps_its_type(hub):
    hub.sets = ZeroDivisionError("a mistake")
    with pytest.raises(ZeroDivisionError):
        mr.load_dataset("hf:x/y", split="test")


def test_a_missing_library_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        mr.InputError, match=r"needs the library datasets: pip install 'mimrefiner\["
    ):
        mr.load_dataset("hf:x/y", split="test")


def test_the_library_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    library = pytest.importorskip("datasets")
    kinds = {"img": library.Image(), "label": library.ClassLabel(names=["ant", "bee"])}
    for split, n, first in (("train", 20, 0), ("test", 6, 100)):
        images = [Image.fromarray(np.full((8, 8), first + i, np.uint8)) for i in range(n)]
        columns = {"img": images, "label": [i % 2 for i in range(n)]}
        made = library.Dataset.from_dict(columns, features=library.Features(kinds))
        made.to_parquet(tmp_path / "data" / f"{split}.parquet")
    for name in (f"hf:{tmp_path}/data", f"parquet:{tmp_path}/data"):
        test = mr.load_dataset(name, split="test")
        assert greys(test) == [(100 + i, i % 2) for i in range(6)] and test.classes == [
            "ant",
            "bee",
        ]
        assert greys(pickle.loads(pickle.dumps(test))) == greys(test)
    assert mr.pixel_features(made, 8).y.tolist() == [0, 1] * 3
