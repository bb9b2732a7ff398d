"""Labelled images by name or path, with splits that are fixed by a seed and never share an image.

Splits are ``train``, ``val``, ``test`` and ``trainval`` (the first two together). Where a source
has an official held-out set, that is ``test``, and ``val`` is a tenth of the training images, drawn
per class. Recipes are chosen on ``val``, results reported on ``test``. ImageNet's folder ``val`` is
therefore ``test`` here, unless the source has a labelled ``test`` of its own.
"""

import hashlib
import io
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from mimrefiner.errors import InputError
from mimrefiner.files import ASSETS, data_folder

SPLITS = ("train", "val", "test", "trainval")
DOWNLOADED = {
    "fashion_mnist": "FashionMNIST",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "stl10": "STL10",
}
HALF_GREY = 0.5 / 255
IMAGE_ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"}


class ImageDataset(Dataset):
    """Map-style data set of (RGB PIL image, int label).

    Attributes:
        name, split: what it was loaded as.
        labels: (images,) int64, or None where the source has none (then every label is -1).
        classes: class names, or None.
        seed: of the split.
    """

    def __init__(
        self,
        name: str,
        split: str,
        load: Callable[[int], Image.Image],
        labels,
        classes=None,
        seed: int = 0,
        length=None,
    ):
        self.name, self.split, self.seed, self.classes = name, split, seed, classes
        self.labels = None if labels is None else np.asarray(labels, dtype=np.int64)
        self.rows = np.arange(len(labels) if length is None else length)
        self._load = load
        self._pixels = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        row = int(self.rows[i])
        try:
            image = self._load(row).convert("RGB")
        except InputError:  # it names the file
            raise
        except (
            OSError,
            SyntaxError,
            ValueError,
        ) as error:  # Pillow's words for bytes that are no image
            raise InputError(
                f"{self.name} ({self.split}): image {row} cannot be decoded: {error}"
            ) from error
        return image, -1 if self.labels is None else int(self.labels[i])

    def subset(self, rows: Sequence[int]) -> "ImageDataset":
        """The images at positions ``rows``, in that order."""
        part = object.__new__(ImageDataset)
        part.__dict__.update(self.__dict__)
        part.rows = self.rows[np.asarray(rows, dtype=np.int64)]
        part.labels = None if self.labels is None else self.labels[np.asarray(rows, dtype=np.int64)]
        return part

    def in_memory(self) -> "ImageDataset":
        """The same images, decoded once and kept as uint8: for data sets that fit (3 bytes a
        pixel).
        """
        images = [np.asarray(image) for image, _ in self]
        place = {int(row): i for i, row in enumerate(self.rows)}
        if len({image.shape for image in images}) == 1:
            images = np.stack(images)
        kept = self.subset(range(len(self)))
        kept._load = partial(_kept, images, place)
        kept._pixels = (images, place) if isinstance(images, np.ndarray) else None
        return kept

    @property
    def pixels(self) -> np.ndarray | None:
        """(images, height, width, 3) uint8 of images of one size that are in memory
        (:meth:`in_memory`), else None.
        """
        if self._pixels is None:
            return None
        images, place = self._pixels
        return images[[place[int(row)] for row in self.rows]]

    def take(self, n: int | None, seed: int = 0) -> "ImageDataset":
        """At most ``n`` images, the same share of every class, chosen by ``seed``; all of them for
        None.
        """
        if n is not None and n < 1:
            raise InputError(f"expected a number of images >= 1, or None for all, got {n}")
        if n is None or n >= len(self):
            return self
        return self.subset(stratified_split(self.labels, len(self), n, seed)[0])


