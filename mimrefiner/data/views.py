"""Batches of (views, index, label), epoch after epoch: the same ones on any device, with any number
of workers and processes.

Crops are cut image by image in the loader's processes, or, where a GPU trains on images of one size
that are in memory (:meth:`mimrefiner.data.datasets.ImageDataset.in_memory`), for the whole batch on
the GPU, which then waits for no loader.
"""

import atexit
import multiprocessing
import signal
import weakref
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mimrefiner.config import Views
from mimrefiner.data.augment import crop_batch, crop_boxes, crop_view, photometric, uniforms
from mimrefiner.data.datasets import to_pil
from mimrefiner.errors import InputError

Keys = list[tuple[int, int]]  # of a batch: (epoch, image)
_LOADERS: weakref.WeakSet = weakref.WeakSet()  # processes
# (batch, 3, size, size) in 0..1 per view; draws, on the CPU; index; label
Crops = tuple[list[Tensor], Tensor, Tensor, Tensor]


def view_batches(
    dataset: Dataset,
    views: Views,
    *,
    batch_size: int,
    steps: int,
    seed: int,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str = "cpu",
    num_workers: int = 0,
    first_step: int = 0,
    part: tuple[int, int] = (0, 1),
) -> Iterator[tuple[list[Tensor], Tensor, Tensor]]:
    """Batches of normalised views, epoch after epoch, incomplete last batches dropped.

    ``first_step`` starts later in the same sequence; ``part`` (i, n) yields the i-th of n equal
    shares of every batch.

    Yields:
        views: one tensor per view in the order of ``views.crops``, (batch, 3, size, size), on
            ``device``.
        index: which image each row is, (batch,).
        label: its class, -1 where there is none, (batch,).
    """
    per_epoch = len(dataset) // batch_size
    if per_epoch == 0:
        raise InputError(
            f"a batch of {batch_size} needs at least that many images, the data set has {len(dataset)}"
        )
    if num_workers < 0:
        raise InputError(f"loader processes (workers) must be >= 0, got {num_workers}")
    if batch_size % part[1]:
        raise InputError(f"a batch of {batch_size} cannot be shared equally by {part[1]} processes")
    share = batch_size // part[1]

    def keys() -> Iterator[Keys]:
        for step in range(first_step, steps):
            epoch, batch = divmod(step, per_epoch)
            if batch == 0 or step == first_step:
                order = epoch_order(len(dataset), epoch, seed)
            start = batch * batch_size + part[0] * share
            yield [(epoch, int(i)) for i in order[start : start + share]]

    device = torch.device(device)
    mean, std = (torch.tensor(x, device=device).view(3, 1, 1) for x in (mean, std))
    pixels = getattr(dataset, "pixels", None) if device.type == "cuda" else None
    if pixels is None:
        batches = loaded_crops(dataset, views, keys(), seed, device, num_workers)
    else:
        batches = resident_crops(pixels, dataset.labels, views, keys(), seed, device)
    for crops, draws, index, label in batches:
        batch = [
            photometric(x, crop, draws[:, v])
            for v, (x, crop) in enumerate(zip(crops, views.crops, strict=True))
        ]
        yield [(x - mean) / std for x in batch], index, label


def epoch_order(n: int, epoch: int, seed: int) -> np.ndarray:
    """The order of ``n`` images in one epoch, (n,)."""
    return np.random.default_rng((seed, epoch)).permutation(n)


def loaded_crops(
    dataset: Dataset,
    views: Views,
    keys: Iterator[Keys],
    seed: int,
    device: torch.device,
    num_workers: int,
) -> Iterator[Crops]:
    """Crops that loader processes cut image by image."""
    loader = DataLoader(
        _Crops(dataset, views, seed),
        batch_sampler=keys,
        num_workers=num_workers,
        collate_fn=_collate,
        generator=torch.Generator(),  # a loader's own draw must not move the global state, or a resumed run would differ
        pin_memory=device.type == "cuda",
        worker_init_fn=_outlive_sigterm,
    )
    others = set(multiprocessing.active_children())
    batches = iter(loader)
    _LOADERS.update(set(multiprocessing.active_children()) - others)
    while (batch := _next(batches)) is not None:
        pixels, draws, index, label = batch
        crops = [
            x.to(device, non_blocking=True).permute(0, 3, 1, 2).float().div_(255) for x in pixels
        ]
        yield crops, draws, index.to(device, non_blocking=True), label.to(device, non_blocking=True)


def _next(batches: Iterator):
    """The next batch or None; a loader's InputError without the traceback that torch puts into its
    message.
    """
    try:
        return next(batches, None)
    except InputError as error:
        raise InputError(
            str(error)
            .strip()
            .splitlines()[-1]
            .removeprefix(f"{InputError.__module__}.InputError: ")
        ) from None


def resident_crops(
    pixels: np.ndarray,
    labels: np.ndarray | None,
    views: Views,
    keys: Iterator[Keys],
    seed: int,
    device: torch.device,
) -> Iterator[Crops]:
    """The same crops to a grey level, cut on ``device``, which holds all images: ``pixels``
    (images, height, width, 3) uint8.
    """
    height, width = pixels.shape[1:3]
    pixels = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2)
    labels = torch.full((len(pixels),), -1) if labels is None else torch.from_numpy(labels)
    scales = np.array([crop.scale for crop in views.crops])
    for batch in keys:
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


class _Crops(Dataset):
    """The uint8 crops of one image and their draws; asked for by (epoch, index), so that workers
    need no state.
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


def _outlive_sigterm(worker: int) -> None:
    """Schedulers and ``torchrun`` send SIGTERM to all processes; the one that trains must still
    save, and ends its loaders then.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@atexit.register
def _end_loaders() -> None:
    """After an error loaders may still run. Multiprocessing, whose turn comes next, would end them
    by SIGTERM, which they outlive, and wait for ever.
    """
    running = [process for process in _LOADERS if process.is_alive()]
    if running and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would call it an error
    for process in running:
        process.kill()


def _collate(rows):
    pixels = [
        torch.from_numpy(np.stack(view)) for view in zip(*(row[0] for row in rows), strict=True)
    ]
    draws = torch.from_numpy(np.stack([row[1] for row in rows]))  # (batch, views, draws)
    return (
        pixels,
        draws,
        torch.tensor([row[2] for row in rows]),
        torch.tensor([row[3] for row in rows]),
    )
