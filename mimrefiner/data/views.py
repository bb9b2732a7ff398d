"""From images to batches of views: which images, their draws, crops and colours.

Every draw is a hash of (seed, epoch, image, view), and everything else a function of pixels and
draws. A view therefore depends neither on the batch nor on the number of workers and processes, and
a resumed run sees the views that an uninterrupted one sees.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from mimrefiner.config import Crop, Views
from mimrefiner.data import pixels as ops
from mimrefiner.data.images import to_pil as to_pil
from mimrefiner.data.loaders import ahead, loaded
from mimrefiner.data.rows import row_of, size_of
from mimrefiner.device import to_device
from mimrefiner.errors import InputError

Keys = list[tuple[int, int]]  # one batch: (epoch, image) of every row
# One batch: the crops of every group, (views, batch, 3, size, size) in 0..1; draws, on the CPU;
# index; label
Crops = tuple[list[Tensor], Tensor, Tensor, Tensor]
CROP_TRIES = 10
# Crop, offset, flip, jitter?, jitter order and factors, blur, grey, solarise
DRAWS = 2 * CROP_TRIES + 2 + 1 + 1 + 8 + 2 + 1 + 1
JITTER = (ops.brightness, ops.contrast, ops.saturation, ops.hue)


@dataclass(frozen=True)
class Order:
    """Which images every step sees: epoch after epoch, each shuffled, incomplete batches dropped.

    Attributes:
        batch_size: images in a step, those of all processes together.
        steps: number of steps.
        seed: shuffles the images, and draws their views.
        first_step: where the sequence is entered; a resumed run goes on in the middle.
        part: (i, n) yields the i-th of n equal shares of every batch, one for each process.

    >>> [[image for epoch, image in batch] for batch in Order(2, steps=3, seed=0).batches(5)]
    [[2, 4], [3, 0], [1, 4]]
    """

    batch_size: int
    steps: int
    seed: int
    first_step: int = 0
    part: tuple[int, int] = (0, 1)

    def batches(self, images: int) -> Iterator[Keys]:
        """One batch of (epoch, image) per step, for a data set of so many images."""
        size, (rank, world) = self.batch_size, self.part
        if images < size:
            raise InputError(
                f"a batch of {size} needs at least that many images, the data set has {images}: "
                "take a smaller batch_size (of commands: another --preset), or more images"
            )
        if size % world:
            raise InputError(f"a batch of {size} cannot be shared equally by {world} processes")
        for step in range(self.first_step, self.steps):
            epoch, batch = divmod(step, images // size)
            if batch == 0 or step == self.first_step:
                order = epoch_order(images, epoch, self.seed)
            share = order[batch * size : (batch + 1) * size].reshape(world, -1)[rank]
            yield [(epoch, int(i)) for i in share]


def epoch_order(images: int, epoch: int, seed: int) -> np.ndarray:
    """The order of the images in one epoch, (images,)."""
    return np.random.default_rng((seed, epoch)).permutation(images)


def view_batches(
    dataset: Dataset,
    views: Views,
    order: Order,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str = "cpu",
    num_workers: int = 0,
) -> Iterator[tuple[list[Tensor], Tensor, Tensor]]:
    """Batches of normalised views, one per step.

    Crops are cut image by image in loader processes, or by the GPU itself for images of one size
    that are in memory (:meth:`mimrefiner.data.datasets.ImageDataset.in_memory`): then it waits for
    no loader.

    Args:
        dataset: any map-style data set; :func:`mimrefiner.data.rows.row_of` says of which rows.
        views: how every view is made.
        order: which images every step sees.
        mean, std: normalise the views, one number per channel.
        device: where the views arrive.
        num_workers: processes that decode and crop; 0 does it in this one.

    Yields:
        views: one tensor per view, in the order of ``views.crops``, (batch, 3, size, size).
        index: which image each row is, (batch,).
        label: its class, -1 where there is none, (batch,).
    """
    if num_workers < 0:
        raise InputError(f"loader processes (workers) must be >= 0, got {num_workers}")
    device = torch.device(device)
    mean, std = (torch.tensor(x, device=device).view(3, 1, 1) for x in (mean, std))
    batches = order.batches(size_of(dataset))
    pixels = getattr(dataset, "pixels", None) if device.type == "cuda" else None
    if pixels is None:
        cut = loaded_crops(dataset, views, batches, order.seed, device, num_workers)
    else:
        cut = resident_crops(pixels, dataset.labels, views, batches, order.seed, device)
    groups = size_groups(views)
    for crops, draws, index, label in cut:
        coloured = [
            photometric(x, views.crops[group], draws[:, group])
            for x, group in zip(crops, groups, strict=True)
        ]
        yield [view for x in coloured for view in ((x - mean) / std).unbind()], index, label


def size_groups(views: Views) -> list[slice]:
    """The views of one size next to each other, which are cut and coloured together.

    >>> from mimrefiner.data.augment import paper_views
    >>> size_groups(paper_views())
    [slice(0, 2, None), slice(2, 12, None)]
    """
    sizes = [crop.size for crop in views.crops]
    starts = [i for i, size in enumerate(sizes) if i == 0 or size != sizes[i - 1]]
    return [slice(*ends) for ends in zip(starts, [*starts[1:], len(sizes)], strict=True)]


def loaded_crops(
    dataset: Dataset,
    views: Views,
    batches: Iterator[Keys],
    seed: int,
    device: torch.device,
    num_workers: int,
) -> Iterator[Crops]:
    """Crops that loader processes cut image by image."""
    cuts = _Cuts(dataset, views, seed)
    pin = device.type == "cuda"
    for pixels, draws, which in loaded(cuts, batches, cuts.collate, num_workers, pin=pin):
        pixels = (x.to(device, non_blocking=True).permute(0, 1, 4, 2, 3) for x in pixels)
        index, label = which.to(device, non_blocking=True)
        yield [x.float().div_(255) for x in pixels], draws, index, label


class _Cuts(Dataset):
    """The uint8 crops of one image and their draws.

    They are asked for by (epoch, index), so that loader processes need no state.
    """

    def __init__(self, dataset: Dataset, views: Views, seed: int):
        self.dataset, self.views, self.seed = dataset, views, seed
        self.scales = np.array([crop.scale for crop in views.crops])
        self.groups = size_groups(views)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]):
        epoch, index = key
        image, label = row_of(self.dataset, index)
        draws = uniforms(self.seed, epoch, index, len(self.views.crops))
        boxes, flips = crop_boxes(*image.size, self.scales, draws)
        pixels = [
            crop_view(image, crop, *where)
            for crop, *where in zip(self.views.crops, boxes, flips, strict=True)
        ]
        return pixels, draws, (index, label)

    def collate(self, rows):
        """One batch of many rows.

        Pixels of every group, (views, batch, size, size, 3) uint8; draws, (batch, views, DRAWS);
        index and label together, (2, batch).
        """
        pixels, draws, which = zip(*rows, strict=True)
        views = list(zip(*pixels, strict=True))
        pixels = [torch.from_numpy(np.stack([np.stack(v) for v in views[g]])) for g in self.groups]
        return pixels, torch.from_numpy(np.stack(draws)), torch.tensor(which).T.contiguous()


def resident_crops(
    pixels: np.ndarray,
    labels: np.ndarray | None,
    views: Views,
    batches: Iterator[Keys],
    seed: int,
    device: torch.device,
) -> Iterator[Crops]:
    """The same crops, equal to a grey level, cut on the ``device`` that holds all images.

    ``pixels`` are (images, height, width, 3), uint8.
    """
    height, width = pixels.shape[1:3]
    pixels = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2)
    labels = torch.full((len(pixels),), -1) if labels is None else torch.from_numpy(labels)
    scales = np.array([crop.scale for crop in views.crops])
    flip_p = np.array([crop.flip_p for crop in views.crops])
    groups = size_groups(views)

    def drawn(batch: Keys) -> tuple[Tensor, Tensor, Tensor]:
        """Draws; boxes and flips, (views, batch, 5); index and label, (2, batch)."""
        which = np.array([i for _, i in batch])
        draws = uniforms(seed, batch[0][0], which, len(views.crops))  # (batch, views, draws)
        boxes, flips = crop_boxes(width, height, scales, draws)
        where = np.concatenate([boxes, (flips < flip_p)[..., None]], -1)
        index = torch.from_numpy(which)
        where = torch.from_numpy(where).transpose(0, 1).float()
        return torch.from_numpy(draws), where, torch.stack([index, labels[index]])

    plans = map(drawn, batches)
    for draws, where, which in ahead(plans) if device.type == "cuda" else plans:
        where, (index, label) = to_device(where, device), to_device(which, device)
        images = pixels[index].float()
        crops = [
            ops.crop_batch(images, views.crops[group.start].size, where[group]) for group in groups
        ]
        yield crops, draws, index, label


def uniforms(
    seed: int, epoch: int, index: int | np.ndarray, views: int, draws: int = DRAWS
) -> np.ndarray:
    """Numbers in [0, 1) that depend on (seed, epoch, image, view, draw) only: (views, draws).

    Several images at once, ``index`` (batch,), give (batch, views, draws). The numbers are float32.
    The finaliser of SplitMix64 (Steele et al. 2014) mixes one key after another.

    >>> (uniforms(seed=0, epoch=0, index=7, views=3)[:2] == uniforms(0, 0, 7, 2)).all()
    np.True_
    """
    with np.errstate(over="ignore"):
        state = np.uint64(seed)
        index = np.asarray(index).astype(np.uint64)[..., None, None]
        view, draw = np.arange(views, dtype=np.uint64)[:, None], np.arange(draws, dtype=np.uint64)
        for key in (np.uint64(epoch), index, view, draw):
            state = _mix(state + np.uint64(0x9E3779B97F4A7C15) * (key + np.uint64(1)))
    return (state >> np.uint64(40)).astype(np.float32) / np.float32(2**24)


def _mix(state: np.ndarray) -> np.ndarray:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def crop_boxes(
    width: int, height: int, scales: np.ndarray, u: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The boxes of torchvision's RandomResizedCrop, and the draws that decide on flips.

    The area is uniform, the logarithm of the aspect ratio uniform between 3/4 and 4/3. Ten tries
    that do not fit give the centred crop with the closest ratio.

    Args:
        width, height: size of the image, or of all images, in pixels.
        scales: smallest and largest share of the area for every view, (views, 2).
        u: draws, (..., views, DRAWS).

    Returns:
        (left, top, right, bottom) of every view, (..., views, 4), and one draw each, (..., views).
    """
    low, span = (x.astype(np.float32)[:, None] for x in (scales[:, 0], scales[:, 1] - scales[:, 0]))
    log_low, log_span = np.float32(math.log(3 / 4)), np.float32(math.log(4 / 3) - math.log(3 / 4))
    areas, ratios, offsets = (
        u[..., 0 : 2 * CROP_TRIES : 2],
        u[..., 1 : 2 * CROP_TRIES : 2],
        u[..., 2 * CROP_TRIES : 2 * CROP_TRIES + 2],
    )
    area = np.float32(width * height) * (low + span * areas)  # (..., views, tries)
    ratio = np.exp((log_low + log_span * ratios).astype(np.float64)).astype(np.float32)
    w, h = (
        np.rint(np.sqrt(x.astype(np.float64))).astype(np.int64)
        for x in (area * ratio, area / ratio)
    )
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first, found = fits.argmax(-1)[..., None], fits.any(-1)
    w, h = (np.take_along_axis(x, first, -1)[..., 0] for x in (w, h))
    left, top = (
        (offsets[..., i] * (room + 1).astype(np.float32)).astype(np.int64)
        for i, room in enumerate((width - w, height - h))
    )
    widest, highest = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    w, h = np.where(found, w, widest), np.where(found, h, highest)
    left = np.where(found, left, (width - widest) // 2)
    top = np.where(found, top, (height - highest) // 2)
    return np.stack([left, top, left + w, top + h], -1), u[..., 2 * CROP_TRIES + 2]


def crop_view(image: Image.Image, crop: Crop, box: np.ndarray, flip: float) -> np.ndarray:
    """One crop of :func:`crop_boxes`, resized bicubically and perhaps flipped: (size, size, 3)."""
    size = (crop.size, crop.size)
    pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC, box=tuple(box.tolist())))
    return pixels[:, ::-1] if flip < crop.flip_p else pixels


