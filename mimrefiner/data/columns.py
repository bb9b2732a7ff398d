"""Which column holds the image and which the label, in parquet files, the hub's tables and rows."""

import json
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.types as kinds

from mimrefiner.data.rows import IMAGE_NAMES, LABEL_NAMES, by_name
from mimrefiner.data.sources import listed
from mimrefiner.errors import InputError


@dataclass(frozen=True)
class Columns:
    """The columns of a table that are used.

    Attributes:
        image: holds the images.
        label: holds the labels, or None.
        classes: the names of labels 0, 1, ... by the table's own metadata, or None.
        others: the columns that could be labels too.
    """

    image: str
    label: str | None
    classes: tuple[str, ...] | None = None
    others: tuple[str, ...] = ()

    def note(self) -> str:
        """What was taken, for a person."""
        if self.label is None:
            return f"column {self.image}"
        others = f" (there is {listed(self.others)}, too)" * bool(self.others)
        return f"columns {self.image} and {self.label}{others}"


def find_columns(
    schema: pa.Schema, where: str, column: str | None = None, label: str | None = None
) -> Columns:
    """The columns of images and labels, found by type, by the hub's metadata and by name.

    Args:
        schema: of the table; its metadata may hold what the hub's ``datasets`` library writes.
        where: what messages call the table.
        column, label: take these columns; None finds them, and the label "" stands for none.

    Raises:
        InputError: no column holds images, several may, or a column that was asked for is missing;
            the columns that are there are listed.

    >>> schema = pa.schema({"img": pa.binary(), "id": pa.int64(), "fine_label": pa.int64()})
    >>> find_columns(schema, "here").label
    'fine_label'
    """
    hub = _hub_features(schema)
    for name in (column, label):
        if name and name not in schema.names:
            raise InputError(f"{where} has no column {name}: there are {_described(schema)}")
    told = [name for name in schema.names if _kind(hub, name) == "Image"]
    images = told or [name for name in schema.names if holds_images(schema.field(name).type)]
    image = column or by_name(images, IMAGE_NAMES) or (images[0] if len(images) == 1 else None)
    if image is None or (column and not holds_images(schema.field(column).type)):
        raise InputError(
            f"{where}: expected a column of images, as encoded bytes, image{{bytes, path}} or "
            f"arrays, got {_described(schema)}: "
            + ("choose with column=NAME" if images else "give files that hold the images")
        )
    numbered = [name for name in schema.names if _kind(hub, name) == "ClassLabel"]
    possible = [name for name in schema.names if _holds_labels(schema.field(name).type)]
    found = by_name(numbered, LABEL_NAMES) or by_name(possible, LABEL_NAMES)
    found = found or (numbered[0] if len(numbered) == 1 else None)
    # A label of another type is refused by what reads it, rather than passed over
    found = found or by_name((name for name in schema.names if name != image), LABEL_NAMES[:4])
    found = found if label is None else label or None
    others = {name for name in numbered or possible if name.lower() in LABEL_NAMES} - {found}
    names = hub.get(found, {}).get("names") if found in numbered else None
    return Columns(image, found, None if names is None else tuple(names), tuple(sorted(others)))


def numbers(
    column: pa.ChunkedArray, columns: Columns, classes: list[str] | None, where: str
) -> tuple[np.ndarray | None, list[str] | None]:
    """Labels as numbers, and the class names they stand for.

    Args:
        column: the labels as they are: whole numbers, bools or strings.
        columns: what :func:`find_columns` found where they lie.
        classes: the names of the training set's labels, which a held-out one shares; None numbers
            strings in their order.
        where: what messages call the table.

    Returns:
        (images,) int64, or None where no image has a label; class names, or None.
    """
    if kinds.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if column.null_count == len(column):
        return None, classes
    is_text = kinds.is_string(column.type) or kinds.is_large_string(column.type)
    if is_text:
        values = column.to_pylist()
        named = set(values) - {None}
        classes = sorted(named) if classes is None else classes
        return _numbered(values, classes, where), classes
    labels = _whole(column, columns.label, where)
    if (labels < 0).all():  # how the hub marks withheld labels
        return None, classes
    labels = np.maximum(labels, -1)
    here = None if columns.classes is None else list(columns.classes)
    if here is not None and labels.max() >= len(here):
        raise InputError(f"{where}: label {labels.max()} is none of its {len(here)} classes")
    if here is None or classes is None or here == classes:
        return labels, classes or here
    known = labels >= 0  # the same names in another order
    labels[known] = _numbered([here[label] for label in labels[known]], classes, where)
    return labels, classes


