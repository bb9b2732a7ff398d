"""Loader processes: they outlive the SIGTERM that their trainer survives, and end when it ends.

:func:`ahead` is for what is too small for a process.
"""

import atexit
import multiprocessing
import signal
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.utils.data import DataLoader, Dataset

from mimrefiner.errors import InputError

_RUNNING: weakref.WeakSet = weakref.WeakSet()  # all loader processes


def loaded(
    dataset: Dataset, batches: Iterator[list], collate: Callable, num_workers: int, *, pin: bool
) -> Iterator:
    """Batches of ``dataset``'s rows, loaded by processes or, with no workers, by this one.

    Args:
        dataset: map-style; its keys may be anything.
        batches: the keys of every batch.
        collate: makes one batch of a list of rows.
        num_workers: number of processes.
        pin: put batches into page-locked memory, from which copies to a GPU need not wait.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=collate,
        # A loader's own draw must not move the global state, or a resumed run would differ
        generator=torch.Generator(),
        pin_memory=pin,
        worker_init_fn=_outlive_sigterm,
    )
    others = set(multiprocessing.active_children())
    rows = iter(loader)
    _RUNNING.update(set(multiprocessing.active_children()) - others)
    yield from without_traces(rows)


def ahead(items: Iterator) -> Iterator:
    """Yield from ``items``, none of which is None; a thread makes the next while this one is used.

    >>> list(ahead(iter([1, 2, 3])))
    [1, 2, 3]
    """
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item


def without_traces(batches: Iterable) -> Iterator:
    """Yield from a loader; an InputError of its processes loses the traceback that torch gave it.

    >>> list(without_traces([1, 2]))
    [1, 2]
    """
    try:
        yield from batches
    except InputError as error:
        last = str(error).strip().splitlines()[-1]
        raise InputError(last.removeprefix(f"{InputError.__module__}.InputError: ")) from None


def _outlive_sigterm(worker: int) -> None:
    """Schedulers and ``torchrun`` send SIGTERM to all processes, but the trainer must still save.

    It ends its loaders afterwards.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@atexit.register
def _end_loaders() -> None:
    """Kill loaders that still run after an error.

    Multiprocessing would end them by SIGTERM, which they ignore, and then wait for them forever.
    """
    running = [process for process in _RUNNING if process.is_alive()]
    if running and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would call it an error
    for process in running:
        process.kill()
