"""Pillow's bicubic resized crop for a whole batch, on any device."""

import torch
from torch import Tensor


def crop_batch(images: Tensor, size: int, where: Tensor) -> Tensor:
    """Crop, resize and flip as :func:`mimrefiner.data.views.crop_view` does, to a grey level.

    Two batched matrix products, along columns and along rows, for all views of one size.

    Args:
        images: grey levels, (batch, 3, height, width), float32.
        size: side of the crops in pixels.
        where: left, top, right and bottom in pixels, and 1 where the crop is flipped, else 0,
            (views, batch, 5), on the images' device.

    Returns:
        (views, batch, 3, size, size) in 0..1.
    """
    height, width = images.shape[2:]
    left, top, right, bottom, flipped = where.unbind(-1)
    columns, rows = _weights(left, right, size, width), _weights(top, bottom, size, height)
    columns = torch.where(flipped[..., None, None] > 0, columns.flip(-2), columns)
    x = images @ columns.mT[:, :, None]  # (views, batch, 3, height, size)
    # Rounded in between, halves up, as Pillow does
    x = rows[:, :, None] @ x.add(0.5).floor().clamp(0, 255)
    return x.add(0.5).floor().clamp(0, 255) / 255


def _weights(start: Tensor, stop: Tensor, size: int, pixels: int) -> Tensor:
    """Weights (..., size, pixels) of the pixels in ``size`` points from ``start`` to ``stop``.

    Pillow's bicubic filter (Keys 1981, a = -1/2), widened where the image shrinks.
    """
    scale = ((stop - start) / size)[..., None, None]
    point = (
        start[..., None, None] + (torch.arange(size, device=start.device)[:, None] + 0.5) * scale
    )
    x = ((torch.arange(pixels, device=start.device) + 0.5 - point) / scale.clamp(min=1)).abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = torch.where(x < 1, near, far) * (x < 2)
    return weights / weights.sum(-1, keepdim=True)
