"""Training that survives: checkpoints of the whole state, exact resume, and a clean end on SIGTERM.

A checkpoint's file name carries the start of its SHA-256, so that a truncated or changed file is
noticed. Files hold tensors, numbers and text only and are loaded with ``weights_only=True``.
"""

import json
import shutil
import signal
import sys
import threading
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from mimrefiner import distributed
from mimrefiner.config import PretrainConfig, RefineConfig
from mimrefiner.data.datasets import ImageDataset, data_hash
from mimrefiner.errors import InputError, Stopped
from mimrefiner.files import atomic_file, goes_on_without, write_csv
from mimrefiner.models.weights import save_encoder, sha256_of
from mimrefiner.training import engine
from mimrefiner.training.checkpoints import Checkpoints, Saving, load_checkpoint

NUMERICS = 1  # raised by hand when the same settings give other weights: trained models of another number are trained anew
LOG_POINTS = 100  # history rows per stage, so that metrics do not stop the GPU at every step
SETTINGS = "settings.json"  # what a finished run was


def run_settings(config: PretrainConfig | RefineConfig, dataset: Dataset, model: nn.Module) -> dict:
    """What a resumed run must share with the interrupted one. Data are told apart by content (they
    may have moved to another folder), those that are no
    :class:`mimrefiner.data.datasets.ImageDataset` by the number of images alone.
    """
    data = data_hash(dataset) if isinstance(dataset, ImageDataset) else ""
    return {
        **asdict(config),
        "data": data,
        "images": len(dataset),
        "first weights": sha256_of(model),
    }


