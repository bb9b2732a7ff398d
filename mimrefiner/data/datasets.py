"""Labelled images by name or path, with splits that a seed fixes and that never share an image.

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
from PIL import Image

from mimrefiner.data.catalogue import CATALOGUE, DOWNLOADED
from mimrefiner.errors import InputError, one_of
from mimrefiner.files import ASSETS, data_folder

SPLITS = ("train", "val", "test", "trainval")
IMAGE_ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"}


class ImageDataset:
    """Map-style data set of (RGB PIL image, int label).

    Args:
        name, split: what it was loaded as.
        load: gives the image of a row of the source; it can be pickled, for loader processes.
        labels: one for each image, or None where the source has none (then every label is -1).
        classes: class names, or None.
        seed: drew the split.
        length: number of images, where there are no labels.

    Attributes:
        rows: which images of the source these are, (images,).
        labels: (images,) int64, or None.
    """

    def __init__(
        self,
        name: str,
        split: str,
        load: Callable[[int], Image.Image],
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

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        row = int(self.rows[i])
        try:
            image = self._load(row).convert("RGB")
        except InputError:  # it names the file
            raise
        except (OSError, SyntaxError, ValueError) as error:  # Pillow's, for bytes that are no image
            raise InputError(
                f"{self.name} ({self.split}): image {row} cannot be decoded: {error}"
            ) from error
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

    @property
    def pixels(self) -> np.ndarray | None:
        """(images, height, width, 3) uint8 where all are in memory and of one size, else None."""
        if self._pixels is None:
            return None
        images, place = self._pixels
        return images[[place[int(row)] for row in self.rows]]


def load_dataset(name_or_path: str, *, split: str, seed: int = 0) -> ImageDataset:
    """Load a data set by name or path.

    Args:
        name_or_path: ``digits`` (scikit-learn's, 8x8 resized to 32x32) and ``fruit64`` (1,393
            photos of fruit at 64x64, 14 kinds) come with the package. torchvision downloads
            ``fashion_mnist``, ``cifar10``, ``cifar100`` and ``stl10`` into ``$MIMREFINER_DATA``,
            default ``~/.cache/mimrefiner/data``. ``imagefolder:PATH`` holds
            ``PATH/train/CLASS/IMAGE`` or ``PATH/CLASS/IMAGE``; ``parquet:PATH`` holds files
            ``train-*.parquet`` and so on with columns ``image{bytes}`` (or ``img``, as the hub's
            CIFAR-10) and ``label``, which are kept in memory as encoded bytes.
        split: ``train``, ``val``, ``test`` or ``trainval``, see the module's first lines.
        seed: draws the splits that the source does not have.

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
        return _downloaded(name_or_path, split, seed)
    raise InputError(f"unknown data set {name_or_path!r}: choose one of {', '.join(CATALOGUE)}")


def short_name(data: str) -> str:
    """The name of a data set without the way to its folder, as result rows carry it.

    >>> short_name("imagefolder:/data/tiny-imagenet"), short_name("digits")
    ('tiny-imagenet', 'digits')
    """
    return Path(data.partition(":")[2]).name or data


