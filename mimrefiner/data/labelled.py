"""Labelled images for classifiers: crops, RandAugment, random erasing, and mixing of a batch.

Draws for one image are a function of (seed, epoch, image), those for a batch of (seed, step, place
in the batch), so that a resumed run sees the images that an uninterrupted one sees. RandAugment and
mixing are timm's, which draw from global generators: within :func:`drawn_from` these draw from a
seed, and afterwards go on as before.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor
from torch.utils.data import Dataset

from mimrefiner.config import Crop
from mimrefiner.data.loaders import loaded
from mimrefiner.data.rows import row_of
from mimrefiner.data.views import (
    CROP_TRIES,
    DRAWS,
    Order,
    crop_boxes,
    crop_view,
    uniforms,
)
from mimrefiner.device import to_device
from mimrefiner.errors import InputError

ERASE_TRIES = 10
ERASE_DRAWS = 1 + 4 * ERASE_TRIES  # whether; area, shape, top and left of every try
ERASED_AREA = (0.02, 1 / 3)
ERASED_SHAPE = (math.log(0.3), math.log(1 / 0.3))  # of height / width
TRANSLATED = 0.45  # largest shift of RandAugment, as a share of the side
SEEDS = 2**24  # that one draw tells apart


@dataclass(frozen=True)
class Augmentation:
    """How a training image of a classifier is made, in the order of application.

    Attributes:
        size: side of the result in pixels.
        resize: the short side is resized to this many pixels first; None: no resizing.
        crop_scale: smallest and largest share of the area of a random resized crop; None: the whole
            image is squeezed into a square.
        flip: whether half of the images are mirrored.
        rand_augment: timm's name of a RandAugment; "" for none.
        erasing: probability that, after normalisation, a rectangle of 2 to 33 % of the area and of
            shape 0.3 to 1 / 0.3 is replaced by standard normal noise (arXiv 1708.04896).
    """

    size: int
    resize: int | None = None
    crop_scale: tuple[float, float] | None = (0.08, 1.0)
    flip: bool = True
    rand_augment: str = ""
    erasing: float = 0.0


def labelled_batches(
    dataset: Dataset,
    augmentation: Augmentation,
    order: Order,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str = "cpu",
    num_workers: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalised, augmented images (batch, 3, size, size) and labels (batch,), one pair per step.

    Args:
        dataset: map-style, (image, label).
        augmentation: what is done to every image.
        order: which images every step sees.
        mean, std: normalise the images, one number per channel; RandAugment fills with ``mean``.
        device: where the images arrive.
        num_workers: processes that decode and augment; 0 does it in this one.
    """
    if num_workers < 0:
        raise InputError(f"loader processes (workers) must be >= 0, got {num_workers}")
    device = torch.device(device)
    fill = tuple(min(255, round(255 * x)) for x in mean)
    mean, std = (torch.tensor(x, device=device).view(3, 1, 1) for x in (mean, std))
    images = _Augmented(dataset, augmentation, order.seed, fill)
    batches = order.batches(len(dataset))
    pin = device.type == "cuda"
    rows = loaded(images, batches, images.collate, num_workers, pin=pin)
    for pixels, boxes, labels in rows:
        pixels, labels = (x.to(device, non_blocking=True) for x in (pixels, labels))
        x = (pixels.permute(0, 3, 1, 2).float().div_(255) - mean) / std
        if augmentation.erasing:
            x = erase(x, boxes)
        yield x, labels


def rand_augment(
    name: str, size: int, fill: tuple[int, ...]
) -> Callable[[Image.Image], Image.Image]:
    """timm's RandAugment of that ``name`` for images of ``size`` pixels, with bicubic resampling.

    ``fill`` is the colour of what moves into view, 0..255.

    Raises:
        InputError: a name that timm does not know.
    """
    options = {
        "translate_const": int(TRANSLATED * size),
        "img_mean": fill,
        "interpolation": Image.Resampling.BICUBIC,
    }
    try:
        transform = rand_augment_transform(name, options)
    except (AssertionError, ValueError) as error:
        raise InputError(
            f"expected timm's name of a RandAugment, such as rand-m9-mstd0.5-inc1, got {name!r}"
        ) from error
    for op in transform.ops:
        if op.name == "PosterizeIncreasing":
            op.aug_fn = posterize
    return transform


def posterize(image: Image.Image, bits: int, **_) -> Image.Image:
    """Keep the first ``bits`` of each colour; 0, which new versions of Pillow refuse, gives black.

    >>> posterize(Image.new("RGB", (1, 1), (255, 130, 1)), 1).getpixel((0, 0))
    (128, 128, 0)
    """
    keep = 256 - 2 ** (8 - bits)
    return image.point([value & keep for value in range(256)] * len(image.getbands()))


