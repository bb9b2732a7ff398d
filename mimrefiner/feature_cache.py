"""Features on disk: one memory-mapped file per block and pooling, filled in the data set's order.

Progress is noted after every batch, so that a killed extraction goes on at the next image. Every ``SHARD`` images the bytes of each
file get a checksum. A folder made from other weights, data, transform or by another version is announced and filled anew; a damaged
shard is announced and filled again from there on.
"""

import errno
import hashlib
import json
import os
import shutil
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from mimrefiner.checkpoint import sha256_of
from mimrefiner.errors import InputError
from mimrefiner.features import Features, block_modules, feature_batches, resolve
from mimrefiner.models import eval_transform
from mimrefiner.results import write_json

FORMAT = "mimrefiner-features-2"
STATE, LABELS = "state.json", "labels.bin"
SHARD = 8192  # images that share a checksum


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
    """Features as :func:`mimrefiner.extract_features` gives them, kept in ``folder`` and mapped from there, not read.

    Args:
        encoder, dataset, blocks, pools, final_norm, autocast: see :func:`mimrefiner.extract_features`.
        folder: of this cache; its name should say model and split.
        dtype: "float32", or "float16" for half the space.
        loading: batch_size, num_workers and device.

    Returns:
        Features whose ``x[pool]`` is a list of memory-mapped (images, dim_b), one per block.

    Raises:
        InputError: no room on the disk (nothing is left behind); a folder with other files than features.
    """
    folder = Path(folder)
    blocks, pools = resolve(encoder, blocks, pools)
    made_of = {
        "format": FORMAT, "weights_sha256": sha256_of(encoder), "data_sha256": _data_hash(dataset), "images": len(dataset),
        "transform": repr(eval_transform(encoder)), "blocks": list(blocks), "pools": list(pools), "final_norm": final_norm,
        "autocast": str(autocast), "dtype": dtype,
    }  # fmt: skip
    state = _open(folder, made_of)
    if state["done"] < len(dataset):
        options = {"final_norm": final_norm, "autocast": autocast, **loading}
        batches = feature_batches(encoder, dataset, range(state["done"], len(dataset)), blocks, pools, **options)
        _fill(folder, state, batches, blocks, pools, np.dtype(dtype))
    maps = {(pool, block): _map(folder, state, pool, block, "c") for pool in pools for block in blocks}
    x = {pool: [torch.from_numpy(maps[pool, block]) for block in blocks] for pool in pools}
    y = torch.from_numpy(np.array(_labels(folder, len(dataset), "r")))
    return Features(x, y, blocks, len(block_modules(encoder)))


def _open(folder: Path, made_of: dict) -> dict:
    """The state of a usable folder; a new one where there is none, or where the old one is of something else."""
    file = folder / STATE
    new = {"made_of": made_of, "done": 0, "widths": {}, "checksums": {}}
    if not folder.exists() or not any(folder.iterdir()):
        return new
    if not file.is_file():
        raise InputError(f"{folder} holds files but no features ({STATE} is missing): choose another folder, or empty this one")
    try:
        state = json.loads(file.read_text())
        different = [name for name in made_of if state["made_of"].get(name) != made_of[name]]
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        different = [STATE]
    if different:
        print(f"{folder} holds features of other {', '.join(different)}: extracting anew", file=sys.stderr)
        for old in (*folder.glob("*_block*.bin"), folder / LABELS):  # no other file: the folder is the user's
            old.unlink(missing_ok=True)
        return new
    damaged = _first_damaged(folder, state)
    if damaged is not None:
        print(f"{folder} is damaged from image {damaged} on: extracting again from there", file=sys.stderr)
        state["done"] = damaged
        state["checksums"] = {start: sums for start, sums in state["checksums"].items() if int(start) < damaged}
    return state


