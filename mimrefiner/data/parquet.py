"""Parquet files as the hub has them: shards of splits, images as encoded bytes or arrays."""

import itertools
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as kinds

from mimrefiner.data.columns import Columns, array_type, find_columns, holds_images, numbers
from mimrefiner.data.sources import (
    Part,
    Source,
    check_numbering,
    existing,
    is_hidden,
    listed,
    skipped_text,
    split_named,
)
from mimrefiner.errors import InputError
from mimrefiner.files import first_line

EXPECTED = "a folder of parquet files, or one"
ROWS = 64  # read at a time: no batch then comes near the 2 GiB that one array of bytes can hold


def read_parquet(path: Path, column: str | None = None, label: str | None = None) -> Source:
    """The images of parquet files, kept in memory as they are encoded.

    Files lie in ``path``, ``path/data`` or a folder of the split, and are called by the split:
    ``train-00000-of-00002.parquet``, ``train_0.parquet``, ``train/0000.parquet``. Where no file
    names a split, and for a single file, all are training images, from which splits are drawn.

    Args:
        path: the folder, or one file.
        column, label: the columns of images and labels; None finds them.

    Raises:
        InputError: no such files, several data sets side by side, no column of images, labels that
            are neither numbers nor names, or held-out labels that training lacks.
    """
    shards, skipped = _shards(existing(path, EXPECTED))
    parts, notes, classes, first = {}, skipped_text(skipped), None, None
    for split, files in shards.items():
        columns = find_columns(_schema(files[0]), str(path), column, label)
        part, found = _part(files, columns, classes, path, split)
        if split == "train":
            classes, first = found, columns
        elif part.labels is None and parts["train"].labels is not None:
            notes.append(f"{split} has no labels and is left out")
            continue
        elif part.labels is not None and classes is None and parts["train"].labels is not None:
            check_numbering(parts["train"].labels, part.labels, f"{path} ({split})")
        parts[split] = part
    names = set(_schema(shards["train"][0]).names) - {first.image, first.label}
    if unused := [name for name in names if name.lower() == "split"]:
        notes.append(
            f"column {unused[0]} is not used: the names of files say what is train or test"
        )
    return Source(parts, classes, [first.note(), *notes])


def _shards(path: Path) -> tuple[dict[str, list[Path]], Counter]:
    """The files of every split, training first, and what was passed over."""
    if path.is_file():
        return {"train": [path]}, Counter()
    files = [
        file
        for file in sorted(path.rglob("*.parquet"))
        if not any(map(is_hidden, file.relative_to(path).parts))
    ]
    if not files:
        raise InputError(f"{path} holds no .parquet files: expected train-*.parquet and so on")
    splits = {file: _split_of(file.relative_to(path)) for file in files}
    if not any(splits.values()):
        splits = dict.fromkeys(files, "train")
    if "train" not in splits.values():
        raise InputError(
            f"{path} holds no train-*.parquet, only {listed(file.name for file in files)}: "
            "expected shards train-*.parquet and val-*.parquet or test-*.parquet"
        )
    named = [file for file in files if splits[file]]
    sets = sorted({_without_split(file.relative_to(path)) for file in named})
    if len(sets) > 1:
        raise InputError(
            f"{path} holds several data sets, in {listed(sets)}: give one of these folders"
        )
    skipped = Counter({"files that name no split": len(files) - len(named)})
    shards = {split: [f for f in named if splits[f] == split] for split in ("train", "val", "test")}
    return {split: found for split, found in shards.items() if found}, +skipped


def _split_of(file: Path) -> str | None:
    """By the file's own name, or by that of the nearest folder which names a split."""
    names = (file.stem, *reversed(file.parts[:-1]))
    return next((split for name in names if (split := split_named(name))), None)


def _without_split(file: Path) -> str:
    """The folders of a file that name no split."""
    return "/".join(part for part in file.parts[:-1] if not split_named(part)) or "."


