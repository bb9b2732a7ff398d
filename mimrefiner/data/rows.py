"""Rows of a data set that somebody else made: what an image is, and what a label."""

import contextlib
import numbers
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset

from mimrefiner.data.images import to_pil
from mimrefiner.errors import InputError

# Names of columns and keys, the likelier first
IMAGE_NAMES = (
    *("image", "img", "jpg", "jpeg", "png", "webp", "tif", "pixel_values", "pixels", "images"),
    *("picture", "photo", "image_bytes", "img_bytes", "bytes", "x"),
)
LABEL_NAMES = (
    *("label", "labels", "fine_label", "class", "cls", "target", "targets", "category", "y"),
    *("class_id", "label_id", "category_id", "class_label", "coarse_label"),
)
LARGEST = 2**63  # what 64 bits cannot hold
A_ROW = "(image, label) or {'image': ..., 'label': ...}"


def by_name(names: Iterable[str], preferred: Sequence[str]) -> str | None:
    """The name that comes first among the preferred ones, in any case; None if none does.

    >>> by_name(["coarse_label", "fine_label", "Img"], LABEL_NAMES)
    'fine_label'
    """
    found = [name for name in names if isinstance(name, str) and name.lower() in preferred]
    return min(found, key=lambda name: preferred.index(name.lower()), default=None)


def size_of(dataset) -> int:
    """The number of rows; InputError for what is no map-style data set."""
    # A stream inherits the method that gives rows, and may have a length
    tables = isinstance(dataset, Mapping | str | Path | IterableDataset) or hasattr(dataset, "iloc")
    if not tables and hasattr(dataset, "__getitem__"):
        with contextlib.suppress(TypeError):
            return len(dataset)
    raise InputError(
        f"expected a map-style data set, which has a length and gives row i as {A_ROW}, got "
        f"{type(dataset).__name__}: put its rows into a list, or load it with load_dataset"
    )


def row_of(dataset, i: int) -> tuple[Image.Image, int]:
    """Row ``i`` of any map-style data set, as an RGB image and a number, -1 without a label.

    Args:
        dataset: its rows are (image, label, ...), with whatever follows; dicts with an image and
            perhaps a label, by the usual names; or images alone. :func:`to_pil` says what an image
            is.
        i: the position, 0-based.

    Raises:
        InputError: something else; the message says what a row must be.

    >>> image, label = row_of([{"img": np.zeros((3, 8, 8), np.uint8), "fine_label": 7}], 0)
    >>> image.size, label
    ((8, 8), 7)
    """
    image, label = parts_of(dataset[i], i)
    return to_pil(image, f"image {i}"), number_of(label, i)


def parts_of(row, i: int) -> tuple[object, object]:
    """The image and the label of a row as they are; see :func:`row_of`. No label is -1."""
    if isinstance(row, Mapping):
        return _of_mapping(row, i)
    if isinstance(row, tuple | list) and len(row) > 1:
        return row[0], row[1]
    if isinstance(row, tuple | list) and row:
        return row[0], -1
    if _is_image(row) or isinstance(row, str | Path | bytes):
        return row, -1
    raise InputError(f"image {i}: expected a row {A_ROW}, got {type(row).__name__}")


def _of_mapping(row: Mapping, i: int) -> tuple[object, object]:
    images = [name for name, value in row.items() if _is_image(value)]
    image = by_name(row, IMAGE_NAMES) or (images[0] if len(images) == 1 else None)
    if image is None:
        keys = ", ".join(map(str, row)) or "nothing"
        raise InputError(f"image {i}: expected a row {A_ROW}, got one with {keys}")
    label = by_name((name for name in row if name != image), LABEL_NAMES)
    return row[image], -1 if label is None else row[label]


def _is_image(value) -> bool:
    if isinstance(value, Tensor | np.ndarray):
        return value.ndim > 1
    return isinstance(value, Image.Image)


def number_of(label, i: int) -> int:
    """The label of image ``i`` as a number: any whole one, of Python, NumPy or torch; None is -1.

    >>> number_of(np.int8(3), 0), number_of(2.0, 0), number_of(None, 0)
    (3, 2, -1)
    """
    if label is None:
        return -1
    if isinstance(label, Tensor | np.ndarray) and label.ndim < 2 and len(label.reshape(-1)) == 1:
        label = label.reshape(-1)[0].item()
    whole = isinstance(label, numbers.Integral | np.bool_)
    if whole or (isinstance(label, numbers.Real) and float(label).is_integer()):
        if abs(int(label)) < LARGEST:
            return int(label)
        raise InputError(f"image {i}: label {label} is too large: number the classes 0, 1, ...")
    what = f"class {label!r}" if isinstance(label, str) else _described(label)
    raise InputError(
        f"image {i}: expected a whole number as label (-1: none), got {what}: number the classes, "
        "the same way for training and test images"
    )


def _described(label) -> str:
    shape = getattr(label, "shape", None)
    if shape:
        return f"{type(label).__name__} of shape {tuple(shape)}"
    return f"{type(label).__name__} {label!r}"[:60]
