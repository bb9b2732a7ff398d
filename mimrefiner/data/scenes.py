"""Images with a class per pixel: folders, training squares, batches."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import functional as colours

from mimrefiner.data.images import UNREADABLE, to_pil, unreadable
from mimrefiner.data.listed import is_image
from mimrefiner.data.sources import is_hidden
from mimrefiner.errors import InputError
from mimrefiner.files import expanded

IGNORE = 255  # the label of pixels that do not count
TRIES = 10  # squares that are looked at before one is taken that a single class fills
LAYOUTS = (
    "PATH/images/SPLIT and PATH/masks/SPLIT, or ADE20K's images/training, annotations/training "
    "and so on"
)
MASK_MODES = ("L", "P", "1", "I")
SPLIT_NAMES = {"train": ("train", "training"), "val": ("val", "validation")}
JITTER = (
    colours.adjust_brightness,
    colours.adjust_contrast,
    colours.adjust_saturation,
    colours.adjust_hue,
)


class SegmentationFolder(Dataset):
    """(RGB image, mask) pairs; masks hold a class per pixel.

    Images lie in ``PATH/images/SPLIT/NAME.jpg`` and masks in ``PATH/masks/SPLIT/NAME.png``, or in
    the folders ``images`` and ``annotations`` with parts ``training`` and ``validation``, as
    ``ADEChallengeData2016.zip`` has them.

    Args:
        path: the folder.
        split: ``train``, ``val``, or another name of a part.

    Raises:
        InputError: a missing or empty folder, an image without mask, files that cannot be read,
            masks of colours or with numbers beyond 255, sizes that differ.

    >>> from tempfile import mkdtemp
    >>> folder = Path(mkdtemp())
    >>> for kind, shape in (("images", (8, 8, 3)), ("masks", (8, 8))):
    ...     (folder / kind / "train").mkdir(parents=True)
    ...     Image.fromarray(np.zeros(shape, np.uint8)).save(folder / kind / "train" / "a.png")
    >>> image, mask = SegmentationFolder(folder, "train")[0]
    >>> image.size, mask.mode
    ((8, 8), 'L')
    """

    def __init__(self, path: Path | str, split: str):
        path = expanded(path)
        images = _part(path, ("images",), split)
        masks = _part(path, ("masks", "annotations"), split)
        found = sorted(f for f in images.iterdir() if is_image(f) and not is_hidden(f.name))
        self.files = [(file, masks / f"{file.stem}.png") for file in found]
        if not self.files:
            raise InputError(f"{images} holds no images")
        for image, mask in self.files:
            if not mask.is_file():
                raise InputError(f"{image.name} has no mask: expected {mask}")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Image.Image, Image.Image]:
        image, mask = to_pil(self.files[i][0]), _read_mask(self.files[i][1])
        if image.size != mask.size:
            raise InputError(
                f"{self.files[i][0]} is {image.size} and its mask {mask.size} pixels wide and high "
                "(images are turned upright as their EXIF orientation says, masks are not)"
            )
        return image, mask


def _read_mask(file: Path) -> Image.Image:
    """A class per pixel, of mode L; InputError for colours and for numbers beyond 0..255."""
    try:
        with Image.open(file) as opened:
            mode, mask = opened.mode, np.asarray(opened)
    except UNREADABLE as error:
        raise unreadable(error, str(file), file) from error
    if mode not in MASK_MODES and not mode.startswith("I;16"):
        raise InputError(
            f"{file} is an image of mode {mode}: expected a mask with the number of a class per "
            "pixel, grey or with a palette (modes L, P, 1, I;16); turn colours into numbers"
        )
    low, high = int(mask.min()), int(mask.max())
    if low < 0 or high > IGNORE:
        raise InputError(
            f"{file} holds the number {low if low < 0 else high}: expected classes of 0 to "
            f"{IGNORE - 1}, and {IGNORE} for none; masks that number objects do not tell classes"
        )
    return Image.fromarray(mask.astype(np.uint8))


def _part(path: Path, kinds: tuple[str, ...], split: str) -> Path:
    """The first folder that is there; InputError where none is."""
    names = SPLIT_NAMES.get(split, (split,))
    candidates = [path / kind / name for kind in kinds for name in names]
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise InputError(f"{candidates[0]} does not exist: expected {LAYOUTS}")


def scenes_hash(scenes: Dataset, images: int = 64) -> str:
    """SHA-256 of the number of scenes and of the pixels and masks of about ``images`` of them."""
    digest = hashlib.sha256(str(len(scenes)).encode())
    for i in range(0, len(scenes), max(1, len(scenes) // images)):
        for part in scenes[i]:
            digest.update(np.asarray(part).tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Labels:
    """What the numbers in masks mean.

    Attributes:
        classes: number of classes.
        ignore_zero: label 0 means "no class" and the classes begin at 1, as in ADE20K's annotation
            files; without it they begin at 0.

    >>> Labels(3, ignore_zero=True).of(np.array([0, 1, 3, 255], np.uint8)).tolist()
    [255, 0, 2, 255]
    """

    classes: int
    ignore_zero: bool = False

    def __post_init__(self):
        if not 2 <= self.classes <= IGNORE:
            raise InputError(f"expected 2 to {IGNORE} classes, got {self.classes}")

    def of(self, mask: np.ndarray) -> np.ndarray:
        """Class indices and :data:`IGNORE`, uint8; InputError for a class that there is not."""
        if self.ignore_zero:
            mask = np.where((mask == 0) | (mask == IGNORE), IGNORE, mask - 1).astype(np.uint8)
        worst = mask[mask != IGNORE].max(initial=0)
        if worst >= self.classes:
            shift = int(self.ignore_zero)
            raise InputError(
                f"a mask holds class {worst + shift}, expected classes {shift} to "
                f"{self.classes - 1 + shift} and {'0 or ' * shift}{IGNORE} for none: "
                "give the right number of classes"
            )
        return mask

    def check(self, scenes: Dataset, images: int = 100) -> None:
        """Look at about ``images`` masks before hours of training do."""
        for i in range(0, len(scenes), max(1, len(scenes) // images)):
            self.of(np.asarray(scenes[i][1]))


@dataclass(frozen=True)
class SceneCrop:
    """How a training square is cut out of a scene, as mmsegmentation does.

    Attributes:
        size: side of the square in pixels.
        long, short: the image is resized, its aspect kept, to fit within r * long x r * short
            pixels; None for both resizes the whole image to the square, whatever its aspect.
        ratio: r is drawn evenly between these two.
        max_share: a square is drawn again, up to ten times, where one class covers this share of
            the pixels that count, or more.
        jitter: strengths of brightness, contrast, saturation and hue, applied to every image in
            random order; () for none.
        flip: probability of a mirrored square.
    """

    size: int
    long: int | None = None
    short: int | None = None
    ratio: tuple[float, float] = (0.5, 2.0)
    max_share: float = 0.75
    jitter: tuple[float, ...] = ()
    flip: float = 0.5

    def at(self, size: int) -> "SceneCrop":
        """The same for squares of ``size`` pixels: scenes shrink in proportion.

        >>> SceneCrop(512, 2048, 512).at(64).long
        256
        """
        share = size / self.size
        sides = [None if x is None else round(share * x) for x in (self.long, self.short)]
        return replace(self, size=size, long=sides[0], short=sides[1])


def cut(image, mask, crop: SceneCrop, rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """A random square of an image and of its mask, a Pillow image each.

    The image is resized bicubically, the mask by nearest neighbours. What lies beyond the image
    becomes :data:`IGNORE` in the mask and black; :class:`SceneBatches` makes it the mean colour.
    """
    shape = (crop.size, crop.size)
    if crop.long is not None:
        ratio = rng.uniform(*crop.ratio)
        factor = min(crop.long * ratio / max(image.size), crop.short * ratio / min(image.size))
        shape = tuple(max(1, int(factor * side + 0.5)) for side in image.size)
    image, mask = resized(image, mask, shape)
    for _ in range(TRIES):
        box = _box(image.size, crop.size, rng)
        counts = np.bincount(np.asarray(mask.crop(box)).ravel(), minlength=256)[:IGNORE]
        if counts.max() < crop.max_share * counts.sum():
            break
    image, mask = image.crop(box), mask.crop(box)
    if rng.random() < crop.flip:
        image, mask = (x.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for x in (image, mask))
    return jittered(image, crop.jitter, rng), mask


def _box(size: tuple[int, int], side: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """A random square within the image, or as much of it as there is."""
    left, top = (int(rng.integers(max(0, x - side) + 1)) for x in size)
    width, height = size
    return left, top, min(left + side, width), min(top + side, height)


def resized(image, mask, shape: tuple[int, int]) -> tuple[Image.Image, Image.Image]:
    """Image (bicubic) and mask (nearest) of ``shape``, width and height in pixels."""
    nearest = mask.resize(shape, Image.Resampling.NEAREST)
    return image.resize(shape, Image.Resampling.BICUBIC), nearest


def jittered(image, strengths: Sequence[float], rng: np.random.Generator) -> Image.Image:
    """Brightness, contrast, saturation and hue changed at random, in random order."""
    for which in rng.permutation(len(strengths)):
        strength = strengths[which]
        middle = 0.0 if JITTER[which] is colours.adjust_hue else 1.0
        image = JITTER[which](image, rng.uniform(middle - strength, middle + strength))
    return image


class SceneBatches(Dataset):
    """Training squares as normalised tensors with class indices, asked for as (epoch, index).

    Draws depend on (seed, epoch, index) alone, so that a resumed run sees the same squares.

    Args:
        scenes: map-style, (image, mask).
        labels: what the masks' numbers mean.
        crop: how squares are cut.
        normalisation: mean and standard deviation of the images, one number per channel each.
        seed: draws the squares.
    """

    def __init__(
        self,
        scenes: Dataset,
        labels: Labels,
        crop: SceneCrop,
        normalisation: tuple[Sequence[float], Sequence[float]],
        seed: int = 0,
    ):
        self.scenes, self.labels, self.crop, self.seed = scenes, labels, crop, seed
        self.normalisation = normalisation

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        image, mask = self.scenes[key[1]]
        mask = Image.fromarray(self.labels.of(np.asarray(mask)))
        image, mask = cut(image, mask, self.crop, np.random.default_rng((self.seed, *key)))
        return padded(*tensors(image, mask, self.normalisation), self.crop.size)

    @staticmethod
    def collate(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """(batch, 3, size, size) and (batch, size, size)."""
        images, masks = zip(*rows, strict=True)
        return torch.stack(images), torch.stack(masks)


def tensors(image, mask, normalisation) -> tuple[Tensor, Tensor]:
    """A normalised image (3, height, width) and its mask (height, width) int64."""
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in normalisation)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return (pixels - mean) / std, torch.from_numpy(np.array(mask)).long()


def padded(image: Tensor, mask: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Both in the middle of a square of ``size``; around them 0 and :data:`IGNORE`."""
    missing = [size - side for side in mask.shape]  # rows, columns
    sides = [part for m in reversed(missing) for part in (m // 2, m - m // 2)]
    pad = torch.nn.functional.pad
    return pad(image, sides), pad(mask, sides, value=IGNORE)