def _first_damaged(folder: Path, state: dict) -> int | None:
    """First image of the first shard whose bytes are not those that were written; None where all are."""
    made_of, n = state["made_of"], state["made_of"]["images"]
    names = {_name(pool, block): (pool, block) for pool in made_of["pools"] for block in made_of["blocks"]}
    itemsize = np.dtype(made_of["dtype"]).itemsize
    if state["done"]:
        sizes = {name: n * state["widths"][name] * itemsize for name in names} | {LABELS: 8 * n}
        if any(not (folder / name).is_file() or (folder / name).stat().st_size != size for name, size in sizes.items()):
            return 0
    for start, sums in sorted(state["checksums"].items(), key=lambda item: int(item[0])):
        rows = slice(int(start), min(int(start) + SHARD, n))
        maps = {name: _map(folder, state, *names[name], "r") for name in names} | {LABELS: _labels(folder, n, "r")}
        if any(_checksum(maps[name][rows]) != value for name, value in sums.items()):
            return int(start)
    return None


def _fill(folder: Path, state: dict, batches, blocks, pools, dtype: np.dtype) -> None:
    n = state["made_of"]["images"]
    maps: dict[str, np.ndarray] = {}
    labels = None
    for pooled, label in batches:
        if not maps:
            state["widths"] = {_name(p, b): x.shape[1] for p in pools for b, x in zip(blocks, pooled[p], strict=True)}
            _reserve(folder, state, n, dtype)
            maps = {_name(p, b): _map(folder, state, p, b, "r+") for p in pools for b in blocks}
            labels = _labels(folder, n, "r+")
        start, stop = state["done"], state["done"] + len(label)
        labels[start:stop] = label
        for pool in pools:
            for block, x in zip(blocks, pooled[pool], strict=True):
                maps[_name(pool, block)][start:stop] = x.numpy()
        state["done"] = stop
        for shard in range(start // SHARD * SHARD, stop, SHARD):
            if shard + SHARD <= stop or stop == n:
                rows = slice(shard, min(shard + SHARD, n))
                state["checksums"][str(shard)] = {name: _checksum(x[rows]) for name, x in (maps | {LABELS: labels}).items()}
        for x in maps.values():
            x.flush()
        labels.flush()
        write_json(state, folder / STATE)  # after the bytes it speaks of


def _reserve(folder: Path, state: dict, n: int, dtype: np.dtype) -> None:
    """Take the whole room on the disk at once, so that a full disk is known before the work is done."""
    existed = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {name: n * width * dtype.itemsize for name, width in state["widths"].items()} | {LABELS: 8 * n}
    try:
        write_json(state, folder / STATE)  # first: says whose files these are
        for name, size in sizes.items():
            with (folder / name).open("ab") as file:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)
                elif shutil.disk_usage(folder).free < size - file.tell():  # macOS
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                file.truncate(size)
    except OSError as error:
        for name in (*sizes, STATE):
            (folder / name).unlink(missing_ok=True)
        if not existed:
            folder.rmdir()
        mib = sum(sizes.values()) / 2**20
        raise InputError(
            f"the features need {mib:,.1f} MiB, which {folder} has not ({error.strerror}): use another folder"
        ) from error


def _name(pool: str, block: int) -> str:
    return f"{pool}_block{block:02d}.bin"


def _map(folder: Path, state: dict, pool: str, block: int, mode: str) -> np.memmap:
    name = _name(pool, block)
    made_of = state["made_of"]
    return np.memmap(folder / name, made_of["dtype"], mode, shape=(made_of["images"], state["widths"][name]))


def _labels(folder: Path, n: int, mode: str) -> np.memmap:
    return np.memmap(folder / LABELS, "int64", mode, shape=(n,))


def _checksum(x: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(x))


def _data_hash(dataset: Dataset, images: int = 1024) -> str:
    """Hash of all labels where the data set lists them, and of pixels and labels of ``images`` images spread evenly over it."""
    digest = hashlib.sha256(str(len(dataset)).encode())
    labels = getattr(dataset, "labels", None)
    if labels is not None:
        digest.update(np.asarray(labels, dtype=np.int64).tobytes())
    for i in range(0, len(dataset), max(1, len(dataset) // images)):
        image, label = dataset[i]
        digest.update(np.asarray(image).tobytes() + str(int(label)).encode())
    return digest.hexdigest()
