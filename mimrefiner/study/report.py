"""The block report: how good every block of an encoder is, by every probe, and which one to take.

Every probe writes its rows when it ends, so that an interrupted report goes on where it stopped.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from mimrefiner import distributed
from mimrefiner.config import check_blocks
from mimrefiner.data.datasets import ImageDataset, data_hash, numbered_together, train_and_test
from mimrefiner.data.rows import size_of
from mimrefiner.data.sources import check_numbering
from mimrefiner.device import default_device
from mimrefiner.errors import InputError
from mimrefiner.files import Entry, atomic_file, write_csv, write_json
from mimrefiner.models.blocks import block_modules
from mimrefiner.models.encoders import eval_transform, load_encoder, random_twin
from mimrefiner.models.pools import available_pools, check_pools
from mimrefiner.models.tokens import input_size
from mimrefiner.models.weights import sha256_of
from mimrefiner.probes import protocols
from mimrefiner.probes.checks import (
    COLUMNS,
    check_count,
    check_finite,
    check_labels,
    check_test_labels,
    tidy,
)
from mimrefiner.probes.clustering import cluster, number_of_clusters
from mimrefiner.probes.feature_cache import HASHED, cached_features
from mimrefiner.probes.features import Features, extract_features, parse_pool, pixel_features
from mimrefiner.probes.knn import hits_to_rows, knn_hits
from mimrefiner.probes.linear import hold_out, linear_probe
from mimrefiner.probes.logistic import draw_shots, low_shot
from mimrefiner.probes.protocols import KMEANS, KNN, LINEAR, PERCENT, SHOTS, SPECTRUM, Protocol
from mimrefiner.probes.similarity import effective_rank
from mimrefiner.study import figures
from mimrefiner.study.advice import Advice, advice_from, choice_rows
from mimrefiner.study.intervals import standard_error
from mimrefiner.study.tables import environment

logger = logging.getLogger(__name__)

METRICS = {  # probe -> the metrics of table and figure
    "knn": KNN.metrics,
    "linear": LINEAR.metrics,
    "low_shot": protocols.low_shot(1).metrics,
    "cluster": KMEANS.metrics,
    "rank": SPECTRUM.metrics,
}
PROBES = tuple(METRICS)
CHOICE = "choice"  # work that follows k-NN: what validation images choose, and what that gains
COMPARED = ("model", "random weights", "raw pixels")
LABELLED = {"knn": "k-NN", "linear": "a linear probe", "low_shot": "low-shot classification"}
PIXEL_BYTES = 2**32  # raw pixels are left out where they take more than this
HEAD = """# Block report: {title}

Blocks are counted from 1. ± is the standard deviation over draws, or the standard error of
an accuracy where nothing was drawn. The best block is the best on these test images: an optimistic
choice.

