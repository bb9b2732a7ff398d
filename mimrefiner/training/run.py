"""What keeps a training alive: its loop's frame, checkpoints, exact resume, a clean end on SIGTERM.

A checkpoint's file name carries the start of its SHA-256, so that a truncated or changed file is
noticed. Files hold tensors, numbers and text only and are loaded with ``weights_only=True``.
"""

import logging
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from mimrefiner import distributed
from mimrefiner.config import PretrainConfig, RefineConfig, Views
from mimrefiner.data.datasets import data_hash
from mimrefiner.data.views import Order, view_batches
from mimrefiner.errors import InputError, Stopped
from mimrefiner.files import Entry, atomic_file, different_settings, goes_on_without, write_csv
from mimrefiner.models.encoders import normalisation
from mimrefiner.models.weights import save_encoder, sha256_of
from mimrefiner.progress import Meter, progress
from mimrefiner.training import engine
from mimrefiner.training.checkpoints import Checkpoints, Saving, load_checkpoint
from mimrefiner.training.cost import operation_counter
from mimrefiner.training.memory import PLENTY, Memory
from mimrefiner.training.optim import Stage, set_lr

logger = logging.getLogger(__name__)

# Raised by hand where the same settings give other weights; the store then trains anew
NUMERICS = 3
CHECK_EVERY = 10  # after so many steps the processes agree on whether to stop; GPUs wait for it
HISTORY_FILE = "history.csv"

# Adds what it measures of a model to the last row of the epochs so far
Watch = Callable[[nn.Module, list[dict]], None]


def run_settings(config: PretrainConfig | RefineConfig, dataset: Dataset, model: nn.Module) -> dict:
    """What a resumed run must share with the interrupted one.

    Data are told apart by what they hold, since they may have moved to another folder.
    """
    return {
        **asdict(config),
        "data": data_hash(dataset),
        "images": len(dataset),
        "first weights": sha256_of(model),
    }


