"""How good a segmentation is: windows over images of any size, and mean intersection over union."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from mimrefiner import distributed
from mimrefiner.data.loaders import without_traces
from mimrefiner.data.scenes import IGNORE, Labels, resized, tensors
from mimrefiner.device import autocast, device_of
from mimrefiner.errors import InputError, one_of
from mimrefiner.models.encoders import normalisation
from mimrefiner.models.upernet import UperNet
from mimrefiner.probes.checks import tidy
from mimrefiner.training.checkpoints import Saving
from mimrefiner.training.segment import SegmentationRecipe, SegmentationResult, segment

FITS = ("scene", "square", "short", "keep")


@dataclass(frozen=True)
class Window:
    """How a model that sees squares of one size is shown images of any size.

    Attributes:
        name: what rows call it.
        size: side of the squares in pixels.
        fit: what happens to an image first. ``"square"``: both sides become ``size``, the aspect is
            lost, and one square shows everything. ``"short"``: the short side does, the aspect is
            kept. ``"keep"``: nothing. Logits go back to the image's own size. ``"scene"``: image
            and mask both become such a square.
        stride: pixels from one square to the next; logits are averaged where squares overlap.
        enlarge: how logits of patches become logits of pixels, ``"bilinear"`` or ``"nearest"``.
    """

    name: str
    size: int
    fit: str
    stride: int
    enlarge: str = "bilinear"

    def __post_init__(self):
        one_of("fit", self.fit, FITS)
        one_of("enlarge", self.enlarge, ("bilinear", "nearest"))
        if not 1 <= self.stride <= self.size:
            raise InputError(
                f"stride must be between 1 and the window of {self.size} pixels, got {self.stride}"
            )

    def at(self, size: int) -> "Window":
        """The same for squares of ``size`` pixels.

        >>> SLIDING.at(64).stride
        43
        """
        stride = max(1, round(self.stride * size / self.size))
        return replace(self, size=size, stride=stride)


# Both ways of testing UperNet. The released callback (KappaSegmentation, offline_segmentation) is
# told to slide, but resizes both sides to 512 before, which leaves one window; its comment speaks
# of the short side.
WHOLE = Window("whole", 512, "square", 512)
SLIDING = Window("sliding", 512, "short", 341)


def fine_tuned(
    encoder: nn.Module,
    train: Dataset,
    val: Dataset,
    recipe: SegmentationRecipe,
    *,
    saving: Saving | None = None,
    device: torch.device | str | None = None,
    num_workers: int = 0,
) -> tuple[pd.DataFrame, SegmentationResult]:
    """Fine-tune an encoder with UperNet and measure it in both ways of testing.

    Args:
        encoder: a plain timm ViT.
        train, val: data sets of (RGB image, mask).
        recipe: how it is trained.
        saving, device, num_workers: see :func:`mimrefiner.training.segment.segment`.

    Returns:
        Rows with the columns of :data:`mimrefiner.probes.checks.COLUMNS`, metric "mIoU": the last
        weights shown whole images, and under a sliding window; and the best of all evaluations with
        whole images, which is chosen on the images it is measured on, as the paper reports it. And
        what training gives.
    """
    recipe.labels.check(val)
    device = device_of(device)
    normalise, size = normalisation(encoder), recipe.model.size

    def measure(model: UperNet, window: Window) -> float:
        with autocast(device, encoder):
            found = mean_iou(
                lambda images: model.segment(images)[None],
                val,
                recipe.labels,
                window.at(size),
                normalise,
                device=device,
                num_workers=num_workers,
            )
        return found.item()

    result = segment(
        encoder,
        train,
        recipe,
        lambda model: measure(model, WHOLE),
        device=device,
        num_workers=num_workers,
        saving=saving,
    )
    model, scores = result.model.to(device), result.scores["score"]
    found = {"whole, last": scores.iloc[-1], "sliding, last": measure(model, SLIDING)}
    found[f"whole, best of {len(scores)} evaluations on test"] = scores.max()
    model.cpu()
    common = {"block": len(encoder.blocks) - 1, "pool": "tokens", "protocol": "upernet"}
    common |= {"metric": "mIoU", "seed": recipe.seed, "n_train": len(train), "n_test": len(val)}
    rows = [{**common, "value": value, "setting": setting} for setting, value in found.items()]
    return tidy(rows), result


class _Scenes(Dataset):
    """Scenes as normalised tensors and class indices; those of one process where there are more."""

    def __init__(self, scenes: Dataset, labels: Labels, normalise, side: int | None):
        self.scenes, self.labels, self.side = scenes, labels, side
        self.normalise = normalise

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        image, mask = self.scenes[i]
        mask = Image.fromarray(self.labels.of(np.asarray(mask)))
        if self.side is not None:
            image, mask = resized(image, mask, (self.side, self.side))
        return tensors(image, mask, self.normalise)


@torch.no_grad()
def mean_iou(
    model: Callable[[Tensor], Tensor],
    scenes: Dataset,
    labels: Labels,
    window: Window,
    normalise,
    *,
    device: torch.device | str = "cpu",
    num_workers: int = 0,
) -> Tensor:
    """Mean intersection over union of every segmentation of ``model``, (probes,).

    Over the classes that occur in masks or predictions, as torchmetrics' macro Jaccard index has
    it. The processes of a group share the images.

    Args:
        model: images (1, 3, size, size) -> logits of patches or pixels, (probes, 1, classes, rows,
            columns).
        scenes: map-style, (image, mask).
        labels: what the masks' numbers mean.
        window: how images are shown.
        normalise: mean and standard deviation, one number per channel each.
    """
    device, classes = torch.device(device), labels.classes
    mine = Subset(scenes, range(distributed.rank(), len(scenes), distributed.world()))
    side = window.size if window.fit == "scene" else None
    # One at a time, because they differ in size
    batches = DataLoader(_Scenes(mine, labels, normalise, side), 1, num_workers=num_workers)
    table = torch.zeros(1, classes**2, dtype=torch.float64, device=device)
    for image, mask in without_traces(batches):
        mask = mask.to(device)
        counted = mask != IGNORE
        pairs = [
            mask[counted] * classes + logits.argmax(1)[counted]
            for logits in segmented(model, image.to(device), window)
        ]
        table = table + torch.stack([torch.bincount(x, minlength=classes**2) for x in pairs])
    table = distributed.mean(table) * distributed.world()
    return iou(table.unflatten(1, (classes, classes))).cpu()


def iou(table: Tensor) -> Tensor:
    """Mean intersection over union from counts of pixels.

    Args:
        table: (..., true class, predicted class).

    >>> iou(torch.tensor([[3.0, 1.0, 0.0], [0.0, 4.0, 0.0], [0.0, 0.0, 0.0]]))
    tensor(0.7750)
    """
    right = table.diagonal(dim1=-2, dim2=-1)
    union = table.sum(-1) + table.sum(-2) - right
    return torch.where(union > 0, right / union.clamp_min(1), 0.0).sum(-1) / (union > 0).sum(-1)


def segmented(model: Callable[[Tensor], Tensor], image: Tensor, window: Window) -> Iterator[Tensor]:
    """Logits of the image's own pixels, (1, classes, height, width), of one probe after another.

    Args:
        model, window: see :func:`mean_iou`.
        image: normalised, (1, 3, height, width).
    """
    shape = image.shape[-2:]
    if window.fit in ("square", "short"):
        sides = [window.size] * 2
        if window.fit == "short":
            sides = [max(window.size, round(x * window.size / min(shape))) for x in shape]
        image = F.interpolate(image, size=sides, mode="bilinear", align_corners=False)
    for logits in slide(model, image, window):
        same = logits.shape[-2:] == shape
        yield logits if same else to_size(logits, shape, "bilinear")


def slide(model: Callable[[Tensor], Tensor], images: Tensor, window: Window) -> Iterator[Tensor]:
    """Logits per pixel, (batch, classes, height, width), of one probe after the other.

    The window slides over the images; the last one of a row or column is moved back to end with the
    image. Images smaller than the window are padded with the mean colour.

    Args:
        model, window: see :func:`mean_iou`.
        images: normalised, (batch, 3, height, width).
    """
    (height, width), side = images.shape[-2:], window.size
    images = F.pad(images, (0, max(0, side - width), 0, max(0, side - height)))
    tops, lefts = (
        [
            min(start, whole - side)
            for start in range(0, whole - side + window.stride, window.stride)
        ]
        for whole in images.shape[-2:]
    )
    places = [
        (..., slice(top, top + side), slice(left, left + side)) for top in tops for left in lefts
    ]
    found = [model(images[place]) for place in places]
    for probe in range(len(found[0])):
        total = found[0].new_zeros(len(images), found[0].shape[2], *images.shape[-2:])
        times = total.new_zeros(images.shape[-2:])
        for place, logits in zip(places, found, strict=True):
            total[place] += to_size(logits[probe], (side, side), window.enlarge)
            times[place] += 1
        yield (total / times)[..., :height, :width]


def to_size(logits: Tensor, shape: tuple[int, int], mode: str) -> Tensor:
    """(batch, classes, rows, columns) -> (batch, classes, height, width)."""
    corners = False if mode == "bilinear" else None
    return F.interpolate(logits.float(), size=tuple(shape), mode=mode, align_corners=corners)
