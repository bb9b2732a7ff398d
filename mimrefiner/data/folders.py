"""Folders of images: one folder per class, with or without folders of splits.

Links are followed, and a real folder counts once within a class; names that begin with a dot are
none of the data set's; every ending that Pillow reads counts, and what does not is said.
"""

import os
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np

from mimrefiner.data.images import image_endings
from mimrefiner.data.sources import (
    SPLIT_OF,
    Part,
    Source,
    existing_folder,
    is_hidden,
    listed,
    skipped_text,
    split_named,
)
from mimrefiner.errors import InputError

EXPECTED = "a folder of images"
ANNOTATIONS = "val_annotations.txt"  # of Tiny-ImageNet: file name, class, box, with tabs between
OWN_FILES = {"data_batch_1": "cifar10", "test_batch": "cifar10", "meta": "cifar100"}


def read_folder(path: Path) -> Source:
    """The images of ``path``: ``SPLIT/CLASS/IMAGE`` or ``CLASS/IMAGE``.

    Splits may be called train or training, val, valid, validation or dev, test or testing, in any
    case, and with other words around (``seg_train``). Tiny-ImageNet is read as its zip has it.

    Raises:
        InputError: no images, classes of a held-out split that training lacks, a split that is
            there twice or a held-out one without ``train``.
    """
    folders = _folders(existing_folder(path, EXPECTED))
    splits = _split_folders(path, folders)
    skipped = Counter()
    if not splits:
        part, classes = _part(path, folders, None, skipped)
        _check_one_class(classes, path)
        return Source({"train": part}, classes, skipped_text(skipped))
    train, classes = _part(splits["train"], _folders(splits["train"]), None, skipped)
    parts, notes = {"train": train}, []
    for split in ("val", "test"):
        if split in splits:
            part = _held_out(split, splits[split], splits["train"], classes, skipped)
            if part is None:
                notes.append(f"{splits[split].name} has no labels and is left out")
            else:
                parts[split] = part
    used = {*splits.values(), *(folder.parent for folder in splits.values())}
    if others := [folder.name for folder in folders if folder not in used]:
        notes.append(f"folders beside the splits are left out: {listed(others)}")
    return Source(parts, classes, notes + skipped_text(skipped))


def _folders(path: Path) -> list[Path]:
    """The folders in ``path`` that are not hidden, in order of their names."""
    found = (entry for entry in path.iterdir() if entry.is_dir())
    return sorted(entry for entry in found if not is_hidden(entry.name))


def _split_folders(path: Path, folders: list[Path]) -> dict[str, Path]:
    """The folders of splits by the split's name; {} where ``folders`` are classes."""
    holding = [folder for folder in folders if _folders(folder)]
    named = {f: SPLIT_OF[f.name.lower()] for f in folders if f.name.lower() in SPLIT_OF}
    if "train" not in {named.get(folder) for folder in holding}:
        # seg_train and seg_test are splits, train_station and bus_station are classes
        loose = {folder: split_named(folder.name) for folder in holding}
        if len(loose) < 2 or None in loose.values() or "train" not in loose.values():
            _check_classes(path, folders, holding, list(named))
            return {}
        named = loose
    found: dict[str, Path] = {}
    for folder, split in named.items():
        if split in found:
            raise InputError(
                f"{path} holds {found[split].name} and {folder.name}, which both name the split "
                f"{split}: keep one of them"
            )
        found[split] = folder
    return {split: _inner(folder) for split, folder in found.items()}


def _inner(folder: Path) -> Path:
    """What an archive unpacked twice holds: ``seg_train/seg_train``."""
    inside = _folders(folder)
    return inside[0] if [f.name for f in inside] == [folder.name] else folder


def _check_classes(path: Path, folders: list[Path], holding: list[Path], named: list[Path]) -> None:
    """Raise InputError where folders that would be classes are most likely something else.

    ``holding`` are those that hold folders, ``named`` those that bear the name of a split.
    """
    if named and (len(named) > 1 or named == folders or named[0] in holding):
        raise InputError(
            f"{path} holds {listed(folder.name for folder in folders)} and no train/CLASS/IMAGE: "
            "expected SPLIT/CLASS/IMAGE with a split train, or CLASS/IMAGE"
        )
    for file, name in OWN_FILES.items():
        if not folders and (path / file).is_file():
            raise InputError(f"{path} holds the files of {name}: give {name}:{path}")


def _check_one_class(classes: list[str], path: Path) -> None:
    """Raise InputError where the splits lie deeper: then everything would be one class."""
    here = [path / classes[0]] if len(classes) == 1 else []
    for _ in range(3):
        for folder in here:
            if "train" in [SPLIT_OF.get(inside.name.lower()) for inside in _folders(folder)]:
                raise InputError(
                    f"{path} holds one class, {classes[0]}, and there are splits in {folder}: give "
                    f"imagefolder:{folder}"
                )
        here = [inside for folder in here[:100] for inside in _folders(folder)]