class TrainingRun:
    """One training: its history, clock and checkpoints, and what its loops have in common.

    Args:
        saving: where checkpoints go; None keeps nothing on disk.
        settings: called where something is kept; it tells what is trained on what, and a checkpoint
            of other settings is refused.
        num_workers: processes that load images.
        memory: what trades time for memory.
        monitor: called at the end of every epoch and stage with the trained module and the rows of
            the epochs so far, to whose last one it adds what it measures; None measures nothing.

    Attributes:
        rows: the history so far, one dictionary per row.
        epochs: what was measured once per epoch, one dictionary each.
        flops: floating point operations of the stages that have begun.
    """

    def __init__(
        self,
        saving: Saving | None = None,
        settings: Callable[[], dict] = dict,
        *,
        num_workers: int = 0,
        memory: Memory = PLENTY,
        monitor: Watch | None = None,
    ):
        self.saving, self.num_workers = saving, num_workers
        self.memory, self.monitor = memory, monitor
        self.rows: list[dict] = []
        self.epochs: list[dict] = []
        self.flops = 0
        self.seconds_before, self.began = 0.0, time.perf_counter()
        self._saved = time.monotonic()
        self.found = None
        if saving is not None:
            self.settings = settings()
            self.checkpoints = Checkpoints(saving.folder, saving.keep)
            self.found = self._restorable()

    @property
    def seconds(self) -> float:
        """Wall time, with that of the earlier parts of a resumed run."""
        return self.seconds_before + time.perf_counter() - self.began

    @property
    def history(self) -> pd.DataFrame:
        """The history so far: one row per logged step, and per head where there are heads."""
        return pd.DataFrame(self.rows)

    def begin(self, stage: Stage, **parts) -> None:
        """Start a stage, or go on with it where the checkpoint left it.

        Args:
            stage: its frame. If the checkpoint is of a later stage, no step of this one is left.
            parts: what a checkpoint keeps, by name, everything with ``state_dict``: first the
                trained module, which has an ``encoder``; then others, and among them, where there
                is one, its ``optimizer``.
        """
        self.stage, self.parts = stage, parts
        self.trained, self.optimizer = next(iter(parts.values())), parts.get("optimizer")
        self.first, self._next, self._first_bad = 0, 0, None
        if self.found is None or self.found["stage"] < stage.number:
            return
        if self.found["stage"] > stage.number:
            self.first = stage.steps
            return
        state, self.found = self.found, None
        for name, part in parts.items():
            engine.load_whole(part, state["parts"][name])
        self.rows, self.epochs = state["rows"], state["epochs"]
        self.flops, self.seconds_before = state["flops"], state["seconds"]
        self.first = self._next = state["step"]
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda_rng"])
        if state["threads"] != torch.get_num_threads() and distributed.rank() == 0:
            logger.warning(
                "the checkpoint was written with %d threads, here are %d: "
                "results will not repeat bit for bit",
                state["threads"],
                torch.get_num_threads(),
            )

    def steps(self, title: str, dataset: Dataset, views: Views, seed: int) -> Iterator[tuple]:
        """Yield (step, batch) for every step that is left, after setting its learning rate.

        Args:
            title: stands before the progress.
            dataset: map-style, (image, label).
            views: the views of every image.
            seed: draws the order and the views.

        A batch holds this process's share, as :func:`mimrefiner.data.views.view_batches` yields it.
        """
        mean, std = normalisation(self.trained.encoder)
        batches = view_batches(
            dataset,
            views,
            self.order(seed),
            mean=mean,
            std=std,
            device=next(self.trained.parameters()).device,
            num_workers=self.num_workers,
        )
        return self.through(title, batches)

    def order(self, seed: int) -> Order:
        """Which images this process sees in the steps that are left."""
        part = distributed.rank(), distributed.world()
        return Order(self.stage.batch_size, self.stage.steps, seed, self.first, part)

    def through(self, title: str, batches: Iterator) -> Iterator[tuple]:
        """Yield (step, batch) of ``batches``, one for every step that is left, as :meth:`steps`."""
        stage = self.stage
        self.meter = Meter(stage.batch_size, next(self.trained.parameters()).device)
        batches = progress(self.meter.waiting(batches), title, stage.steps - self.first)
        for step, batch in enumerate(batches, self.first):
            self.lr = stage.lr(step)
            if self.optimizer is not None:
                set_lr(self.optimizer, self.lr)
            yield step, batch

    @contextmanager
    def counted(self, step: int) -> Iterator[None]:
        """Count the operations inside this block in the first step, which stands for all steps."""
        if step > 0:
            yield
            return
        with operation_counter() as counter:
            yield
        self.flops += counter.get_total_flops() * self.stage.steps * distributed.world()

    def descend(self) -> None:
        """Clip the gradients where the stage asks for it, and let the optimiser take its step."""
        if self.stage.clip_norm is not None:
            engine.clip_gradients(self.trained.parameters(), self.stage.clip_norm)
        self.optimizer.step()

    def end_step(
        self, step: int, losses: Tensor, measure: Callable[[], dict[str, Tensor]] = dict
    ) -> None:
        """End a step: history, monitor, checkpoint, and a look at whether to stop.

        Args:
            step: 0-based.
            losses: this process's loss (), or those of the heads (heads,).
            measure: gives name -> this process's values (heads,); called where the step is logged.

        Raises:
            FloatingPointError: a loss, or a weight about to be saved, is not finite.
            Stopped: SIGTERM has come.
        """
        losses = distributed.mean(losses.detach()).reshape(-1)
        self.watch(step, losses)
        if self.stage.is_logged(step):
            self.check_finite()
            means = {name: distributed.mean(x) for name, x in measure().items()}
            self._log(step, {"loss": losses, **means})
        if self.monitor is not None and self.stage.ends_epoch(step):
            epoch = self.stage.epoch(step + 1)
            self.epochs.append({"stage": self.stage.number, "epoch": epoch, **self.meter.read()})
            self.monitor(self.trained, self.epochs)
            self.meter.start()
        self._next = step + 1
        self._save_or_stop()

    def _log(self, step: int, columns: dict[str, Tensor]) -> None:
        values = {name: x.tolist() for name, x in columns.items()}
        when = {"stage": self.stage.number, "step": step, "epoch": self.stage.epoch(step)}
        for row in range(len(values["loss"])):
            head = {"block": self.stage.blocks[row]} if self.stage.blocks else {}
            numbers = {name: x[row] for name, x in values.items()}
            self.rows.append({**when, "lr": self.lr, **head, **numbers})

    def watch(self, step: int, losses: Tensor) -> None:
        """Remember the first step at which each of ``losses`` (n,) was not finite.

        The GPU does not wait for it.
        """
        bad = torch.where(losses.isfinite(), -1, step)
        before = bad if self._first_bad is None else self._first_bad
        self._first_bad = torch.where(before < 0, bad, before)

    def check_finite(self) -> None:
        """Raise FloatingPointError if a watched loss was not finite."""
        if self._first_bad is None:
            return
        names = [f" in the head on block {block} (0-based)" for block in self.stage.blocks] or [""]
        steps = zip(self._first_bad.tolist(), names, strict=True)
        bad = [(step, name) for step, name in steps if step >= 0]
        if bad:
            step, name = min(bad, key=lambda found: found[0])
            raise FloatingPointError(
                f"the loss became nan or infinite at step {step}{name}: {self._remedy()}"
            )

    def _remedy(self) -> str:
        """What to do about losses or weights that are not finite.

        A resumed run must keep its settings, so other settings need a new run.
        """
        # Pre-training has no temperature
        temperature = "raise the temperature, " if self.stage.number > 1 else ""
        kept = self.saving is not None and self.checkpoints.files()
        return (
            f"start again in an empty folder and {temperature}clip gradients (clip_norm, "
            "--clip-norm) or lower the learning rate"
            + (f"; the last good checkpoint is in {self.saving.folder}" if kept else "")
        )

    def _save_or_stop(self) -> None:
        """Save finite losses and weights if it is time to; stop once SIGTERM has come."""
        last = self._next == self.stage.steps
        due = self.saving is not None and (last or self._is_due())
        agree = distributed.world() == 1 or last or due or self._next % CHECK_EVERY == 0
        stop = agree and distributed.any_process(_Terminated.asked)
        if self.saving is not None and (due or stop):
            self.check_finite()
            self._check_weights()
            self.save()
            # It may have come meanwhile, and no process may leave before the first has written
            stop = distributed.any_process(_Terminated.asked)
        if stop:
            where = f"stopped at stage {self.stage.number}, step {self._next}; "
            kept = f"resume from {self.saving.folder}" if self.saving else "nothing was saved"
            raise Stopped(where + kept)

    def _is_due(self) -> bool:
        """Whether so many steps or minutes are over; processes agree on the latter now and then."""
        every, minutes = self.saving.every, self.saving.minutes
        if every is not None and self._next % every == 0:
            return True
        if minutes is None or (distributed.world() > 1 and self._next % CHECK_EVERY):
            return False
        return distributed.any_process(time.monotonic() - self._saved >= 60 * minutes)

    def _check_weights(self) -> None:
        """Raise FloatingPointError for weights that are not finite, even where the losses are."""
        modules = [part for part in self.parts.values() if isinstance(part, nn.Module)]
        weights = [named for part in modules for named in part.named_parameters()]
        fine = [engine.local(x).isfinite().all() for _, x in weights]
        fine = torch.stack(fine).tolist() if fine else []  # the GPU waits once, not for each
        bad = [name for (name, _), finite in zip(weights, fine, strict=True) if not finite]
        if distributed.any_process(bool(bad)):
            raise FloatingPointError(
                f"weights became nan or infinite by step {self._next - 1} "
                f"({', '.join(bad[:3]) or 'of another process'}), losses did not: {self._remedy()}"
            )

    def save(self) -> None:
        """Write a checkpoint and the history so far.

        The first process writes; the others hold the same state, or give it their shards.
        """
        self._saved = time.monotonic()
        first = distributed.rank() == 0
        parts = {
            name: engine.whole(part.state_dict(), keep=first) for name, part in self.parts.items()
        }
        if not first:
            return
        state = {
            "settings": self.settings,
            "stage": self.stage.number,
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
        history = self.saving.folder / HISTORY_FILE
        with goes_on_without(HISTORY_FILE), atomic_file(history) as temporary:
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
                f"not all processes see {file}, which the first one chose: "
                "use a folder that all of them share"
            )
        found = load_checkpoint(file)
        different = different_settings(found["settings"], self.settings)
        if distributed.any_process(bool(different)):
            raise InputError(
                f"{self.saving.folder} holds checkpoints of a run with other settings "
                f"({', '.join(different) or 'of another process'}): "
                "resume with the same ones, or use an empty folder"
            )
        return found

    def _choose(self) -> tuple[str, int] | None:
        """Name and bytes of the newest valid checkpoint, which the first process alone reads."""
        if not self.saving.resume:
            if self.checkpoints.files():
                raise InputError(
                    f"{self.saving.folder} holds checkpoints already: "
                    "resume from them or use an empty folder"
                )
            return None
        # Not before: a start by mistake must leave the file that a running training is writing
        self.checkpoints.clear()
        file = self.checkpoints.newest_file()
        return None if file is None else (file.name, file.stat().st_size)


