"""Parquet files as the hub has them: which files, which columns, which labels."""

import io
import json
import logging
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import mimrefiner as mr
from mimrefiner.data import datasets, parquet

SPLITS = ("train", "val", "test", "trainval")


def encoded(value, kind="PNG"):
    buffer, value = io.BytesIO(), np.uint8(value) if isinstance(value, int) else value
    Image.fromarray(np.full((8, 8), value)).save(buffer, kind)
    return buffer.getvalue()


def structs(values):
    return pa.array([{"bytes": encoded(value), "path": f"{value}.png"} for value in values])


def write(file, columns, names=None):
    """A parquet file, with the hub's metadata where ``names`` gives classes of columns."""
    file.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if names is not None:
        features = {name: {"names": of, "_type": "ClassLabel"} for name, of in names.items()}
        features |= {name: {"_type": "Image"} for name in columns if name in ("image", "img", "y")}
        hub = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": hub})
    pq.write_table(table, file)


def simple(file, n=20, first=0, labels=None):
    values = range(first, first + n)
    write(file, {"image": structs(values), "label": labels or [i % 2 for i in range(n)]})


def loaded(path, split="trainval", **options):
    return mr.load_dataset(f"parquet:{path}", split=split, **options)


def greys(*parts):
    return sorted((image.getpixel((0, 0))[0], label) for part in parts for image, label in part)


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, "mimrefiner")
    datasets._tell.cache_clear()
    return caplog


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"),
        ("train-0.parquet", "val-0.parquet"),
        ("train_0.parquet", "validation_0.parquet"),
        ("train.parquet", "valid.parquet"),
        ("data/train-00000-of-00001-ab12cd.parquet", "data/test-00000-of-00001-34ef.parquet"),
        ("train/0000.parquet", "test/0000.parquet"),
        ("cifar/Train/0000.parquet", "cifar/Test/0000.parquet"),
    ],
)
def test_names_of_files(train, test, tmp_path):
    simple(tmp_path / train)
    simple(tmp_path / test, 6, 100)
    (tmp_path / test).with_name("._train-0.parquet").write_bytes(b"x")
    simple(tmp_path / ".cache" / "train-0.parquet")
    sizes = {split: len(loaded(tmp_path, split)) for split in SPLITS}
    assert sizes == {"train": 18, "val": 2, "test": 6, "trainval": 20}
    assert greys(loaded(tmp_path, "test")) == [(100 + i, i % 2) for i in range(6)]


def test_shards_follow_each_other_and_a_single_file_is_split(tmp_path, said):
    simple(tmp_path / "train-00000-of-00002.parquet", labels=[5, 7] * 10)
    simple(tmp_path / "train-00001-of-00002.parquet", 10, 50, [5, 7] * 5)
    simple(tmp_path / "val-00000-of-00001.parquet", 6, 100, [5] * 6)
    simple(tmp_path / "extra-00000-of-00001.parquet", 6, 150)
    data = loaded(tmp_path)
    assert [image.getpixel((0, 0))[0] for image, _ in data] == [*range(20), *range(50, 60)]
    assert data.labels.tolist() == [5, 7] * 15
    assert said.messages == [
        f"parquet:{tmp_path}: 27 train, 3 val (drawn from train), 6 test (its val) images; "
        "2 classes; columns image and label; left out: files that name no split (1)"
    ]
    one = tmp_path / "train-00000-of-00002.parquet"
    assert sorted(greys(loaded(one), loaded(one, "test"))) == [
        (i, 5 + i % 2 * 2) for i in range(20)
    ]
    for i in range(2):
        simple(tmp_path / "parts" / f"part-{i}.parquet", 10, 10 * i)
    parts = loaded(tmp_path / "parts"), loaded(tmp_path / "parts", "test")
    assert greys(*parts) == [(i, i % 2) for i in range(20)]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((), "holds no .parquet files: expected train-"),
        (("test-0.parquet",), "holds no train-.*, only test-0.parquet: expected shards"),
        (("a/train-0.parquet", "b/train-0.parquet"), "holds several data sets, in a, b: give one"),
        (("train-0.parquet", "b/train-0.parquet"), "holds several data sets, in ., b"),
    ],
)
def test_files_that_would_be_read_wrongly_are_refused(files, message, tmp_path):
    for file in files:
        simple(tmp_path / file)
    with pytest.raises(mr.InputError, match=message):
        loaded(tmp_path)


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("img", "label"),
        ("image", "labels"),
        ("jpg", "cls"),
        ("pixel_values", "fine_label"),
        ("png", "class"),
        ("Image", "Label"),
        ("scan", "target"),
    ],
)
def test_columns_by_type_and_name(image, label, tmp_path, said):
    columns = {"id": list(range(20)), "caption": ["x"] * 20, label: [i % 2 for i in range(20)]}
    write(tmp_path / "train-0.parquet", {**columns, image: structs(range(20))})
    assert greys(loaded(tmp_path), loaded(tmp_path, "test")) == [(i, i % 2) for i in range(20)]
    assert said.messages[0].endswith(f"2 classes; columns {image} and {label}")


