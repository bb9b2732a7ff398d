"""Labelled images by name or path, with splits that a seed fixes and that never share an image.

Splits are ``train``, ``val``, ``test`` and ``trainval`` (the first two together). Where a source
has an official held-out set, that is ``test``, and ``val`` is a tenth of the training images, drawn
per class. Recipes are chosen on ``val``, results reported on ``test``. ImageNet's folder ``val`` is
therefore ``test`` here, unless the source has a labelled ``test`` of its own.
"""

import functools
import hashlib
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Subset

from mimrefiner import distributed
from mimrefiner.data.catalogue import CATALOGUE, DOWNLOADED
from mimrefiner.data.folders import read_folder
from mimrefiner.data.images import to_pil
from mimrefiner.data.rows import number_of, parts_of, size_of
from mimrefiner.data.sources import Part, Source, existing_folder, listed
from mimrefiner.errors import InputError, one_of
from mimrefiner.files import ASSETS, data_folder, expanded

logger = logging.getLogger(__name__)

SPLITS = ("train", "val", "test", "trainval")
OPTIONS = ("column", "label", "config")


class ImageDataset:
    """Map-style data set of (RGB PIL image, int label).

    Args:
        name, split: what it was loaded as.
        load: gives what holds the image of a row of the source, as
            :func:`mimrefiner.data.images.to_pil` takes it; it can be pickled, for loader processes.
        labels: one for each image, or None where the source has none (then every label is -1).
        classes: class names, or None.
        seed: drew the split.
        length: number of images, where there are no labels.

    Attributes:
        rows: which images of the source these are, (images,).
        labels: (images,) int64, or None.
        drawn: how a part with few labels was chosen (:mod:`mimrefiner.data.subsets`); "" for none.
    """

    def __init__(
        self,
        name: str,
        split: str,
        load: Callable[[int], object],
        labels,
        classes=None,
        seed: int = 0,
        length: int | None = None,
    ):
        self.name, self.split, self.seed, self.classes = name, split, seed, classes
        self.labels = None if labels is None else np.asarray(labels, dtype=np.int64)
        self.rows = np.arange(len(labels) if length is None else length)
        self._load = load
        self._pixels = None
        self.drawn = ""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        row = int(self.rows[i])
        image = to_pil(self._load(row), f"{self.name} ({self.split}): image {row}")
        return image, -1 if self.labels is None else int(self.labels[i])

    def subset(self, rows: Sequence[int]) -> "ImageDataset":
        """The images at positions ``rows``, in that order."""
        rows = np.asarray(rows, dtype=np.int64)
        part = object.__new__(ImageDataset)
        part.__dict__.update(self.__dict__)
        part.rows = self.rows[rows]
        part.labels = None if self.labels is None else self.labels[rows]
        return part

    def take(self, n: int | None, seed: int = 0) -> "ImageDataset":
        """At most ``n`` images, the same share of every class; None takes all of them."""
        if n is not None and n < 1:
            raise InputError(f"expected a number of images >= 1, or None for all, got {n}")
        if n is None or n >= len(self):
            return self
        return self.subset(stratified_split(self.labels, len(self), n, seed)[0])

    def in_memory(self) -> "ImageDataset":
        """The same images, decoded once and kept as uint8, which takes 3 bytes a pixel."""
        images = [np.asarray(image) for image, _ in self]
        place = {int(row): i for i, row in enumerate(self.rows)}
        if len({image.shape for image in images}) == 1:
            images = np.stack(images)
        kept = self.subset(range(len(self)))
        kept._load = partial(_kept, images, place)
        kept._pixels = (images, place) if isinstance(images, np.ndarray) else None
        return kept

    def file(self, i: int) -> Path | None:
        """The file that image ``i`` is in; None where it has no file of its own."""
        held = self._load(int(self.rows[i]))
        return held if isinstance(held, Path) else None

    def file_name(self, i: int) -> str | None:
        """The name of the file that image ``i`` is in; None where it has no file of its own."""
        file = self.file(i)
        return None if file is None else file.name

    @property
    def pixels(self) -> np.ndarray | None:
        """(images, height, width, 3) uint8 where all are in memory and of one size, else None."""
        if self._pixels is None:
            return None
        images, place = self._pixels
        return images[[place[int(row)] for row in self.rows]]