def photometric(x: Tensor, crops: Sequence[Crop], u: Tensor) -> Tensor:
    """Colour jitter, greyscale, blur and solarisation of views, each image by its own draws.

    All views of one size are coloured together, since a GPU spends its time on the number of calls.
    The draws stay on the CPU, where they decide which rows each call touches; rows and numbers of
    all calls travel in one copy each.

    Args:
        x: views in 0..1, (views, batch, 3, height, width), on any device.
        crops: the recipe of every view.
        u: draws of each image, (batch, views, DRAWS), on the CPU.

    Returns:
        New views in 0..1.
    """
    calls = photometric_calls(crops, u.transpose(0, 1)[..., 2 * CROP_TRIES + 3 :])
    flat = x.flatten(0, 1).clone()
    if calls:
        functions, rows, numbers = zip(*calls, strict=True)
        sizes = [len(row) for row in rows]
        rows, numbers = (
            to_device(torch.cat(part), x.device).split(sizes) for part in (rows, numbers)
        )
        for function, row, number in zip(functions, rows, numbers, strict=True):
            flat[row] = function(flat[row], number[:, None, None, None])
    return flat.view(x.shape)


def photometric_calls(
    crops: Sequence[Crop], u: Tensor
) -> list[tuple[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor]]:
    """What is done in which order: (function, rows of (views * batch), one number per row).

    ``u`` are the photometric draws, (views, batch, 13): jitter?, the order of its four parts, their
    factors, grey?, blur?, sigma, solarise?
    """

    def of_views(values: Iterable) -> Tensor:
        return torch.tensor(list(values))[:, None]

    strengths = torch.tensor([[c.brightness, c.contrast, c.saturation, c.hue] for c in crops])
    shifts = (2 * u[..., 5:9] - 1) * strengths[:, None]
    jitter = (u[..., 0] < of_views(c.jitter_p for c in crops))[..., None]
    jitter = jitter & (strengths > 0)[:, None]
    order = u[..., 1:5].argsort(-1)
    calls = [
        (function, jitter[..., part] & (order[..., turn] == part), shifts[..., part])
        for turn in range(4)
        for part, function in enumerate(JITTER)
    ]
    calls.append((ops.greyscale, u[..., 9] < of_views(c.grey_p for c in crops), u[..., 9]))
    low = of_views(c.blur_sigma[0] for c in crops)
    sigma = low + of_views(c.blur_sigma[1] - c.blur_sigma[0] for c in crops) * u[..., 11]
    blurred = u[..., 10] < of_views(c.blur_p for c in crops)
    radii = of_views(max(1, math.ceil(3 * c.blur_sigma[1])) for c in crops)
    for radius in radii.unique().tolist():
        calls.append((partial(ops.blur, radius=radius), blurred & (radii == radius), sigma))
    calls.append((ops.solarize, u[..., 12] < of_views(c.solarize_p for c in crops), u[..., 12]))
    return [
        (function, chosen.flatten().nonzero()[:, 0], numbers[chosen])
        for function, chosen, numbers in calls
        if chosen.any()
    ]
