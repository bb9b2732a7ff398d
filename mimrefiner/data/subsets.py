"""Few labels: published lists of images, the published rule for iNaturalist, or a drawn part.

Every part says in ``drawn`` where it comes from, and rows of results carry that.
"""

import itertools
import logging
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path

import numpy as np
import torch

from mimrefiner.data.datasets import ImageDataset, stratified_split
from mimrefiner.errors import InputError
from mimrefiner.files import expanded

logger = logging.getLogger(__name__)

# Names and paths of images in a list of any form: a line each, or a Python list of them
NAME = re.compile(r"[^\s\"',]+\.(?:jpe?g|png|webp|bmp|tiff?)\b", re.IGNORECASE)


def few_labels(
    dataset: ImageDataset,
    amount: int | float,
    *,
    file: Path | str | None = None,
    seed: int = 0,
) -> ImageDataset:
    """A part of ``dataset`` with few labels.

    Args:
        dataset: the training images, all of them where a list is read.
        amount: images per class (1, 2, 5), or a share of all (0.01, 0.1; the same share of every
            class). With ``file`` it is checked against what the list names.
        file: a published list of image names; None draws.
        seed: draws, where there is no list.

    Raises:
        InputError: see :func:`read_list` and :func:`drawn_rows`.

    >>> import mimrefiner as mr
    >>> part = few_labels(mr.load_dataset("digits", split="train"), 2, seed=1)
    >>> len(part), part.drawn
    (20, '2 per class, drawn with seed 1')
    """
    if file is not None:
        part = read_list(dataset, file)
        _check_amount(part, len(dataset), amount, file)
        return part
    labels = _labels(dataset)
    rows, known = drawn_rows(labels, amount, seed), np.count_nonzero(labels >= 0)
    part, text = dataset.subset(rows), amount_text(amount)
    if amount < 1 and len(rows) > round(amount * known):
        text = f"{100 * len(rows) / known:.2g} %, one of each class"
    part.drawn = f"{text}, drawn with seed {seed}"
    return part


def amount_text(amount: int | float) -> str:
    """How many labels, in words.

    >>> amount_text(5), amount_text(0.01)
    ('5 per class', '1 %')
    """
    return f"{100 * amount:g} %" if amount < 1 else f"{amount} per class"


def drawn_rows(labels: np.ndarray, amount: int | float, seed: int, classes=None) -> np.ndarray:
    """Positions of one draw: ``amount`` images of every class, or below 1 that share of all.

    Args:
        labels: one for each image, (images,); images with -1 are left out.
        amount: whole numbers such as 1, or shares between 0 and 1.
        seed: draws.
        classes: the classes to draw from; None takes all labels that there are.

    Raises:
        InputError: another amount, or a class with fewer images than that.

    >>> drawn_rows(np.array([0, 0, 1, 1]), 1, seed=0).tolist()
    [1, 3]
    """
    labels = np.asarray(labels)
    classes = np.unique(labels[labels >= 0]) if classes is None else np.asarray(classes)
    if 0 < amount < 1:
        labelled = np.flatnonzero(np.isin(labels, classes))
        n = max(len(classes), round(amount * len(labelled)))
        return labelled[stratified_split(labels[labelled], len(labelled), n, seed)[0]]
    if amount < 1 or not isinstance(amount, Integral):  # 1.0 might be meant as one image or as all
        raise InputError(
            f"shots must be whole numbers such as 1 or shares between 0 and 1, got {amount}"
        )
    rng = np.random.default_rng(seed)
    rows = []
    for label in classes.tolist():
        members = np.flatnonzero(labels == label)
        if len(members) < amount:
            raise InputError(
                f"class {label} has {len(members)} images, fewer than {amount} shots: "
                "use fewer shots or more images"
            )
        rows.append(rng.choice(members, amount, replace=False))
    return np.concatenate(rows)


def read_list(dataset: ImageDataset, file: Path | str) -> ImageDataset:
    """The images of ``dataset`` that a published list names, in the list's order.

    Lists of MSN (``imagenet_subsets1/1imgs_class.txt``), SimCLR v2
    (``imagenet_subsets/10percent.txt``) and ImageNetSubsetGenerator (``versions/*.py``) are read:
    whatever stands around them, names that end like an image count, with or without folders. A
    line that is the name of a file as a whole may hold spaces. Folders tell files of one name
    apart; an image that is named twice is taken once, and a warning says so.

    Args:
        dataset: images in files of their own, all that the list may name (split "trainval").
        file: the list.

    Raises:
        InputError: a missing list, one without names, or names that the data set does not have, or
            has several times.
    """
    file = expanded(file)
    if not file.is_file():
        raise InputError(
            f"{file} does not exist: expected a published list of image names, "
            "or leave it out to draw the images by seed"
        )
    place = defaultdict(list)
    for i, name in enumerate(_file_names(dataset, "a list of images")):
        place[name].append(i)
    names = _listed_names(file, place)
    found = [_named(dataset, place, name) for name in names]
    if missing := [name for name, rows in zip(names, found, strict=True) if not rows]:
        raise InputError(
            f"{file} names {len(missing):,} of {len(names):,} images that {dataset.name} "
            f"({dataset.split}) does not have, such as {missing[0]}: it belongs to another data "
            "set, or part of this one is held out (use the split trainval)"
        )
    for name, rows in zip(names, found, strict=True):
        if len(rows) > 1:
            raise InputError(
                f"{file} names {name}, and {dataset.name} has {len(rows)} files of that name, such "
                f"as {dataset.file(rows[0])} and {dataset.file(rows[1])}: write CLASS/NAME"
            )
    rows = list(dict.fromkeys(row for (row,) in found))
    if len(rows) < len(found):
        logger.warning("%s names %d images twice: each is taken once", file, len(found) - len(rows))
    part = dataset.subset(rows)
    part.drawn = f"{file.name}, {len(rows):,} images"
    return part


