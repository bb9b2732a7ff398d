"""One way to show progress, and the meter of a training's throughput."""

import logging
import os
import resource
import sys
import time
from collections.abc import Iterable, Iterator

import torch
from tqdm.auto import tqdm

logger = logging.getLogger(__name__)

LOG_SECONDS = 10


def progress(items: Iterable, title: str, total: int | None = None, unit: str = "step") -> Iterator:
    """Yield from ``items`` and show how far that is.

    A terminal and a live notebook get a bar; elsewhere, and with ``MIMREFINER_PROGRESS=log``, the
    logger of this module gets a line every ten seconds. Only the first of several processes tells.

    Args:
        items: what to go through.
        title: names the work.
        total: the number of items, where ``len(items)`` does not tell.
        unit: what one item is, in the bar.
    """
    if os.environ.get("RANK", "0") != "0":
        yield from items
        return
    total = len(items) if total is None and hasattr(items, "__len__") else total
    if os.environ.get("MIMREFINER_PROGRESS") != "log" and (
        sys.stderr.isatty() or "ipykernel" in sys.modules
    ):
        yield from tqdm(items, title, total, unit=unit, leave=False, dynamic_ncols=True)
        return
    start = last = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - last >= LOG_SECONDS:
            last = now
            left = f" of {total} ({done / total:.0%})" if total else ""
            if total and done:  # the first item alone may take longer than this
                left += f", about {(now - start) / done * (total - done):.0f} s left"
            logger.info("%s: %s%s", title, done, left)
        yield item


class Meter:
    """Measures how fast a training goes: images per second, waiting, memory.

    Args:
        batch_size: images in the batch of all processes together.
        device: the device that trains.
    """

    def __init__(self, batch_size: int, device: torch.device | str = "cpu"):
        self.batch_size, self.device = batch_size, torch.device(device)
        self.start()

    def start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.began, self.waited, self.batches = time.perf_counter(), 0.0, 0

    def waiting(self, batches: Iterable) -> Iterator:
        """Yield from ``batches`` and count the time spent waiting for each."""
        batches = iter(batches)
        while True:
            asked = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.waited += time.perf_counter() - asked
            self.batches += 1
            yield batch

    def read(self) -> dict[str, float]:
        """What was measured since :meth:`start`.

        Returns:
            ``images_per_second`` of all processes, ``data_wait_share`` of the time, and
            ``peak_memory_mib`` of the GPU, else of the process.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            memory = torch.cuda.max_memory_allocated(self.device) / 2**20
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        seconds = time.perf_counter() - self.began
        return {
            "images_per_second": self.batches * self.batch_size / seconds,
            "data_wait_share": self.waited / seconds,
            "peak_memory_mib": memory,
        }
