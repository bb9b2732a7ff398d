"""A classifier's answers on test images, in a group of processes shared by all of them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from mimrefiner import distributed
from mimrefiner.data.labelled import Transformed
from mimrefiner.data.loaders import without_traces
from mimrefiner.device import autocast, evaluated, full_float32, plain_attention
from mimrefiner.errors import InputError
from mimrefiner.models.classifier import ImageClassifier
from mimrefiner.models.encoders import eval_transform, normalisation
from mimrefiner.models.tokens import input_size
from mimrefiner.progress import progress


@dataclass(frozen=True)
class Testing:
    """How test images pass a classifier.

    Attributes:
        squeeze: the whole image is squeezed into a square (VTAB-1K); otherwise the encoder's own
            preparation, which for published models is resizing to 256 px and a crop of 224.
        float32: in float32 where training is in bfloat16.
        batch_size: images at a time.
        num_workers: processes that load them.
    """

    squeeze: bool = False
    float32: bool = False
    batch_size: int = 256
    num_workers: int = 0


@torch.no_grad()
def logit_batches(
    model: ImageClassifier,
    dataset: Dataset,
    testing: Testing | None = None,
    rows: Sequence[int] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits (batch, classes), float32, and labels (batch,), both on the CPU, batch by batch.

    The model runs where it is, and is in eval mode while it does.

    Args:
        model: the classifier.
        dataset: map-style, (image, label).
        testing: how images pass; None takes the defaults.
        rows: which images; None takes all. Every process passes the rows that it is given.

    >>> import mimrefiner as mr
    >>> from mimrefiner.models.classifier import Head
    >>> encoder = mr.build_vit(mr.ViTConfig(dim=32, depth=2, num_heads=2))
    >>> images = mr.load_dataset("digits", split="test").take(3)
    >>> [(logits, labels)] = logit_batches(ImageClassifier(encoder, Head(10)), images)
    >>> logits.shape, labels.shape
    (torch.Size([3, 10]), torch.Size([3]))
    """
    testing = testing or Testing()
    device = next(model.parameters()).device
    chosen = dataset if rows is None else Subset(dataset, rows)
    loader = DataLoader(
        Transformed(chosen, preparation(model.encoder, testing.squeeze)),
        testing.batch_size,
        num_workers=testing.num_workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # the global one belongs to what is being trained
    )
    with evaluated(model):
        for images, labels in progress(without_traces(loader), "test", len(loader), "batch"):
            precision = autocast(device, model.encoder)
            if testing.float32:
                precision = torch.autocast(device.type, enabled=False)
            with precision, full_float32(), plain_attention(model, device):
                logits = model(images.to(device, non_blocking=True))
            yield logits.float().cpu(), labels


def accuracy(model: ImageClassifier, dataset: Dataset, testing: Testing | None = None) -> float:
    """The share of right answers, 0..1; the processes of a group share the images.

    Raises:
        InputError: no images.
    """
    if not len(dataset):
        raise InputError("a classifier is tested on images, and there are none")
    rank, world = distributed.rank(), distributed.world()
    own = range(rank, len(dataset), world)
    # All pass equally many, because sharded models wait for each other; what is too much is dropped
    rows = [*own, *[0] * (-(-len(dataset) // world) - len(own))]
    right = [logits.argmax(-1) == y for logits, y in logit_batches(model, dataset, testing, rows)]
    hits = torch.cat(right)[: len(own)].float().sum().to(next(model.parameters()).device)
    return distributed.mean(hits).item() * world / len(dataset)


def preparation(encoder: nn.Module, squeeze: bool) -> Callable[[Image.Image], Tensor]:
    """How a test image is prepared: as the encoder says, or squeezed into a square."""
    if not squeeze:
        return eval_transform(encoder)
    size = input_size(encoder)[-1]
    return partial(_squeezed, size, *normalisation(encoder))


def _squeezed(size: int, mean: Sequence[float], std: Sequence[float], image: Image.Image) -> Tensor:
    pixels = np.array(image.resize((size, size), Image.Resampling.BICUBIC))
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (mean, std))
    return (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - mean) / std