class _Terminated:
    """Whether SIGTERM has come."""

    asked = False

    @classmethod
    def set(cls, *_) -> None:
        cls.asked = True


class sigterm_stops:
    """Within this block SIGTERM ends training after the step at hand, not the process at once.

    A block inside another one does nothing, so that a signal between two stages is kept for the
    next step. A signal that comes after the last step is sent again at the end.
    """

    def __enter__(self):
        self.before = None
        inside = signal.getsignal(signal.SIGTERM) == _Terminated.set
        # Python allows handlers in the main thread alone
        if not inside and threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGTERM, _Terminated.set)

    def __exit__(self, error, *_):
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)
            late, _Terminated.asked = _Terminated.asked and error is None, False
            if late:
                signal.raise_signal(signal.SIGTERM)


def _plain(x):
    """``x`` with NumPy's numbers as Python's, since ``weights_only=True`` refuses others."""
    if isinstance(x, dict):
        return {name: _plain(value) for name, value in x.items()}
    if isinstance(x, (list, tuple)):
        return type(x)(_plain(value) for value in x)
    return x.item() if isinstance(x, np.generic) else x


def train_into(
    out: Path, train: partial, encoders: tuple[str, ...], *, save_every: int, resume: bool
) -> None:
    """Train and write the result to the folder ``out``, unless it is there already.

    Args:
        out: gets the history, the encoders and a manifest, which says that the run is finished;
            until then checkpoints lie in ``out/checkpoints``.
        train: ``pretrain`` or ``refine`` of (encoder, data set, config), to be called with
            ``saving``.
        encoders: attributes of its result; each is written as ``NAME.safetensors``.
        save_every: steps between two checkpoints.
        resume: go on with an interrupted run, and leave a finished one as it is.

    Raises:
        InputError: ``out`` holds a finished run, and it has other settings, is damaged, or
            ``resume`` is off.
    """
    encoder, dataset, config = train.args

    def write(result, out: Path) -> tuple[list[Path], dict]:
        weights = [out / f"{name}.safetensors" for name in encoders]
        for name, file in zip(encoders, weights, strict=True):
            save_encoder(getattr(result, name), file)
        write_csv(result.history, out / HISTORY_FILE)
        facts = {"flops": result.flops, "seconds": result.seconds}
        return [*weights, out / HISTORY_FILE], facts

    settings = run_settings(config, dataset, encoder)
    run_into(out, settings, train, write, save_every=save_every, resume=resume)