def load_dataset(
    name_or_path: str,
    *,
    split: str,
    seed: int = 0,
    column: str | None = None,
    label: str | None = None,
) -> ImageDataset:
    """Load a data set by name or path. What was found is logged once, with splits and classes.

    Args:
        name_or_path: ``digits`` (scikit-learn's, 8x8 resized to 32x32) and ``fruit64`` (1,393
            photos of fruit at 64x64, 14 kinds) come with the package. torchvision downloads
            ``fashion_mnist``, ``cifar10``, ``cifar100`` and ``stl10`` into ``$MIMREFINER_DATA``,
            default ``~/.cache/mimrefiner/data``; ``cifar10:PATH`` reads what is there.
            ``imagefolder:PATH`` holds ``PATH/train/CLASS/IMAGE`` or ``PATH/CLASS/IMAGE``;
            ``parquet:PATH`` holds files ``train-*.parquet`` and so on, which are kept in memory as
            encoded bytes; ``hf:NAME`` is one of the Hugging Face hub. The guide to data says which
            folders and files are understood.
        split: ``train``, ``val``, ``test`` or ``trainval``, see the module's first lines.
        seed: draws the splits that the source does not have.
        column, label: the columns of images and labels, for ``parquet:`` and ``hf:``; None finds
            them, and the label "" stands for none. In the name they are
            ``parquet:PATH,column=NAME,label=NAME``.

    Raises:
        InputError: an unknown name or split, a path that is missing, empty or of another layout, or
            no network.

    >>> import mimrefiner as mr
    >>> digits = mr.load_dataset("digits", split="val")
    >>> image, label = digits[0]
    >>> len(digits), image.size, label
    (126, (32, 32), 4)
    """
    if not isinstance(name_or_path, str):
        raise InputError(
            f"expected a data set by name, such as digits or imagefolder:PATH, got {name_or_path!r}"
        )
    if seed < 0:
        raise InputError(f"seed must be >= 0, got {seed}")
    one_of("split", split, SPLITS)
    name, options = _options_of(name_or_path)
    options |= {k: v for k, v in {"column": column, "label": label}.items() if v is not None}
    parts = _split(_read(name, options), name_or_path, seed)
    parts[split].split = split
    return parts[split]


def _options_of(name: str) -> tuple[str, dict[str, str]]:
    """A name without the options at its end, and these.

    >>> _options_of("hf:uoft-cs/cifar100,label=coarse_label")
    ('hf:uoft-cs/cifar100', {'label': 'coarse_label'})
    """
    options = {}
    while match := re.search(rf",({'|'.join(OPTIONS)})=([^,]*)$", name):
        options[match[1]], name = match[2], name[: match.start()]
    return name, options


def _read(name: str, options: dict[str, str]) -> Source:
    """The source of a name or path."""
    kind, colon, path = name.partition(":")
    known = {"parquet": ("column", "label"), "hf": OPTIONS}.get(kind, ())
    if unknown := [option for option in options if option not in known]:
        raise InputError(
            f"{name} takes no {unknown[0]}: "
            + (f"expected {', '.join(known)}" if known else "parquet:PATH and hf:NAME do")
        )
    if kind == "imagefolder" and path:
        return read_folder(expanded(path))
    # Imported here, like pyarrow elsewhere: other data sets need none
    if kind == "parquet" and path:
        from mimrefiner.data.parquet import read_parquet

        return read_parquet(expanded(path), **options)
    if kind == "hf" and path:
        from mimrefiner.data.hub import read_hub

        return read_hub(path, **options)
    if kind in DOWNLOADED and (path or not colon):
        return _downloaded(kind, expanded(path) if path else None)
    if name == "digits":
        return _digits()
    if name == "fruit64":
        return _fruit64()
    hint = ""
    if expanded(name).exists():
        is_parquet = name.endswith(".parquet") or any(expanded(name).glob("*.parquet"))
        hint = f"; for the path give {'parquet' if is_parquet else 'imagefolder'}:{name}"
    raise InputError(f"unknown data set {name!r}: choose one of {', '.join(CATALOGUE)}{hint}")


def short_name(data: str) -> str:
    """The name of a data set without the way to its folder, as result rows carry it.

    >>> short_name("imagefolder:/data/tiny-imagenet"), short_name("digits")
    ('tiny-imagenet', 'digits')
    """
    kind, _, path = data.partition(":")
    return kind if kind in DOWNLOADED else Path(path).name or data


def train_and_test(data, seed: int = 0) -> tuple:
    """The training and the test images that a probe was given.

    Args:
        data: what :func:`load_dataset` takes; (train, test); or ``{"train": ..., "test": ...}``.
        seed: draws the splits of a named data set.

    Returns:
        Two map-style data sets of (image, label).

    Raises:
        InputError: one data set, three, a path or anything else.

    >>> train, test = train_and_test("digits")
    >>> len(train), len(test)
    (1258, 539)
    """
    if isinstance(data, str):
        return tuple(load_dataset(data, split=split, seed=seed) for split in ("trainval", "test"))
    if isinstance(data, Mapping) and set(data) == {"train", "test"}:
        data = data["train"], data["test"]
    if isinstance(data, tuple | list) and len(data) == 2:
        for part in data:
            size_of(part)  # an InputError for what is no data set
        return tuple(data)
    raise InputError(
        "expected training and test images, as (train, test), {'train': ..., 'test': ...} or a "
        f"name such as imagefolder:PATH, got {_given(data)}"
    )


