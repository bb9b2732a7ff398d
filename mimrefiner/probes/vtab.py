"""VTAB: fine-tuning on 1,000 images of 19 data sets, linear probes on six whole ones.

VTAB-1K is a search for the learning rate, then five runs, on each data set. Every run has a folder
of its own that says when it is finished, so that an interrupted search goes on where it stopped,
and any number of processes can work on the same folder at once.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from torch.utils.data import Dataset

from mimrefiner import distributed
from mimrefiner.data.datasets import data_hash
from mimrefiner.data.vtab import GROUPS, NOT_IN_18, PARTS, SIX, TASKS, Task, whole
from mimrefiner.errors import InputError, one_of
from mimrefiner.files import Entry, take_turns
from mimrefiner.models.weights import sha256_of
from mimrefiner.probes.linear_grid import IN1K, LinearRecipe, grid_settings, linear_grid
from mimrefiner.training.finetune import finetune_recipe
from mimrefiner.training.memory import PLENTY, Memory
from mimrefiner.training.recipes import FinetuneRecipe

RECIPE = FinetuneRecipe(
    "vtab1k",
    "all but 2B/14",
    "BenediktAlkin/vtab1k-pytorch at 007fd7b, src/pipelines/mimrefiner/*_5lr.yaml",
    epochs=50,
    warmup_epochs=5,
    batch_size=64,
    warmup_to_peak=True,
    decay_cls=True,
    drop_path=0.0,
    learn_positions=False,
    head_norm=False,
    crop_scale=None,
    flip=False,
    rand_augment="",
    erasing=0.0,
    mixup=0.0,
    cutmix=0.0,
    smoothing=0.0,
    test_float32=True,
    images=1_000,
)
RECIPE_2B14 = replace(RECIPE, name="vtab1k_2b14", models="2B/14", frozen_share=0.25)
WIDEST = 2000  # encoders wider than this take the recipe of 2B/14
MEMORY_2B14 = Memory(micro_batch=8)  # eight parts of a batch of 64
# y/eval/probe_transfer/{caltech101,cifar100,dtd,flowers,pets,sun397}_probe/ of the released code
LINEAR_6 = replace(
    IN1K,
    name="linear_grid_vtab6",
    source="y/eval/probe_transfer/*_probe/",
    batch_size=256,
    squeeze=True,
)


@dataclass(frozen=True)
class VTABProtocol:
    """The search and the final runs; the defaults are the paper's.

    vtab1k-pytorch at 007fd7b: ``processors/eval_gridsearch_processor.py`` takes the rate with the
    highest mean over seeds of the accuracy on val200 after the last epoch.

    Attributes:
        recipe: how each run trains; its own rate is replaced.
        learning_rates: absolute rates, of a batch of any size.
        seeds: of the search and of the final runs.

    >>> len(VTABProtocol().learning_rates) * len(VTABProtocol().seeds)
    25
    """

    recipe: FinetuneRecipe = RECIPE
    learning_rates: tuple[float, ...] = (1e-3, 7.5e-4, 5e-4, 2.5e-4, 1e-4)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)

    def of(self, rate: float, seed: int) -> FinetuneRecipe:
        """The recipe of one run: base rates are for 256 images."""
        return replace(self.recipe, base_lr=rate * 256 / self.recipe.batch_size, seed=seed)


@dataclass(frozen=True)
class Computing:
    """Where and how runs compute; none of it changes what they give, but for rounding."""

    device: torch.device | str | None = None
    num_workers: int = 0
    memory: Memory = PLENTY


class Search:
    """All runs of a model on one data set.

    Args:
        encoder: the model.
        task: the data set, with its ``parts`` as :func:`mimrefiner.data.vtab.read_task` gives them.
        protocol: search and final runs.
        folder: where runs are kept.
    """

    def __init__(
        self,
        encoder: nn.Module,
        task: Task,
        parts: dict[str, Dataset],
        protocol: VTABProtocol,
        folder: Path,
    ):
        self.encoder, self.task, self.parts = encoder, task, parts
        self.protocol, self.folder = protocol, folder
        self.classes = int(max(parts["train800val200"].labels)) + 1
        self.drawn = getattr(parts["train800"], "drawn", "")
        for part in PARTS:
            if int(max(parts[part].labels)) >= self.classes:
                raise InputError(
                    f"{task.name}: {part} has label {max(parts[part].labels)}, and train800val200 "
                    f"has classes 0 to {self.classes - 1}: the lists do not belong together"
                )
        if len(parts["train800"]) < protocol.recipe.batch_size:
            raise InputError(
                f"{task.name}: a batch of {protocol.recipe.batch_size} needs at least that many "
                f"images, train800 has {len(parts['train800'])}"
            )
        self.data = {part: data_hash(images) for part, images in parts.items()}
        self.weights = sha256_of(encoder)

    def entry(self, phase: str, rate: float, seed: int) -> Entry:
        """The memory of one run."""
        train, test = self._sets(phase)
        settings = {
            **asdict(self.protocol.of(rate, seed)),
            "weights": self.weights,
            "data": [self.data[train], self.data[test]],
        }
        return Entry(self.folder / f"{self.task.name}-{phase}-lr{rate:g}-seed{seed}", settings)

    def _sets(self, phase: str) -> tuple[str, str]:
        return ("train800", "val200") if phase == "search" else ("train800val200", "test")

    def run(self, phase: str, rate: float, seed: int, computing: Computing) -> dict:
        """Train and test once: the accuracy after the last epoch."""
        train, test = (self.parts[part] for part in self._sets(phase))
        how = {"device": computing.device, "num_workers": computing.num_workers}
        result = finetune_recipe(
            self.encoder,
            train,
            test,
            self.protocol.of(rate, seed),
            classes=self.classes,
            memory=computing.memory,
            **how,
        )
        return {"accuracy": float(result.rows["value"].iloc[0]), "seconds": result.seconds}

    def accuracies(self, phase: str, rate: float) -> list[float] | None:
        """Of all seeds; None as long as one is not finished."""
        facts = [self.entry(phase, rate, seed).facts() for seed in self.protocol.seeds]
        return None if None in facts else [fact["accuracy"] for fact in facts]

    def chosen(self) -> float | None:
        """The rate with the highest mean on val200, the first of equals; None before the end."""
        means = {}
        for rate in self.protocol.learning_rates:
            found = self.accuracies("search", rate)
            if found is None:
                return None
            means[rate] = sum(found) / len(found)
        return max(means, key=means.get)

    def open_runs(self, computing: Computing) -> Iterator[tuple[Entry, Callable[[], dict]]]:
        """The runs that can be done now: the search's, and when it is over the final ones."""
        for rate in self.protocol.learning_rates:
            for seed in self.protocol.seeds:
                run = partial(self.run, "search", rate, seed, computing)
                yield self.entry("search", rate, seed), run
        rate = self.chosen()
        for seed in self.protocol.seeds if rate is not None else ():
            yield self.entry("final", rate, seed), partial(self.run, "final", rate, seed, computing)

    def rows(self) -> Iterator[dict]:
        """One row per run that is finished."""
        rate_chosen = self.chosen()
        final = () if rate_chosen is None else (rate_chosen,)
        for phase, rates in (("search", self.protocol.learning_rates), ("final", final)):
            train, test = (self.parts[part] for part in self._sets(phase))
            for rate in rates:
                for seed in self.protocol.seeds:
                    fact = self.entry(phase, rate, seed).facts()
                    if fact is not None:
                        yield {
                            "dataset": self.task.name,
                            "group": self.task.group,
                            "phase": phase,
                            "lr": rate,
                            "seed": seed,
                            "metric": "accuracy",
                            "value": fact["accuracy"],
                            "n_train": len(train),
                            "n_test": len(test),
                            "images": self.drawn or "published lists",
                        }


