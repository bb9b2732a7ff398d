"""Pillow's bicubic resized crop for a whole batch, on any device."""

import torch
from torch import Tensor

from mimrefiner.config import Crop


def crop_batch(images: Tensor, crop: Crop, boxes: Tensor, flips: Tensor) -> Tensor:
    """Crop, resize and flip as :func:`mimrefiner.data.views.crop_view` does, to a grey level.

    Two batched matrix products, along columns and along rows.

    Args:
        images: grey levels, (batch, 3, height, width), float32.
        crop: the recipe.
        boxes: (left, top, right, bottom) of each image in pixels, (batch, 4), on the CPU.
        flips: the draw that decides whether an image is flipped, (batch,), on the CPU.

    Returns:
        (batch, 3, size, size) in 0..1.
    """
    height, width = images.shape[2:]
    left, top, right, bottom = boxes.to(images.device, torch.float32, non_blocking=True).T
    columns = _weights(left, right, crop.size, width)
    rows = _weights(top, bottom, crop.size, height)
    flipped = (flips < crop.flip_p).to(images.device, non_blocking=True)[:, None, None]
    columns = torch.where(flipped, columns.flip(1), columns)
    x = images @ columns.mT[:, None]  # (batch, 3, height, size)
    # Rounded in between, halves up, as Pillow does
    x = rows[:, None] @ x.add(0.5).floor().clamp(0, 255)
    return x.add(0.5).floor().clamp(0, 255) / 255


def _weights(start: Tensor, stop: Tensor, size: int, pixels: int) -> Tensor:
    """Weights (batch, size, pixels) of the pixels in ``size`` points from ``start`` to ``stop``.

    Pillow's bicubic filter (Keys 1981, a = -1/2), widened where the image shrinks.
    """
    scale = ((stop - start) / size)[:, None, None]
    point = start[:, None, None] + (torch.arange(size, device=start.device)[:, None] + 0.5) * scale
    x = ((torch.arange(pixels, device=start.device) + 0.5 - point) / scale.clamp(min=1)).abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = torch.where(x < 1, near, far) * (x < 2)
    return weights / weights.sum(-1, keepdim=True)
