"""One image: which files are images, and how anything that holds one becomes 8-bit RGB.

The rules, wherever an image comes from:

- 8 bits stay as they are; 16 bits are divided by 257, so that 65,535 becomes 255; floats are 0..1.
- The EXIF orientation is applied, and the first frame of several counts.
- Grey is repeated three times, palettes are looked up, transparency is dropped.

What no rule covers is an InputError that names the file, rather than a picture that is all white.
"""

import io
import os
import struct
import warnings
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from mimrefiner.errors import InputError
from mimrefiner.files import first_line

HALF_GREY = 0.5 / 255
CHANNELS = (1, 3, 4)
# Formats whose mode I means 16 bits (PNG in older Pillows)
SIXTEEN_BITS = ("PNG", "PPM")
# Pillow knows these by their endings and shows no pixels of them
NO_IMAGES = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
# Where Pillow keeps it: of JPEG and WebP, of old PNGs, and as XMP
EXIF = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}
UNREADABLE = (  # what Pillow raises for files that are damaged
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    EOFError,
    NotImplementedError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
WHAT_COUNTS = (
    "a PIL image, an array or tensor (uint8, uint16, or floats in 0..1), encoded bytes or a path"
)


@cache
def image_endings() -> frozenset[str]:
    """The endings, in lower case, of files that Pillow reads as images.

    >>> {".jpg", ".jfif", ".pgm", ".gif", ".webp"} <= image_endings(), ".txt" in image_endings()
    (True, False)
    """
    Image.init()
    return frozenset(
        ending
        for ending, kind in Image.registered_extensions().items()
        if kind in Image.OPEN and kind not in NO_IMAGES
    )


def to_pil(image, name: str = "") -> Image.Image:
    """An RGB PIL image of anything that holds one, by the rules of this module.

    Args:
        image: a PIL image; an array, (height, width[, channels]) or (channels, height, width); a
            tensor, (channels, height, width), (height, width) or, where it can be nothing else,
            (height, width, channels); encoded bytes; a path; or ``{"bytes": ..., "path": ...}``, as
            the hub's files hold it. Channels are 1, 3 or 4; numbers are uint8, uint16, bool, or
            floats in 0..1.
        name: what messages call the image; a path is called by itself.

    Raises:
        InputError: something else, numbers outside of their range, or what cannot be decoded.

    >>> import numpy as np
    >>> to_pil(np.full((3, 8, 8), 65535, dtype=np.uint16)).getpixel((0, 0))
    (255, 255, 255)
    """
    if isinstance(image, dict) and {"bytes", "path"} & set(image):
        image = image.get("path") if image.get("bytes") is None else image["bytes"]
    if isinstance(image, str | Path):
        return _decoded(image, str(image))
    if isinstance(image, bytes | bytearray | memoryview):
        return _decoded(io.BytesIO(image), name or "an image")
    if isinstance(image, Tensor):
        return _from_array(_numpy(image), "an image tensor", name)
    if isinstance(image, np.ndarray):
        return _from_array(image, "an image array", name)
    if image is None:
        raise InputError(f"{name or 'an image'} is missing: leave out rows without an image")
    if not isinstance(image, Image.Image):
        raise InputError(f"{_begin(name)}expected {WHAT_COUNTS}, got {type(image).__name__}")
    try:
        return _rgb(image, name)
    except InputError:
        raise
    except UNREADABLE as error:  # opened by somebody else, decoded here
        raise unreadable(error, name or getattr(image, "filename", "") or "an image") from error


def _begin(name: str) -> str:
    return f"{name}: " if name else ""


def _decoded(file: str | Path | io.BytesIO, name: str) -> Image.Image:
    try:
        with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):
            opened = Image.open(file)  # large is fine; twice as large is an error
        with opened as image:
            return _rgb(image, name)
    except InputError:
        raise
    except UNREADABLE as error:
        raise unreadable(error, name, file) from error