def load_dataset(name_or_path: str, *, split: str, seed: int = 0) -> ImageDataset:
    """Load a data set.

    Args:
        name_or_path: ``digits`` (scikit-learn's, 8x8 resized to 32x32) and ``fruit64`` (1,393
            photos of fruit at 64x64, 14 kinds) come with the package; ``fashion_mnist``,
            ``cifar10``, ``cifar100``, ``stl10`` (downloaded by torchvision into
            ``$MIMREFINER_DATA``, default ``~/.cache/mimrefiner/data``), ``imagefolder:PATH``
            (``PATH/train/CLASS/IMAGE`` or ``PATH/CLASS/IMAGE``) or ``parquet:PATH`` (files
            ``train-*.parquet`` and so on with columns ``image{bytes}`` and ``label``; held in
            memory as encoded bytes).
        split: ``train``, ``val``, ``test`` or ``trainval``, see the module's first lines.
        seed: of the drawn splits.

    Raises:
        InputError: unknown name or split, a path that is missing, empty or of another layout, or no
            network.
    """
    if not isinstance(name_or_path, str):
        raise InputError(
            f"expected a data set by name, such as digits or imagefolder:PATH, got {name_or_path!r}"
        )
    if seed < 0:
        raise InputError(f"seed must be >= 0, got {seed}")
    if split not in SPLITS:
        raise InputError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    kind, _, path = name_or_path.partition(":")
    if kind == "imagefolder" and path:
        return _image_folder(Path(path).expanduser(), split, seed)
    if kind == "parquet" and path:
        return _parquet(Path(path).expanduser(), split, seed)
    if name_or_path == "digits":
        return _digits(split, seed)
    if name_or_path == "fruit64":
        return _fruit64(split, seed)
    if name_or_path in DOWNLOADED:
        return _torchvision_dataset(name_or_path, split, seed)
    names = ", ".join(["digits", "fruit64", *DOWNLOADED])
    raise InputError(
        f"unknown data set {name_or_path!r}: choose one of {names}, imagefolder:PATH or parquet:PATH"
    )


def short_name(data: str) -> str:
    """The name of a data set without the way to its folder, as result rows carry it."""
    return Path(data.partition(":")[2]).name or data


