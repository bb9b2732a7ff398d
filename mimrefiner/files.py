"""Files that are whole or absent, folders that are finished or not, and where they lie."""

import glob
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mimrefiner.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

PACKAGE = Path(__file__).resolve().parent
CHECKOUT = PACKAGE.parent  # where the package lies in one
ASSETS = PACKAGE / "assets"
POLL_SECONDS = 2.0  # between two looks at what other processes are at


@contextmanager
def atomic_file(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; it is renamed when the block ends well, else removed.

    >>> from tempfile import mkdtemp
    >>> file = Path(mkdtemp()) / "folder" / "note.txt"
    >>> with atomic_file(file) as temporary:
    ...     temporary.write_text("whole or absent")
    15
    >>> file.read_text()
    'whole or absent'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix is kept, because writers read the file type off it
    handle, temporary = tempfile.mkstemp(
        dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix
    )
    os.close(handle)
    try:
        yield Path(temporary)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def goes_on_without(what: str, then: str = "training goes on") -> Iterator[None]:
    """Inside this block a full disk is reported and does not end the run."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        logger.warning("%s not written (%s): %s", what, first_line(error), then)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def cache_folder() -> Path:
    """Where trained models and downloads lie: ``$MIMREFINER_CACHE``, or ``~/.cache/mimrefiner``."""
    return variable_folder("MIMREFINER_CACHE") or _home() / ".cache" / "mimrefiner"


def data_folder() -> Path:
    """Where downloaded data sets lie: ``$MIMREFINER_DATA``, or ``~/.cache/mimrefiner/data``."""
    return variable_folder("MIMREFINER_DATA") or _home() / ".cache" / "mimrefiner" / "data"


def variable_folder(variable: str) -> Path | None:
    """The folder that an environment variable names, ``~`` expanded; None where it is empty.

    >>> os.environ["MIMREFINER_EXAMPLE"] = " /data/images\\r"
    >>> variable_folder("MIMREFINER_EXAMPLE").as_posix()
    '/data/images'
    """
    text = os.environ.get(variable, "").strip()
    return expanded(text) if text else None


def expanded(path: str | Path) -> Path:
    """``path`` with its ``~``; InputError where nothing says which folder that is."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # neither $HOME nor an entry of this user
        raise InputError(f"{path}: no home folder is known here, give a whole path") from error


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError as error:
        raise InputError(
            "no home folder is known here: set MIMREFINER_CACHE and MIMREFINER_DATA to folders"
        ) from error


def project_folder() -> Path:
    """The checkout that holds this package, else the nearest folder upwards that has notebooks."""
    for folder in (CHECKOUT, Path.cwd(), *Path.cwd().parents):
        if (folder / "notebooks").is_dir():
            return folder
    return Path.cwd()


def write_csv(frame: "pd.DataFrame", path: Path) -> None:
    """Write ``frame`` without its index, whole or not at all."""
    with atomic_file(path) as temporary:
        frame.to_csv(temporary, index=False)


def write_json(value, path: Path) -> None:
    """Write ``value`` as indented JSON, whole or not at all."""
    with atomic_file(path) as temporary:
        text = json.dumps(value, indent=2, default=_jsonable) + "\n"
        temporary.write_text(text, encoding="utf-8")


def check_writable(folder: Path, option: str = "--out") -> None:
    """Raise InputError unless files can be written under ``folder``, which ``option`` names."""
    try:
        with atomic_file(folder / ".writable") as temporary:
            temporary.write_text("x", encoding="utf-8")
        (folder / ".writable").unlink(missing_ok=True)  # several runs may write to one folder
    except OSError as error:
        raise InputError(
            f"cannot write to {folder} ({error.strerror}): choose another folder with {option}"
        ) from error


def sha256_of_file(file: Path) -> str:
    """The SHA-256 of a file's bytes, as hexadecimal digits."""
    with Path(file).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def key_of(settings: dict) -> str:
    """The first 16 digits of the SHA-256 of ``settings``, whatever the order of their names."""
    text = json.dumps(settings, sort_keys=True, default=_jsonable)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def different_settings(there: dict, here: dict) -> list[str]:
    """The names of the settings in which two dictionaries differ.

    >>> different_settings({"seed": 0, "epochs": 3}, {"seed": 1, "epochs": 3})
    ['seed']
    """
    return [name for name in {**there, **here} if there.get(name) != here.get(name)]


def _jsonable(value):
    """NumPy's numbers as Python's; paths and the like as text."""
    return value.item() if getattr(value, "ndim", None) == 0 else str(value)


@dataclass(frozen=True)
class Entry:
    """The one memory of what is done: a folder, the settings that made it, and its manifest.

    The manifest is a JSON file that is written last. It holds the settings, facts about the result
    and the SHA-256 of every file, so that a folder is finished and undamaged or counts as absent.

    Attributes:
        folder: where the files lie.
        settings: everything that decides what the files hold; JSON must be able to hold it.
        manifest: the name of the manifest, relative to ``folder``.

    >>> from tempfile import mkdtemp
    >>> entry = Entry(Path(mkdtemp()) / "squares", {"upto": 3})
    >>> entry.facts() is None
    True
    >>> with entry.filled_aside() as folder:
    ...     (folder / "squares.txt").write_text("1 4 9")
    ...     entry.finish(folder, {"n": 3})
    5
    >>> entry.facts()
    {'n': 3}
    """

    folder: Path
    settings: dict
    manifest: str = "manifest.json"

    @classmethod
    def named(cls, parent: Path, kind: str, settings: dict) -> "Entry":
        """An entry in ``parent`` whose name ends in the hash of its settings."""
        return cls(Path(parent) / f"{kind}-{key_of(settings)}", settings)

    @property
    def is_there(self) -> bool:
        """Whether the folder holds a manifest, of whatever settings."""
        return self._has(self.manifest)

    def facts(self) -> dict | None:
        """What :meth:`finish` was given, or None.

        None stands for an entry that is unfinished, damaged or of other settings.
        """
        return None if self.different() or self.damage() else self._read("facts")

    def damage(self) -> str | None:
        """Why the entry does not count as finished, in words; None where it does."""
        files = self._read("files")
        if files is None:
            return f"{self.manifest} is missing or unreadable"
        damaged = files.keys() - self.intact()
        return f"{min(damaged)} is missing or changed" if damaged else None

    def intact(self) -> list[str]:
        """The names of the manifest's files that are as they were written; [] without a manifest.

        >>> from tempfile import mkdtemp
        >>> entry = Entry(Path(mkdtemp()), {})
        >>> for name in ("a", "b"):
        ...     _ = (entry.folder / name).write_text(name)
        >>> entry.finish(entry.folder, {})
        >>> _ = (entry.folder / "a").write_text("changed")
        >>> entry.intact()
        ['b']
        """
        files = self._read("files") or {}
        there = [(name, expected) for name, expected in files.items() if self._has(name)]
        return [name for name, sha in there if sha256_of_file(self.folder / name) == sha]

    def different(self) -> list[str]:
        """The names of the settings that differ from the manifest's; [] without a manifest."""
        there = self._read("settings")
        here = json.loads(json.dumps(self.settings, default=_jsonable))  # as a file gives it back
        return [] if there is None else different_settings(there, here)

    def _has(self, name: str) -> bool:
        return (self.folder / name).is_file()

    def _read(self, part: str) -> dict | None:
        """A part of the manifest, None where it cannot be read."""
        try:
            return json.loads((self.folder / self.manifest).read_text(encoding="utf-8"))[part]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def finish(self, folder: Path, facts: dict, files: Iterable[Path] | None = None) -> None:
        """Write the manifest into ``folder``, which makes the entry finished.

        Args:
            folder: where the files lie now; the entry's own folder, or the one that
                :meth:`filled_aside` yields.
            facts: what is known about the result; JSON must be able to hold it.
            files: the files that belong to the entry; None takes all in ``folder``.
        """
        folder = Path(folder)
        found = folder.rglob("*") if files is None else map(Path, files)
        hashes = {
            file.relative_to(folder).as_posix(): sha256_of_file(file)
            for file in sorted(found)
            if file.is_file() and file != folder / self.manifest
        }
        content = {"settings": self.settings, "facts": facts, "files": hashes}
        write_json(content, folder / self.manifest)

    @contextmanager
    def filled_aside(self) -> Iterator[Path]:
        """Yield a new folder beside the entry's own; it takes its place when the block ends well.

        What was there before is removed only then, and a warning says what was damaged in it.
        Leftovers of killed processes are removed first, so hold :meth:`locked` around this where
        several processes may fill the same entry.
        """
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        beside = f".{self.folder.name}."
        for leftover in self.folder.parent.glob(f"{glob.escape(beside)}????????"):
            shutil.rmtree(leftover, ignore_errors=True)
        if self.folder.exists() and (damage := self.damage()):
            logger.warning("%s is damaged (%s): it is made anew", self.folder, damage)
        with tempfile.TemporaryDirectory(dir=self.folder.parent, prefix=beside) as aside:
            part = Path(aside) / "entry"
            part.mkdir()
            yield part
            if self.folder.exists():
                shutil.rmtree(self.folder)
            part.rename(self.folder)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the entry's lock, which one process at a time has; it ends with the process."""
        from filelock import FileLock, Timeout

        lock = FileLock(self.folder.parent / "locks" / f"{self.folder.name}.lock")
        Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.warning("another process is filling %s: waiting for it", self.folder.name)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def taken(self) -> Iterator[bool]:
        """Hold the entry's lock, as :meth:`locked`, if it is free; whether it is, without waiting.

        >>> from tempfile import mkdtemp
        >>> with Entry(Path(mkdtemp()) / "a", {}).taken() as mine:
        ...     mine
        True
        """
        from filelock import FileLock, Timeout

        lock = FileLock(self.folder.parent / "locks" / f"{self.folder.name}.lock")
        Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
        try:
            with lock.acquire(timeout=0):
                yield True
        except Timeout:
            yield False


def take_turns(runs: Callable[[], Iterable[tuple[Entry, Callable[[], dict]]]]) -> None:
    """Do runs until none is left; any number of processes may do so on the same folder.

    Args:
        runs: gives the runs that can be done now, each as its entry and a function that does it and
            returns its facts; finished ones are passed over. It is asked again until all that it
            gives are finished, so that a run may depend on others.

    Raises:
        InputError: a folder holds the result of other settings.

    >>> from tempfile import mkdtemp
    >>> entry = Entry(Path(mkdtemp()) / "two", {"of": 2})
    >>> take_turns(lambda: [(entry, lambda: {"square": 4})])
    >>> entry.facts()
    {'square': 4}
    """
    while True:
        left = done = 0
        for entry, run in runs():
            if different := entry.different():
                raise InputError(
                    f"{entry.folder} holds a run with other settings ({', '.join(different)}): "
                    "use another folder"
                )
            if entry.facts() is not None:
                continue
            left += 1
            with entry.taken() as mine:
                if mine and entry.facts() is None:
                    entry.finish(entry.folder, run(), [])
                    done += 1
        if not left:
            return
        if not done:  # others are at all that is left; if they end, it is taken over
            time.sleep(POLL_SECONDS)
