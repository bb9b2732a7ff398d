"""Folders of images: one folder per class, with or without folders of splits.

Links are followed, and a real folder counts once within a class; names that begin with a dot are
none of the data set's; every ending that Pillow reads counts, and what does not is said.
"""

import os
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from mimrefiner.data.images import image_endings
from mimrefiner.data.sources import (
    SPLIT_OF,
    Part,
    Source,
    class_name,
    existing_folder,
    is_hidden,
    is_result,
    listed,
    skipped_text,
    split_named,
)
from mimrefiner.errors import InputError

EXPECTED = "a folder of images"
ANNOTATIONS = "val_annotations.txt"  # of Tiny-ImageNet: file name, class, box, with tabs between
OWN_FILES = {"data_batch_1": "cifar10", "test_batch": "cifar10", "meta": "cifar100"}


@dataclass
class Met:
    """What was met on the way through folders.

    Attributes:
        skipped: what was passed over.
        links: whether a link was followed; then one file may be there by several ways.
    """

    skipped: Counter = field(default_factory=Counter)
    links: bool = False


def read_folder(path: Path) -> Source:
    """The images of ``path``: ``SPLIT/CLASS/IMAGE`` or ``CLASS/IMAGE``.

    Splits may be called train or training, val, valid, validation or dev, test or testing, in any
    case, and with other words around (``seg_train``). Tiny-ImageNet is read as its zip has it.

    Raises:
        InputError: no images, classes of a held-out split that training lacks, a split that is
            there twice or a held-out one without ``train``, one image in two splits or classes.
    """
    folders = _folders(existing_folder(path, EXPECTED))
    splits = _split_folders(path, folders)
    met = Met()
    if not splits:
        part, classes = _part(path, folders, None, met)
        _check_one_class(classes, path)
        return Source({"train": part}, classes, skipped_text(met.skipped))
    train, classes = _part(splits["train"], _folders(splits["train"]), None, met)
    parts, notes = {"train": train}, []
    for split in ("val", "test"):
        if split in splits:
            part = _held_out(split, splits[split], splits["train"], classes, met)
            if part is None:
                notes.append(f"{splits[split].name} has no labels and is left out")
            else:
                parts[split] = part
    if met.links:
        _check_apart(parts)
    used = {*splits.values(), *(folder.parent for folder in splits.values())}
    if others := [folder.name for folder in folders if folder not in used]:
        notes.append(f"folders beside the splits are left out: {listed(others)}")
    return Source(parts, classes, notes + skipped_text(met.skipped))


def _check_apart(parts: dict[str, Part]) -> None:
    """Raise InputError where a file is in two splits, by links."""
    found: dict[tuple[int, int], tuple[str, Path]] = {}
    for split, part in parts.items():
        files = [part.load(row) for row in part.rows]
        keys = [_key(file) for file in files]
        twice = [(file, *found[key]) for file, key in zip(files, keys, strict=True) if key in found]
        if twice:
            file, other_split, other = twice[0]
            raise InputError(
                f"{len(twice):,} images are both {other_split} and {split}, by links, such as "
                f"{other} and {file}: each image needs one split"
            )
        found |= {key: (split, file) for file, key in zip(files, keys, strict=True)}


def _key(file: Path) -> tuple[int, int]:
    """Tells real files apart."""
    status = os.stat(file)
    return status.st_dev, status.st_ino


def _folders(path: Path) -> list[Path]:
    """The folders in ``path`` that are images', not hidden and no results of this package."""
    found = (entry for entry in path.iterdir() if entry.is_dir())
    return sorted(f for f in found if not is_hidden(f.name) and not is_result(f))


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
    inside = [[SPLIT_OF.get(f.name.lower()) for f in _folders(folder)] for folder in folders]
    if len(folders) > 1 and all("train" in names and set(names) - {"train"} for names in inside):
        raise InputError(
            f"each of {listed(folder.name for folder in folders)} in {path} holds folders of "
            f"splits: give one of them, such as imagefolder:{folders[0]}, or, if they are classes, "
            "put the splits outside, as SPLIT/CLASS/IMAGE"
        )
    for file, name in OWN_FILES.items():
        if not folders and (path / file).is_file():
            raise InputError(f"{path} holds the files of {name}: give {name}:{path}")


