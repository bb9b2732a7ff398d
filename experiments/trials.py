"""Refinement, refinement with one thing changed, and controls: trained at equal compute, measured.

What is trained is an entry of the folder ``runs``, named by its settings: one that is finished is
loaded, one that was cut off goes on from its checkpoints. Encoders are kept in half precision, and
what is kept is what is measured.
"""

import argparse
import copy
import json
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from experiments import measure
from experiments.measure import Extract, Measured, Model
from mimrefiner.config import AUTO, PretrainConfig, RefineConfig, Views
from mimrefiner.data.datasets import ImageDataset, load_dataset, short_name
from mimrefiner.device import default_device, plain_attention
from mimrefiner.files import Entry, atomic_file, write_csv, write_json
from mimrefiner.method.nn_queue import NNQueue
from mimrefiner.method.refiner import MIMRefiner
from mimrefiner.models.encoders import load_encoder
from mimrefiner.models.masked import MAE, SimMIM, build_masked_model, random_mask
from mimrefiner.models.weights import save_encoder, sha256_of
from mimrefiner.probes.features import Features, extract_features, pixel_features
from mimrefiner.probes.knn import hits_to_rows, knn_hits
from mimrefiner.probes.protocols import KNN
from mimrefiner.study.claims import Record
from mimrefiner.study.presets import Preset
from mimrefiner.study.tables import git_sha
from mimrefiner.training.checkpoints import Saving
from mimrefiner.training.cost import operation_counter
from mimrefiner.training.finetune import FinetuneResult, finetune
from mimrefiner.training.optim import freeze_first
from mimrefiner.training.placement import placed
from mimrefiner.training.pretrain import PretrainResult, pretrain
from mimrefiner.training.refine import (
    RefineResult,
    refine,
    refine_encoder,
    refinement_flops,
    train_heads,
)
from mimrefiner.training.run import NUMERICS, TrainingRun, run_settings, sigterm_stops

logger = logging.getLogger(f"mimrefiner.{__name__}")

MINUTES = 1  # between checkpoints
BANK = 10_000  # training images that vote on validation images
TRANSFER_BANK = 20_000  # and on a data set that no model was trained on
TRIALS = (
    "refined",
    "one head",
    "placed heads",
    "random blocks",
    "own view",
    "no stage 2",
    "colours kept",
    "published pairing",
    "negatives swapped",
    "masked",
    "labels",
)
UNTRAINED = ("before", "pixels")  # what is measured as it is
Result = PretrainResult | RefineResult | FinetuneResult


# ---- one training


@dataclass(frozen=True)
class Start:
    """Where trainings start.

    Attributes:
        encoder: a timm ViT.
        dataset: the training images.
        refine: refinement's recipe.
        pretrain: pre-training's recipe, for the control ``masked``.
        model: the pre-training model that ``masked`` goes on from; None builds a new one around the
            encoder.
    """

    encoder: nn.Module
    dataset: ImageDataset
    refine: RefineConfig
    pretrain: PretrainConfig
    model: SimMIM | MAE | None = None


def trained(trial: str, start: Start, out: Path) -> nn.Module:
    """The encoder that ``trial`` makes of the start at the compute of refinement.

    It is trained now unless ``out`` has it.
    """
    settings = {
        "trial": trial,
        **run_settings(start.refine, start.dataset, start.encoder),
        "numerics": NUMERICS,
    }
    if trial == "masked":
        settings["pretrain"] = asdict(start.pretrain)
        settings["first model"] = None if start.model is None else sha256_of(start.model)
    entry = Entry.named(out, f"{trial.replace(' ', '_')}-seed{start.refine.seed}", settings)
    with entry.locked():
        if entry.facts() is None:
            _fill(entry, trial, start)
        else:
            logger.info("%s, seed %d: trained before", trial, start.refine.seed)
    return load_encoder(entry.folder / "encoder.safetensors")


def _fill(entry: Entry, trial: str, start: Start) -> None:
    unfinished = entry.folder.parent / "unfinished" / entry.folder.name
    began = time.process_time()
    result, config = _train(
        trial, start, Saving(unfinished, every=None, resume=True, minutes=MINUTES)
    )
    encoder = getattr(result, "ema_encoder", result.encoder).half()
    facts = {
        "flops": result.flops,
        "seconds": round(result.seconds),
        "cpu_seconds_since_resume": round(time.process_time() - began),
        "git_sha": git_sha(),
        "trained_with": asdict(config),
        "weights_sha256": sha256_of(copy.deepcopy(encoder).float()),
    }
    with entry.filled_aside() as folder:
        write_csv(result.history, folder / "history.csv")
        save_encoder(encoder, folder / "encoder.safetensors")
        save_encoder(result.encoder.half(), folder / "raw.safetensors")
        entry.finish(folder, facts)
    shutil.rmtree(unfinished, ignore_errors=True)


