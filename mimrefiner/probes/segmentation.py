"""Images with a class per pixel: their folders, and how dense probes are given them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from mimrefiner.data.datasets import IMAGE_ENDINGS
from mimrefiner.errors import InputError
from mimrefiner.models.encoders import normalisation

IGNORE = 255  # the label of pixels that do not count


@dataclass(frozen=True)
class DenseConfig:
    """Settings of the probe; the defaults are the paper's for ADE20K per block.

    Attributes:
        classes: number of classes.
        blocks: "all" or 0-based blocks.
        epochs, batch_size: how long the probes are trained, and on how many images at a time.
        learning_rates: peak rates times batch_size / 16, warm-up over a tenth of the steps, then
            cosine to 1e-6; several are trained together and validation images choose.
        flip: training images are flipped with probability 1/2.
        ignore_zero: label 0 means "no class" and the classes begin at 1, as in ADE20K's annotation
            files.
        scale: None resizes training images to the encoder's input size S. A pair (low, high)
            resizes them, their aspect kept, to fit within r S x 2 r S with r drawn between the two,
            and cuts a random square of S out of them.
        max_share: such a square is drawn again, up to ten times, where one class covers more of it
            than this.
        stride: None resizes test images to S. A number of pixels leaves them as they are: a window
            of S slides over them by it, and logits are averaged where windows overlap.
        enlarge: how logits per patch become logits per pixel, "bilinear" or "nearest".
        join: one probe on the tokens of all blocks side by side, instead of one per block.
        cls: for every probe another one that also sees the block's cls token beside every patch.
        seed: draws weights, order, flips and squares.
    """

    classes: int
    blocks: str | tuple[int, ...] = "all"
    epochs: float = 50
    batch_size: int = 16
    learning_rates: tuple[float, ...] = (0.1,)
    flip: bool = True
    ignore_zero: bool = False
    scale: tuple[float, float] | None = None
    max_share: float = 1.0
    stride: int | None = None
    enlarge: str = "bilinear"
    join: bool = False
    cls: bool = False
    seed: int = 0


class SegmentationFolder(Dataset):
    """(RGB image, mask) pairs; masks hold a class per pixel.

    Images lie in ``PATH/images/SPLIT/NAME.jpg``, masks in ``PATH/masks/SPLIT/NAME.png``.

    Raises:
        InputError: a missing or empty folder, an image without mask, files that cannot be read,
            sizes that differ.
    """

    def __init__(self, path: Path | str, split: str):
        path = Path(path).expanduser()
        images, masks = path / "images" / split, path / "masks" / split
        for folder in (images, masks):
            if not folder.is_dir():
                raise InputError(
                    f"{folder} does not exist: expected PATH/images/SPLIT and PATH/masks/SPLIT"
                )
        self.files = [
            (f, masks / f"{f.stem}.png")
            for f in sorted(images.iterdir())
            if f.suffix.lower() in IMAGE_ENDINGS
        ]
        if not self.files:
            raise InputError(f"{images} holds no images")
        for image, mask in self.files:
            if not mask.is_file():
                raise InputError(f"{image.name} has no mask: expected {mask}")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Image.Image, Image.Image]:
        try:
            with Image.open(self.files[i][0]) as image, Image.open(self.files[i][1]) as mask:
                mask = Image.fromarray(np.asarray(mask, dtype=np.uint8))
                image = image.convert("RGB")
        except (OSError, SyntaxError, ValueError, TypeError) as error:
            raise InputError(
                f"{self.files[i][0]} or its mask cannot be decoded: {error}"
            ) from error
        if image.size != mask.size:
            raise InputError(
                f"{self.files[i][0]} is {image.size} and its mask {mask.size} pixels wide and high"
            )
        return image, mask


class Prepared(Dataset):
    """Images as normalised tensors and masks as class indices.

    Training images are ``random``: they are asked for as (epoch, index).
    """

    def __init__(
        self, dataset: Dataset, encoder: nn.Module, config: DenseConfig, *, random: bool = False
    ):
        self.dataset, self.config, self.random = dataset, config, random
        self.size = encoder.pretrained_cfg["input_size"][-1]
        self.mean, self.std = (torch.tensor(x).view(3, 1, 1) for x in normalisation(encoder))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, Tensor]:
        image, mask = self.dataset[key[1] if self.random else key]
        mask = np.array(mask)
        if self.config.ignore_zero:
            mask = np.where((mask == 0) | (mask == IGNORE), IGNORE, mask - 1).astype(np.uint8)
        worst = mask[mask != IGNORE].max(initial=0)
        if worst >= self.config.classes:
            raise InputError(
                f"a mask holds class {worst}, expected classes 0 to {self.config.classes - 1} "
                f"and {IGNORE} for none"
            )
        mask = Image.fromarray(mask)
        if self.random and self.config.scale:
            rng = np.random.default_rng((self.config.seed, *key))
            fill = tuple(round(255 * x) for x in self.mean.flatten().tolist())
            image, mask = random_square(image, mask, self.size, self.config, fill, rng)
        elif self.random or not self.config.stride:
            image, mask = _resized(image, mask, (self.size, self.size))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        return (pixels - self.mean) / self.std, torch.from_numpy(np.array(mask)).long()


def _resized(image, mask, shape: tuple[int, int]) -> tuple[Image.Image, Image.Image]:
    nearest = mask.resize(shape, Image.Resampling.NEAREST)
    return image.resize(shape, Image.Resampling.BICUBIC), nearest


def random_square(
    image, mask, size: int, config: DenseConfig, fill: tuple[int, int, int], rng
) -> tuple[Image.Image, Image.Image]:
    """A square of ``size`` pixels out of a resized image and its mask; see :class:`DenseConfig`.

    What is missing has the colour ``fill`` and does not count.
    """
    ratio = size * rng.uniform(*config.scale)
    factor = min(2 * ratio / max(image.size), ratio / min(image.size))
    shape = tuple(max(1, round(factor * side)) for side in image.size)
    image, mask = _resized(image, mask, shape)
    whole = [max(side, size) for side in shape]
    padded, padded_mask = Image.new("RGB", whole, fill), Image.new("L", whole, IGNORE)
    padded.paste(image)
    padded_mask.paste(mask)
    for _ in range(10):
        left, top = (int(rng.integers(side - size + 1)) for side in whole)
        box = (left, top, left + size, top + size)
        square = padded_mask.crop(box)
        counts = np.bincount(np.asarray(square).ravel(), minlength=256)[:IGNORE]
        if counts.max() <= config.max_share * counts.sum():
            break
    return padded.crop(box), square