def _listed_names(file: Path, known: Mapping[str, list[int]]) -> list[str]:
    """The names and paths that a list holds; ``known`` has the names of files."""
    names = []
    # Windows' editors begin a file with a mark of their own
    for line in file.read_text(encoding="utf-8-sig", errors="replace").splitlines():
        whole, found = line.strip(" \t,\"'"), NAME.findall(line)
        names += [whole] if len(found) < 2 and _parts(whole)[-1] in known else found
    if not names:
        raise InputError(f"{file} names no images: expected names such as n01440764_5698.JPEG")
    return names


def _parts(name: str) -> list[str]:
    """The folders and the name of a path of any system."""
    return re.split(r"[/\\]", name)


def _named(dataset: ImageDataset, known: Mapping[str, list[int]], name: str) -> list[int]:
    """Positions of the images that a name or path may mean, those whose folders fit it best.

    A folder of the path that is a class must be the image's; other folders may be called otherwise
    than where the list was made.
    """
    *folders, last = _parts(name)
    rows, classes = known.get(last, []), dataset.classes or ()
    if folders and dataset.labels is not None and (said := set(folders) & set(classes)):
        rows = [row for row in rows if classes[dataset.labels[row]] in said]
    if len(rows) < 2 or not folders:
        return rows
    fits = {row: _common(folders, dataset.file(row).parent.parts) for row in rows}
    return [row for row in rows if fits[row] == max(fits.values())]


def _common(first: Sequence[str], second: Sequence[str]) -> int:
    """How many parts two paths have in common at their ends.

    >>> _common(["train", "a"], ["photos", "train", "a"])
    2
    """
    pairs = zip(reversed(first), reversed(second), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def inat18_shots(dataset: ImageDataset, shots: int, split: int) -> ImageDataset:
    """The paper's 1, 5 or 10 images per class of iNaturalist 2018, by its published rule.

    Classes by their folders' numbers, files by name, and one generator of torch, seeded once with
    the number of the split, that goes on through all classes: the first ``shots`` of each class's
    permutation; a class with fewer images gives all (``create_inat18_lowshot_dataset.py``).

    Args:
        dataset: all training images (split "trainval") in folders that are named by numbers.
        shots: images per class.
        split: 1, 2 or 3.

    Raises:
        InputError: folders with other names, or images without files.
    """
    if shots < 1 or split < 1:
        raise InputError(f"expected shots and split >= 1, got {shots} and {split}")
    names, labels = _file_names(dataset, "iNaturalist's rule"), _labels(dataset)
    words = dataset.classes or []
    if not words or not all(word.isdecimal() for word in words):
        raise InputError(
            "iNaturalist's rule takes folders that are named by numbers, 0 to 8141, got "
            f"{', '.join(words[:3]) or 'no names'}"
        )
    generator = torch.Generator().manual_seed(split)
    rows = []
    for label in sorted(range(len(words)), key=lambda label: int(words[label])):
        members = sorted(np.flatnonzero(labels == label).tolist(), key=names.__getitem__)
        order = torch.randperm(len(members), generator=generator)
        rows += [members[i] for i in order[:shots].tolist()]
    part = dataset.subset(rows)
    part.drawn = f"{amount_text(shots)}, iNaturalist's rule, split {split}"
    return part


def _labels(dataset: ImageDataset) -> np.ndarray:
    if dataset.labels is None:
        raise InputError("few labels are drawn from images with labels, and there are none")
    return dataset.labels


def _file_names(dataset: ImageDataset, what: str) -> Sequence[str]:
    names = [dataset.file_name(i) for i in range(len(dataset))]
    if None in names:
        raise InputError(
            f"{what} needs images in files of their own, such as imagefolder:PATH, and "
            f"{dataset.name} has none"
        )
    return names


def _check_amount(part: ImageDataset, images: int, amount: int | float, file) -> None:
    """InputError where a list is clearly another one than asked for."""
    expected = amount * images if amount < 1 else amount * len(np.unique(part.labels))
    if not 0.5 < len(part) / max(1, expected) < 2:
        raise InputError(
            f"{file} names {len(part):,} images, and {amount_text(amount)} would be about "
            f"{expected:,.0f}: give the list that belongs to it"
        )
