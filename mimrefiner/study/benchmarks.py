"""The paper's benchmarks as folders: what a command writes, and what it finds there again."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from torch.utils.data import Dataset, Subset

from mimrefiner import distributed
from mimrefiner.data.scenes import scenes_hash
from mimrefiner.data.vtab import TASKS
from mimrefiner.errors import InputError, one_of
from mimrefiner.files import Entry, atomic_file, take_turns, write_csv
from mimrefiner.models.tensors import write_safetensors
from mimrefiner.models.weights import sha256_of
from mimrefiner.probes.checks import tidy
from mimrefiner.probes.dense import DenseConfig, dense_probe
from mimrefiner.probes.linear_grid import LinearRecipe
from mimrefiner.probes.robustness import TestFolders, robustness
from mimrefiner.probes.segmentation import fine_tuned
from mimrefiner.probes.vtab import (
    MEMORY_2B14,
    RECIPE,
    RECIPE_2B14,
    WIDEST,
    Computing,
    VTABProtocol,
    six_table,
    table,
    vtab1k,
    vtab6,
)
from mimrefiner.study.plan import shape_of
from mimrefiner.study.tables import markdown_table
from mimrefiner.training.benchmark_cost import (
    segmentation_bytes,
    segmentation_total,
    upernet_flops,
    upernet_parameters,
)
from mimrefiner.training.cost import gpu_hours
from mimrefiner.training.finetune_cost import finetune_bytes, finetune_total
from mimrefiner.training.memory import PLENTY, Memory
from mimrefiner.training.run import HISTORY_FILE, run_into
from mimrefiner.training.segment import SegmentationRecipe, SegmentationResult

ROWS, TABLE, MODEL, SCORES = "rows.csv", "table.md", "upernet.safetensors", "evaluations.csv"
HELD_OUT = 0.1  # share of training scenes that choose among learning rates


def upernet_into(
    out: Path,
    encoder: nn.Module,
    train: Dataset,
    val: Dataset,
    recipe: SegmentationRecipe,
    *,
    save_every: int = 5_000,
    resume: bool = False,
    num_workers: int = 0,
) -> pd.DataFrame:
    """Fine-tune with UperNet and write rows, weights, evaluations and history to ``out``.

    Args:
        out: the folder; until training is over checkpoints lie in ``out/checkpoints``.
        encoder, train, val, recipe: see :func:`mimrefiner.probes.segmentation.fine_tuned`.
        save_every: steps between two checkpoints.
        resume: go on with an interrupted run, and leave a finished one as it is.
        num_workers: processes that load images.

    Returns:
        The rows.
    """
    settings = {
        **asdict(recipe),
        "weights": sha256_of(encoder),
        "data": [scenes_hash(part) for part in (train, val)],
    }

    def write(found: tuple[pd.DataFrame, SegmentationResult], folder: Path):
        rows, result = found
        tables = {ROWS: rows, SCORES: result.scores, HISTORY_FILE: result.history}
        for name, frame in tables.items():
            write_csv(frame, folder / name)
        tensors = {name: x.contiguous() for name, x in result.model.state_dict().items()}
        write_safetensors(tensors, folder / MODEL, {"format": "mimrefiner-upernet-1"})
        files = [folder / name for name in (*tables, MODEL)]
        return files, {"flops": result.flops, "seconds": result.seconds}

    train_and_test = partial(fine_tuned, encoder, train, val, recipe, num_workers=num_workers)
    run_into(out, settings, train_and_test, write, save_every=save_every, resume=resume)
    distributed.barrier()  # the first process writes
    return pd.read_csv(out / ROWS)


def dense_into(
    out: Path,
    encoder: nn.Module,
    train: Dataset,
    test: Dataset,
    config: DenseConfig,
    *,
    best_on_test: bool = False,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
) -> pd.DataFrame:
    """Probe frozen features and write the rows to ``out``; a finished folder is read again.

    Where there are several learning rates, a tenth of the training scenes, drawn by the seed,
    chooses among them, and the probes are trained on the others.

    Raises:
        InputError: a process group, and what :func:`mimrefiner.probes.dense.dense_probe` refuses.
    """
    if distributed.world() > 1:
        raise InputError(
            "linear probes of segmentation are trained in one process: start the command without "
            "torchrun"
        )
    settings = {
        **asdict(config),
        "weights": sha256_of(encoder),
        "data": [scenes_hash(part) for part in (train, test)],
        "best on test": best_on_test,
    }

    def run() -> dict:
        chosen = len(config.learning_rates) > 1 and not best_on_test
        val, rest = held_out(train, config.seed) if chosen else (None, train)
        rows = dense_probe(
            encoder,
            rest,
            test,
            config,
            val=val,
            best_on_test=best_on_test,
            device=device,
            num_workers=num_workers,
        )
        return {"rows": rows.to_dict("records")}

    entry = Entry(out / "probes", settings)
    take_turns(lambda: [(entry, run)])
    rows = tidy(entry.facts()["rows"])
    write_csv(rows, out / ROWS)
    return rows


def cost_text(
    model: str,
    benchmark: str,
    gpus: int = 1,
    tflops: float = 312,
    memory: Memory | None = None,
) -> str:
    """What a benchmark costs, as text.

    Args:
        model: a plain ViT of the table of models.
        benchmark: "upernet", or "vtab1k", whose runs take one GPU each.
        gpus: how many share UperNet's batch.
        tflops: the peak of one GPU in bfloat16, TFLOP/s.
        memory: what trades time for memory in VTAB-1K; None takes the recipe's own.

    >>> print(cost_text("mae_l16", "upernet").partition(", ")[2])
    upernet: 441.5 M parameters, 2,497.6 GFLOPs per 512 px image, 46.6 GiB, 42.7 GPU-hours
    """
    s = shape_of(model)
    if not 0 < tflops < math.inf:
        raise InputError(f"expected tflops > 0, got {tflops}")
    if benchmark == "upernet":
        recipe = SegmentationRecipe()
        hours = gpu_hours(segmentation_total(s, recipe), tflops)
        weights = upernet_parameters(s, recipe.model) / 1e6
        work = upernet_flops(s, recipe.model) / 1e9
        room = segmentation_bytes(s, recipe, gpus) / 2**30
        return (
            f"{model}, upernet: {weights:,.1f} M parameters, {work:,.1f} GFLOPs per "
            f"{recipe.model.size} px image, {room:,.1f} GiB{' on each GPU' * (gpus > 1)}, "
            f"{hours:,.1f} GPU-hours"
        )
    one_of("benchmark", benchmark, ("upernet", "vtab1k"))
    protocol = VTABProtocol(RECIPE_2B14 if s.dim > WIDEST else RECIPE)
    memory = memory or (MEMORY_2B14 if s.dim > WIDEST else PLENTY)
    runs = len(TASKS) * len(protocol.seeds)
    total = sum(
        n * finetune_total(s, protocol.recipe, images, protocol.recipe.classes, memory)
        for n, images in ((runs * len(protocol.learning_rates), 800), (runs, 1_000))
    )
    room = finetune_bytes(s, protocol.recipe, protocol.recipe.classes, memory=memory) / 2**30
    return (
        f"{model}, vtab1k: {runs * (1 + len(protocol.learning_rates))} runs, {room:,.1f} GiB on "
        f"the GPU of each, {gpu_hours(total, tflops):,.1f} GPU-hours in all without tests"
    )


def held_out(scenes: Dataset, seed: int) -> tuple[Dataset, Dataset]:
    """(a tenth, the rest) of ``scenes``, drawn by ``seed``.

    >>> val, rest = held_out(range(20), seed=0)
    >>> len(val), len(rest)
    (2, 18)
    """
    order = torch.randperm(len(scenes), generator=torch.Generator().manual_seed(seed)).tolist()
    n = round(HELD_OUT * len(order))
    if not n:
        raise InputError(
            f"{len(order)} training scenes are too few to hold some out for the choice of the "
            "learning rate: expected 5 or more"
        )
    return Subset(scenes, sorted(order[:n])), Subset(scenes, sorted(order[n:]))


def vtab_into(
    out: Path, encoder: nn.Module, data: dict, protocol: VTABProtocol, computing: Computing
) -> pd.DataFrame:
    """Search and final runs in ``out/runs``; rows and the table of means beside them.

    Returns:
        The table, see :func:`mimrefiner.probes.vtab.table`.
    """
    rows = vtab1k(encoder, data, out / "runs", protocol=protocol, computing=computing)
    means = table(rows)
    _write(out, rows, means)
    return means


def six_into(
    out: Path, encoder: nn.Module, names: Sequence[str], recipe: LinearRecipe, **options
) -> pd.DataFrame:
    """Linear probes on data sets of VTAB-6 in ``out/runs``; rows and the table beside them.

    Args:
        out: the folder.
        encoder, names, recipe, options: see :func:`mimrefiner.probes.vtab.vtab6`.
    """
    rows = vtab6(encoder, names, out / "runs", recipe, **options)
    means = six_table(rows)
    _write(out, rows, means)
    return means


def robustness_into(out: Path, model: nn.Module, folders: TestFolders, **options) -> pd.DataFrame:
    """Measure a classifier with what is finished in ``out/parts``; rows and a table beside it.

    Args:
        out: the folder.
        model, folders, options: see :func:`mimrefiner.probes.robustness.robustness`.

    Returns:
        The table: all rows but those of single corruptions.
    """
    rows = robustness(model, folders, out / "parts", **options)
    single = rows["setting"].str.fullmatch(r"\w+ \d")
    short = rows[~single]
    _write(out, rows, short)
    return short


def _write(out: Path, rows: pd.DataFrame, short: pd.DataFrame) -> None:
    write_csv(rows, out / ROWS)
    with atomic_file(out / TABLE) as temporary:
        temporary.write_text(markdown_table(short), encoding="utf-8")
