"""From images to batches of views: which images, their draws, crops and colours.

Every draw is a hash of (seed, epoch, image, view), and everything else a function of pixels and
draws. A view therefore depends neither on the batch nor on the number of workers and processes, and
a resumed run sees the views that an uninterrupted one sees.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from mimrefiner.config import Crop, Views
from mimrefiner.data.loaders import loaded
from mimrefiner.data.resampling import crop_batch
from mimrefiner.errors import InputError

Keys = list[tuple[int, int]]  # one batch: (epoch, image) of every row
# One batch: crops of every view in 0..1, (batch, 3, size, size); draws, on the CPU; index; label
Crops = tuple[list[Tensor], Tensor, Tensor, Tensor]
CROP_TRIES = 10
# Crop, offset, flip, jitter?, jitter order and factors, blur, grey, solarise
DRAWS = 2 * CROP_TRIES + 2 + 1 + 1 + 8 + 2 + 1 + 1
HALF_GREY = 0.5 / 255


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
                f"a batch of {size} needs at least that many images, the data set has {images}"
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
        dataset: any map-style data set of (image, label); :func:`to_pil` says which images.
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
    batches = order.batches(len(dataset))
    pixels = getattr(dataset, "pixels", None) if device.type == "cuda" else None
    if pixels is None:
        cut = loaded_crops(dataset, views, batches, order.seed, device, num_workers)
    else:
        cut = resident_crops(pixels, dataset.labels, views, batches, order.seed, device)
    for crops, draws, index, label in cut:
        coloured = [
            photometric(x, crop, draws[:, v])
            for v, (x, crop) in enumerate(zip(crops, views.crops, strict=True))
        ]
        yield [(x - mean) / std for x in coloured], index, label


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
    for pixels, *rest in loaded(cuts, batches, _collate, num_workers, pin=device.type == "cuda"):
        pixels = (x.to(device, non_blocking=True).permute(0, 3, 1, 2) for x in pixels)
        draws, index, label = rest
        index, label = (x.to(device, non_blocking=True) for x in (index, label))
        yield [x.float().div_(255) for x in pixels], draws, index, label


class _Cuts(Dataset):
    """The uint8 crops of one image and their draws.

    They are asked for by (epoch, index), so that loader processes need no state.
    """

    def __init__(self, dataset: Dataset, views: Views, seed: int):
        self.dataset, self.views, self.seed = dataset, views, seed
        self.scales = np.array([crop.scale for crop in views.crops])

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]):
        epoch, index = key
        image, label = self.dataset[index]
        image = to_pil(image)
        draws = uniforms(self.seed, epoch, index, len(self.views.crops))
        boxes, flips = crop_boxes(*image.size, self.scales, draws)
        pixels = [
            crop_view(image, crop, *where)
            for crop, *where in zip(self.views.crops, boxes, flips, strict=True)
        ]
        return pixels, draws, index, int(label)


def _collate(rows):
    pixels, draws, index, label = zip(*rows, strict=True)
    pixels = [torch.from_numpy(np.stack(view)) for view in zip(*pixels, strict=True)]
    draws = torch.from_numpy(np.stack(draws))  # (batch, views, draws)
    return pixels, draws, torch.tensor(index), torch.tensor(label)


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
    for batch in batches:
        index = torch.tensor([i for _, i in batch])
        # (batch, views, draws)
        draws = uniforms(seed, batch[0][0], index.numpy(), len(views.crops))
        boxes, flips = crop_boxes(width, height, scales, draws)
        draws, boxes, flips = (torch.from_numpy(x) for x in (draws, boxes, flips))
        on_device = index.to(device, non_blocking=True)
        images = pixels[on_device].float()
        crops = [
            crop_batch(images, crop, boxes[:, v], flips[:, v]) for v, crop in enumerate(views.crops)
        ]
        yield crops, draws, on_device, labels[index].to(device, non_blocking=True)


def to_pil(image) -> Image.Image:
    """An RGB PIL image of a PIL image, a uint8 array or a tensor.

    Arrays are (height, width[, 3]); tensors (3, height, width), in 0..1 or of uint8.
    """
    if isinstance(image, Tensor):
        if image.dtype != torch.uint8:
            low, high = image.min().item(), image.max().item()
            # Rounding errors pass, NaN does not
            if not (low > -HALF_GREY and high < 1 + HALF_GREY):
                raise InputError(
                    f"expected an image tensor in 0..1 or of uint8, got {low:.3g} to {high:.3g}: "
                    "do not normalise it"
                )
            image = (image.clamp(0, 1) * 255).round().to(torch.uint8)
        image = image.permute(1, 2, 0).squeeze(-1).cpu().numpy()
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise InputError(
                f"expected an image array of uint8, got {image.dtype}: scale it to 0..255"
            )
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise InputError(
            f"expected a PIL image, a uint8 array or a tensor, got {type(image).__name__}"
        )
    return image.convert("RGB")


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


def photometric(x: Tensor, crop: Crop, u: Tensor) -> Tensor:
    """Colour jitter, greyscale, blur and solarisation of a batch, each image by its own draws.

    The draws stay on the CPU, where they decide which images each step touches, so that no step
    waits for the GPU.

    Args:
        x: images in 0..1, (batch, 3, height, width), on any device.
        crop: the recipe.
        u: draws of each image, (batch, DRAWS), on the CPU.

    Returns:
        A new batch in 0..1.
    """
    x = x.clone()
    u = u[:, 2 * CROP_TRIES + 3 :]
    jitter, order, factors = u[:, 0] < crop.jitter_p, u[:, 1:5].argsort(-1), u[:, 5:9]
    strengths = (crop.brightness, crop.contrast, crop.saturation, crop.hue)
    for turn in range(4):
        for op, strength in enumerate(strengths):
            chosen = jitter & (order[:, turn] == op)
            if strength > 0 and chosen.any():
                shift = (2 * factors[chosen, op] - 1) * strength
                rows = _rows(chosen, x)
                shift = shift.to(x.device, non_blocking=True)[:, None, None, None]
                x[rows] = _JITTER[op](x[rows], shift)
    grey, blur, solarize = u[:, 9] < crop.grey_p, u[:, 10] < crop.blur_p, u[:, 12] < crop.solarize_p
    if grey.any():
        rows = _rows(grey, x)
        x[rows] = _grey(x[rows]).expand(-1, 3, -1, -1)
    if blur.any():
        low, high = crop.blur_sigma
        sigma = (low + (high - low) * u[blur, 11]).to(x.device, non_blocking=True)
        rows = _rows(blur, x)
        x[rows] = gaussian_blur(x[rows], sigma, radius=max(1, math.ceil(3 * high)))
    if solarize.any():
        rows = _rows(solarize, x)
        x[rows] = torch.where(x[rows] >= 128 / 255, 1 - x[rows], x[rows])
    return x


def _rows(chosen: Tensor, x: Tensor) -> Tensor:
    """The rows of ``x`` that are ``chosen`` on the CPU, as indices beside ``x``."""
    return chosen.nonzero()[:, 0].to(x.device, non_blocking=True)


def _grey(x: Tensor) -> Tensor:
    # ITU-R 601, as PIL and torchvision
    weights = torch.tensor([0.2989, 0.587, 0.114], dtype=x.dtype)
    weights = weights.to(x.device, non_blocking=True)
    return torch.einsum("bchw,c->bhw", x, weights)[:, None]


def _brightness(x: Tensor, shift: Tensor) -> Tensor:
    return (x * (1 + shift)).clamp(0, 1)


def _contrast(x: Tensor, shift: Tensor) -> Tensor:
    mean = _grey(x).mean((2, 3), keepdim=True)
    return (mean + (x - mean) * (1 + shift)).clamp(0, 1)


def _saturation(x: Tensor, shift: Tensor) -> Tensor:
    grey = _grey(x)
    return (grey + (x - grey) * (1 + shift)).clamp(0, 1)


def _hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by ``shift`` of a full circle.

    HSV becomes RGB channel by channel: f(n) = v - v s max(0, min(k, 4 - k, 1)).
    """
    value, low = x.amax(1), x.amin(1)
    chroma = value - low
    safe = torch.where(chroma > 0, chroma, 1)
    r, g, b = x.unbind(1)
    green_or_blue = torch.where(value == g, (b - r) / safe + 2, (r - g) / safe + 4)
    hue = torch.where(value == r, ((g - b) / safe) % 6, green_or_blue) + 6 * shift[:, 0]
    channels = []
    for n in (5.0, 3.0, 1.0):
        k = (n + hue) % 6
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, 1)


_JITTER = (_brightness, _contrast, _saturation, _hue)


def gaussian_blur(x: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Blur each image of (batch, 3, height, width) with its own ``sigma`` (batch,), in pixels."""
    batch, channels, height, width = x.shape
    offsets = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma[:, None]) ** 2)
    # (batch * channels, taps)
    kernel = (kernel / kernel.sum(-1, keepdim=True)).repeat_interleave(channels, 0)
    x = F.pad(x, (radius,) * 4, mode="replicate").flatten(0, 1)[None]
    x = F.conv2d(x, kernel[:, None, None, :], groups=batch * channels)
    x = F.conv2d(x, kernel[:, None, :, None], groups=batch * channels)
    return x.view(batch, channels, height, width)