def _train(
    trial: str, start: Start, saving: Saving
) -> tuple[Result, RefineConfig | PretrainConfig]:
    """The result of one training, and the settings that it had."""
    encoder, dataset, config = start.encoder, start.dataset, start.refine
    if trial == "refined":
        return refine(encoder, dataset, config, saving=saving), config
    flops = refinement_flops(encoder, dataset, config)
    if trial == "labels":
        return finetune(encoder, dataset, config, flops=flops, saving=saving), config
    if trial == "masked":
        return _continue_masked(start, flops, saving)
    changed = placed(recipe(trial, config, len(encoder.blocks)), encoder, dataset)
    longer = flops / refinement_flops(encoder, dataset, changed)
    changed = replace(
        changed,
        heads_epochs=longer * changed.heads_epochs,
        refine_epochs=longer * changed.refine_epochs,
    )
    train = refine_on_own_views if trial == "own view" else refine
    return train(encoder, dataset, changed, saving=saving), changed


def _continue_masked(
    start: Start, flops: float, saving: Saving
) -> tuple[PretrainResult, PretrainConfig]:
    """Masked pre-training with refinement's frozen blocks, for so many operations."""
    model = copy.deepcopy(start.model)
    if model is None:
        model = build_masked_model(copy.deepcopy(start.encoder), start.pretrain)
    freeze_first(model.encoder, start.refine.frozen_blocks)
    steps = flops / step_flops(model, start.pretrain)
    per_epoch = len(start.dataset) // start.pretrain.batch_size
    config = replace(start.pretrain, epochs=steps / per_epoch)
    return pretrain(start.encoder, start.dataset, config, start_from=model, saving=saving), config