def is_logged(step: int, steps: int) -> bool:
    return step % max(1, steps // LOG_POINTS) == 0 or step == steps - 1


CHECK_EVERY = (
    10  # steps between the processes' agreements on whether to stop: each one waits for the GPU
)


HISTORY = "history.csv"  # beside the checkpoints, as long as training goes on


class Run:
    """One training run: its history, clock, checkpoints, and the checks between two steps.

    Args:
        saving: None keeps nothing on disk.
        settings: what is trained on what; a checkpoint of other settings is refused.

    Attributes:
        rows: the history, one dictionary per row; ``epochs``: the same of what is measured once an
            epoch.
        flops: counted so far.
    """

    def __init__(self, saving: Saving | None, settings: dict):
        self.saving, self.settings = saving, settings
        self.rows: list[dict] = []
        self.epochs: list[dict] = []
        self.flops = 0
        self.seconds_before, self.began = 0.0, time.perf_counter()
        self.found = None
        self._first_bad = None
        if saving is not None:
            self.checkpoints = Checkpoints(saving.folder)
            self.found = self._restorable()

    @property
    def seconds(self) -> float:
        """Wall time, that of earlier parts of a resumed run included."""
        return self.seconds_before + time.perf_counter() - self.began

    @property
    def history(self) -> pd.DataFrame:
        return pd.DataFrame(self.rows)

    def begin(self, stage: int, steps: int, **parts) -> int:
        """Start a stage: restore ``parts`` (anything with ``state_dict``) if a checkpoint has them;
        returns the first step to do.

        A stage that the checkpoint has behind it is not restored, its first step is ``steps``.
        """
        self.stage, self.steps, self.parts = stage, steps, parts
        self._first_bad, self._next = None, 0
        if self.found is None or self.found["stage"] < stage:
            return 0
        if self.found["stage"] > stage:
            return steps
        state, self.found = self.found, None
        for name, part in parts.items():
            engine.load_whole(part, state["parts"][name])
        self.rows, self.epochs = state["rows"], state["epochs"]
        self.flops, self.seconds_before = state["flops"], state["seconds"]
        self._next = state["step"]
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda_rng"])
        if state["threads"] != torch.get_num_threads() and distributed.rank() == 0:
            print(
                f"the checkpoint was written with {state['threads']} threads, here are {torch.get_num_threads()}: "
                "results will not repeat bit for bit",
                file=sys.stderr,
            )
        return state["step"]

    def watch(self, step: int, losses: Tensor) -> None:
        """Remember the first step at which each of ``losses`` (n,) was not finite, without waiting
        for the GPU.
        """
        bad = torch.where(losses.detach().isfinite(), -1, step)
        self._first_bad = (
            bad
            if self._first_bad is None
            else torch.where(self._first_bad < 0, bad, self._first_bad)
        )

    def check_finite(self, names: list[str]) -> None:
        """Raise FloatingPointError if a watched loss was not finite; ``names``: what each of them
        is.
        """
        if self._first_bad is None:
            return
        bad = [
            (step, name)
            for name, step in zip(names, self._first_bad.tolist(), strict=True)
            if step >= 0
        ]
        if bad:
            step, name = min(bad, key=lambda found: found[0])
            raise FloatingPointError(
                f"the loss became nan or infinite at step {step}{name}: {self._remedy()}"
            )

    def _remedy(self) -> str:
        """What to do about losses or weights that are not finite. A resumed run must keep its
        settings, so it takes a new one.
        """
        temperature = "raise the temperature, " if self.stage > 1 else ""  # pre-training has none
        kept = self.saving is not None and self.checkpoints.files()
        return (
            f"start again in an empty folder and {temperature}clip gradients (clip_norm, --clip-norm) or lower the learning rate"
            + (f"; the last good checkpoint is in {self.saving.folder}" if kept else "")
        )

    def end_step(self, step: int, names: list[str]) -> None:
        """Save if it is time to, after checking the losses; raise :class:`Stopped` once SIGTERM has
        come.

        Raises:
            FloatingPointError: see :meth:`check_finite`.
        """
        self._next = step + 1
        last = self._next == self.steps
        due = self.saving is not None and (last or self._next % self.saving.every == 0)
        agree = distributed.world() == 1 or last or due or self._next % CHECK_EVERY == 0
        stop = agree and distributed.any_process(_Terminated.asked)
        if self.saving is None:
            if stop:
                raise Stopped(
                    f"stopped at stage {self.stage}, step {self._next}; nothing was saved"
                )
            return
        if due or stop:
            self.check_finite(names)
            self._check_weights(step)
            self.save()
            # again: it may have come meanwhile, and no process must leave before the first one has
            # written
            stop = distributed.any_process(_Terminated.asked)
        if stop:
            raise Stopped(
                f"stopped at stage {self.stage}, step {self._next}; resume from {self.saving.folder}"
            )

    def _check_weights(self, step: int) -> None:
        """A finite loss can have gradients that are not: such weights are not saved either."""
        modules = [part for part in self.parts.values() if isinstance(part, nn.Module)]
        weights = [named for part in modules for named in part.named_parameters()]
        bad = [name for name, x in weights if not engine.local(x).isfinite().all()]
        if distributed.any_process(bool(bad)):
            raise FloatingPointError(
                f"weights became nan or infinite by step {step} ({', '.join(bad[:3]) or 'of another process'}), losses did not: "
                f"{self._remedy()}"
            )

    def save(self) -> None:
        """Write a checkpoint and the history so far. Process 0 does; the others hold the same
        state, or give it their shards.
        """
        first = distributed.rank() == 0
        parts = {
            name: engine.whole(part.state_dict(), keep=first) for name, part in self.parts.items()
        }
        if not first:
            return
        state = {
            "settings": self.settings,
            "stage": self.stage,
            "step": self._next,
            "parts": parts,
            "rows": self.rows,
            "epochs": self.epochs,
            "flops": self.flops,
            "seconds": self.seconds,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
            "threads": torch.get_num_threads(),
        }
        self.checkpoints.save(_plain(state))
        with goes_on_without(HISTORY), atomic_file(self.saving.folder / HISTORY) as temporary:
            self.history.to_csv(temporary, index=False)

    def _restorable(self) -> dict | None:
        """The checkpoint to go on from, the same on all processes; None for a new run.

        Raises:
            InputError: on all processes alike, so that none waits for another.
        """
        chosen = distributed.from_first(self._choose)
        if chosen is None:
            return None
        name, size = chosen
        file = self.saving.folder / name
        if distributed.any_process(not file.exists() or file.stat().st_size != size):
            raise InputError(
                f"not all processes see {file}, which the first one chose: use a folder that all of them share"
            )
        found = load_checkpoint(file)
        different = different_settings(found["settings"], self.settings)
        if distributed.any_process(bool(different)):
            raise InputError(
                f"{self.saving.folder} holds checkpoints of a run with other settings "
                f"({', '.join(different) or 'of another process'}): resume with the same ones, or use an empty folder"
            )
        return found

    def _choose(self) -> tuple[str, int] | None:
        """Name, which tells stage, step and checksum, and bytes of the newest valid checkpoint.
        Process 0 alone reads it all.
        """
        if not self.saving.resume:
            if self.checkpoints.files():
                raise InputError(
                    f"{self.saving.folder} holds checkpoints already: resume from them or use an empty folder"
                )
            return None
        self.checkpoints.clear()  # not before: a start by mistake must not take the file that a running one is writing
        file = self.checkpoints.newest_file()
        return None if file is None else (file.name, file.stat().st_size)


class _Terminated:
    """Whether SIGTERM has come."""

    asked = False

    @classmethod
    def set(cls, *_) -> None:
        cls.asked = True


class sigterm_stops:
    """Within it, SIGTERM ends training after the step at hand instead of the process at once. One
    inside of another does nothing, so that what comes between two stages is not forgotten; what
    comes too late for any step is handed on at the end.
    """

    def __enter__(self):
        self.before = None
        inside = signal.getsignal(signal.SIGTERM) == _Terminated.set
        # Python allows handlers nowhere else
        if not inside and threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGTERM, _Terminated.set)

    def __exit__(self, error, *_):
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)
            late, _Terminated.asked = _Terminated.asked and error is None, False
            if late:
                signal.raise_signal(signal.SIGTERM)


