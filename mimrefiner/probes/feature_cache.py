"""Features on disk: one file per block and pooling, the images in the data set's order,
memory-mapped when it is read.

Every process writes the rows of its own images into the same files and notes after every batch
which it has written, with their checksums, in a file of its own. Whoever comes next, however many
processes, puts the notes together and goes on with the images that are missing. A folder made from
other weights, data, transform or by another version is announced and filled anew; images whose
bytes are not those that were written are announced and extracted again.
"""

import errno
import hashlib
import json
import os
import shutil
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from mimrefiner import distributed
from mimrefiner.errors import InputError
from mimrefiner.files import write_json
from mimrefiner.models.blocks import block_modules
from mimrefiner.models.encoders import eval_transform
from mimrefiner.models.weights import sha256_of
from mimrefiner.probes.features import Features, feature_batches, resolve

FORMAT = "mimrefiner-features-3"
STATE, LABELS, PIECES = "state.json", "labels.bin", "pieces_{}.json"
SHARD = 8192  # images that share a checksum, at least and up to a batch more


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
    """Features as :func:`mimrefiner.extract_features` gives them, kept in ``folder`` and mapped
    from there, not read.

    In a process group every process fills in its share of the images that are missing, and all
    return the whole.

    Args:
        encoder, dataset, blocks, pools, final_norm, autocast: see
            :func:`mimrefiner.extract_features`.
        folder: of this cache; its name should say model and split. All processes must see the same
            one.
        dtype: "float32", or "float16" for half the space.
        loading: batch_size, num_workers and device.

    Returns:
        Features whose ``x[pool]`` is a list of memory-mapped (images, dim_b), one per block.

    Raises:
        InputError: no room on the disk (known before the work, nothing is left behind); a folder
            with other files than features.
    """
    folder, n = Path(folder), len(dataset)
    if file := next((place for place in (folder, *folder.parents) if place.is_file()), None):
        raise InputError(f"{file} is a file: features are kept in a folder, give one")
    blocks, pools = resolve(encoder, blocks, pools)

    def opened() -> dict:
        return _open(
            folder,
            {
                "format": FORMAT,
                "weights_sha256": sha256_of(encoder),
                "data_sha256": _data_hash(dataset),
                "images": n,
                "transform": repr(eval_transform(encoder)),
                "blocks": list(blocks),
                "pools": list(pools),
                "final_norm": final_norm,
                "autocast": str(autocast),
                "dtype": dtype,
            },
        )

    state = distributed.from_first(opened)
    missing = np.ones(n, bool)
    for piece in state["pieces"]:
        missing[piece["start"] : piece["stop"]] = False
    missing = np.flatnonzero(missing)
    if len(missing):
        rank, world = distributed.rank(), distributed.world()
        rows = missing[len(missing) * rank // world : len(missing) * (rank + 1) // world]
        # The same number everywhere: sharded encoders wait
        padding = [0] * (-(-len(missing) // world) - len(rows))
        options = {"final_norm": final_norm, "autocast": autocast, **loading}
        _fill(
            folder,
            state,
            rows,
            feature_batches(encoder, dataset, [*rows.tolist(), *padding], blocks, pools, **options),
        )
        distributed.barrier()
    maps = {name: _map(folder, state, name, "c") for name in state["widths"]}
    x = {pool: [torch.from_numpy(maps[_name(pool, block)]) for block in blocks] for pool in pools}
    y = torch.from_numpy(np.array(_map(folder, state, LABELS, "r")))
    return Features(x, y, blocks, len(block_modules(encoder)))


def _open(folder: Path, made_of: dict) -> dict:
    """The state of a usable folder; a new one where there is none, or where the old one is of
    something else.
    """
    file, notes = folder / STATE, sorted(folder.glob(PIECES.format("*")))
    new = {"made_of": made_of, "widths": {}, "pieces": []}
    if not folder.exists() or not any(folder.iterdir()):
        return new
    if not file.is_file():
        raise InputError(
            f"{folder} holds files but no features ({STATE} is missing): choose another folder, or empty this one"
        )
    try:
        state = json.loads(file.read_text())
        different = [name for name in made_of if state["made_of"].get(name) != made_of[name]]
        pieces = [
            *state.get("pieces", ()),
            *(piece for note in notes for piece in json.loads(note.read_text())),
        ]
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        different = [STATE]
    if different:
        print(
            f"{folder} holds features of other {', '.join(different)}: extracting anew",
            file=sys.stderr,
        )
        # No other file: the folder is the user's
        for old in (*folder.glob("*_block*.bin"), folder / LABELS, *notes):
            old.unlink(missing_ok=True)
        return new
    damaged = _damaged(folder, state, pieces)
    if damaged:
        where = ", ".join(
            f"{piece['start']} to {piece['stop'] - 1}" for piece in damaged[:5]
        ) + ", ..." * (len(damaged) > 5)
        print(f"{folder} is damaged at the images {where}: extracting them again", file=sys.stderr)
    state["pieces"] = [piece for piece in pieces if piece not in damaged]
    write_json(state, file)
    for note in notes:
        note.unlink()
    return state


def _damaged(folder: Path, state: dict, pieces: list[dict]) -> list[dict]:
    """The pieces whose bytes are not those that were written, by their first images."""
    pieces = sorted(pieces, key=lambda piece: piece["start"])
    sizes = _sizes(state)
    if any(
        not (folder / name).is_file() or (folder / name).stat().st_size != size
        for name, size in sizes.items()
    ):
        return pieces
    maps = {name: _map(folder, state, name, "r") for name in sizes} if pieces else {}
    return [
        piece
        for piece in pieces
        if any(
            zlib.crc32(maps[name][piece["start"] : piece["stop"]]) != value
            for name, value in piece["sums"].items()
        )
    ]


def _fill(
    folder: Path,
    state: dict,
    rows: np.ndarray,
    batches: Iterator[tuple[dict[str, list[Tensor]], Tensor]],
) -> None:
    """Write the features of the images ``rows``, this process's; ``batches`` may hold others behind
    them.
    """
    made_of, pieces, done = state["made_of"], [], 0
    with ExitStack() as stack:
        for pooled, label in batches:
            arrays = {
                _name(pool, block): x.numpy().astype(made_of["dtype"])
                for pool in made_of["pools"]
                for block, x in zip(made_of["blocks"], pooled[pool], strict=True)
            }
            if not state["widths"]:
                state["widths"] = {name: x.shape[1] for name, x in arrays.items()}
            arrays[LABELS] = label.numpy()
            if done == 0:
                distributed.from_first(partial(_reserve, folder, state))
                files = {
                    name: stack.enter_context(_existing(folder / name).open("r+b"))
                    for name in arrays
                }
            batch = rows[done : done + len(label)]
            try:
                _write(files, arrays, batch, pieces)
                # After the bytes it speaks of
                write_json(pieces, folder / PIECES.format(distributed.rank()))
            except OSError as error:
                raise InputError(
                    f"{folder} takes no more features ({error.strerror}); those that are there are kept: make room and start again"
                ) from error
            done += len(batch)


def _write(
    files: dict[str, BinaryIO], arrays: dict[str, np.ndarray], rows: np.ndarray, pieces: list[dict]
) -> None:
    """Write the first rows of ``arrays`` to their places ``rows`` and add them to the last of
    ``pieces``, or to a new one.
    """
    done = 0
    # Neighbours in the files
    for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1) if len(rows) else ():
        start, stop = int(run[0]), int(run[-1]) + 1
        if (
            not pieces
            or pieces[-1]["stop"] != start
            or pieces[-1]["stop"] - pieces[-1]["start"] >= SHARD
        ):
            pieces.append({"start": start, "stop": start, "sums": dict.fromkeys(arrays, 0)})
        # Written, not mapped: processes on several machines must not share a page
        for name, x in arrays.items():
            content = np.ascontiguousarray(x[done : done + len(run)])
            files[name].seek(start * content[0].nbytes)
            files[name].write(content)
            files[name].flush()
            pieces[-1]["sums"][name] = zlib.crc32(content, pieces[-1]["sums"][name])
        pieces[-1]["stop"] = stop
        done += len(run)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise InputError(
            f"{path} is not there on every machine: the processes need a folder that they share"
        )
    return path


def _reserve(folder: Path, state: dict) -> None:
    """Take the whole room on the disk at once, so that a full disk is known before the work is
    done.
    """
    existed = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    sizes = _sizes(state)
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


def _sizes(state: dict) -> dict[str, int]:
    """Bytes of every file."""
    n, itemsize = state["made_of"]["images"], np.dtype(state["made_of"]["dtype"]).itemsize
    return {name: n * width * itemsize for name, width in state["widths"].items()} | {LABELS: 8 * n}


def _name(pool: str, block: int) -> str:
    return f"{pool}_block{block:02d}.bin"


def _map(folder: Path, state: dict, name: str, mode: str) -> np.memmap:
    n = state["made_of"]["images"]
    if name == LABELS:
        return np.memmap(folder / name, "int64", mode, shape=(n,))
    return np.memmap(
        folder / name, state["made_of"]["dtype"], mode, shape=(n, state["widths"][name])
    )


def _data_hash(dataset: Dataset, images: int = 1024) -> str:
    """Hash of all labels where the data set lists them, and of pixels and labels of ``images``
    images spread evenly over it.
    """
    digest = hashlib.sha256(str(len(dataset)).encode())
    labels = getattr(dataset, "labels", None)
    if labels is not None:
        digest.update(np.asarray(labels, dtype=np.int64).tobytes())
    for i in range(0, len(dataset), max(1, len(dataset) // images)):
        image, label = dataset[i]
        digest.update(np.asarray(image).tobytes() + str(int(label)).encode())
    return digest.hexdigest()