def numbered_together(train, test) -> bool:
    """Whether labels mean the same in both sets by what these say of themselves.

    They do if they were loaded by one name, or if their class names are known and equal.

    >>> numbered_together(load_dataset("digits", split="train"), [])
    False
    """
    parts = []
    for part in (train, test):
        while isinstance(part, Subset):
            part = part.dataset
        parts.append(part)
    if all(isinstance(part, ImageDataset) for part in parts) and parts[0].name == parts[1].name:
        return True
    names = [getattr(part, "classes", None) for part in parts]
    known = all(isinstance(part, Sequence) for part in names)
    return known and list(names[0]) == list(names[1])


def _given(data) -> str:
    """What came in place of training and test images."""
    if isinstance(data, Path):
        return f"the path {data}: write imagefolder:{data} or parquet:{data}, as text"
    if isinstance(data, Mapping):
        return f"{type(data).__name__} with {listed(data) or 'nothing'}"
    try:
        return f"{type(data).__name__} of length {len(data)}"
    except TypeError:
        return type(data).__name__


def data_hash(dataset, images: int = 64) -> str:
    """SHA-256 of what a map-style data set holds, wherever its files lie.

    Its name without a path, its rows and labels where it lists them, and the pixels of about
    ``images`` images that are spread evenly over it (with their labels, where it lists none).
    """
    name, labels = str(getattr(dataset, "name", "")), _whole(getattr(dataset, "labels", None))
    total, rows = size_of(dataset), _whole(getattr(dataset, "rows", None))
    digest = hashlib.sha256(f"{name.partition(':')[0]} {total}".encode())
    for numbers in (rows, labels):
        if numbers is not None:
            digest.update(numbers.tobytes())
    for i in range(0, total, max(1, total // images)):
        image, label = parts_of(dataset[i], i)
        pixels = isinstance(image, Image.Image | np.ndarray | Tensor)
        digest.update(np.asarray(image if pixels else to_pil(image, f"image {i}")).tobytes())
        label = number_of(label, i)
        if labels is None and label != -1:
            digest.update(str(label).encode())
    return digest.hexdigest()


def _whole(values) -> np.ndarray | None:
    """Whole numbers as int64; None for what somebody else's data set has under that name."""
    try:
        return None if values is None else np.asarray(values, dtype=np.int64)
    except (ValueError, TypeError):
        return None


def stratified_split(
    labels: np.ndarray | None, total: int, n: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw ``n`` of ``total`` images, the same share of every class: positions (chosen, rest).

    Every class is shuffled, and its images are spread evenly over 0..1; the ``n`` smallest places
    are chosen. Both lists of positions are sorted.

    >>> chosen, rest = stratified_split(np.array([0, 0, 0, 0, 1, 1]), 6, 3, seed=0)
    >>> chosen.tolist(), rest.tolist()
    ([2, 3, 5], [0, 1, 4])
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(total)
    place = np.empty(total)
    groups = np.zeros(total, dtype=np.int64) if labels is None else np.asarray(labels)
    for group in np.unique(groups):
        members = order[groups[order] == group]
        place[members] = (np.arange(len(members)) + rng.random()) / len(members)
    by_place = np.argsort(place, kind="stable")
    return np.sort(by_place[:n]), np.sort(by_place[n:])


def _split(source: Source, name: str, seed: int) -> dict[str, ImageDataset]:
    """All splits of a source, and a line that says what they are, once."""
    sets = {
        called: _dataset(part, name, called, source.classes, seed)
        for called, part in source.parts.items()
    }
    splits, drawn = _complete(sets, seed)
    origin = dict.fromkeys(drawn, " (drawn from train)")
    if len(sets) == 2:  # whatever the source calls it, it is the test set
        (called,) = (part.called for name, part in source.parts.items() if name != "train")
        origin["test"] = f" (its {called})" * (called.lower() not in ("", "test"))
    counts = [f"{len(splits[s]):,} {s}{origin.get(s, '')}" for s in ("train", "val", "test")]
    _tell("; ".join([f"{name}: {', '.join(counts)} images", _classes(splits), *source.notes]))
    return splits


def _dataset(part: Part, name: str, split: str, classes, seed: int) -> ImageDataset:
    data = ImageDataset(name, split, part.load, part.labels, classes, seed, len(part.rows))
    data.rows = part.rows
    return data


def _complete(sets: dict[str, ImageDataset], seed: int) -> tuple[dict[str, ImageDataset], set]:
    """The four splits of a source with one to three sets, and the names of those that are drawn.

    The only held-out set is ``test``. A tenth of the training images is drawn as ``val``; before
    that, 30 % as ``test`` if there is none.
    """
    train, val, test = sets["train"], sets.get("val"), sets.get("test")
    if val is not None and test is not None:
        labels = None if train.labels is None else np.concatenate([train.labels, val.labels])
        load = partial(_of_two, train._load, len(train), val._load)
        both = len(train) + len(val)
        whole = ImageDataset(train.name, "trainval", load, labels, train.classes, seed, both)
        return {**sets, "trainval": whole}, set()
    drawn, test = {"val"}, val if test is None else test
    if test is None:
        drawn.add("test")
        held, rest = stratified_split(train.labels, len(train), round(0.3 * len(train)), seed)
        train, test = train.subset(rest), train.subset(held)
    n = max(1, round(0.1 * len(train)))
    chosen, rest = stratified_split(train.labels, len(train), n, seed + 1)
    part, val = train.subset(rest), train.subset(chosen)
    return {"train": part, "val": val, "trainval": train, "test": test}, drawn


def _classes(splits: dict[str, ImageDataset]) -> str:
    """How many classes there are, and the first of their names."""
    whole = splits["trainval"]
    if whole.labels is None:
        return "no labels"
    numbers = np.unique(whole.labels[whole.labels >= 0])
    names = numbers if whole.classes is None else whole.classes
    text = f"{len(names)} class{'es' * (len(names) != 1)}"
    return text if whole.classes is None else f"{text}: {listed(names)}"


@functools.cache
def _tell(text: str) -> None:
    """Log a line, once in a process and by the first of several."""
    if distributed.rank() == 0:
        logger.info("%s", text)


def _digits() -> Source:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    load = partial(_digit, np.round(bunch.images * (255 / 16)).astype(np.uint8))
    labels = bunch.target.astype(np.int64)
    return Source(
        {"train": Part(load, np.arange(len(labels)), labels)}, [str(i) for i in range(10)]
    )


def _fruit64() -> Source:
    """The source's test set is kept; its 57 validation photos, without three classes, train."""
    import pyarrow.parquet as pq

    table = pq.read_table(ASSETS / "fruit64.parquet")
    classes = table.schema.metadata[b"classes"].decode().split(",")
    encoded = table["image"].combine_chunks().field("bytes")
    labels = table["label"].to_numpy().astype(np.int64)
    held = table["split"].to_numpy(zero_copy_only=False) == "test"
    parts = {
        split: Part(partial(_encoded, encoded), rows, labels[rows])
        for split, rows in (("train", np.flatnonzero(~held)), ("test", np.flatnonzero(held)))
    }
    return Source(parts, classes)


def _downloaded(name: str, path: Path | None) -> Source:
    """One of torchvision's data sets, downloaded if no ``path`` says where it lies."""
    import torchvision.datasets

    builder = getattr(torchvision.datasets, DOWNLOADED[name])
    own = getattr(builder, "base_folder", builder.__name__)  # cifar-10-batches-py
    root = data_folder()
    if path is not None:
        root = existing_folder(path, f"the folder that holds {own}")
        root = root.parent if root.resolve().name == own else root

    def fetch(train: bool):
        part = {"split": "train" if train else "test"} if name == "stl10" else {"train": train}
        source = builder(str(root), download=path is None, **part)
        labels = np.asarray(source.labels if name == "stl10" else source.targets, dtype=np.int64)
        part = Part(partial(_first, source), np.arange(len(labels)), labels)
        return part, getattr(source, "classes", None)

    try:
        (train, classes), (test, _) = fetch(True), fetch(False)
    except (OSError, RuntimeError) as error:
        if path is not None:
            why = "files are missing there, or have other checksums than the original ones"
            why = why if "download=True" in str(error) else str(error)
            raise InputError(
                f"{path} does not hold {name} as torchvision has it, the folder {own}: {why}"
            ) from error
        raise InputError(
            f"{name} is not in {root} and could not be downloaded ({error}): check the network, "
            f"give {name}:PATH where it lies elsewhere, or use the embedded data set digits"
        ) from error
    return Source({"train": train, "test": test}, classes and list(classes))


# What a row holds: functions of the module, which loader processes can be sent


def _kept(images: Sequence[np.ndarray], place: dict[int, int], row: int) -> np.ndarray:
    return images[place[row]]


def _digit(pixels: np.ndarray, row: int) -> Image.Image:
    return Image.fromarray(pixels[row]).resize((32, 32), Image.Resampling.BICUBIC)


def _encoded(images: Sequence, row: int) -> bytes:
    return images[row].as_py()


def _first(source: Sequence, row: int):
    return source[row][0]


def _of_two(first: Callable, n: int, second: Callable, row: int):
    return first(row) if row < n else second(row - n)