def _schema(file: Path) -> pa.Schema:
    try:
        return pq.read_schema(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise _broken(file, error) from error


def _broken(file: Path, error: Exception) -> InputError:
    return InputError(f"expected parquet files, and {file} cannot be read: {first_line(error)}")


class Batches:
    """The images of some files in memory, as they are encoded, and their labels.

    Calling it gives what holds the image of a row, as :func:`mimrefiner.data.images.to_pil` takes
    it.

    Args:
        files: read one after another.
        columns: which of their columns.
    """

    def __init__(self, files: list[Path], columns: Columns):
        wanted = [columns.image] if columns.label is None else [columns.image, columns.label]
        self.images, self.labels = [], []
        for file in files:
            for batch in _batches(file, wanted):
                self.images.append((_plain(batch.column(columns.image), file), file.parent))
                if columns.label is not None:
                    self.labels.append(batch.column(columns.label))
        self.ends = np.array(list(itertools.accumulate(len(part) for part, _ in self.images)))

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __call__(self, row: int):
        batch = int(np.searchsorted(self.ends, row, side="right"))
        column, folder = self.images[batch]
        cell = column[row - (self.ends[batch - 1] if batch else 0)]
        return image_of(cell.as_py(), column.type, folder)


_IN_MEMORY: weakref.WeakValueDictionary[tuple, Batches] = weakref.WeakValueDictionary()


def _shared(files: list[Path], columns: Columns) -> Batches:
    """The images of files, held once however many splits are made of them."""
    states = [(str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files]
    key = (*states, columns.image, columns.label, ROWS)
    found = _IN_MEMORY.get(key)
    if found is None:
        found = _IN_MEMORY[key] = Batches(files, columns)
    return found


def _batches(file: Path, wanted: list[str]) -> Iterator[pa.RecordBatch]:
    """The wanted columns of a file, :data:`ROWS` rows at a time."""
    try:
        with pq.ParquetFile(file) as opened:
            missing = [name for name in wanted if name not in opened.schema_arrow.names]
            if missing:
                raise InputError(f"{file} has no column {missing[0]}, unlike other files")
            yield from opened.iter_batches(ROWS, columns=wanted)
    except (pa.ArrowException, OSError) as error:
        raise _broken(file, error) from error


def _part(
    files: list[Path], columns: Columns, classes: list[str] | None, path: Path, split: str
) -> tuple[Part, list[str] | None]:
    images, labels, where = _shared(files, columns), None, f"{path} ({split})"
    if not len(images):
        raise InputError(f"{path} holds no images in {listed(file.name for file in files)}")
    if images.labels:
        labels, classes = numbers(_one_type(images.labels, where), columns, classes, where)
    return Part(images, np.arange(len(images)), labels, split), classes


def _plain(column: pa.Array, file: Path) -> pa.Array | pa.StructArray:
    """A column of images; bytes alone where no row gives a path in their place."""
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if kinds.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not holds_images(column.type):
        raise InputError(f"{file} has no images where other files do, but {column.type}")
    if kinds.is_struct(column.type) and not column.field("bytes").null_count:
        return column.field("bytes")
    return column


def _one_type(labels: list[pa.Array], where: str) -> pa.ChunkedArray:
    """Labels of shards whose numbers may differ in width, or be floats in some (of pandas)."""
    found = {part.type for part in labels}
    floats = any(map(kinds.is_floating, found))
    if len(found) > 1 and all(kinds.is_integer(x) or kinds.is_floating(x) for x in found):
        labels = [part.cast(pa.float64() if floats else pa.int64()) for part in labels]
    elif len(found) > 1:
        text = [
            part.dictionary_decode() if kinds.is_dictionary(part.type) else part for part in labels
        ]
        try:
            labels = [part.cast(pa.large_string()) for part in text if not _is_number(part.type)]
        except pa.ArrowException:
            labels = []
        if len(labels) < len(text):
            raise InputError(
                f"{where}: files differ in the type of labels: {listed(sorted(map(str, found)))}"
            )
    return pa.chunked_array(labels)


def _is_number(kind: pa.DataType) -> bool:
    return kinds.is_integer(kind) or kinds.is_floating(kind) or kinds.is_boolean(kind)


def image_of(value, kind: pa.DataType, folder: Path):
    """A cell of a table as :func:`mimrefiner.data.images.to_pil` takes it.

    Args:
        value: the cell as Python has it.
        kind: the type of its column.
        folder: where paths begin that stand in place of bytes.
    """
    if isinstance(value, dict) and value.get("bytes") is None and value.get("path"):
        return folder / value["path"]
    dtype = array_type(kind)
    return value if dtype is None else np.array(value, dtype=dtype)