class _Augmented(Dataset):
    """The augmented uint8 pixels of one image, what is erased of it, and its label."""

    def __init__(
        self, dataset: Dataset, augmentation: Augmentation, seed: int, fill: tuple[int, ...]
    ):
        a = self.augmentation = augmentation
        self.dataset, self.seed = dataset, seed
        self.crop = Crop(a.size, a.crop_scale or (1.0, 1.0), flip_p=0.5 * a.flip)
        self.rand_augment = rand_augment(a.rand_augment, a.size, fill) if a.rand_augment else None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]):
        epoch, index = key
        image, label = row_of(self.dataset, index)
        draws = uniforms(self.seed, epoch, index, 1, DRAWS + 2 + ERASE_DRAWS)[0]
        pixels = self._crop(image, draws[:DRAWS])
        if self.rand_augment is not None:
            with drawn_from(int(draws[DRAWS] * SEEDS)):
                pixels = np.asarray(self.rand_augment(Image.fromarray(pixels)))
        a = self.augmentation
        box = erased_box(a.size, a.erasing, draws[DRAWS + 2 :])
        return pixels, (*box, int(draws[DRAWS + 1] * SEEDS)), label

    def _crop(self, image: Image.Image, draws: np.ndarray) -> np.ndarray:
        a = self.augmentation
        if a.resize is not None:
            # The long side is rounded down, as torchvision does
            size = tuple(a.resize * side // min(image.size) for side in image.size)
            image = image.resize(size, Image.Resampling.BICUBIC)
        if a.crop_scale is None:
            box, flip = np.array([0, 0, *image.size]), draws[2 * CROP_TRIES + 2]
        else:
            boxes, flips = crop_boxes(*image.size, np.array([a.crop_scale]), draws[None])
            box, flip = boxes[0], flips[0]
        return np.ascontiguousarray(crop_view(image, self.crop, box, flip))

    def collate(self, rows):
        """One batch of many rows.

        Pixels, (batch, size, size, 3) uint8; boxes with seeds, (batch, 5); labels, (batch,).
        """
        pixels, boxes, labels = zip(*rows, strict=True)
        return torch.from_numpy(np.stack(pixels)), torch.tensor(boxes), torch.tensor(labels)


class Transformed(Dataset):
    """(transformed image, label) from a map-style data set of (image, label)."""

    def __init__(self, dataset: Dataset, transform):
        self.dataset, self.transform = dataset, transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int):
        image, label = row_of(self.dataset, i)
        return self.transform(image), label


def erased_box(size: int, p: float, draws: np.ndarray) -> tuple[int, int, int, int]:
    """Top, left, bottom and right of the rectangle that is erased, in pixels; zeros for none.

    Args:
        size: side of the image in pixels.
        p: probability of one.
        draws: in [0, 1), (:data:`ERASE_DRAWS`,).

    >>> erased_box(100, 1.0, np.full(ERASE_DRAWS, 0.5))
    (29, 29, 71, 71)
    """
    (low, high), (flat, tall) = ERASED_AREA, ERASED_SHAPE
    for area, shape, top, left in draws[1:].reshape(-1, 4) if draws[0] < p else ():
        pixels = size**2 * (low + (high - low) * float(area))
        ratio = math.exp(flat + (tall - flat) * float(shape))
        height, width = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if height < size and width < size:
            top, left = (int(x * (size - side + 1)) for x, side in ((top, height), (left, width)))
            return top, left, top + height, left + width
    return 0, 0, 0, 0


def erase(x: Tensor, boxes: Tensor) -> Tensor:
    """``x`` with standard normal noise inside the boxes, in place.

    Noise is drawn on the CPU, so that it is the same on every device and for any number of
    processes.

    Args:
        x: images, (batch, 3, height, width).
        boxes: top, left, bottom and right in pixels, zeros for none, and the seed of the noise,
            (batch, 5), on the CPU.
    """
    rows = boxes[:, 2].nonzero()[:, 0]
    if not len(rows):
        return x
    noise, generator = torch.empty(len(rows), *x.shape[1:]), torch.Generator()
    for image, seed in zip(noise, boxes[rows, 4].tolist(), strict=True):
        image.normal_(generator=generator.manual_seed(seed))
    y, across = (torch.arange(side) for side in x.shape[2:])
    top, left, bottom, right, _ = boxes[rows, :, None].unbind(1)
    inside = (y >= top) & (y < bottom), (across >= left) & (across < right)
    inside = (inside[0][:, :, None] & inside[1][:, None])[:, None]  # (rows, 1, height, width)
    rows, noise, inside = (to_device(part, x.device) for part in (rows, noise, inside))
    x[rows] = torch.where(inside, noise, x[rows])
    return x


@dataclass(frozen=True)
class Mixing:
    """Mixup (arXiv 1710.09412) or CutMix (arXiv 1905.04899) of a batch with itself, reversed.

    Attributes:
        mixup, cutmix: parameters of the Beta distributions; a coin for every batch decides where
            both are above 0.
        smoothing: label smoothing, which the targets carry.
        classes: how many there are.
    """

    mixup: float
    cutmix: float
    smoothing: float
    classes: int

    def __call__(self, images: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Mixed images and their targets, (batch, classes), which sum to 1.

        Raises:
            InputError: an odd number of images.

        >>> mixing = Mixing(mixup=0.8, cutmix=0.0, smoothing=0.0, classes=2)
        >>> x, target = mixing(torch.eye(2)[:, :, None, None], torch.tensor([0, 1]), seed=0)
        >>> torch.equal(x[:, :, 0, 0], target) and bool(0 < target[0, 0] < 1)
        True
        """
        if len(images) % 2:
            raise InputError(
                f"mixing takes images in pairs, got {len(images)} at a time: use an even batch "
                "size and micro-batch, or a recipe without mixup and cutmix"
            )
        mix = Mixup(
            self.mixup,
            self.cutmix,
            label_smoothing=self.smoothing,
            num_classes=self.classes,
        )
        with drawn_from(seed):
            return mix(images.clone(), labels)


@contextmanager
def drawn_from(seed: int) -> Iterator[None]:
    """Within this block Python's and NumPy's global generators draw from ``seed`` (below 2^32).

    >>> with drawn_from(3):
    ...     first = random.random(), np.random.rand()
    >>> with drawn_from(3):
    ...     first == (random.random(), np.random.rand())
    True
    """
    before = random.getstate(), np.random.get_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002


def batch_seed(seed: int, stream: int, step: int, place: int) -> int:
    """A seed below 2^32 for what one part of a batch draws; ``place`` is the part's number."""
    return int(np.random.SeedSequence((seed, stream, step, place)).generate_state(1)[0])
