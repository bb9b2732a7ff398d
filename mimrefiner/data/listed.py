"""Labelled images by their files: folders of classes as they are, and lists in text files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from mimrefiner.data.images import image_endings, to_pil
from mimrefiner.data.sources import class_name, is_hidden
from mimrefiner.errors import InputError


class ListedImages(Dataset):
    """Map-style data set of (RGB image, int label) from files, nothing drawn and nothing split.

    Args:
        name: what it is called.
        files: paths of images.
        labels: one number for each.
        classes: names of the classes, where they are known.
        drawn: where the images come from, in words, if they are a choice among more.
    """

    def __init__(
        self,
        name: str,
        files: Sequence[Path],
        labels: Sequence[int],
        classes: Sequence[str] | None = None,
        drawn: str = "",
    ):
        self.name, self.files, self.drawn = name, list(files), drawn
        self.labels = np.asarray(labels, dtype=np.int64)
        self.classes = None if classes is None else list(classes)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return to_pil(self.files[i]), int(self.labels[i])


def is_image(file: Path) -> bool:
    """Whether a file's name ends as those of images do.

    >>> is_image(Path("a/b.JPEG")), is_image(Path("a/b.txt"))
    (True, False)
    """
    return file.suffix.lower() in image_endings()


def class_folders(path: Path) -> list[str]:
    """The names of the folders in ``path``, sorted; InputError where there is none."""
    inside = path.iterdir() if path.is_dir() else ()
    found = sorted(f.name for f in inside if f.is_dir() and not is_hidden(f.name))
    if not found:
        raise InputError(f"{path} holds no folders of classes: expected {path}/CLASS/IMAGE")
    return found


def read_classes(path: Path, classes: Sequence[str]) -> ListedImages:
    """The images of ``path``/CLASS/IMAGE, whose labels are places in ``classes``.

    Not every class needs a folder.

    Raises:
        InputError: a folder that ``classes`` does not name, or no images.
    """
    place = {class_name(Path(name)): i for i, name in enumerate(classes)}
    files, labels = [], []
    for folder in class_folders(path):
        name = class_name(path / folder)
        if name not in place:
            raise InputError(
                f"{path} has a folder {name}, which is none of the model's {len(place)} classes: "
                "test sets need folders named as those of training"
            )
        inside = (path / folder).iterdir()
        found = sorted(f for f in inside if is_image(f) and not is_hidden(f.name))
        files += found
        labels += [place[name]] * len(found)
    if not files:
        raise InputError(f"{path} holds no images: expected {path}/CLASS/IMAGE")
    return ListedImages(path.name, files, labels, classes)


def read_list(file: Path, folder: Path, name: str) -> ListedImages:
    """The images that a text file lists, one ``PATH LABEL`` a line, paths relative to ``folder``.

    Raises:
        InputError: a missing or empty file, a line of another form, or a missing image.
    """
    if not file.is_file():
        raise InputError(f"{file} does not exist: expected a list of PATH LABEL lines")
    files, labels = [], []
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), 1):
        if not line.strip():
            continue
        path, _, label = line.strip().rpartition(" ")
        if not path or not label.isdigit():
            raise InputError(f"{file}, line {number}: expected PATH LABEL, got {line!r}")
        files.append(folder / path)
        labels.append(int(label))
    if not files:
        raise InputError(f"{file} lists no images")
    for image in (files[0], files[-1]):  # all would take minutes on a network disk
        if not image.is_file():
            raise InputError(f"{file} lists {image}, which does not exist")
    return ListedImages(name, files, labels)