CIFAR = {"img": structs(range(20)), "fine_label": [i % 4 for i in range(20)]}
CIFAR["coarse_label"] = [i % 4 // 2 for i in range(20)]


def test_the_label_can_be_chosen(tmp_path, said):
    names = {"coarse_label": ["big", "small"], "fine_label": ["ant", "bee", "cat", "dog"]}
    write(tmp_path / "train-0.parquet", CIFAR, names)
    assert loaded(tmp_path).classes == names["fine_label"]
    assert "columns img and fine_label (there is coarse_label, too)" in said.messages[0]
    assert "4 classes: ant, bee, cat, dog" in said.messages[0]
    for data in (loaded(tmp_path, label="coarse_label"), loaded(f"{tmp_path},label=coarse_label")):
        assert data.classes == ["big", "small"]
        assert greys(data) == [(grey, grey % 4 // 2) for grey, _ in greys(data)]
    with pytest.raises(
        mr.InputError, match=r"no column kind: there are img \(struct\), fine_label"
    ):
        loaded(tmp_path, label="kind")


def test_the_image_can_be_chosen(tmp_path):
    columns = {"left": structs(range(20)), "right": structs(range(50, 70)), "label": [0, 1] * 10}
    write(tmp_path / "train-0.parquet", columns)
    with pytest.raises(
        mr.InputError, match=r"got left \(struct\), right .*: choose with column=NAME"
    ):
        loaded(tmp_path)
    assert greys(loaded(f"{tmp_path},column=right,label=label"))[0][0] >= 50
    with pytest.raises(mr.InputError, match=r"expected a column of images, .* got left"):
        loaded(tmp_path, column="label")


def test_metadata_tells_more_than_names(tmp_path):
    """An image column that is called y, and classes whose column has an odd name."""
    columns = {"x": structs(range(50, 70)), "y": structs(range(20)), "kind": [0, 1] * 10}
    write(tmp_path / "train-0.parquet", columns, {"kind": ["ant", "bee"]})
    data = loaded(tmp_path)
    assert data.classes == ["ant", "bee"] and greys(data)[-1][0] < 20


def test_class_names_in_another_order_keep_their_meaning(tmp_path):
    for split, names in (("train", ["ant", "bee", "cat"]), ("test", ["cat", "ant", "bee"])):
        columns = {"image": structs(range(18)), "label": [0, 1, 2] * 6}
        write(tmp_path / f"{split}-0.parquet", columns, {"label": names})
    assert greys(loaded(tmp_path, "test")) == [(i, (2, 0, 1)[i % 3]) for i in range(18)]
    some = {"image": structs(range(18)), "label": [0, 1, -1] * 6}
    write(tmp_path / "test-0.parquet", some, {"label": ["cat", "ant", "bee"]})
    assert greys(loaded(tmp_path, "test")) == [(i, (2, 0, -1)[i % 3]) for i in range(18)]
    write(tmp_path / "test-0.parquet", some, {"label": ["cat"]})
    with pytest.raises(mr.InputError, match=r"\(test\): label 1 is none of its 1 classes"):
        loaded(tmp_path)


@pytest.mark.parametrize(
    "kind",
    [pa.binary(), pa.large_binary(), pa.binary_view(), pa.dictionary(pa.int32(), pa.binary())],
)
def test_plain_bytes(kind, tmp_path):
    images = pa.array([encoded(i) for i in range(20)]).cast(kind)
    write(tmp_path / "train-0.parquet", {"image": images, "label": [0, 1] * 10})
    assert greys(loaded(tmp_path), loaded(tmp_path, "test")) == [(i, i % 2) for i in range(20)]


@pytest.mark.parametrize(
    ("kind", "factor"), [(np.uint8, 1), (np.uint16, 257), (np.float32, 1 / 255)]
)
def test_arrays(kind, factor, tmp_path):
    images = [np.full((3, 8, 8), i * factor, dtype=kind).tolist() for i in range(20)]
    leaf = pa.list_(pa.list_(pa.list_(pa.from_numpy_dtype(kind))))
    images = pa.array(images, type=leaf)
    write(tmp_path / "train-0.parquet", {"pixel_values": images, "label": [0, 1] * 10})
    assert greys(loaded(tmp_path), loaded(tmp_path, "test")) == [(i, i % 2) for i in range(20)]


def test_arrays_of_an_own_type(tmp_path):
    """As the hub's library registers Array2D once it is imported."""

    class Array2D(pa.ExtensionType):
        def __init__(self):
            super().__init__(pa.list_(pa.list_(pa.uint16())), "mimrefiner.tests.array2d")

        def __arrow_ext_serialize__(self):
            return b""

        @classmethod
        def __arrow_ext_deserialize__(cls, storage, serialized):
            return cls()

    pa.register_extension_type(Array2D())
    try:
        storage = pa.array([np.full((8, 8), 257 * i).tolist() for i in range(20)])
        cells = pa.ExtensionArray.from_storage(Array2D(), storage.cast(Array2D().storage_type))
        write(tmp_path / "train-0.parquet", {"image": cells, "label": [0, 1] * 10})
        assert greys(loaded(tmp_path), loaded(tmp_path, "test")) == [(i, i % 2) for i in range(20)]
    finally:
        pa.unregister_extension_type("mimrefiner.tests.array2d")


def test_sixteen_bit_images(tmp_path):
    images = [encoded(np.uint16(value)) for value in (2_000, 50_000)] * 10
    write(tmp_path / "train-0.parquet", {"image": images, "label": [0, 1] * 10})
    assert {*greys(loaded(tmp_path))} == {(8, 0), (195, 1)}


def test_shards_may_differ_in_widths_and_further_columns(tmp_path):
    image = structs(range(10))
    label = pa.array([0, 1] * 5, pa.int8())
    write(tmp_path / "train-0.parquet", {"image": image, "label": label})
    large = pa.array([encoded(i) for i in range(10, 20)], pa.large_binary())
    more = {"more": ["x"] * 10, "label": pa.array([0, 1] * 5, pa.uint64()), "image": large}
    write(tmp_path / "train-1.parquet", more)
    assert greys(loaded(tmp_path), loaded(tmp_path, "test")) == [(i, i % 2) for i in range(20)]
    write(tmp_path / "train-2.parquet", {"image": image, "kind": label})
    with pytest.raises(mr.InputError, match=r"train-2\.parquet has no column label, unlike other"):
        loaded(tmp_path)


def test_images_in_files_beside_the_table(tmp_path):
    rows = [{"bytes": None, "path": f"photos/{i}.png"} for i in range(20)]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    write(tmp_path / "train-0.parquet", {"image": pa.array(rows, kind), "label": [0, 1] * 10})
    (tmp_path / "photos").mkdir()
    for i in range(20):
        (tmp_path / "photos" / f"{i}.png").write_bytes(encoded(i))
    assert greys(loaded(tmp_path), loaded(tmp_path, "test")) == [(i, i % 2) for i in range(20)]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())]
)
def test_names_as_labels_become_classes(kind, tmp_path):
    labels = pa.array(["bee", "ant"] * 10).cast(kind)
    write(tmp_path / "train-0.parquet", {"image": structs(range(20)), "label": labels})
    held = pa.array(["bee"] * 4).cast(kind)
    write(tmp_path / "test-0.parquet", {"image": structs(range(4)), "label": held})
    assert loaded(tmp_path).classes == ["ant", "bee"]
    assert greys(loaded(tmp_path)) == [(i, 1 - i % 2) for i in range(20)]
    assert greys(loaded(tmp_path, "test")) == [(i, 1) for i in range(4)]  # as training has it
    write(tmp_path / "test-0.parquet", {"image": structs(range(4)), "label": ["cat"] * 4})
    with pytest.raises(mr.InputError, match=r"\(test\) has classes that train has not: cat"):
        loaded(tmp_path)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0.0, 1.5] * 10, "column label must be whole numbers .*, got fractions: convert it"),
        ([0.0, float("nan")] * 10, "must be whole numbers .*, got fractions"),
        ([[0, 1]] * 20, "must be whole numbers .*, got list<.*: convert it, or choose another"),
        ([2**63 + 1, 1] * 10, "column label holds too large labels"),
    ],
)
def test_labels_that_are_none_are_named(labels, message, tmp_path):
    kind = pa.uint64() if labels[0] == 2**63 + 1 else None
    columns = {"image": structs(range(20)), "label": pa.array(labels, kind)}
    write(tmp_path / "train-0.parquet", columns)
    with pytest.raises(mr.InputError, match=message):
        loaded(tmp_path)
    assert loaded(f"{tmp_path},label=").labels is None  # without them


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([0.0, 1.0] * 10, [0, 1] * 10),
        ([0, None] * 10, [0, -1] * 10),
        ([3.0, None] * 10, [3, -1] * 10),
        (["bee", None, "ant", "bee"] * 5, [1, -1, 0, 1] * 5),
    ],
)
def test_whole_floats_and_missing_labels_are_read_as_rows_are(labels, expected, tmp_path, said):
    write(tmp_path / "train-0.parquet", {"image": structs(range(20)), "target": labels})
    found = greys(loaded(tmp_path), loaded(tmp_path, "test"))
    assert found == list(zip(range(20), expected, strict=True))
    assert "columns image and target" in said.messages[0]