def _check_one_class(classes: list[str], path: Path) -> None:
    """Raise InputError where splits or classes lie deeper: then everything would be one class."""
    only = [folder for folder in _folders(path) if [class_name(folder)] == classes]
    here = only
    for _ in range(3):
        for folder in here:
            if "train" in [SPLIT_OF.get(inside.name.lower()) for inside in _folders(folder)]:
                raise InputError(
                    f"{path} holds one class, {classes[0]}, and there are splits in {folder}: give "
                    f"imagefolder:{folder}"
                )
        here = [inside for folder in here[:100] for inside in _folders(folder)]
    for folder in only:
        while len(inside := _folders(folder)) == 1 and not _holds_images(folder):
            folder = inside[0]
        holding = [] if _holds_images(folder) else [f for f in inside if _images(f, Met())]
        if len(holding) > 1:
            raise InputError(
                f"{path} holds one class, {classes[0]}, and {folder} holds folders of images, such "
                f"as {holding[0].name}: give imagefolder:{folder}, if these are the classes"
            )


def _holds_images(folder: Path) -> bool:
    """Whether images lie in a folder itself."""
    return any(_ending(f) in image_endings() and not is_hidden(f.name) for f in folder.iterdir())


def _part(
    path: Path, folders: list[Path], classes: list[str] | None, met: Met
) -> tuple[Part, list[str]]:
    """The images of class folders, and the classes: None takes those that have images."""
    real = {folder.resolve(): folder.name for folder in folders}
    if len(real) < len(folders):
        names = {folder.name for folder in folders} - set(real.values())
        raise InputError(f"{path} holds {listed(sorted(names))} twice, by links, as two classes")
    skipped, called = met.skipped, [class_name(folder) for folder in folders]
    if twice := sorted({name for name in called if called.count(name) > 1}):
        raise InputError(
            f"{path} holds {listed(twice)} twice, with accents written in two ways: join the two"
        )
    met.links |= any(folder.is_symlink() for folder in (path, *folders))
    images = {class_name(folder): _images(folder, met) for folder in folders}
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
    if met.links:
        _check_one_label(files)
    return _of_files(files, labels, path.name), classes


def _check_one_label(files: list[Path]) -> None:
    """Raise InputError where a file is in two classes, by links; in one it is met once."""
    found: dict[tuple[int, int], Path] = {}
    for file in files:
        other = found.setdefault(_key(file), file)
        if other is not file:
            raise InputError(
                f"{other} and {file} are one file, by links, in two classes: each image needs one "
                "class"
            )


def _of_files(files: list[Path], labels: list[int], called: str) -> Part:
    labels = np.asarray(labels, dtype=np.int64)
    return Part(partial(_file, files), np.arange(len(files)), labels, called)


def _file(files: list[Path], row: int) -> Path:
    return files[row]


def _held_out(split: str, path: Path, train: Path, classes: list[str], met: Met) -> Part | None:
    """A split beside ``train``; None where it is a test set without labels."""
    if path.samefile(train):
        raise InputError(f"{path} and {train} are the same folder: each image needs one split")
    if (path / ANNOTATIONS).is_file():
        return _annotated(path, classes, met)
    folders = _folders(path)
    unknown = [folder for folder in folders if class_name(folder) not in classes]
    # As in ImageNet's archive, and in Tiny-ImageNet's
    if split == "test" and (not folders or (len(folders) == 1 and unknown)):
        return None
    if unknown := [folder.name for folder in unknown if _images(folder, Met())]:
        raise InputError(
            f"{path} must hold one folder per class, named as in {train}, "
            f"which has no {listed(unknown)}"
        )
    return _part(path, folders, classes, met)[0]


def _annotated(path: Path, classes: list[str], met: Met) -> Part:
    """Tiny-ImageNet's validation set: all images in one folder, their classes in a file."""
    skipped = met.skipped
    lines = (path / ANNOTATIONS).read_text(encoding="utf-8-sig").splitlines()
    class_of = dict(line.split("\t")[:2] for line in lines if "\t" in line)
    found = Met()  # the file of annotations and the like are not said to be left out
    files = _images(path, found)
    met.links |= found.links or path.is_symlink()
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


def _images(folder: Path, met: Met) -> list[Path]:
    """All images under ``folder``, sorted; what is none is counted."""
    found, links = [], []
    _collect(folder, found, links, met.skipped, {})
    met.links |= bool(links)
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
            if is_result(entry.path):
                continue
            _collect(entry.path, found, links, skipped, seen)
        elif not entry.is_file():
            skipped["pipes and sockets"] += 1
        elif _ending(Path(entry.path)) in image_endings():
            found.append(Path(entry.path))
        else:
            skipped[_ending(Path(entry.path))] += 1


def _ending(file: Path) -> str:
    return file.suffix.lower() or "without ending"