def _whole(column: pa.ChunkedArray, name: str, where: str) -> np.ndarray:
    """Labels as int64, -1 where there is none; floats must be whole, as pandas leaves them."""
    floats = kinds.is_floating(column.type)
    try:
        if floats or kinds.is_integer(column.type) or kinds.is_boolean(column.type):
            labels = column.cast(pa.float64() if floats else pa.int64())
            labels = labels.fill_null(-1).to_numpy()
            if not floats or ((labels == np.rint(labels)) & (np.abs(labels) < 2**62)).all():
                return labels.astype(np.int64)
    except pa.ArrowInvalid as error:
        raise InputError(f"{where}: column {name} holds too large labels") from error
    found = "fractions" if floats else column.type
    raise InputError(
        f"{where}: column {name} must be whole numbers (-1: none) or class names, got {found}: "
        "convert it, or choose another with label=NAME (label= alone: no labels)"
    )


def _numbered(values: list[str | None], classes: list[str], where: str) -> np.ndarray:
    number = {name: i for i, name in enumerate(classes)} | {None: -1}
    if unknown := sorted(set(values) - number.keys()):
        raise InputError(f"{where} has classes that train has not: {listed(unknown)}")
    return np.array([number[value] for value in values], dtype=np.int64)


def _hub_features(schema: pa.Schema) -> dict:
    """What the hub's library says of columns, by name; {} where it wrote nothing."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: one for name, one in features.items() if isinstance(one, dict)}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _kind(hub: dict, name: str) -> str | None:
    return hub.get(name, {}).get("_type")


def holds_images(kind: pa.DataType) -> bool:
    """Whether a column of that type can hold images: encoded, or as numbers."""
    kind = _stored(kind)
    if kinds.is_struct(kind):
        names = {kind.field(i).name for i in range(kind.num_fields)}
        return "bytes" in names and _is_binary(kind.field("bytes").type)
    return _is_binary(kind) or _leaf(kind)[1] in (2, 3)


def _holds_labels(kind: pa.DataType) -> bool:
    kind = _stored(kind)
    text = kinds.is_string(kind) or kinds.is_large_string(kind)
    number = kinds.is_integer(kind) or kinds.is_floating(kind)
    return text or number or kinds.is_boolean(kind) or kinds.is_null(kind)


def _stored(kind: pa.DataType) -> pa.DataType:
    """What a dictionary, or a type of the hub's library, stores."""
    if isinstance(kind, pa.BaseExtensionType):
        return _stored(kind.storage_type)
    return kind.value_type if kinds.is_dictionary(kind) else kind


def _is_binary(kind: pa.DataType) -> bool:
    view = getattr(kinds, "is_binary_view", lambda kind: False)
    return (
        kinds.is_binary(kind)
        or kinds.is_large_binary(kind)
        or kinds.is_fixed_size_binary(kind)
        or view(kind)
    )


def _leaf(kind: pa.DataType) -> tuple[pa.DataType, int]:
    """What nested lists hold, and how deep they are nested."""
    kind, depth = _stored(kind), 0
    while kinds.is_list(kind) or kinds.is_large_list(kind) or kinds.is_fixed_size_list(kind):
        kind, depth = kind.value_type, depth + 1
    number = kinds.is_integer(kind) or kinds.is_floating(kind)
    return kind, depth if number else 0


def array_type(kind: pa.DataType) -> np.dtype | None:
    """The type of numbers in a column of nested lists; None for another column."""
    kind, depth = _leaf(kind)
    return np.dtype(kind.to_pandas_dtype()) if depth else None


def _described(schema: pa.Schema) -> str:
    """The columns with their types, as messages list them."""
    return listed((f"{field.name} ({str(field.type).split('<')[0]})" for field in schema), 12)
