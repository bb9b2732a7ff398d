"""Operations on pixels, for whole batches on any device: crops as Pillow's, colours, blur.

Colours are 0..1. A colour operation takes (batch, 3, height, width) and one number for each image,
(batch, 1, 1, 1); the results equal torchvision's.
"""

from functools import cache

import torch
import torch.nn.functional as F
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
    start, stop, flipped = where[..., 0:2], where[..., 2:4], where[..., 4]
    if height == width:  # columns and rows in one go: a GPU spends its time on the number of calls
        columns, rows = _weights(start, stop, size, width).unbind(-3)
    else:
        columns = _weights(start[..., 0], stop[..., 0], size, width)
        rows = _weights(start[..., 1], stop[..., 1], size, height)
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


def brightness(x: Tensor, shift: Tensor) -> Tensor:
    """Scale the image by 1 + ``shift``."""
    return (x * (1 + shift)).clamp(0, 1)


def contrast(x: Tensor, shift: Tensor) -> Tensor:
    """Scale the distance from the image's mean grey by 1 + ``shift``."""
    mean = _grey(x).mean((2, 3), keepdim=True)
    return (mean + (x - mean) * (1 + shift)).clamp(0, 1)


def saturation(x: Tensor, shift: Tensor) -> Tensor:
    """Scale the distance from each pixel's grey by 1 + ``shift``."""
    grey = _grey(x)
    return (grey + (x - grey) * (1 + shift)).clamp(0, 1)


def hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by ``shift`` of a full circle.

    HSV becomes RGB channel by channel: f(n) = v - v s max(0, min(k, 4 - k, 1)).
    """
    value, low = x.amax(1), x.amin(1)
    chroma = value - low
    safe = torch.where(chroma > 0, chroma, 1)
    r, g, b = x.unbind(1)
    green_or_blue = torch.where(value == g, (b - r) / safe + 2, (r - g) / safe + 4)
    angle = torch.where(value == r, ((g - b) / safe) % 6, green_or_blue) + 6 * shift[:, 0]
    n = torch.arange(5, 0, -2, device=x.device, dtype=x.dtype)[:, None, None]
    k = (n + angle[:, None]) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def greyscale(x: Tensor, _=None) -> Tensor:
    """Grey images with three equal channels."""
    return _grey(x).expand(-1, 3, -1, -1)


def solarize(x: Tensor, _=None) -> Tensor:
    """Invert what is brighter than 128 of 255."""
    return torch.where(x >= 128 / 255, 1 - x, x)


def blur(x: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Gaussian blur with ``sigma`` and ``radius`` in pixels; edges are replicated."""
    batch, channels, height, width = x.shape
    offsets = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma.view(batch, 1)) ** 2)
    # (batch * channels, taps)
    kernel = (kernel / kernel.sum(-1, keepdim=True)).repeat_interleave(channels, 0)
    x = F.pad(x, (radius,) * 4, mode="replicate").flatten(0, 1)[None]
    x = F.conv2d(x, kernel[:, None, None, :], groups=batch * channels)
    x = F.conv2d(x, kernel[:, None, :, None], groups=batch * channels)
    return x.view(batch, channels, height, width)


def _grey(x: Tensor) -> Tensor:
    return torch.einsum("bchw,c->bhw", x, _grey_weights(x.device, x.dtype))[:, None]


@cache
def _grey_weights(device: torch.device, dtype: torch.dtype) -> Tensor:
    """ITU-R 601, as PIL and torchvision have it."""
    return torch.tensor([0.2989, 0.587, 0.114], dtype=dtype).to(device, non_blocking=True)