def unreadable(error: Exception, name: str, file=None) -> InputError:
    """What to say of an image that cannot be read or decoded.

    Args:
        error: what Pillow raised, one of :data:`UNREADABLE`.
        name: what the message calls the image.
        file: its path or its encoded bytes, where they are known.

    >>> unreadable(OSError("Truncated File Read"), "a.jpg")
    InputError('a.jpg cannot be decoded as an image: Truncated File Read')
    """
    if isinstance(error, OSError) and error.errno is not None:  # the system's word, not Pillow's
        return InputError(f"{name} cannot be read: {error.strerror}")
    if isinstance(error, Image.DecompressionBombError):
        return InputError(
            f"{name} has more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels, Pillow's limit: make it "
            "smaller, or raise PIL.Image.MAX_IMAGE_PIXELS in Python"
        )
    reason = first_line(error)
    if isinstance(error, UnidentifiedImageError):
        empty = not (file.getbuffer() if isinstance(file, io.BytesIO) else os.path.getsize(file))
        reason = "it is empty" if empty else "Pillow knows no format that begins like it"
    return InputError(f"{name} cannot be decoded as an image: {reason}")


def _rgb(image: Image.Image, name: str) -> Image.Image:
    if 0 in image.size:
        raise InputError(f"{_begin(name)}expected an image with pixels, got size {image.size}")
    # The format is lost when an image is turned
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format in SIXTEEN_BITS)
    image = _upright(image)
    if sixteen:
        image = Image.fromarray(_of_sixteen_bits(np.asarray(image)))
    elif image.mode == "F":
        image = Image.fromarray(_of_floats(np.asarray(image), "an image of floats (mode F)", name))
    elif image.mode == "I":
        low, high = image.getextrema()
        raise InputError(
            f"{_begin(name)}expected an image of 8 or 16 bits, got 32-bit whole numbers (mode I) "
            f"from {low} to {high}: save it with 16 bits"
        )
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns of the direct way
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    """The image as its EXIF orientation says; EXIF that cannot be read counts as none."""
    image.load()
    if not EXIF & image.info.keys() and not hasattr(image, "tag_v2"):
        return image
    try:
        with warnings.catch_warnings(action="ignore"):  # of corrupt EXIF
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
            return ImageOps.exif_transpose(image) if turned else image
    except UNREADABLE:
        return image


def _numpy(image: Tensor) -> np.ndarray:
    """A tensor as an array, with the channels last where the first dimension may be channels."""
    image = image.detach().cpu()
    if image.dtype in (torch.bfloat16, torch.float16):
        image = image.float()
    array = image.numpy()
    return array.transpose(1, 2, 0) if array.ndim == 3 and len(array) in CHANNELS else array


def _from_array(x: np.ndarray, what: str, name: str) -> Image.Image:
    if x.ndim == 3 and x.shape[2] not in CHANNELS and len(x) in CHANNELS:
        x = x.transpose(1, 2, 0)
    if not (x.ndim == 2 or (x.ndim == 3 and x.shape[2] in CHANNELS)) or not x.size:
        raise InputError(
            f"{_begin(name)}expected {what} of (height, width), or with 1, 3 or 4 channels as its "
            f"first or last dimension, got shape {x.shape}"
        )
    if x.ndim == 3 and x.shape[2] == 1:
        x = x[..., 0]
    if x.dtype == np.bool_:
        x = x * np.uint8(255)
    elif x.dtype == np.uint16:
        x = _of_sixteen_bits(x)
    elif np.issubdtype(x.dtype, np.floating):
        x = _of_floats(x, what, name)
    elif x.dtype != np.uint8:
        raise InputError(
            f"{_begin(name)}expected {what} of uint8, uint16, or floats in 0..1, got {x.dtype}: "
            "convert it"
        )
    return Image.fromarray(np.ascontiguousarray(x)).convert("RGB")


def _of_sixteen_bits(x: np.ndarray) -> np.ndarray:
    """0..65535 to 0..255: the nearest of the 8-bit values, which stand for 0, 257, ..., 65535."""
    return ((x.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _of_floats(x: np.ndarray, what: str, name: str) -> np.ndarray:
    low, high = x.min(), x.max()
    if not (low > -HALF_GREY and high < 1 + HALF_GREY):  # rounding errors pass, NaN does not
        raise InputError(
            f"{_begin(name)}expected {what} in 0..1 or of uint8, got {low:.3g} to {high:.3g}: "
            "scale it, and do not normalise it"
        )
    return np.rint(np.clip(x, 0, 1) * 255).astype(np.uint8)
