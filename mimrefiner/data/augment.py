"""The views of an image: recipes, their random draws, the crop (image by image or batched) and the
photometric part (batched).

Every draw is a hash of (seed, epoch, image, view): a view does not depend on batch order, workers
or processes, and a resumed run sees the same ones. What follows is a function of the pixels and the
draws.
"""

import math
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mimrefiner.config import Crop, Views

CROP_TRIES = 10
# Crop, offset, flip, jitter?, jitter order and factors, blur, grey, solarise
DRAWS = 2 * CROP_TRIES + 2 + 1 + 1 + 8 + 2 + 1 + 1


def paper_views(size: int = 224, local_size: int = 96, n_local: int = 10) -> Views:
    """The paper's recipe: BYOL's two global crops and local ones (``train_byolaug_localviews.yaml``
    of the released code).
    """
    return Views(
        global_crops=(
            Crop(size, (0.25, 1.0), blur_p=1.0),
            Crop(size, (0.25, 1.0), blur_p=0.1, solarize_p=0.2),
        ),
        local_crop=Crop(local_size, (0.05, 0.25), blur_p=0.5),
        n_local=n_local,
    )


def small_views(size: int, patch_size: int, n_local: int = 10) -> Views:
    """The paper's recipe for images of 28 to 96 px: local crops of about 3/7 of the side, blur
    shrunk with the image.
    """
    local_size = max(2, round(size * 96 / 224 / patch_size)) * patch_size
    views = paper_views(size, local_size, n_local)

    def shrink(crop: Crop) -> Crop:
        return replace(crop, blur_sigma=(0.1, max(0.1, 2.0 * size / 224)))

    return Views(
        tuple(shrink(crop) for crop in views.global_crops), shrink(views.local_crop), n_local
    )


def digit_views(size: int, patch_size: int, n_local: int = 10) -> Views:
    """Views that leave a digit's class alone: no flip, hue, grey or solarisation, and local crops
    that hold half of it.
    """
    local_size = max(2, round(size / 2 / patch_size)) * patch_size
    crop = Crop(size, (0.4, 1.0), flip_p=0.0, saturation=0.0, hue=0.0, grey_p=0.0)
    return Views((crop, crop), replace(crop, size=local_size, scale=(0.2, 0.5)), n_local)


def plain_views(size: int, scale: tuple[float, float], flip: bool = True) -> Views:
    """One view of an image: a random resized crop, mirrored in half of the cases if ``flip``.

    >>> crop, = plain_views(32, (0.08, 1.0)).crops
    >>> crop.size, crop.flip_p, crop.jitter_p
    (32, 0.5, 0.0)
    """
    crop = Crop(size, scale, flip_p=0.5 * flip, jitter_p=0.0, grey_p=0.0)
    return Views((crop,), crop, n_local=0)