def run_into(
    out: Path,
    settings: dict,
    train: Callable,
    write: Callable[[object, Path], tuple[list[Path], dict]],
    *,
    save_every: int,
    resume: bool,
) -> None:
    """Train and write the result to the folder ``out``, unless it is there already.

    Args:
        out: gets what is written and a manifest, which says that the run is finished; until then
            checkpoints lie in ``out/checkpoints``.
        settings: everything that decides the result.
        train: called with ``saving``; gives the result.
        write: writes a result into a folder; gives its files, and facts for the manifest, among
            which are ``seconds``.
        save_every, resume: see :func:`train_into`.

    Raises:
        InputError: ``out`` holds a finished run, and it has other settings, is damaged, or
            ``resume`` is off.
    """
    entry = Entry(out, settings, manifest="settings.json")
    checkpoints = out / "checkpoints"
    if distributed.from_first(partial(_is_finished, entry, resume)):
        if distributed.rank() == 0:  # a run that was killed at its very end leaves them
            shutil.rmtree(checkpoints, ignore_errors=True)
        return
    result = train(saving=Saving(checkpoints, save_every, resume=resume))
    if distributed.rank() == 0:
        files, facts = write(result, out)
        entry.finish(out, facts, files)
        shutil.rmtree(checkpoints)
        names = [file.name for file in files]
        listed = " and ".join([", ".join(names[:-1]), names[-1]])
        logger.info("%.0f s; %s are in %s", facts["seconds"], listed, out)


def _is_finished(entry: Entry, resume: bool) -> bool:
    """Whether ``entry`` holds what is to be trained; InputError if it holds something else."""
    out = entry.folder
    if not entry.is_there:
        return False
    if not resume:
        raise InputError(
            f"{out} holds a finished run: use an empty folder, "
            "or --resume, which leaves it as it is"
        )
    if different := entry.different():
        raise InputError(
            f"{out} holds a finished run with other settings ({', '.join(different)}): "
            "use an empty folder"
        )
    if damage := entry.damage():
        raise InputError(f"{out} holds a finished run, but {damage}: use an empty folder")
    logger.info("%s is finished: nothing to do", out)
    return True
