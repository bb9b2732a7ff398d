"""Features on disk: one file per block and pooling, memory-mapped when it is read.

Every set of weights, data and settings has a folder of its own, whose name ends in their hash. Its
files take their whole room at once and are filled by shards of SHARD images, a row per image in the
data set's order. A shard counts once its note is there: the note is written last, whole or not at
all, and holds the SHA-256 of the shard's rows in every file. Whoever comes next, however many
processes, goes on with the shards that have no note, or whose rows are not those that were written.
"""

import errno
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from mimrefiner import distributed
from mimrefiner.data.datasets import data_hash
from mimrefiner.errors import InputError
from mimrefiner.files import Entry
from mimrefiner.models.blocks import depth_of
from mimrefiner.models.encoders import eval_transform
from mimrefiner.models.weights import sha256_of
from mimrefiner.probes.features import (
    Features,
    Loading,
    Selection,
    feature_batches,
    padded,
    process_share,
)

logger = logging.getLogger(__name__)

FORMAT = "mimrefiner-features-4"
LABELS = "labels.bin"
SHARD = 8192  # images
HASHED = 1024  # images whose pixels identify the data


def cached_features(
    encoder: nn.Module,
    dataset: Dataset,
    folder: Path | str,
    *,
    blocks: str | Sequence[int] = "all",
    pools: Sequence[str] | None = None,
    final_norm: bool = False,
    autocast: torch.dtype | None = None,
    dtype: str = "float32",
    **loading,
) -> Features:
    """Features as :func:`mimrefiner.extract_features` gives them, mapped from a folder on disk.

    Every set of weights, data and settings has a folder of its own. Of two runs that need the same
    one, the second waits for the first and reads what it wrote. In a process group all processes
    share the work, and all return the whole.

    Args:
        encoder, dataset, blocks, pools, final_norm, autocast: see
            :func:`mimrefiner.extract_features`.
        folder: holds the folders of all features; the processes of a group must see the same one.
        dtype: "float32", or "float16" for half the space.
        loading: batch_size, num_workers and device, see
            :class:`mimrefiner.probes.features.Loading`.

    Returns:
        Features whose ``x[pool]`` is a list of memory-mapped (images, dim_b), one per block.

    Raises:
        InputError: no room on the disk (known before the work, and no features are left behind);
            ``folder`` is a file or cannot be written to.
    """
    selection = Selection.of(encoder, blocks, pools, final_norm)
    loading, folder = Loading(autocast=autocast, **loading), Path(folder)
    if file := next((place for place in (folder, *folder.parents) if place.is_file()), None):
        raise InputError(f"{file} is a file: features are kept in a folder, give one")
    with ExitStack() as lock:  # held by the first process

        def opened() -> tuple[_Files, list[range]]:
            settings = _settings(encoder, dataset, selection, loading, dtype)
            files = _Files(Entry.named(folder, "features", settings))
            lock.enter_context(files.entry.locked())
            return files, files.missing()

        files, missing = distributed.from_first(opened)
        if missing:
            rows = [row for shard in missing for row in _own_rows(shard)]
            files.fill(missing, feature_batches(encoder, dataset, rows, selection, loading))
    x = {
        pool: [torch.from_numpy(files.mapped(_name(pool, block))) for block in selection.blocks]
        for pool in selection.pools
    }
    y = torch.from_numpy(np.array(files.mapped(LABELS)[:, 0]))
    return Features(x, y, selection.blocks, depth_of(encoder))


def _settings(
    encoder: nn.Module, dataset: Dataset, selection: Selection, loading: Loading, dtype: str
) -> dict:
    """Everything that decides what the files hold."""
    return {
        "format": FORMAT,
        "weights_sha256": sha256_of(encoder),
        "data_sha256": data_hash(dataset, HASHED),
        "images": len(dataset),
        "transform": repr(eval_transform(encoder)),
        "blocks": list(selection.blocks),
        "pools": list(selection.pools),
        "final_norm": selection.final_norm,
        "autocast": str(loading.autocast),
        "dtype": dtype,
    }


def _name(pool: str, block: int) -> str:
    return f"{pool}_block{block:02d}.bin"