def vtab1k(
    encoder: nn.Module,
    data: dict[Task, dict[str, Dataset]],
    folder: Path,
    *,
    protocol: VTABProtocol | None = None,
    computing: Computing | None = None,
) -> pd.DataFrame:
    """Search and final runs on all data sets, those that ``folder`` holds left out.

    Args:
        encoder: a timm VisionTransformer with a cls token.
        data: task -> its four parts.
        folder: keeps every run; other processes may work on it at the same time.
        protocol: None takes the paper's.
        computing: None takes a GPU where there is one.

    Returns:
        One row per run: data set, group, phase (search or final), rate, seed and accuracy.

    Raises:
        InputError: lists that do not belong together, fewer images than a batch, no cls token, a
            folder with runs of other settings, or a process group.
    """
    _refuse_group("VTAB-1K")
    protocol, computing = protocol or VTABProtocol(), computing or Computing()
    searches = [Search(encoder, task, parts, protocol, folder) for task, parts in data.items()]

    def open_runs() -> Iterator[tuple[Entry, Callable[[], dict]]]:
        for search in searches:
            yield from search.open_runs(computing)

    take_turns(open_runs)
    return pd.DataFrame([row for search in searches for row in search.rows()])


def table(rows: pd.DataFrame, names: Iterable[str] = tuple(task.name for task in TASKS)):
    """One row per data set and per mean, from the rows of :func:`vtab1k`.

    Means are plain ones over data sets: of every group, of all 19, and of the 18 without Flowers
    (both are in use). A mean is missing as long as one of its data sets is.

    Returns:
        ``name``, ``lr``, ``accuracy`` (percent, mean over seeds), ``sd`` over seeds, ``images``.

    >>> rows = pd.DataFrame({"dataset": "dtd", "group": "natural", "phase": "final", "lr": 1e-3,
    ...                      "seed": [0, 1], "value": [0.5, 0.7], "images": "published lists"})
    >>> table(rows, ["dtd"])[["name", "accuracy"]].values.tolist()[0]
    ['dtd', 60.0]
    """
    final = rows[rows["phase"] == "final"] if len(rows) else rows
    found, means = [], {}
    for name in names:
        own = final[final["dataset"] == name] if len(final) else final
        if len(own):
            means[name] = 100 * own["value"].mean()
            spread = 100 * own["value"].std() if len(own) > 1 else None
            found.append(
                {
                    "name": name,
                    "lr": own["lr"].iloc[0],
                    "accuracy": means[name],
                    "sd": spread,
                    "images": own["images"].iloc[0],
                }
            )
    groups = {f"mean, {group}": [t.name for t in TASKS if t.group == group] for group in GROUPS}
    groups["mean of 19"] = [task.name for task in TASKS]
    groups["mean of 18, without Flowers"] = [t.name for t in TASKS if t.name != NOT_IN_18]
    for title, members in groups.items():
        there = [means[name] for name in members if name in means]
        mean = sum(there) / len(there) if len(there) == len(members) else None
        found.append({"name": title, "accuracy": mean})
    return pd.DataFrame(found, columns=["name", "lr", "accuracy", "sd", "images"])