def _part(
    path: Path, folders: list[Path], classes: list[str] | None, skipped: Counter
) -> tuple[Part, list[str]]:
    """The images of class folders, and the classes: None takes those that have images."""
    real = {folder.resolve(): folder.name for folder in folders}
    if len(real) < len(folders):
        names = {folder.name for folder in folders} - set(real.values())
        raise InputError(f"{path} holds {listed(sorted(names))} twice, by links, as two classes")
    images = {folder.name: _images(folder, skipped) for folder in folders}
    beside = [entry for entry in path.iterdir() if not is_hidden(entry.name) and entry.is_file()]
    for entry in beside:
        skipped[f"{_ending(entry)} beside the folders of classes"] += 1
    empty = [name for name, files in images.items() if not files]
    if empty:
        skipped[f"folders without images such as {empty[0]}"] += len(empty)
    classes = [name for name, files in images.items() if files] if classes is None else classes
    files = [file for name in classes for file in images.get(name, ())]
    if not files:
        flat = sum(entry.suffix.lower() in image_endings() for entry in beside)
        raise InputError(
            f"{path} holds no images: expected {path}/CLASS/IMAGE.jpg (or .png, .webp, ...)"
            + f", found {flat:,} images outside of folders, which have no class" * bool(flat)
        )
    labels = [i for i, name in enumerate(classes) for _ in images.get(name, ())]
    return _of_files(files, labels, path.name), classes


def _of_files(files: list[Path], labels: list[int], called: str) -> Part:
    labels = np.asarray(labels, dtype=np.int64)
    return Part(partial(_file, files), np.arange(len(files)), labels, called)


def _file(files: list[Path], row: int) -> Path:
    return files[row]


def _held_out(
    split: str, path: Path, train: Path, classes: list[str], skipped: Counter
) -> Part | None:
    """A split beside ``train``; None where it is a test set without labels."""
    if path.samefile(train):
        raise InputError(f"{path} and {train} are the same folder: each image needs one split")
    if (path / ANNOTATIONS).is_file():
        return _annotated(path, classes, skipped)
    folders = _folders(path)
    unknown = [folder.name for folder in folders if folder.name not in classes]
    # As in ImageNet's archive, and in Tiny-ImageNet's
    if split == "test" and (not folders or (len(folders) == 1 and unknown)):
        return None
    if unknown := [name for name in unknown if _images(path / name, Counter())]:
        raise InputError(
            f"{path} must hold one folder per class, named as in {train}, "
            f"which has no {listed(unknown)}"
        )
    return _part(path, folders, classes, skipped)[0]


def _annotated(path: Path, classes: list[str], skipped: Counter) -> Part:
    """Tiny-ImageNet's validation set: all images in one folder, their classes in a file."""
    lines = (path / ANNOTATIONS).read_text(encoding="utf-8").splitlines()
    class_of = dict(line.split("\t")[:2] for line in lines if "\t" in line)
    files = _images(path, Counter())
    known = [file for file in files if file.name in class_of]
    if len(known) < len(files):
        skipped[f"images that {ANNOTATIONS} does not list"] += len(files) - len(known)
    if missing := class_of.keys() - {file.name for file in files}:
        skipped[f"lines of {ANNOTATIONS} without image"] += len(missing)
    if unknown := sorted({class_of[file.name] for file in known} - set(classes)):
        raise InputError(
            f"{path / ANNOTATIONS} names classes that train has not: {listed(unknown)}"
        )
    if not known:
        raise InputError(f"{path} holds none of the images that {ANNOTATIONS} lists")
    return _of_files(known, [classes.index(class_of[file.name]) for file in known], path.name)


def _images(folder: Path, skipped: Counter) -> list[Path]:
    """All images under ``folder``, sorted; what is none is counted in ``skipped``."""
    found, links = [], []
    _collect(folder, found, links, skipped, {})
    if links:  # the same file by two ways would be two images
        found = list(
            {os.path.realpath(file): file for file in sorted(found, reverse=True)}.values()
        )
    return sorted(found)


def _collect(folder, found: list, links: list, skipped: Counter, seen: dict) -> None:
    """Go through a folder; ``seen`` holds the real folders that were met before."""
    status = os.stat(folder)
    if (status.st_dev, status.st_ino) in seen:
        return
    seen[status.st_dev, status.st_ino] = True
    for entry in os.scandir(folder):
        if is_hidden(entry.name):
            continue
        if entry.is_symlink():
            links.append(entry.path)
            if not os.path.exists(entry.path):
                skipped["broken links"] += 1
                continue
        if entry.is_dir():
            _collect(entry.path, found, links, skipped, seen)
        elif not entry.is_file():
            skipped["pipes and sockets"] += 1
        elif _ending(Path(entry.path)) in image_endings():
            found.append(Path(entry.path))
        else:
            skipped[_ending(Path(entry.path))] += 1


def _ending(file: Path) -> str:
    return file.suffix.lower() or "without ending"