def data_hash(dataset, images: int = 64) -> str:
    """SHA-256 of what a map-style data set holds, wherever its files lie.

    Its name without a path, its rows and labels where it lists them, and the pixels of about
    ``images`` images that are spread evenly over it (with their labels, where it lists none).
    """
    name, labels = getattr(dataset, "name", ""), getattr(dataset, "labels", None)
    digest = hashlib.sha256(f"{name.partition(':')[0]} {len(dataset)}".encode())
    digest.update(np.asarray(getattr(dataset, "rows", ())).tobytes())
    if labels is not None:
        digest.update(np.asarray(labels, dtype=np.int64).tobytes())
    for i in range(0, len(dataset), max(1, len(dataset) // images)):
        image, label = dataset[i]
        digest.update(np.asarray(image).tobytes())
        if labels is None and label != -1:
            digest.update(str(int(label)).encode())
    return digest.hexdigest()


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


def _split_of(
    train: ImageDataset, held_out: dict[str, ImageDataset], split: str, seed: int
) -> ImageDataset:
    """One split of a source that holds a training set and no, one or two other sets."""
    if len(held_out) < 2:
        return _drawn(train, next(iter(held_out.values()), None), split, seed)
    if split != "trainval":
        return {"train": train, **held_out}[split]
    val, n = held_out["val"], len(train) + len(held_out["val"])
    labels = None if train.labels is None else np.concatenate([train.labels, val.labels])
    load = partial(_of_two, train._load, len(train), val._load)
    return ImageDataset(train.name, split, load, labels, train.classes, train.seed, n)


def _drawn(train: ImageDataset, test: ImageDataset | None, split: str, seed: int) -> ImageDataset:
    """Draw a tenth of the training images as ``val``; before that, 30 % as ``test`` if missing."""
    if test is None:
        held, rest = stratified_split(train.labels, len(train), round(0.3 * len(train)), seed)
        train, test = train.subset(rest), train.subset(held)
    n = max(1, round(0.1 * len(train)))
    val, rest = stratified_split(train.labels, len(train), n, seed + 1)
    parts = {"train": train.subset(rest), "val": train.subset(val), "trainval": train, "test": test}
    part = parts[split]
    part.split = split
    return part


def _digits(split: str, seed: int) -> ImageDataset:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    load = partial(_digit, np.round(bunch.images * (255 / 16)).astype(np.uint8))
    classes = [str(i) for i in range(10)]
    return _drawn(
        ImageDataset("digits", split, load, bunch.target, classes, seed), None, split, seed
    )


def _fruit64(split: str, seed: int) -> ImageDataset:
    """The source's test set is kept; its 57 validation photos, without three classes, train."""
    import pyarrow.parquet as pq

    table = pq.read_table(ASSETS / "fruit64.parquet")
    classes = table.schema.metadata[b"classes"].decode().split(",")
    encoded, labels = table["image"].combine_chunks().field("bytes"), table["label"].to_numpy()
    whole = ImageDataset("fruit64", split, partial(_encoded, encoded), labels, classes, seed)
    held = table["split"].to_numpy(zero_copy_only=False) == "test"
    train, test = (whole.subset(np.flatnonzero(rows)) for rows in (~held, held))
    return _drawn(train, test, split, seed)


def _downloaded(name: str, split: str, seed: int) -> ImageDataset:
    import torchvision.datasets

    root = data_folder()
    builder = getattr(torchvision.datasets, DOWNLOADED[name])

    def fetch(train: bool) -> ImageDataset:
        part = {"split": "train" if train else "test"} if name == "stl10" else {"train": train}
        source = builder(str(root), download=True, **part)
        labels = source.labels if name == "stl10" else source.targets
        classes = getattr(source, "classes", None)
        return ImageDataset(name, split, partial(_of_source, source), labels, classes, seed)

    try:
        return _drawn(fetch(True), fetch(False), split, seed)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"{name} is not in {root} and could not be downloaded ({error}): check the network, "
            "put the files there, or use the embedded data set digits"
        ) from error


def _image_folder(path: Path, split: str, seed: int) -> ImageDataset:
    folders = {f.name for f in _existing(path).iterdir() if f.is_dir()}
    if "train" not in folders:
        return _drawn(_folder_part(path, None, split, seed), None, split, seed)
    train = _folder_part(path / "train", None, split, seed)
    names = [name for name in ("val", "test") if name in folders]
    # Images without classes, as ImageNet's
    if "test" in names and not any(f.is_dir() for f in (path / "test").iterdir()):
        names.remove("test")
    held_out = {name: _folder_part(path / name, train.classes, split, seed) for name in names}
    return _split_of(train, held_out, split, seed)


def _existing(path: Path) -> Path:
    if not path.exists():
        raise InputError(f"{path} does not exist: expected a folder of images")
    if not path.is_dir():
        raise InputError(f"{path} is a file: expected a folder")
    return path


def _folder_part(path: Path, classes: list[str] | None, split: str, seed: int) -> ImageDataset:
    """One folder of class folders.

    ``classes`` are those of the training set, where it is another folder; this one may lack some.
    """
    here = sorted(f.name for f in path.iterdir() if f.is_dir())
    classes = here if classes is None else classes
    if unknown := [name for name in here if name not in classes]:
        names = ", ".join(unknown[:5]) + ", ..." * (len(unknown) > 5)
        raise InputError(
            f"{path} must hold one folder per class, named as in {path.parent / 'train'}, "
            f"which has no {names}"
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


def _parquet(path: Path, split: str, seed: int) -> ImageDataset:
    shards = {"train": [], "val": [], "test": []}
    for file in sorted(_existing(path).glob("*.parquet")):
        part = file.name.split("-")[0].split(".")[0].replace("validation", "val")
        shards.get(part, []).append(file)
    if not shards["train"]:
        raise InputError(
            f"{path} holds no train-*.parquet: expected shards train-*.parquet "
            "and val-*.parquet or test-*.parquet"
        )
    train, *others = (
        _parquet_part(path, files, split, seed) if files else None for files in shards.values()
    )
    held_out = {
        part: data
        for part, data in zip(("val", "test"), others, strict=True)
        if data is not None and (data.labels is not None or train.labels is None)
    }
    return _split_of(train, held_out, split, seed)


def _parquet_part(path: Path, files: list[Path], split: str, seed: int) -> ImageDataset:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pa.concat_tables([pq.read_table(file) for file in files])
        column = "img" if {"image", "img"}.intersection(table.column_names) == {"img"} else "image"
        if not pa.types.is_struct(table[column].type):
            raise TypeError(f"column {column} is {table[column].type}")
        encoded = table[column].combine_chunks().field("bytes") if len(table) else []
    except (pa.ArrowInvalid, KeyError, OSError, TypeError) as error:
        raise InputError(
            f"{path}: expected parquet files with columns image{{bytes, path}} (or img) and label: "
            f"{error}"
        ) from error
    labels = table["label"] if "label" in table.column_names else None
    if labels is not None:
        missing, kind = labels.null_count, labels.type
        if missing or not pa.types.is_integer(kind):
            found = f"{missing} of {len(labels)} missing" if missing else kind
            raise InputError(
                f"{path}: column label must be whole numbers (-1: none), got {found}: "
                "convert it, or leave it out"
            )
        labels = labels.to_numpy()
        if (labels < 0).all():  # how the hub marks withheld labels
            labels = None
    if not len(encoded):
        raise InputError(f"{path} holds no images in {', '.join(file.name for file in files)}")
    load = partial(_encoded, encoded)
    return ImageDataset(f"parquet:{path}", split, load, labels, None, seed, len(encoded))


# How the image of a row is read: functions of the module, which loader processes can be sent


def _kept(images: Sequence[np.ndarray], place: dict[int, int], row: int) -> Image.Image:
    return Image.fromarray(images[place[row]])


def _digit(pixels: np.ndarray, row: int) -> Image.Image:
    return Image.fromarray(pixels[row]).resize((32, 32), Image.Resampling.BICUBIC)


def _encoded(images: Sequence, row: int) -> Image.Image:
    return Image.open(io.BytesIO(images[row].as_py()))


def _of_source(source: Sequence, row: int) -> Image.Image:
    return source[row][0]


def _of_two(first: Callable, n: int, second: Callable, row: int) -> Image.Image:
    return first(row) if row < n else second(row - n)


def _file(files: list[Path], row: int) -> Image.Image:
    try:
        with Image.open(files[row]) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{files[row]} cannot be decoded as an image: {error}") from error