def test_one_shard_of_pandas_may_have_floats(tmp_path):
    simple(tmp_path / "train-0.parquet", 4, labels=[0, 1, 2, 0])
    simple(tmp_path / "train-1.parquet", 4, 4, [1.0, None, 2.0, 1.0])
    found = greys(loaded(tmp_path), loaded(tmp_path, "test"))
    assert found == list(enumerate([0, 1, 2, 0, 1, -1, 2, 1]))


def test_labels_that_training_lacks_are_refused(tmp_path):
    simple(tmp_path / "train-0.parquet", 9, labels=[0, 1, 2] * 3)
    simple(tmp_path / "test-0.parquet", 6, labels=[1, 2, 3] * 2)
    message = (
        r"\(test\): 2 of 6 images have labels that no training image has \(3; training has 0, 1, "
        r"2\): number the classes in the same way for both"
    )
    with pytest.raises(mr.InputError, match=message):
        loaded(tmp_path)
    simple(tmp_path / "test-0.parquet", 6, labels=[2, -1] * 3)  # some classes may be missing
    assert loaded(tmp_path, "test").labels.tolist() == [2, -1] * 3
    # Where names say what labels mean, a rare class may be without training images
    simple(tmp_path / "named" / "train-0.parquet", 9, labels=["ant", "bee", "cat"] * 3)
    simple(tmp_path / "named" / "test-0.parquet", 2, labels=["cat"] * 2)
    assert loaded(tmp_path / "named", "test").labels.tolist() == [2, 2]