def different_settings(there: dict, here: dict) -> list[str]:
    """Names of the settings in which two runs differ."""
    return [name for name in {**there, **here} if there.get(name) != here.get(name)]


def _plain(x):
    """``x`` (nested dictionaries, lists and tuples) with NumPy's numbers as Python's: others are
    not loaded again.
    """
    if isinstance(x, dict):
        return {name: _plain(value) for name, value in x.items()}
    if isinstance(x, (list, tuple)):
        return type(x)(_plain(value) for value in x)
    return x.item() if isinstance(x, np.generic) else x


def train_into(
    out: Path, train: partial, encoders: tuple[str, ...], *, save_every: int, resume: bool
) -> None:
    """Run ``train`` and write its results to the folder ``out``: nothing is trained that ``resume``
    finds finished there.

    Args:
        train: ``pretrain`` or ``refine`` of (encoder, data set, config), to be called with
            ``saving``.
        encoders: attributes of its result, each written as ``NAME.safetensors``; the last one says
            that the run is finished.
        save_every: steps between two checkpoints, which lie in ``out`` until the run is finished.

    Raises:
        InputError: a finished run is in ``out``, of other settings or, without ``resume``, of any.
    """
    folder, last = out / "checkpoints", out / f"{encoders[-1]}.safetensors"
    encoder, dataset, config = train.args
    # As a file gives them back
    settings = json.loads(json.dumps(run_settings(config, dataset, encoder)))
    if distributed.from_first(last.exists):
        if not resume:
            raise InputError(
                f"{out} holds a finished run: use an empty folder, or --resume, which leaves it as it is"
            )
        distributed.from_first(lambda: _finish_again(out, folder, settings))
        return
    result = train(saving=Saving(folder, save_every, resume))
    if distributed.rank() == 0:
        write_csv(result.history, out / "history.csv")
        with atomic_file(out / SETTINGS) as temporary:
            temporary.write_text(json.dumps(settings, indent=2))
        for name in encoders:
            save_encoder(getattr(result, name), out / f"{name}.safetensors")
        shutil.rmtree(folder)
        files = ", ".join(f"{name}.safetensors" for name in encoders)
        print(f"{result.seconds:.0f} s; {files} and history.csv are in {out}")


def _finish_again(out: Path, folder: Path, settings: dict) -> None:
    """Remove checkpoints that a run killed at its very end has left.

    Raises:
        InputError: the finished run had other settings.
    """
    if different := different_settings(json.loads((out / SETTINGS).read_text()), settings):
        raise InputError(
            f"{out} holds a finished run with other settings ({', '.join(different)}): use an empty folder"
        )
    shutil.rmtree(folder, ignore_errors=True)
    print(f"{out} is finished: nothing to do")