| probe | pooling | best block | its value | last block | random weights, best | raw pixels | n |
|---|---|---|---|---|---|---|---|"""


def probe(
    encoder: nn.Module | str,
    data: str | tuple[Dataset, Dataset] | dict[str, Dataset],
    *,
    blocks: str | Sequence[int] = "all",
    pools: Sequence[str] | None = None,
    probes: Sequence[str] = ("knn",),
    shots: Sequence[int | float] = SHOTS,
    clusters: int | None = None,
    out: Path | str | None = None,
    resume: bool = False,
    cache: Path | str | None = None,
    pretrained: bool = True,
    baselines: bool = True,
    seed: int = 0,
    batch_size: int = 256,
    num_workers: int = 0,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
) -> pd.DataFrame:
    """Probe every block of an encoder, and say which one to take.

    Args:
        encoder: a timm model, or what :func:`mimrefiner.load_encoder` takes.
        data: what :func:`mimrefiner.load_dataset` takes, (train, test), or a dict of these two.
        blocks: "all" or 0-based numbers.
        pools: such as "cls", "mean", "cls+mean_last4"; None takes cls and mean where there are.
        probes: any of knn, linear, low_shot, cluster, rank.
        shots: labelled images per class, or shares of all, for the low-shot probe.
        clusters: how many k-means makes; None makes as many as there are classes.
        out: the folder of report.csv, .md, .png, .pdf and every probe's rows; None writes nothing.
        resume: keep the finished probes in ``out``, of the same weights, settings and data (which
            labels and about 1,024 images identify).
        cache: a folder that keeps the features, so that a stopped extraction can go on.
        pretrained: False probes random weights.
        baselines: also probe raw pixels and the same network with random weights.
        seed: draws splits, labelled images and starts.
        batch_size, num_workers, autocast: see :func:`mimrefiner.extract_features`.
        device: where features and probes are computed; None takes a GPU where there is one.

    Returns:
        Tidy rows: model ("model", "random weights", "raw pixels"), probe, the probes' columns; of a
            process group (``torchrun``) the first process returns them, the others none. After
            k-NN, ``rows.attrs["advice"]`` says which block to take and what that gains.

    Raises:
        InputError: what was asked does not fit, or ``out`` holds another report or foreign files.

    >>> import mimrefiner as mr
    >>> digits = [mr.load_dataset("digits", split=split).take(60) for split in ("train", "test")]
    >>> mr.probe("simmim_digits", digits, blocks=(5, 11), baselines=False)["pool"].tolist()
    ['cls', 'cls', 'mean', 'mean']
    """
    task = Task(tuple(probes), tuple(shots), clusters, seed, device)
    loading = {"batch_size": batch_size, "num_workers": num_workers, "autocast": autocast}
    named = load_encoder(encoder, pretrained=pretrained) if isinstance(encoder, str) else encoder
    plan = make_plan(named, data, task, {"blocks": blocks, "pools": pools, **loading}, baselines)
    plan = plan if out is None else plan.identified()
    folder = None if out is None else ReportFolder.opened(Path(out), plan.settings, resume)
    return _reported(plan, folder, cache, report_title(encoder, data))


@dataclass(frozen=True)
class Task:
    """Which probes run on the features, and with which settings.

    Attributes:
        probes, shots, clusters, seed: see :func:`probe`.
        device: where the probes compute; None becomes the default.
    """

    probes: tuple[str, ...]
    shots: tuple[int | float, ...] = SHOTS
    clusters: int | None = None
    seed: int = 0
    device: torch.device | str | None = None

    def __post_init__(self):
        for name in self.probes:
            if name not in PROBES:
                raise InputError(f"unknown probe {name!r}: choose from {', '.join(PROBES)}")
        if not self.probes or len(set(self.probes)) < len(self.probes):
            found = ", ".join(self.probes) or "none"
            raise InputError(f"expected one or more different probes, got {found}")
        check_count("seed", self.seed, 0)
        device = default_device() if self.device is None else torch.device(self.device)
        object.__setattr__(self, "device", device)

    def protocols(self, images: int) -> list[Protocol]:
        """The protocols of the rows that ``images`` training images give."""
        of_probe = {
            "knn": [
                protocols.knn(min(KNN.settings["k"], images))
            ],  # where there are fewer, all vote
            "linear": [LINEAR],
            "low_shot": [protocols.low_shot(shot) for shot in self.shots],
            "cluster": [KMEANS],
            "rank": [SPECTRUM],
        }
        return [protocol for name in self.probes for protocol in of_probe[name]]

    def check(self, train: ImageDataset, test: ImageDataset) -> None:
        """Raise now what a probe would raise after the extraction."""
        y, test_y = _labels(train), _labels(test)
        for name in self.probes:
            if name in LABELLED:
                what = LABELLED[name]
                classes = check_labels(y, what, everywhere=name != "low_shot")
                check_test_labels(test_y, what)
                if not numbered_together(train, test):
                    check_numbering(y.numpy(), test_y.numpy(), "the test set")
            if name == "low_shot":
                for shot in self.shots:
                    draw_shots(y, classes, shot, self.seed)
            if name == "cluster":
                number_of_clusters(test_y.numpy(), self.clusters)

    def work(self, model: str) -> tuple[str, ...]:
        """What is computed of a model: the probes, and behind k-NN of the model itself CHOICE."""
        chooses = model == COMPARED[0] and "knn" in self.probes
        return (*self.probes, CHOICE) if chooses else self.probes

    def rows(self, name: str, train: Features, test: Features) -> pd.DataFrame:
        """The tidy rows of one probe, or those of CHOICE."""
        common = {"seed": self.seed, "device": self.device}
        if name == "knn":
            return self._knn_rows(train, test)
        if name == CHOICE:
            return choice_rows(train, test, **common)
        if name == "linear":
            # Before labels decide what is held out
            check_labels(train.y, LABELLED[name], everywhere=True)
            val, rest = hold_out(train, self.seed)
            return linear_probe(rest, test, val=val, choose=len(train.x) > 1, **common)
        if name == "low_shot":
            return low_shot(train, test, shots=self.shots, **common)
        if name == "cluster":
            return cluster(test, clusters=self.clusters, seed=self.seed)
        return effective_rank(test)

    def _knn_rows(self, train: Features, test: Features) -> pd.DataFrame:
        protocol = protocols.knn(min(KNN.settings["k"], len(train.y)))
        hits = knn_hits(train, test, k=protocol.settings["k"], device=self.device)
        common = {"protocol": protocol.name, "metric": "accuracy", "seed": self.seed}
        common |= {"n_train": len(train.y), "n_test": len(test.y)}
        rows = [
            hits_to_rows(right, blocks=test.blocks, pool=pool, **common)
            for pool, right in hits.items()
        ]
        return tidy([row for of_pool in rows for row in of_pool])


@dataclass(frozen=True)
class ReportPlan:
    """What a report looks at; it is made, and checked, before any work.

    Attributes:
        encoder: the model.
        train, test: its data.
        pools: the poolings that are probed, joined ones too.
        task: the probes.
        extraction: keywords of :func:`mimrefiner.extract_features`.
        compared: what is probed: the model and its baselines.
        settings: everything that decides the rows.
    """

    encoder: nn.Module
    train: Dataset
    test: Dataset
    pools: tuple[str, ...]
    task: Task
    extraction: dict
    compared: tuple[str, ...]
    settings: dict

    def identified(self) -> "ReportPlan":
        """The same with hashes of the data: by a later run, a name may stand for other images."""
        hashes = [data_hash(part, HASHED) for part in (self.train, self.test)]
        return replace(self, settings=self.settings | {"data_sha256": hashes})


def make_plan(
    encoder: nn.Module, data, task: Task, extraction: dict, baselines: bool
) -> ReportPlan:
    """Settle what :func:`probe` is asked for; InputError where that does not fit the model or data.

    Args:
        encoder, data, task, baselines: see :func:`probe`.
        extraction: keywords of :func:`mimrefiner.extract_features` as a user gives them.
    """
    train, test = train_and_test(data)
    blocks, pools, depth = extraction["blocks"], extraction["pools"], len(block_modules(encoder))
    numbers = tuple(range(depth)) if blocks == "all" else check_blocks(blocks, depth)
    pools = available_pools(encoder, numbers) if pools is None else tuple(pools)
    parts = sorted({part for name in pools for part in parse_pool(name)[0]})
    plain = check_pools(encoder, parts, numbers)
    # Poolings that need other blocks are refused here
    nothing = [torch.empty(0, 1) for _ in numbers]
    Features(dict.fromkeys(plain, nothing), torch.empty(0), numbers, depth).joined(pools)
    if all(isinstance(part, ImageDataset) for part in (train, test)):
        task.check(train, test)
    settings = {
        "weights_sha256": sha256_of(encoder),
        "data": data if isinstance(data, str) else [size_of(train), size_of(test)],
        "blocks": list(numbers),
        "pools": list(pools),
        "seed": task.seed,
        "shots": list(task.shots),
        "clusters": task.clusters,
        "autocast": str(extraction["autocast"]),
        "transform": repr(eval_transform(encoder)),
    }
    compared = COMPARED if baselines else COMPARED[:1]
    if baselines and _too_many_pixels(encoder, train):
        compared = COMPARED[:-1]
    extraction = extraction | {"pools": plain, "device": task.device}
    return ReportPlan(encoder, train, test, pools, task, extraction, compared, settings)


def _reported(
    plan: ReportPlan, folder: "ReportFolder | None", cache: Path | str | None, title: str
) -> pd.DataFrame:
    """The rows with their advice, after the report was written."""
    table, advice = _probed(plan, folder, cache)
    if folder is not None and distributed.rank() == 0:
        folder.write_report(table, plan, title, advice)
    table.attrs["advice"] = "" if advice is None else str(advice)
    return table


def _probed(
    plan: ReportPlan, folder: "ReportFolder | None", cache: Path | str | None
) -> tuple[pd.DataFrame, Advice | None]:
    """The rows of all models and probes, and the advice; none but on the first process."""
    work = ((model, *_extracted(plan, folder, model, cache)) for model in plan.compared)
    # All processes extract before one of them probes: none waits for it in the next extraction
    if distributed.world() > 1:
        work = list(work)
    tables, advice = [pd.DataFrame(columns=COLUMNS)], None
    for model, missing, parts in work if distributed.rank() == 0 else ():
        for name in plan.task.work(model):
            if name in missing:
                rows = plan.task.rows(name, *parts).assign(model=model, probe=name)
                if folder is not None:
                    folder.keep(rows, model, name)
            else:
                rows = folder.rows(model, name)
            if name == CHOICE:
                advice = advice_from(rows)
            else:
                tables.append(rows)
    table = pd.concat(tables[1:] or tables, ignore_index=True)
    return table.reindex(columns=["model", "probe", *COLUMNS]), advice


def _extracted(
    plan: ReportPlan, folder: "ReportFolder | None", model: str, cache: Path | str | None
) -> tuple[list[str], tuple[Features, ...]]:
    """The probes of a model that are missing, and the features they need: (train, test)."""
    work = plan.task.work(model)
    missing = [name for name in work if folder is None or not folder.has(model, name)]
    if not missing:
        return [], ()
    if model == "raw pixels":
        size = _pixel_size(plan.encoder)
        return missing, tuple(pixel_features(part, size) for part in (plan.train, plan.test))
    encoder = random_twin(plan.encoder) if model == "random weights" else plan.encoder
    kept = None if cache is None else Path(cache) / model.replace(" ", "_")
    parts = _features(plan, encoder, kept)
    if LABELLED.keys() & missing and not numbered_together(plan.train, plan.test):
        check_numbering(*(part.y.numpy() for part in parts), "the test set")
    return missing, tuple(part.joined(plan.pools) for part in parts)


def _features(
    plan: ReportPlan, encoder: nn.Module, cache: Path | None
) -> tuple[Features, Features]:
    if cache is None:
        pair = tuple(
            extract_features(encoder, part, **plan.extraction) for part in (plan.train, plan.test)
        )
    else:
        pair = tuple(
            cached_features(encoder, part, cache / name, **plan.extraction)
            for part, name in ((plan.train, "train"), (plan.test, "test"))
        )
    check_finite(*pair)
    return pair


def _labels(data: ImageDataset) -> Tensor:
    return torch.full((len(data),), -1) if data.labels is None else torch.from_numpy(data.labels)


def _pixel_size(encoder: nn.Module) -> int:
    return min(input_size(encoder)[-1], 64)


def _too_many_pixels(encoder: nn.Module, train: Dataset) -> bool:
    size = 4 * 3 * _pixel_size(encoder) ** 2 * len(train)
    if size > PIXEL_BYTES and distributed.rank() == 0:
        logger.warning(
            "the baseline of raw pixels is left out: it would take %.0f GiB", size / 2**30
        )
    return size > PIXEL_BYTES


@dataclass
class ReportFolder:
    """The folder of a report: it remembers finished probes, and holds the report at the end.

    Attributes:
        entry: the folder and the settings; its manifest, settings.json, lists the finished rows.
        finished: the names of the files of finished probes.
        is_own: whether what lies in the folder belongs to this report.
    """

    entry: Entry
    finished: list[str] = field(default_factory=list)
    is_own: bool = False

    @classmethod
    def opened(cls, folder: Path, settings: dict, resume: bool) -> "ReportFolder":
        """The folder as all processes see it; nothing in it changes.

        Raises:
            InputError: files there bear a report's names and are none of a report, or, with
                ``resume``, a report of other settings is there.
        """
        entry = Entry(folder, settings, manifest="settings.json")
        return distributed.from_first(lambda: cls._opened(entry, resume))

    @classmethod
    def _opened(cls, entry: Entry, resume: bool) -> "ReportFolder":
        folder = entry.folder
        # A run of notebooks has a manifest too
        ours = _is_ours(folder / entry.manifest)
        checked = [folder / "manifest.json"] if ours else own_files(folder)
        foreign = [old.name for old in checked if old.exists() and not _is_ours(old)]
        if foreign:
            raise InputError(
                f"{folder} holds {', '.join(foreign)}, which no report wrote: choose another "
                "folder with --out"
            )
        if not resume or not entry.is_there:
            return cls(entry)
        if different := entry.different():
            raise InputError(
                f"{folder} holds a report of other {', '.join(different)}: choose another folder "
                "or leave out --resume"
            )
        if damage := entry.damage():
            logger.warning("%s: %s, and is probed again", folder, damage)
        return cls(entry, entry.intact(), is_own=True)

    def has(self, model: str, name: str) -> bool:
        """Whether the rows of a probe are there, as they were written."""
        return self._file(model, name).name in self.finished

    def rows(self, model: str, name: str) -> pd.DataFrame:
        """The rows of a finished probe."""
        return pd.read_csv(self._file(model, name), keep_default_na=False)

    def keep(self, rows: pd.DataFrame, model: str, name: str) -> None:
        """Write the rows of a probe that has just finished; the first ones clear the folder."""
        if not self.is_own:  # only now: bad input leaves an old report as it is
            for old in own_files(self.entry.folder):
                old.unlink(missing_ok=True)
            self.is_own = True
        file = self._file(model, name)
        write_csv(rows, file)
        self.finished.append(file.name)
        self.entry.finish(self.entry.folder, {}, [file.parent / name for name in self.finished])

    def write_report(
        self, table: pd.DataFrame, plan: ReportPlan, title: str, advice: Advice | None
    ) -> None:
        """Write report.csv, .md, .png and .pdf, and manifest.json with the versions of all."""
        folder, shown = self.entry.folder, plan.task.protocols(len(plan.train))
        with atomic_file(folder / "report.md") as temporary:
            text = markdown(table, title, "" if advice is None else str(advice))
            temporary.write_text(text, encoding="utf-8")
        figures.use_style()
        over = f"Block report: {title}" if advice is None else f"{advice.finding}\n{title}"
        figure = figures.plot_report(summary(table), shown, title=over)
        if advice is not None and plan.task.probes[0] == "knn":
            _mark(figure.axes[0], advice)
        figures.save_figure(figure, folder / "report", table)
        plt.close(figure)  # else pyplot keeps the figures of all reports
        write_json({**environment(), **plan.settings}, folder / "manifest.json")

    def _file(self, model: str, name: str) -> Path:
        return _rows_file(self.entry.folder, model, name)


def _mark(axes: plt.Axes, advice: Advice) -> None:
    """Point at the block that validation images chose; the ring is the best on test images."""
    place = advice.block + 1, 100 * advice.accuracy
    style = {"ha": "center", "va": "top", "fontsize": 6.5, "arrowprops": {"arrowstyle": "-"}}
    axes.annotate("chosen on validation", place, (0, -26), textcoords="offset points", **style)


def own_files(folder: Path) -> list[Path]:
    """Every file that a report may write, whether it is there or not."""
    rows = [_rows_file(folder, model, name) for model in COMPARED for name in PROBES]
    rows.append(_rows_file(folder, COMPARED[0], CHOICE))
    report = [folder / f"report.{kind}" for kind in ("csv", "md", "png", "pdf")]
    return [*rows, *report, folder / "manifest.json", folder / "settings.json"]


def _rows_file(folder: Path, model: str, name: str) -> Path:
    if name == CHOICE:
        return folder / "choice.csv"
    return folder / f"rows_{name}_{model.replace(' ', '_')}.csv"


def _is_ours(file: Path) -> bool:
    """Whether ``file`` is the settings or the manifest of a report."""
    try:
        content = json.loads(file.read_bytes())
        return "weights_sha256" in content or "weights_sha256" in content["settings"]
    except (OSError, ValueError, TypeError, KeyError):
        return False


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Mean and spread of every probe's main metrics, per model, block and pooling.

    The spread is the standard deviation over draws. Where nothing was drawn, it is the binomial
    standard error of an accuracy on the test images, and empty for other metrics.
    """
    shown = [m in METRICS[p] for p, m in zip(table["probe"], table["metric"], strict=True)]
    keys = ["model", "probe", "protocol", "metric", "pool", "block"]
    of_line = table[shown].groupby(keys, sort=False)
    stats = of_line["value"].agg(value="mean", spread="std", draws="size").reset_index()
    stats["n_test"] = of_line["n_test"].first().to_numpy()
    alone = (stats["draws"] == 1) & (stats["metric"] == "accuracy")
    stats.loc[alone, "spread"] = [
        standard_error(row.value, row.n_test) for row in stats[alone].itertuples()
    ]
    return stats