def _own_rows(shard: range) -> list[int]:
    """The images of a shard that this process extracts, as many as every other process."""
    rows = process_share(shard, distributed.rank()) or shard[:1]
    return padded(rows, -(-len(shard) // distributed.world()))


@dataclass(frozen=True)
class _Files:
    """The files of one cache, (images, width) each, and the notes of their whole shards."""

    entry: Entry

    @property
    def names(self) -> list[str]:
        of = self.entry.settings
        return [LABELS, *(_name(pool, block) for pool in of["pools"] for block in of["blocks"])]

    def dtype(self, name: str) -> np.dtype:
        return np.dtype("int64" if name == LABELS else self.entry.settings["dtype"])

    def mapped(self, name: str) -> np.memmap:
        """One file as (images, width); changes to the array stay in memory."""
        file, images = self.entry.folder / name, self.entry.settings["images"]
        width = file.stat().st_size // (images * self.dtype(name).itemsize)
        return np.memmap(file, self.dtype(name), "c", shape=(images, width))

    def note(self, shard: range) -> Entry:
        """What makes a shard whole, with :meth:`facts`."""
        settings = {**self.entry.settings, "rows": [shard.start, shard.stop]}
        return Entry(self.entry.folder, settings, f"images_{shard.start:08d}.json")

    def facts(self, shard: range) -> dict[str, str]:
        """SHA-256 of the shard's rows in all files."""
        digest = hashlib.sha256()
        for name in self.names:
            digest.update(self.mapped(name)[shard.start : shard.stop])
        return {"sha256": digest.hexdigest()}

    def intact(self, shard: range) -> bool:
        try:
            return self.note(shard).facts() == self.facts(shard)
        except (OSError, ValueError):  # a file is missing or short
            return False

    def missing(self) -> list[range]:
        """The shards that are to be extracted; damaged ones are announced."""
        images, folder = self.entry.settings["images"], self.entry.folder
        starts = range(0, max(1, images), SHARD)
        shards = [range(start, min(start + SHARD, images)) for start in starts]
        new = [shard for shard in shards if not (folder / self.note(shard).manifest).exists()]
        damaged = [shard for shard in shards if shard not in new and not self.intact(shard)]
        if damaged:
            where = ", ".join(f"{shard[0]} to {shard[-1]}" for shard in damaged[:5])
            where += ", ..." * (len(damaged) > 5)
            logger.warning("%s is damaged at the images %s: extracting them again", folder, where)
        return sorted(new + damaged, key=lambda shard: shard.start)

    def fill(
        self, shards: list[range], batches: Iterator[tuple[dict[str, list[Tensor]], Tensor]]
    ) -> None:
        """Write this process's rows of the shards, and the note of every shard that is whole."""
        own = [_own_rows(shard) for shard in shards]
        rows, ends, done = np.concatenate(own), [*accumulate(map(len, own))], 0
        for pooled, label in batches:
            parts = [x.numpy() for pool in self.entry.settings["pools"] for x in pooled[pool]]
            arrays = dict(zip(self.names, [label.numpy()[:, None], *parts], strict=True))
            if done == 0:
                widths = {name: x.shape[1] for name, x in arrays.items()}
                distributed.from_first(partial(self.reserve, widths))
            before, done = done, done + len(label)
            try:
                for name, x in arrays.items():
                    self.write(name, rows[before:done], x.astype(self.dtype(name)))
                for shard, end in zip(shards, ends, strict=True):
                    if before < end <= done:
                        distributed.barrier()  # every process has written its rows
                        distributed.from_first(partial(self.finish, shard))
            except OSError as error:
                raise InputError(
                    f"{self.entry.folder} takes no more features ({error.strerror}); whole shards "
                    "are kept: make room, or use a folder that all processes share"
                ) from error

    def write(self, name: str, rows: np.ndarray, x: np.ndarray) -> None:
        """Write ``x``, (rows, width), to its places ``rows`` in a file."""
        # Not mapped: processes on several machines must not share a page
        with (self.entry.folder / name).open("r+b") as file:
            for part in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(rows) != 1) + 1):
                file.seek(int(rows[part[0]]) * x[0].nbytes)
                file.write(x[part])

    def finish(self, shard: range) -> None:
        self.note(shard).finish(self.entry.folder, self.facts(shard), files=())

    def reserve(self, widths: dict[str, int]) -> None:
        """Take the whole room on the disk at once, so that a full disk is known before the work."""
        folder, images = self.entry.folder, self.entry.settings["images"]
        sizes = {name: images * w * self.dtype(name).itemsize for name, w in widths.items()}
        existed = folder.exists()
        try:
            folder.mkdir(exist_ok=True)
            for name, size in sizes.items():
                with (folder / name).open("ab") as file:
                    if hasattr(os, "posix_fallocate"):
                        os.posix_fallocate(file.fileno(), 0, size)
                    elif shutil.disk_usage(folder).free < size - file.tell():  # macOS
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    file.truncate(size)
        except OSError as error:
            if not existed:
                shutil.rmtree(folder, ignore_errors=True)
            mib = sum(sizes.values()) / 2**20
            raise InputError(
                f"the features need {mib:,.1f} MiB, which {folder.parent} has not "
                f"({error.strerror}): use another folder"
            ) from error
