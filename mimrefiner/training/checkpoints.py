"""Checkpoints of the whole state of a training."""

import logging
import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch

from mimrefiner.errors import InputError
from mimrefiner.files import atomic_file, goes_on_without, sha256_of_file

logger = logging.getLogger(__name__)

KEEP = 2
NAME = re.compile(r"stage(\d)-step(\d{8})-([0-9a-f]{16})\.pt")


@dataclass(frozen=True)
class Saving:
    """Where and how often training writes checkpoints.

    Attributes:
        folder: the checkpoints' folder.
        every: steps between two; one more is written at the end of every stage and on SIGTERM. None
            leaves it to ``minutes``.
        resume: go on from the newest valid one, if there is any.
        keep: steps whose checkpoints stay; of the others only the last :data:`KEEP` do.
        minutes: one is also written when so many minutes are over since the last; None does not.

    >>> Saving(Path("checkpoints"), every=None, minutes=5).resume
    False
    """

    folder: Path
    every: int | None = 500
    resume: bool = False
    keep: tuple[int, ...] = ()
    minutes: float | None = None

    def __post_init__(self):
        if self.every is not None and self.every < 1:
            raise InputError(f"steps between checkpoints must be at least 1, got {self.every}")
        if self.minutes is not None and not self.minutes > 0:
            raise InputError(f"minutes between checkpoints must be > 0, got {self.minutes}")


class Checkpoints:
    """The last good :data:`KEEP` checkpoints in ``folder``, and those of the steps ``keep``."""

    def __init__(self, folder: Path, keep: Collection[int] = ()):
        self.folder, self.keep = Path(folder), keep

    def clear(self) -> None:
        """Remove what a killed process left half written."""
        for file in self.folder.glob(".writing-*.pt"):
            file.unlink()

    def files(self) -> list[Path]:
        """The checkpoints' files, oldest first."""
        found = [file for file in self.folder.glob("stage*.pt") if NAME.fullmatch(file.name)]
        return sorted(found, key=lambda file: NAME.fullmatch(file.name).groups()[:2])

    def save(self, state: dict) -> None:
        """Write ``state`` aside, rename it when it is whole and on disk, then drop old ones.

        A full disk is reported; training goes on, and the earlier checkpoints stay.
        """
        aside = self.folder / "writing.pt"
        with goes_on_without(f"checkpoint at step {state['step']}", "earlier ones are kept"):
            with atomic_file(aside) as temporary:
                torch.save(state, temporary)
                with temporary.open("rb+") as stream:
                    os.fsync(stream.fileno())
            name = f"stage{state['stage']}-step{state['step']:08d}-{digest_of(aside)}.pt"
            aside.rename(self.folder / name)
            for file in self.files()[:-KEEP]:
                if step_of(file) not in self.keep:
                    file.unlink(missing_ok=True)

    def newest_file(self) -> Path | None:
        """The newest valid checkpoint, None where there is none.

        Damaged ones are named and renamed to ``*.damaged``, so that they no longer count among the
        newest, for which new ones would be dropped.
        """
        for file in reversed(self.files()):
            if digest_of(file) == NAME.fullmatch(file.name).group(3):
                return file
            kept = file.rename(file.with_name(f"{file.name}.damaged"))
            logger.warning(
                "%s is damaged (its checksum differs): now %s; trying the one before",
                file,
                kept.name,
            )
        return None

    def newest(self) -> dict | None:
        """What :meth:`newest_file` holds."""
        file = self.newest_file()
        return None if file is None else load_checkpoint(file)


def step_of(file: Path) -> int:
    """The steps of its stage that a checkpoint has behind it, which its name carries."""
    return int(NAME.fullmatch(file.name).group(2))


def digest_of(file: Path) -> str:
    """The first 16 digits of the file's SHA-256, which its name carries."""
    return sha256_of_file(file)[:16]


def load_checkpoint(file: Path) -> dict:
    """The state in a checkpoint; its tensors are read when used, and processes share them."""
    return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