def test_a_column_of_splits_is_said_not_to_be_used(tmp_path, said):
    columns = {"image": structs(range(20)), "label": [0, 1] * 10, "split": ["train", "test"] * 10}
    write(tmp_path / "all.parquet", columns)
    assert len(loaded(tmp_path)) == 14
    assert said.messages[0].endswith(
        "column split is not used: the names of files say what is train or test"
    )


def test_bools_and_missing_labels(tmp_path, said):
    write(
        tmp_path / "b" / "train-0.parquet",
        {"image": structs(range(20)), "label": [False, True] * 10},
    )
    assert greys(loaded(tmp_path / "b"))[:2] != [] and set(loaded(tmp_path / "b").labels) == {0, 1}
    for name, columns in (
        ("none", {}),
        ("null", {"label": pa.nulls(20)}),
        ("minus", {"label": [-1] * 20}),
    ):
        write(tmp_path / name / "train-0.parquet", {"image": structs(range(20)), **columns})
        data = loaded(tmp_path / name)
        assert data.labels is None and data[0][1] == -1
    assert all("no labels" in line for line in said.messages[1:]) and len(said.messages) == 4


def test_every_negative_label_is_none(tmp_path, said):
    simple(tmp_path / "train-0.parquet", 12, labels=[0, 7, -100] * 4)
    assert {label for _, label in greys(loaded(tmp_path))} == {0, 7, -1}
    assert "; 2 classes; " in said.messages[0]