def vtab6(
    encoder: nn.Module,
    names: Sequence[str],
    folder: Path,
    recipe: LinearRecipe = LINEAR_6,
    *,
    best_on_test: bool = False,
    computing: Computing | None = None,
) -> pd.DataFrame:
    """The paper's grid of linear probes on whole data sets, which torchvision downloads.

    Args:
        encoder: a timm ViT.
        names: of :data:`mimrefiner.data.vtab.SIX`.
        folder: keeps what is finished; other processes may work on it at the same time.
        recipe: the grid.
        best_on_test: choose probe and epoch on test images, as the paper does; otherwise a tenth of
            the training images chooses.
        computing: None takes a GPU where there is one.

    Returns:
        The rows of :func:`mimrefiner.probes.linear_grid.linear_grid` with a column ``dataset``.

    Raises:
        InputError: an unknown name, a folder with runs of other settings, or a process group.
    """
    _refuse_group("VTAB-6")
    computing = computing or Computing()
    for name in names:
        one_of("data set of VTAB-6", name, tuple(SIX))
    sets = {name: whole(name) for name in names}
    how = {"device": computing.device, "num_workers": computing.num_workers}

    def run(name: str) -> dict:
        train, test = sets[name]
        result = linear_grid(encoder, train, test, recipe, best_on_test=best_on_test, **how)
        return {"rows": result.rows.to_dict("records")}

    entries = {}
    for name, (train, test) in sets.items():
        settings = grid_settings(encoder, recipe, {"train": train, "test": test}, best_on_test)
        entries[name] = Entry(folder / name, settings)
    take_turns(lambda: [(entry, partial(run, name)) for name, entry in entries.items()])
    found = [
        {"dataset": name, **row} for name, entry in entries.items() for row in entry.facts()["rows"]
    ]
    return pd.DataFrame(found)


def _refuse_group(what: str) -> None:
    """InputError in a process group: one process would take a run and wait for the others."""
    if distributed.world() > 1:
        raise InputError(
            f"the runs of {what} are independent: share them among processes by --gpus, or start "
            "the command several times with the same --out, without torchrun"
        )


def six_table(rows: pd.DataFrame) -> pd.DataFrame:
    """The chosen probe of every data set, and the mean of six, in percent.

    >>> rows = pd.DataFrame({"dataset": ["dtd"], "pool": "chosen", "value": 0.5, "setting": "lr=1"})
    >>> six_table(rows)[["name", "accuracy"]].values.tolist()[0]
    ['dtd', 50.0]
    """
    chosen = rows[rows["pool"] == "chosen"]
    found = [
        {"name": row["dataset"], "accuracy": 100 * row["value"], "setting": row["setting"]}
        for row in chosen.to_dict("records")
    ]
    complete = set(chosen["dataset"]) == set(SIX)
    mean = 100 * chosen["value"].mean() if complete else None
    return pd.DataFrame([*found, {"name": "mean of 6", "accuracy": mean}])
