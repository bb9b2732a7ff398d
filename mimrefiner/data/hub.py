"""Data sets of the Hugging Face hub, by the ``datasets`` library, which is an extra."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from mimrefiner.data.columns import find_columns, numbers
from mimrefiner.data.parquet import image_of
from mimrefiner.data.sources import Part, Source, check_numbering, listed, split_named
from mimrefiner.errors import InputError
from mimrefiner.files import first_line


def read_hub(
    name: str, config: str | None = None, column: str | None = None, label: str | None = None
) -> Source:
    """The splits of a data set of the hub, downloaded once into the hub's own cache.

    Args:
        name: as the hub has it, such as ``uoft-cs/cifar10``.
        config: which of its configurations, where there are several.
        column, label: the columns of images and labels; None finds them.

    Raises:
        InputError: the library is not installed, no network, no such data set, no images.
    """
    library = _library()
    try:
        tables = library.load_dataset(name, config)
    except Exception as error:
        if not _can_be_mended(error):
            raise
        raise InputError(
            f"hf:{name} could not be loaded ({type(error).__name__}: {first_line(error)}): check "
            "the name, give ,config=NAME where it has several configurations, or check the "
            "network; parquet:PATH reads files that were downloaded elsewhere"
        ) from error
    return _source(library, tables, f"hf:{name}", column, label)


def _library():
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            "hf:NAME needs the library datasets: pip install 'mimrefiner[hub]', or give "
            "parquet:PATH for files that were downloaded"
        ) from error
    return datasets


def _can_be_mended(error: Exception) -> bool:
    """Whether a name or the network is the reason; clients of the network have errors of their
    own.
    """
    foreign = type(error).__module__.partition(".")[0] in ("datasets", "huggingface_hub", "httpx")
    return foreign or isinstance(error, OSError | ValueError | RuntimeError)


def _source(library, tables, where: str, column: str | None, label: str | None) -> Source:
    """The sets of what the library loaded, {name: table}."""
    named = {name: split_named(str(name)) for name in tables}
    if "train" not in named.values():  # what there is, is what splits are drawn from
        named = {name: "train" if len(named) == 1 else split for name, split in named.items()}
    if "train" not in named.values():
        raise InputError(f"{where} holds no split train, only {listed(tables)}")
    parts, notes, classes, first = {}, [], None, None
    for split in ("train", "val", "test"):
        (called, *more) = [name for name in tables if named[name] == split] or [None]
        if more:
            raise InputError(f"{where}: several splits are called {split}: {listed(tables)}")
        if called is None:
            continue
        schema = tables[called].features.arrow_schema
        columns = find_columns(schema, f"{where} ({called})", column, label)
        loaded = _loaded(library, tables[called], columns, classes, f"{where} ({called})")
        part, found = replace(loaded[0], called=str(called)), loaded[1]
        if split == "train":
            classes, first = found, columns
        elif part.labels is None and parts["train"].labels is not None:
            notes.append(f"{split} has no labels and is left out")
            continue
        elif part.labels is not None and classes is None and parts["train"].labels is not None:
            check_numbering(parts["train"].labels, part.labels, f"{where} ({called})")
        parts[split] = part
    if others := [name for name in tables if named[name] is None]:
        notes.append(f"left out: {listed(others)}")
    return Source(parts, classes, [first.note(), *notes])


def _loaded(library, table, columns, classes, where: str) -> tuple[Part, list[str] | None]:
    labels = None
    if columns.label is not None:
        only = table.select_columns([columns.label]).with_format("arrow")[:]
        labels, classes = numbers(only.column(columns.label), columns, classes, where)
    images = table.select_columns([columns.image]).with_format(None)
    if isinstance(images.features[columns.image], library.Image):
        # Decoded here, by the rules of this package
        images = images.cast_column(columns.image, library.Image(decode=False))
    load = partial(_cell, images, columns.image)
    return Part(load, np.arange(len(table)), labels), classes


def _cell(table, column: str, row: int):
    kind = table.features.arrow_schema.field(column).type
    return image_of(table[int(row)][column], kind, Path())