def step_flops(model: SimMIM | MAE, config: PretrainConfig) -> float:
    """Operations of one step of masked pre-training, counted on two images."""
    size = model.encoder.pretrained_cfg["input_size"][-1]
    model = copy.deepcopy(model)
    mask = random_mask(2, (size // model.patch) ** 2, config.mask_ratio)
    with plain_attention(model, torch.device("cpu")), operation_counter() as counter:
        model(torch.zeros(2, 3, size, size), mask).backward()
    return counter.get_total_flops() * config.batch_size / 2


# ---- refinement with one thing changed


def recipe(trial: str, config: RefineConfig, depth: int) -> RefineConfig:
    """Refinement's settings with the one change that ``trial`` names.

    >>> from mimrefiner.data.augment import small_views
    >>> recipe("one head", RefineConfig(small_views(32, 4)), 12).blocks
    (11,)
    """
    last, rng = depth - 1, np.random.default_rng(config.seed)
    before_last = rng.choice(last, len(config.resolve_blocks(depth)) - 1, replace=False)
    changes = {
        "refined": {},
        "own view": {},  # the queue differs
        "one head": {"blocks": (last,)},
        "placed heads": {"blocks": AUTO},
        "random blocks": {"blocks": (*sorted(before_last.tolist()), last)},
        "no stage 2": {"heads_epochs": 0.0},
        "colours kept": {"views": colours_kept(config.views)},
        "published pairing": {"pairing": "published"},
        "negatives swapped": {"swap_negatives": True},
    }
    return replace(config, **changes[trial])


def colours_kept(views: Views) -> Views:
    """The same crops, flips and blur without jitter, grey views and solarisation."""

    def plain(crop):
        return replace(crop, jitter_p=0.0, grey_p=0.0, solarize_p=0.0)

    crops = tuple(plain(crop) for crop in views.global_crops)
    return Views(crops, plain(views.local_crop), views.n_local)


class OwnView(NNQueue):
    """A queue that answers every projection with itself: the positive is the image, no neighbour.

    >>> z = torch.randn(1, 4, 2, 8)  # (heads, batch, views, dim)
    >>> torch.equal(OwnView(heads=1, size=16, dim=8).lookup(z, index=None), z)
    True
    """

    def lookup_slots(self, z: Tensor, index: Tensor | None, **_) -> Tensor:
        """Slot 0 for every projection, which :meth:`gather` does not read."""
        self._asked = z
        return torch.zeros(z.shape[:3], dtype=torch.long, device=z.device)

    def gather(self, slots: Tensor) -> Tensor:
        """The projections that were looked up last."""
        return self._asked


def refine_on_own_views(
    encoder: nn.Module, dataset: ImageDataset, config: RefineConfig, *, saving: Saving
) -> RefineResult:
    """:func:`mimrefiner.refine` with the image's own view in the neighbour's place."""
    refiner = MIMRefiner(copy.deepcopy(encoder), config)
    refiner.queue = OwnView(len(refiner.blocks), config.queue_size, config.out_dim)
    run = TrainingRun(saving, partial(run_settings, config, dataset, encoder))
    refiner.to(default_device())
    with sigterm_stops():
        train_heads(refiner, dataset, run)
        average, _, _ = refine_encoder(refiner, dataset, run)
    raw = refiner.encoder.eval().requires_grad_(True).cpu()
    return RefineResult(raw, average, run.history, run.flops, run.seconds)


# ---- the study of one encoder


def plainly(encoder: nn.Module | None, dataset: ImageDataset) -> Features:
    """Features after every block in float32; None stands for raw pixels."""
    if encoder is None:
        return pixel_features(dataset, measure.PIXELS)
    return extract_features(encoder, dataset)


@dataclass(frozen=True)
class Study:
    """One encoder, what is made of it, and how that is measured.

    Attributes:
        preset: the data and the recipes of refinement and of masked pre-training.
        encoder: where trainings start.
        out: folder of runs, rows and what was chosen.
        extract: features of a data set.
        rates: of every trial the learning rates among which :meth:`choose` chooses.
        model: the pre-training model around ``encoder``, for the control ``masked``, where there
            is one.
    """

    preset: Preset
    encoder: nn.Module
    out: Path
    extract: Extract
    rates: dict[str, tuple[float, ...]]
    model: SimMIM | MAE | None = None

    @property
    def chosen(self) -> dict[str, dict]:
        """The settings chosen so far: trial -> name -> value."""
        file = self.out / "chosen.json"
        return json.loads(file.read_text()) if file.is_file() else {}

    def train(self, trial: str, seed: int = 0, **changes) -> nn.Module:
        """Train with the settings chosen so far and ``changes``.

        These are fields of RefineConfig, and for ``masked`` of PretrainConfig too.
        """
        preset, chosen = self.preset.with_seed(seed), self.chosen
        refine, masked = replace(preset.refine, **chosen.get("refined", {})), preset.pretrain
        if trial != "refined":
            changes = chosen.get(trial, {}) | changes
        for name, value in changes.items():
            if trial == "masked" and hasattr(masked, name):
                masked = replace(masked, **{name: value})
            else:
                refine = replace(refine, **{name: value})
        dataset = load_dataset(preset.dataset, split="train").in_memory()
        start = Start(self.encoder, dataset, refine, masked, self.model)
        return trained(trial, start, self.out / "runs")

    def choose(self, trial: str, name: str, values: Sequence | None = None) -> None:
        """Choose the setting ``name`` of ``trial`` on validation images, unless it is chosen.

        Args:
            trial: one of TRIALS.
            name: the setting.
            values: among which; None takes the trial's rates.
        """
        if name not in self.chosen.get(trial, {}):
            tried = self.rates[trial] if values is None else values
            found = {value: self.try_out(trial, **{name: value}) for value in tried}
            best = max(found, key=found.get)
            of_trial = self.chosen.get(trial, {}) | {name: best}
            write_json(self.chosen | {trial: of_trial}, self.out / "chosen.json")
            logger.info("%s: %s = %s, of %s", trial, name, best, found)

    def choose_rate(self, trial: str) -> None:
        """Choose the learning rate of ``trial``."""
        self.choose(trial, "base_lr" if trial == "masked" else "refine_base_lr")

    def try_out(self, trial: str, **changes) -> float:
        """The last block's accuracy on validation images: k-NN of the class token.

        That of every block is kept in ``rows/choice.csv``, one set of rows for each model.
        """
        encoder = self.encoder if trial == "before" else self.train(trial, **changes)
        file, sha = self.out / "rows" / "choice.csv", sha256_of(encoder)
        kept = pd.read_csv(file) if file.is_file() else pd.DataFrame({"weights_sha256": []})
        if sha not in set(kept["weights_sha256"]):
            settings = json.dumps(self.chosen.get("refined", {}) | changes)
            known = {"trial": trial, "settings": settings, "weights_sha256": sha}
            rows = self._on_validation(encoder).assign(**known, git_sha=git_sha())
            kept = pd.concat([kept, rows]) if len(kept) else rows
            write_csv(kept, file)
        of_model = kept[(kept["weights_sha256"] == sha) & (kept["pool"] == "cls")]
        return of_model["value"].iloc[-1]

    def _on_validation(self, encoder: nn.Module) -> pd.DataFrame:
        bank, val = self._two_parts(encoder, self.preset.dataset, "val", BANK)
        sizes = {"n_train": len(bank.y), "n_val": len(val.y)}
        hits = knn_hits(bank, val)
        parts = [hits_to_rows(right, **sizes, pool=pool) for pool, right in hits.items()]
        return pd.DataFrame([row for rows in parts for row in rows])

    def _two_parts(
        self, encoder: nn.Module | None, data: str, split: str, bank: int
    ) -> tuple[Features, Features]:
        """Features of ``bank`` training images and of all images of ``split``."""
        train, asked = (load_dataset(data, split=part) for part in ("train", split))
        return self.extract(encoder, train.take(bank)), self.extract(encoder, asked)

    def trial(
        self, trial: str, seed: int = 0, elsewhere: Sequence[str] = (), changes: dict | None = None
    ) -> None:
        """Train and measure; the results are ``rows/TRIAL-SEED.csv`` and ``.npz``.

        Args:
            trial: one of TRIALS, or of UNTRAINED.
            seed: of the training.
            elsewhere: more data sets to measure k-NN on.
            changes: of the settings, for a training that is longer.
        """
        if trial in UNTRAINED:
            encoder = self.encoder if trial == "before" else None
        else:
            encoder = self.train(trial, seed, **(changes or {}))
        name = "raw pixels" if trial == "pixels" else trial + " longer" * bool(changes)
        model = Model(name, seed, self.preset.with_seed(seed), encoder)
        self._on_test(model, elsewhere)

    def _on_test(self, model: Model, elsewhere: Sequence[str]) -> None:
        """Write the rows of one model, and which test images are right.

        They are those of all probes on the preset's data, with all its training images, and on
        fruit64, and those of k-NN alone on the data sets ``elsewhere``.
        """
        data = self.preset.dataset
        bank = len(load_dataset(data, split="train"))
        how = {"transfer": measure.TRANSFER, "bank": bank, "features": self.extract}
        measured = measure.kept(self.out / "measured", model, data, **how)
        record = Record("trials", model.preset, (model.seed,), self.out, rows=measured.rows)
        for name in elsewhere:
            train, test = self._two_parts(model.encoder, name, "test", TRANSFER_BANK)
            columns = {
                "model": model.name,
                "weights_sha256": model.sha,
                "dataset": short_name(name),
                "n_train": len(train.y),
                "n_test": len(test.y),
                "protocol": KNN.name,
                "metric": KNN.metrics[0],
                "seed": model.seed,
                "unit": KNN.unit,
            }
            for pool, right in knn_hits(train, test).items():
                measured.hits[short_name(name), pool, KNN.label] = right
                for row in hits_to_rows(right, pool=pool, **columns):
                    record.add(**row)
        file = self.out / "rows" / f"{model.name.replace(' ', '_')}-{model.seed}"
        _write_hits(measured, file.with_suffix(".npz"))
        write_csv(record.table(), file.with_suffix(".csv"))


def _write_hits(measured: Measured, file: Path) -> None:
    """Write hits and best blocks, by data set, pooling and label with blanks between them.

    Hits are bool; those of few labelled images count the draws in which an image is right.
    """
    arrays = {f"best {' '.join(key)}": np.array(block) for key, block in measured.best.items()}
    for key, right in measured.hits.items():
        counts = right if right.dtype == torch.bool else (right * measure.DRAWS).round().byte()
        arrays[" ".join(key)] = counts.numpy()
    with atomic_file(file) as temporary:
        np.savez_compressed(temporary, **arrays)


# ---- the command line


def add_commands(commands: argparse._SubParsersAction) -> list[argparse.ArgumentParser]:
    """Add the commands ``choose`` and ``trial``; returns their parsers, for more options."""
    parsers = []
    for name, trials, text in (
        ("choose", TRIALS, "choose a trial's rate on validation images"),
        ("trial", (*UNTRAINED, *TRIALS), "train and measure"),
    ):
        parser = commands.add_parser(name, help=text)
        parser.add_argument("trial", choices=trials)
        add_places(parser)
        parsers.append(parser)
    parsers[-1].add_argument("--seed", type=int, default=0)
    elsewhere = "data sets to measure k-NN on too, with commas between them"
    parsers[-1].add_argument("--elsewhere", default="", help=elsewhere)
    return parsers


def add_places(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where data and results lie."""
    data = "such as cifar10 or parquet:FOLDER (default: %(default)s)"
    parser.add_argument("--data", default="cifar10", help=data)
    out = "folder of runs, rows, checkpoints and what was chosen"
    parser.add_argument("--out", type=Path, required=True, help=out)


def measure_trial(study: Study, args: argparse.Namespace, changes: dict | None = None) -> None:
    """Carry out the command ``trial``."""
    elsewhere = [name for name in args.elsewhere.split(",") if name]
    study.trial(args.trial, args.seed, elsewhere, changes)
