"""The data sets of VTAB: 19 of 1,000 images each (VTAB-1K), and six whole ones (VTAB-6).

VTAB-1K is read from the folder that ``vtab-1k.zip`` of NOAH and RepAdapter makes: a folder for each
data set with text lists. torchvision downloads ten of the 19 with all their images; then 1,000 are
drawn here, and rows say so. VTAB-6 comes from torchvision, with the splits of the released code.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from mimrefiner.data.images import to_pil
from mimrefiner.data.listed import ListedImages, class_folders, is_image, read_list
from mimrefiner.errors import InputError, one_of
from mimrefiner.files import data_folder, expanded

PARTS = ("train800", "val200", "train800val200", "test")
GROUPS = ("natural", "specialised", "structured")
DRAWN = "1,000 images drawn by seed 0, not the published ones"
NOT_IN_18 = "oxford_flowers102"


@dataclass(frozen=True)
class Task:
    """One data set of VTAB-1K.

    Attributes:
        name: of its folder.
        group: natural, specialised or structured.
        test_images: how many the published test set has.
    """

    name: str
    group: str
    test_images: int


# vtab1k-pytorch at 007fd7b, datasets/vtab1k_dataset.py; groups: arXiv 1910.04867
TASKS = (
    Task("caltech101", "natural", 6_085),
    Task("cifar", "natural", 10_000),
    Task("dtd", "natural", 1_880),
    Task("oxford_flowers102", "natural", 6_149),
    Task("oxford_iiit_pet", "natural", 3_669),
    Task("sun397", "natural", 21_750),
    Task("svhn", "natural", 26_032),
    Task("patch_camelyon", "specialised", 32_768),
    Task("eurosat", "specialised", 5_400),
    Task("resisc45", "specialised", 6_300),
    Task("diabetic_retinopathy", "specialised", 42_670),
    Task("clevr_count", "structured", 15_000),
    Task("clevr_dist", "structured", 15_000),
    Task("dmlab", "structured", 22_735),
    Task("kitti", "structured", 711),
    Task("dsprites_loc", "structured", 73_728),
    Task("dsprites_ori", "structured", 73_728),
    Task("smallnorb_azi", "structured", 12_150),
    Task("smallnorb_ele", "structured", 12_150),
)
# VTAB-6: name -> images of train and test, classes (src/datasets/*.py of the released code)
SIX = {
    "caltech101": (3_060, 6_084, 102),
    "cifar100": (50_000, 10_000, 100),
    "dtd": (3_760, 1_880, 47),
    "flowers": (2_040, 6_149, 102),
    "pets": (3_680, 3_669, 37),
    "sun397": (87_002, 21_752, 397),
}
IN_TORCHVISION = {  # task of VTAB-1K -> data set of torchvision
    "caltech101": "caltech101",
    "cifar": "cifar100",
    "dtd": "dtd",
    "oxford_flowers102": "flowers",
    "oxford_iiit_pet": "pets",
    "sun397": "sun397",
    "svhn": "svhn",
    "patch_camelyon": "pcam",
    "eurosat": "eurosat",
    "clevr_count": "clevr",
}


def tasks_named(names: Sequence[str] | None = None) -> tuple[Task, ...]:
    """The tasks called ``names``, all 19 for None, in their usual order.

    >>> [task.group for task in tasks_named(["kitti", "dtd"])]
    ['natural', 'structured']
    """
    known = [task.name for task in TASKS]
    for name in names or ():
        one_of("data set of VTAB-1K", name, tuple(known))
    return tuple(task for task in TASKS if names is None or task.name in names)


def read_task(folder: Path, task: Task) -> dict[str, ListedImages]:
    """The four parts of a task from its folder, ``FOLDER/TASK/PART.txt``.

    Raises:
        InputError: a missing folder, list or image.
    """
    path = expanded(folder) / task.name
    if not path.is_dir():
        raise InputError(
            f"{path} does not exist: expected the folder that vtab-1k.zip makes, with a folder for "
            f"each data set (choose among them with --datasets)"
        )
    return {part: read_list(path / f"{part}.txt", path, task.name) for part in PARTS}


def draw_task(task: Task) -> dict[str, Dataset]:
    """The four parts of a task from torchvision; its 1,000 images are drawn by seed 0.

    Raises:
        InputError: torchvision has not this data set, or cannot download it.
    """
    if task.name not in IN_TORCHVISION:
        raise InputError(
            f"torchvision has no {task.name} (it has {', '.join(IN_TORCHVISION)}): give the folder "
            "of vtab-1k.zip, or choose with --datasets"
        )
    train, test = whole(IN_TORCHVISION[task.name])
    if len(train) < 1000:
        raise InputError(f"{task.name} has {len(train)} training images, expected 1,000 or more")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:1000].tolist()
    rows = {"train800": order[:800], "val200": order[800:], "train800val200": order}
    return {part: train.subset(chosen, DRAWN) for part, chosen in rows.items()} | {"test": test}


class Gathered(Dataset):
    """Images of several data sets of torchvision as one, (RGB image, int label).

    Args:
        name: what it is called.
        sources: data sets of (image, anything).
        labels: of all their images, one after the other.
        rows: which of them; None takes all.
        drawn: how they were chosen, in words.
    """

    def __init__(self, name, sources, labels, rows=None, drawn: str = ""):
        self.name, self.sources, self.drawn = name, tuple(sources), drawn
        self.starts = np.cumsum([0, *(len(source) for source in self.sources)])
        self.all_labels = np.asarray(labels, dtype=np.int64)
        self.rows = np.arange(len(self.all_labels)) if rows is None else np.asarray(rows)
        self.labels, self.classes = self.all_labels[self.rows], None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        row = self.rows[i]
        which = int(np.searchsorted(self.starts, row, side="right")) - 1
        image = self.sources[which][int(row - self.starts[which])][0]
        return to_pil(image, f"{self.name}: image {row}"), int(self.labels[i])

    def subset(self, rows: Sequence[int], drawn: str = "") -> "Gathered":
        """The images at positions ``rows``."""
        chosen = self.rows[np.asarray(rows)]
        return Gathered(self.name, self.sources, self.all_labels, chosen, drawn or self.drawn)


class FileImages(Dataset):
    """Images by their files, as a source of :class:`Gathered`."""

    def __init__(self, files: Sequence[Path]):
        self.files = list(files)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Image.Image, None]:
        return to_pil(self.files[i]), None


def whole(name: str) -> tuple[Gathered, Gathered]:
    """Training and test images of a data set of torchvision, downloaded once.

    The splits are those of the released code (``src/datasets/*.py``) for the six of VTAB-6. EuroSAT
    has none: a fifth, drawn by seed 0, is its test set.

    Raises:
        InputError: it is not there and cannot be downloaded.
    """
    root = data_folder()
    try:
        return LOADERS[name](root)
    except (OSError, RuntimeError, ImportError) as error:
        raise InputError(
            f"{name} is not in {root} and torchvision could not fetch it ({error}): check the "
            "network, or put its files there"
        ) from error


def split_per_class(labels: np.ndarray, train: Callable[[int], int]) -> tuple[list, list]:
    """Positions of training and test images: of every class ``train(n)`` of its n train.

    One generator of torch, seed 0, runs through the classes in the order of their numbers.

    >>> split_per_class(np.array([0, 0, 0, 1, 1]), lambda n: 1)
    ([2, 4], [0, 1, 3])
    """
    generator = torch.Generator().manual_seed(0)
    chosen, rest = [], []
    for label in range(int(labels.max()) + 1):
        members = np.flatnonzero(labels == label)
        order = members[torch.randperm(len(members), generator=generator).numpy()]
        n = train(len(members))
        chosen += order[:n].tolist()
        rest += order[n:].tolist()
    return chosen, sorted(rest)


def _split(name: str, images: Gathered, train: Callable[[int], int]) -> tuple[Gathered, Gathered]:
    chosen, rest = split_per_class(images.labels, train)
    return images.subset(chosen), images.subset(rest)


def _caltech101(root: Path) -> tuple[Gathered, Gathered]:
    """102 classes, the background's too, sorted; 30 images of each train."""
    from torchvision.datasets import Caltech101

    Caltech101(str(root), download=True)
    path = root / "caltech101" / "101_ObjectCategories"
    names = class_folders(path)
    files = [sorted(f for f in (path / name).iterdir() if is_image(f)) for name in names]
    labels = [i for i, found in enumerate(files) for _ in found]
    images = Gathered("caltech101", [FileImages([f for found in files for f in found])], labels)
    return _split("caltech101", images, lambda n: min(30, n))


def _sun397(root: Path) -> tuple[Gathered, Gathered]:
    """Classes in the order of ClassName.txt; 80 % of each train."""
    from torchvision.datasets import SUN397

    SUN397(str(root), download=True)
    path = root / "SUN397"
    listed = (path / "ClassName.txt").read_text(encoding="utf-8").splitlines()
    names = [line.strip() for line in listed if line]
    files = [sorted((path / name.lstrip("/")).glob("sun_*.jpg")) for name in names]
    labels = [i for i, found in enumerate(files) for _ in found]
    images = Gathered("sun397", [FileImages([f for found in files for f in found])], labels)
    return _split("sun397", images, lambda n: round(0.8 * n))


def _cifar100(root: Path) -> tuple[Gathered, Gathered]:
    from torchvision.datasets import CIFAR100

    parts = [CIFAR100(str(root), train=train, download=True) for train in (True, False)]
    return tuple(Gathered("cifar100", [part], part.targets) for part in parts)


def _of_splits(kind: str, train: tuple[str, ...], test: tuple[str, ...], labels: Callable):
    """A loader of a data set whose parts torchvision calls ``train`` and ``test``."""

    def load(root: Path) -> tuple[Gathered, Gathered]:
        import torchvision.datasets

        builder = getattr(torchvision.datasets, kind)
        sets = []
        for parts in (train, test):
            sources = [builder(str(root), split=part, download=True) for part in parts]
            numbers = np.concatenate([np.asarray(labels(source)) for source in sources])
            sets.append(Gathered(kind.lower(), sources, numbers))
        return tuple(sets)

    return load


def _eurosat(root: Path) -> tuple[Gathered, Gathered]:
    from torchvision.datasets import EuroSAT

    source = EuroSAT(str(root), download=True)
    images = Gathered("eurosat", [source], source.targets)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tolist()
    test = len(images) // 5
    return images.subset(order[test:]), images.subset(sorted(order[:test]))


def _private(source) -> Sequence[int]:
    return source._labels


LOADERS: dict[str, Callable] = {
    "caltech101": _caltech101,
    "cifar100": _cifar100,
    "dtd": _of_splits("DTD", ("train", "val"), ("test",), _private),
    "flowers": _of_splits("Flowers102", ("train", "val"), ("test",), _private),
    "pets": _of_splits("OxfordIIITPet", ("trainval",), ("test",), _private),
    "sun397": _sun397,
    "svhn": _of_splits("SVHN", ("train",), ("test",), lambda source: source.labels),
    "pcam": _of_splits(
        "PCAM", ("train",), ("test",), lambda source: [source[i][1] for i in range(len(source))]
    ),
    "eurosat": _eurosat,
    # Classes are 3 to 10 objects
    "clevr": _of_splits(
        "CLEVRClassification", ("train",), ("val",), lambda x: np.asarray(x._labels) - 3
    ),
}