def test_withheld_labels_are_left_out_and_said(tmp_path, said):
    simple(tmp_path / "train-0.parquet")
    simple(tmp_path / "val-0.parquet", 6, 100)
    simple(tmp_path / "test-0.parquet", 6, 200, [-1] * 6)
    test = loaded(tmp_path, "test")  # the labelled val is what is measured
    assert greys(test) == [(100 + i, i % 2) for i in range(6)]
    assert said.messages[0].endswith("test has no labels and is left out")


def test_labels_that_do_not_start_at_zero_work_from_folder_to_knn(tmp_path):
    simple(tmp_path / "train-0.parquet", 40, labels=[5, 7] * 20)
    simple(tmp_path / "val-0.parquet", 6, labels=[5] * 6)
    train, test = (mr.pixel_features(loaded(tmp_path, s), 8) for s in ("train", "test"))
    assert mr.knn_hits(train, test)["pixels"].shape == (1, 6)


def test_batches_are_kept_apart(tmp_path, monkeypatch):
    """More than 2 GiB of bytes cannot be one array: nothing is combined."""
    simple(tmp_path / "train-0.parquet", 20)
    simple(tmp_path / "train-1.parquet", 9, 50)
    whole = [image.getpixel((0, 0)) for image, _ in loaded(tmp_path)]
    monkeypatch.setattr(parquet, "ROWS", 7)
    data = loaded(tmp_path)
    images = data._load.images
    assert data._load.ends.tolist() == [7, 14, 20, 27, 29]
    assert [len(part) for part, _ in images] == [7, 7, 6, 7, 2]
    assert [image.getpixel((0, 0)) for image, _ in data] == whole
    rest = loaded(tmp_path, "test")
    assert rest._load is data._load  # the bytes of two splits lie in memory once
    sent = pickle.loads(pickle.dumps(data))
    assert [image.getpixel((0, 0)) for image, _ in sent] == whole


@pytest.mark.parametrize("bad", [b"x" * 30, b"", None])
def test_a_broken_cell_is_named(bad, tmp_path):
    cells = [encoded(i) for i in range(3)] + [bad]
    write(
        tmp_path / "train-0.parquet", {"image": pa.array(cells, pa.binary()), "label": [0, 1] * 2}
    )
    parts = [loaded(tmp_path, split) for split in ("trainval", "test")]
    message = rf"parquet:{tmp_path} \(\w+\): image 3"
    with pytest.raises(mr.InputError, match=message):
        greys(*parts)


@pytest.mark.parametrize("content", [b"PAR1", b"", b"x" * 100])
def test_a_broken_file_is_named(content, tmp_path):
    simple(tmp_path / "train-0.parquet")
    (tmp_path / "train-1.parquet").write_bytes(content)
    with pytest.raises(
        mr.InputError, match=r"expected parquet files, and .*train-1\.parquet cannot"
    ):
        loaded(tmp_path)


def test_a_table_without_images_lists_its_columns(tmp_path):
    write(tmp_path / "train-0.parquet", {"text": ["a"], "label": [0]})
    message = r"got text \(string\), label \(int64\): give files that hold the images"
    with pytest.raises(mr.InputError, match=message):
        loaded(tmp_path)
    write(
        tmp_path / "train-0.parquet",
        {"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())},
    )
    with pytest.raises(mr.InputError, match=r"holds no images in train-0\.parquet"):
        loaded(tmp_path)