def data_hash(dataset: Dataset, images: int = 64) -> str:
    """SHA-256 of what a map-style data set holds, judged by a sample of its pixels.

    Args:
        dataset: (image, label); an :class:`ImageDataset` also gives its name and rows, and every
            data set with the attribute ``labels`` gives all of them.
        images: how many images, spread evenly over the data set, give their pixels.

    >>> pixels = np.zeros((2, 8, 8, 3), np.uint8)
    >>> data_hash(list(zip(pixels, (0, 1)))) == data_hash(list(zip(pixels, (0, 0))))
    False
    """
    own = isinstance(dataset, ImageDataset)
    name = dataset.name.partition(":")[0] if own else type(dataset).__name__
    digest = hashlib.sha256(f"{name} {len(dataset)}".encode())
    for numbers in (dataset.rows if own else None, getattr(dataset, "labels", None)):
        if numbers is not None:
            digest.update(np.asarray(numbers, dtype=np.int64).tobytes())
    for i in range(0, len(dataset), max(1, len(dataset) // images)):
        image, label = dataset[i]
        digest.update(np.asarray(image).tobytes())
        digest.update(b"" if hasattr(dataset, "labels") else str(int(label)).encode())
    return digest.hexdigest()


def stratified_split(
    labels: np.ndarray | None, total: int, n: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Positions (chosen, rest), both sorted: ``n`` of ``total`` images, the same share of every
    class, drawn by ``seed``.

    Every class is shuffled, and its images are spread evenly over 0..1; the ``n`` smallest places
    are chosen.
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


def _select(train: ImageDataset, test: ImageDataset | None, split: str, seed: int) -> ImageDataset:
    """Draw ``val`` from ``train`` (and ``test`` too where there is none: 30 % test, then a tenth
    validation).
    """
    if test is None:
        held, rest = stratified_split(train.labels, len(train), round(0.3 * len(train)), seed)
        train, test = train.subset(rest), train.subset(held)
    val, rest = stratified_split(
        train.labels, len(train), max(1, round(0.1 * len(train))), seed + 1
    )
    part = {"train": train.subset(rest), "val": train.subset(val), "trainval": train, "test": test}[
        split
    ]
    part.split = split
    return part


def _digits(split: str, seed: int) -> ImageDataset:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    return _select(
        ImageDataset(
            "digits",
            split,
            partial(_digit, pixels),
            bunch.target,
            [str(i) for i in range(10)],
            seed,
        ),
        None,
        split,
        seed,
    )


def _fruit64(split: str, seed: int) -> ImageDataset:
    """The source's test set is kept; its validation set of 57 photos lacks three classes and joins
    the training photos.
    """
    import pyarrow.parquet as pq

    table = pq.read_table(ASSETS / "fruit64.parquet")
    classes = table.schema.metadata[b"classes"].decode().split(",")
    encoded, labels = table["image"].combine_chunks().field("bytes"), table["label"].to_numpy()
    whole = ImageDataset("fruit64", split, partial(_encoded, encoded), labels, classes, seed)
    held = table["split"].to_numpy(zero_copy_only=False) == "test"
    return _select(
        whole.subset(np.flatnonzero(~held)), whole.subset(np.flatnonzero(held)), split, seed
    )


def _torchvision_dataset(name: str, split: str, seed: int) -> ImageDataset:
    import torchvision.datasets

    root = data_folder()
    builder = getattr(torchvision.datasets, DOWNLOADED[name])

    def fetch(train: bool) -> ImageDataset:
        part = {"split": "train" if train else "test"} if name == "stl10" else {"train": train}
        source = builder(str(root), download=True, **part)
        labels = source.labels if name == "stl10" else source.targets
        return ImageDataset(
            name, split, partial(_of_source, source), labels, getattr(source, "classes", None), seed
        )

    try:
        return _select(fetch(True), fetch(False), split, seed)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"{name} is not in {root} and could not be downloaded ({error}): check the network, put the files there, "
            f"or use the embedded data set digits"
        ) from error


def _existing(path: Path) -> Path:
    if not path.exists():
        raise InputError(f"{path} does not exist: expected a folder of images")
    if not path.is_dir():
        raise InputError(f"{path} is a file: expected a folder")
    return path


def _image_folder(path: Path, split: str, seed: int) -> ImageDataset:
    folders = {f.name for f in _existing(path).iterdir() if f.is_dir()}
    if "train" not in folders:
        return _select(_folder_part(path, None, split, seed), None, split, seed)
    train = _folder_part(path / "train", None, split, seed)
    names = [name for name in ("val", "test") if name in folders]
    # Images without classes, as ImageNet's
    if "test" in names and not any(f.is_dir() for f in (path / "test").iterdir()):
        names.remove("test")
    official = {name: _folder_part(path / name, train.classes, split, seed) for name in names}
    if len(official) == 2:
        return _official(train, official, split)
    return _select(train, next(iter(official.values()), None), split, seed)


def _official(train: ImageDataset, parts: dict[str, ImageDataset], split: str) -> ImageDataset:
    """The splits of a source that has all three."""
    if split in parts:
        return parts[split]
    if split == "train":
        return train
    val = parts["val"]
    labels = None if train.labels is None else np.concatenate([train.labels, val.labels])
    load = partial(_of_two, train._load, len(train), val._load)
    return ImageDataset(
        train.name, split, load, labels, train.classes, train.seed, len(train) + len(val)
    )


def _folder_part(path: Path, classes: list[str] | None, split: str, seed: int) -> ImageDataset:
    """One folder of class folders. ``classes`` are the training ones, of which a held-out part may
    lack some.
    """
    here = sorted(f.name for f in path.iterdir() if f.is_dir())
    classes = here if classes is None else classes
    if unknown := [name for name in here if name not in classes]:
        names = ", ".join(unknown[:5]) + ", ..." * (len(unknown) > 5)
        raise InputError(
            f"{path} must hold one folder per class, named as in {path.parent / 'train'}, which has no {names}"
        )
    files, labels = [], []
    for name in here:
        found = sorted(f for f in (path / name).rglob("*") if f.suffix.lower() in IMAGE_ENDINGS)
        files += found
        labels += [classes.index(name)] * len(found)
    if not files:
        raise InputError(
            f"{path} holds no images: expected {path}/CLASS/IMAGE.jpg (or .png, .webp, ...)"
        )
    return ImageDataset(f"imagefolder:{path}", split, partial(_file, files), labels, classes, seed)


# How image ``row`` of a source is read: functions of the module, so that data sets can be sent to
# loader processes.


def _kept(images: Sequence[np.ndarray], place: dict[int, int], row: int) -> Image.Image:
    return Image.fromarray(images[place[row]])


def _digit(pixels: np.ndarray, row: int) -> Image.Image:
    return Image.fromarray(pixels[row]).resize((32, 32), Image.Resampling.BICUBIC)


def _encoded(images: Sequence, row: int) -> Image.Image:
    return Image.open(io.BytesIO(images[row].as_py()))


def _of_source(source: Dataset, row: int) -> Image.Image:
    return source[row][0]


def _of_two(first: Callable, n: int, second: Callable, row: int) -> Image.Image:
    return first(row) if row < n else second(row - n)


def _file(files: list[Path], row: int) -> Image.Image:
    return _open(files[row])


def _open(file: Path) -> Image.Image:
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{file} cannot be decoded as an image: {error}") from error


def _parquet(path: Path, split: str, seed: int) -> ImageDataset:
    prefixes = {"train": ("train",), "val": ("val", "validation"), "test": ("test",)}
    files = {
        part: sorted(
            f
            for f in _existing(path).glob("*.parquet")
            if f.name.split("-")[0].split(".")[0] in names
        )
        for part, names in prefixes.items()
    }
    if not files["train"]:
        raise InputError(
            f"{path} holds no train-*.parquet: expected shards train-*.parquet and val-*.parquet or test-*.parquet"
        )
    train = _parquet_part(path, files["train"], split, seed)
    official = {
        part: _parquet_part(path, files[part], split, seed)
        for part in ("val", "test")
        if files[part]
    }
    official = {
        part: data
        for part, data in official.items()
        if data.labels is not None or train.labels is None
    }
    if len(official) == 2:
        return _official(train, official, split)
    return _select(train, next(iter(official.values()), None), split, seed)


def _parquet_part(path: Path, files: list[Path], split: str, seed: int) -> ImageDataset:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pa.concat_tables([pq.read_table(file) for file in files])
        if not pa.types.is_struct(table["image"].type):
            raise TypeError(f"column image is {table['image'].type}")
        encoded = table["image"].combine_chunks().field("bytes") if len(table) else []
    except (pa.ArrowInvalid, KeyError, OSError, TypeError) as error:
        raise InputError(
            f"{path}: expected parquet files with columns image{{bytes, path}} and label: {error}"
        ) from error
    labels = table["label"] if "label" in table.column_names else None
    if labels is not None:
        if labels.null_count or not pa.types.is_integer(labels.type):
            found = (
                f"{labels.null_count} of {len(labels)} missing"
                if labels.null_count
                else f"{labels.type}"
            )
            raise InputError(
                f"{path}: column label must be whole numbers (-1: none), got {found}: convert it, or leave it out"
            )
        labels = labels.to_numpy()
    if labels is not None and (labels < 0).all():  # the hub's mark for withheld labels
        labels = None
    if not len(encoded):
        raise InputError(f"{path} holds no images in {', '.join(file.name for file in files)}")
    return ImageDataset(
        f"parquet:{path}", split, partial(_encoded, encoded), labels, None, seed, len(encoded)
    )


def to_pil(image) -> Image.Image:
    """An RGB PIL image from a PIL image, a uint8 array (height, width[, 3]) or a tensor (3, height,
    width) in 0..1 or uint8.
    """
    if isinstance(image, Tensor):
        if image.dtype != torch.uint8:
            low, high = image.min().item(), image.max().item()
            # What rounding leaves is fine; also says no to NaN
            if not (low > -HALF_GREY and high < 1 + HALF_GREY):
                raise InputError(
                    f"expected an image tensor in 0..1 or of uint8, got {low:.3g} to {high:.3g}: do not normalise it"
                )
            image = (image.clamp(0, 1) * 255).round().to(torch.uint8)
        image = image.permute(1, 2, 0).squeeze(-1).cpu().numpy()
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise InputError(
                f"expected an image array of uint8, got {image.dtype}: scale it to 0..255"
            )
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise InputError(
            f"expected a PIL image, a uint8 array or a tensor, got {type(image).__name__}"
        )
    return image.convert("RGB")