def report_title(encoder: nn.Module | str, data) -> str:
    """The title "MODEL on DATA"; of a path to a model its last part counts."""
    if not isinstance(encoder, str):
        cfg = getattr(encoder, "pretrained_cfg", None) or {}
        encoder = cfg.get("loaded_from", type(encoder).__name__)
    model = encoder.rsplit("/", 1)[-1]
    return f"{model} on {data if isinstance(data, str) else 'own data'}"


def markdown(table: pd.DataFrame, title: str, advice: str = "") -> str:
    """The report as text: best block, last block, baselines of every probe and pooling; advice.

    Args:
        table: what :func:`probe` returns.
        title: names model and data.
        advice: the last sentence.
    """
    stats = summary(table)
    lines = [HEAD.format(title=title)]
    ours = stats[stats["model"] == "model"]
    for (protocol, metric, pool), rows in ours.groupby(["protocol", "metric", "pool"], sort=False):
        best, last = rows.loc[rows["value"].idxmax()], rows.iloc[-1]
        same = stats[(stats["protocol"] == protocol) & (stats["metric"] == metric)]
        random = same[(same["model"] == "random weights") & (same["pool"] == pool)]
        pixels = same[same["model"] == "raw pixels"]
        cells = [protocol, pool, str(best["block"] + 1), _number(best), _number(last)]
        cells += [
            _number(part.loc[part["value"].idxmax()]) if len(part) else ""
            for part in (random, pixels)
        ]
        lines.append("| " + " | ".join([*cells, str(best["n_test"])]) + " |")
    return "\n".join([*lines, f"\n**{advice}**"] if advice else lines) + "\n"


def _number(row) -> str:
    scale = 100 if row["metric"] in PERCENT else 1
    spread = f" ± {scale * row['spread']:.1f}" if pd.notna(row["spread"]) else ""
    return f"{scale * row['value']:.1f}{spread}"
