"""What a source of images holds as it lies there, before splits are drawn; names of splits."""

import itertools
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mimrefiner.errors import InputError

SPLIT_WORDS = {
    "train": ("train", "training", "trainset"),
    "val": ("val", "valid", "validation", "dev", "valset"),
    "test": ("test", "testing", "testset"),
}
SPLIT_OF = {word: split for split, words in SPLIT_WORDS.items() for word in words}
ARCHIVES = {".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar"}
RESULTS = ("settings.json", "manifest.json")  # what :class:`mimrefiner.files.Entry` writes last
# Beside dot names: what systems leave in folders
NOT_OURS = {"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"}


@dataclass(frozen=True)
class Part:
    """One set of images as the source has it.

    Attributes:
        load: gives what holds the image of a row, as :func:`mimrefiner.data.images.to_pil` takes
            it; it can be pickled, for loader processes.
        rows: which rows of the source these are, (images,).
        labels: one for each image, (images,) int64, or None where there are none.
        called: what the source calls the set, such as "valid"; "" where it has no name.
    """

    load: Callable[[int], object]
    rows: np.ndarray
    labels: np.ndarray | None
    called: str = ""


@dataclass(frozen=True)
class Source:
    """Sets by the names "train", "val" and "test", of which the first is always there.

    Attributes:
        parts: the sets.
        classes: class names, or None where they are not known.
        notes: what else a person should know: columns that were taken, what was left out.
    """

    parts: dict[str, Part]
    classes: list[str] | None = None
    notes: list[str] = field(default_factory=list)


def split_named(name: str) -> str | None:
    """The split that a folder, a file or a set of that name holds; None where it names none.

    >>> [split_named(name) for name in ("Validation", "seg_train", "test-00000-of-00001", "cats")]
    ['val', 'train', 'test', None]
    """
    found = {SPLIT_OF[word] for word in re.findall("[a-z]+", name.lower()) if word in SPLIT_OF}
    return found.pop() if len(found) == 1 else None


def is_hidden(name: str) -> bool:
    """Whether a file or folder is none of the data set's: dot names, and what systems leave.

    >>> [is_hidden(name) for name in (".ipynb_checkpoints", "._0001.jpg", "__MACOSX", "0001.jpg")]
    [True, True, True, False]
    """
    return name.startswith(".") or name in NOT_OURS


def class_name(folder: Path) -> str:
    """The name of a folder of a class, whichever way the system writes its accents.

    >>> class_name(Path("cafe\u0301")) == class_name(Path("caf\u00e9"))
    True
    """
    return unicodedata.normalize("NFC", folder.name)


def is_result(folder: Path | str) -> bool:
    """Whether a folder holds results of this package, or nothing but folders that do.

    A report that is written below the images, into ``runs/report``, is no class of theirs.
    """
    for name in RESULTS:
        file = os.path.join(folder, name)
        if os.path.isfile(file):
            try:
                with open(file, encoding="utf-8") as stream:
                    return json.load(stream).keys() >= {"settings", "facts", "files"}
            except (OSError, ValueError, AttributeError):
                return False
    with os.scandir(folder) as entries:
        first = next(entries, None)
        inside = itertools.chain([first], entries)
        return first is not None and all(
            entry.is_dir(follow_symlinks=False) and is_result(entry.path) for entry in inside
        )


def existing(path: Path, what: str) -> Path:
    """``path``, if it is there; InputError, which says ``what`` was expected, if it is not."""
    if not path.exists():
        raise InputError(f"{path} does not exist: expected {what}")
    return path


def existing_folder(path: Path, what: str) -> Path:
    """``path``, if it is a folder; InputError, which says ``what`` was expected, if it is not."""
    if existing(path, what).is_file() and path.suffix.lower() in ARCHIVES:
        raise InputError(f"{path} is an archive: unpack it first, and give {what}")
    if not path.is_dir():
        raise InputError(f"{path} is a file: expected {what}")
    return path


def check_numbering(known: np.ndarray, labels: np.ndarray, where: str) -> None:
    """InputError where a held-out set has labels that no training image has.

    Two sets that were numbered apart, one from 0 and one from 1, would give a wrong number. A
    held-out set may lack some of the training classes.

    Args:
        known: the labels of the training images, -1 for none.
        labels: those of the held-out set.
        where: what messages call that.

    >>> check_numbering(np.array([0, 1, 2]), np.array([2, 0, -1]), "the test set")
    """
    unknown = (labels >= 0) & ~np.isin(labels, known)
    if unknown.any():
        others, classes = np.unique(labels[unknown]), np.unique(known[known >= 0])
        raise InputError(
            f"{where}: {unknown.sum():,} of {len(labels):,} images have labels that no training "
            f"image has ({listed(others)}; training has {listed(classes)}): number the classes in "
            "the same way for both, or leave these images out"
        )


def skipped_text(skipped: Counter) -> list[str]:
    """What was passed over, as notes: none, or one.

    >>> skipped_text(Counter({"broken links": 1, ".txt": 200}))
    ['left out: .txt (200), broken links (1)']
    """
    counts = sorted(skipped.items(), key=lambda pair: (-pair[1], pair[0]))
    return [f"left out: {', '.join(f'{what} ({n:,})' for what, n in counts)}"] if counts else []


def listed(names, most: int = 5) -> str:
    """The first names of a list with commas, and dots where there are more.

    >>> listed("abc", 2)
    'a, b, ...'
    """
    names = [str(name) for name in names]
    return ", ".join(names[:most]) + ", ..." * (len(names) > most)