def uniforms(
    seed: int, epoch: int, index: int | np.ndarray, views: int, draws: int = DRAWS
) -> np.ndarray:
    """Numbers in [0, 1) that depend on (seed, epoch, image, view, draw) only: (views, draws),
    float32.

    Several images at once, ``index`` (batch,), give (batch, views, draws). SplitMix64's finaliser
    (Steele et al. 2014) over the chained keys.
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
    """The boxes of torchvision's RandomResizedCrop: area uniform, log aspect ratio uniform in
    3/4..4/3, ten tries.

    Args:
        width, height: of the image, or of all images.
        scales: of every view, (views, 2); see :class:`Crop`.
        u: draws, (..., views, DRAWS).

    Returns:
        (left, top, right, bottom), (..., views, 4), and the draw that decides whether the view is
        flipped, (..., views).
    """
    low, span = (x.astype(np.float32)[:, None] for x in (scales[:, 0], scales[:, 1] - scales[:, 0]))
    # (..., views, tries)
    area = np.float32(width * height) * (low + span * u[..., : 2 * CROP_TRIES : 2])
    log_ratio = (
        np.float32(math.log(3 / 4))
        + np.float32(math.log(4 / 3) - math.log(3 / 4)) * u[..., 1 : 2 * CROP_TRIES : 2]
    )
    ratio = np.exp(log_ratio.astype(np.float64)).astype(np.float32)
    w, h = (
        np.rint(np.sqrt(x.astype(np.float64))).astype(np.int64)
        for x in (area * ratio, area / ratio)
    )
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first, found = fits.argmax(-1)[..., None], fits.any(-1)
    w, h = (np.take_along_axis(x, first, -1)[..., 0] for x in (w, h))
    left, top = (
        (u[..., 2 * CROP_TRIES + i] * (room + 1).astype(np.float32)).astype(np.int64)
        for i, room in enumerate((width - w, height - h))
    )
    # The closest ratio
    w_centred, h_centred = (min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3)))
    w, h = np.where(found, w, w_centred), np.where(found, h, h_centred)
    left, top = (
        np.where(found, left, (width - w_centred) // 2),
        np.where(found, top, (height - h_centred) // 2),
    )
    return np.stack([left, top, left + w, top + h], -1), u[..., 2 * CROP_TRIES + 2]


def crop_view(image: Image.Image, crop: Crop, box: np.ndarray, flip: float) -> np.ndarray:
    """Bicubic resized crop and flip of one image, (size, size, 3) uint8; for ``box`` and ``flip``
    see :func:`crop_boxes`.
    """
    pixels = np.asarray(
        image.resize((crop.size, crop.size), Image.Resampling.BICUBIC, box=tuple(box.tolist()))
    )
    return pixels[:, ::-1] if flip < crop.flip_p else pixels


def crop_batch(images: Tensor, crop: Crop, boxes: Tensor, flips: Tensor) -> Tensor:
    """:func:`crop_view` of a batch on any device, equal to a grey level: two batched matrix
    products, along rows and columns.

    Args:
        images: grey levels, (batch, 3, height, width), float32.
        crop: the recipe.
        boxes, flips: one each per image, (batch, 4) and (batch,), on the CPU.

    Returns:
        (batch, 3, size, size) in 0..1.
    """
    height, width = images.shape[2:]
    left, top, right, bottom = boxes.to(images.device, torch.float32, non_blocking=True).T
    columns, rows = (
        _resampling(left, right, crop.size, width),
        _resampling(top, bottom, crop.size, height),
    )
    flipped = (flips < crop.flip_p).to(images.device, non_blocking=True)[:, None, None]
    columns = torch.where(flipped, columns.flip(1), columns)
    x = images @ columns.mT[:, None]  # (batch, 3, height, size)
    # Rounded in between, halves up, as Pillow does
    x = rows[:, None] @ x.add(0.5).floor().clamp(0, 255)
    return x.add(0.5).floor().clamp(0, 255) / 255


def _resampling(start: Tensor, stop: Tensor, size: int, pixels: int) -> Tensor:
    """Weights (batch, size, pixels) of the pixels in ``size`` points between ``start`` and ``stop``
    (batch,): Pillow's bicubic filter (Keys 1981, a = -1/2), widened where the image shrinks.
    """
    scale = ((stop - start) / size)[:, None, None]
    point = start[:, None, None] + (torch.arange(size, device=start.device)[:, None] + 0.5) * scale
    x = ((torch.arange(pixels, device=start.device) + 0.5 - point) / scale.clamp(min=1)).abs()
    weights = torch.where(
        x < 1, (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    ) * (x < 2)
    return weights / weights.sum(-1, keepdim=True)


def photometric(x: Tensor, crop: Crop, u: Tensor) -> Tensor:
    """Colour jitter, greyscale, blur and solarisation of a batch, each image by its own draws.

    The draws stay on the CPU, where they decide which images each step touches, so that no step
    waits for the GPU.

    Args:
        x: images in 0..1, (batch, 3, height, width), any device.
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
            rows = (jitter & (order[:, turn] == op)).nonzero()[:, 0]
            if strength > 0 and len(rows):
                shift = (2 * factors[rows, op] - 1) * strength
                rows = rows.to(x.device, non_blocking=True)
                x[rows] = _JITTER[op](
                    x[rows], shift.to(x.device, non_blocking=True)[:, None, None, None]
                )
    grey, blur, solarize = u[:, 9] < crop.grey_p, u[:, 10] < crop.blur_p, u[:, 12] < crop.solarize_p
    if grey.any():
        rows = grey.nonzero()[:, 0].to(x.device, non_blocking=True)
        x[rows] = _grey(x[rows]).expand(-1, 3, -1, -1)
    if blur.any():
        rows = blur.nonzero()[:, 0]
        low, high = crop.blur_sigma
        sigma = (low + (high - low) * u[rows, 11]).to(x.device, non_blocking=True)
        rows = rows.to(x.device, non_blocking=True)
        x[rows] = gaussian_blur(x[rows], sigma, radius=max(1, math.ceil(3 * high)))
    if solarize.any():
        rows = solarize.nonzero()[:, 0].to(x.device, non_blocking=True)
        x[rows] = torch.where(x[rows] >= 128 / 255, 1 - x[rows], x[rows])
    return x


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
    """Turn the hue by ``shift`` of a full circle: HSV to RGB is written per channel, as f(n) = v -
    v s max(0, min(k, 4-k, 1)).
    """
    value, low = x.amax(1), x.amin(1)
    chroma = value - low
    safe = torch.where(chroma > 0, chroma, 1)
    r, g, b = x.unbind(1)
    hue = torch.where(
        value == r,
        ((g - b) / safe) % 6,
        torch.where(value == g, (b - r) / safe + 2, (r - g) / safe + 4),
    )
    hue = hue + 6 * shift[:, 0]
    channels = []
    for n in (5.0, 3.0, 1.0):
        k = (n + hue) % 6
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, 1)


_JITTER = (_brightness, _contrast, _saturation, _hue)


def gaussian_blur(x: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Blur each image of (batch, 3, height, width) with its own ``sigma`` (batch,), edges
    replicated.
    """
    batch, channels, height, width = x.shape
    offsets = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma[:, None]) ** 2)
    # (batch * channels, taps)
    kernel = (kernel / kernel.sum(-1, keepdim=True)).repeat_interleave(channels, 0)
    x = F.pad(x, (radius,) * 4, mode="replicate").flatten(0, 1)[None]
    x = F.conv2d(x, kernel[:, None, None, :], groups=batch * channels)
    x = F.conv2d(x, kernel[:, None, :, None], groups=batch * channels)
    return x.view(batch, channels, height, width)
