"""The block report: how good every block of an encoder is, by every probe, as a table and one
figure.

Every probe writes its rows when it ends, so that an interrupted report goes on where it stopped.
"""

import copy
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from mimrefiner import distributed
from mimrefiner.config import check_blocks
from mimrefiner.data.datasets import ImageDataset, load_dataset
from mimrefiner.device import default_device
from mimrefiner.errors import InputError
from mimrefiner.files import atomic_file, write_csv, write_json
from mimrefiner.models.blocks import available_pools, block_modules, check_pools
from mimrefiner.models.encoders import load_encoder
from mimrefiner.models.weights import sha256_of
from mimrefiner.probes.checks import (
    COLUMNS,
    check_count,
    check_finite,
    check_labels,
    check_test_labels,
    tidy,
)
from mimrefiner.probes.clustering import cluster, number_of_clusters
from mimrefiner.probes.feature_cache import cached_features
from mimrefiner.probes.features import Features, extract_features, parse_pool, pixel_features
from mimrefiner.probes.knn import KNN_PROTOCOL, knn_hits
from mimrefiner.probes.linear import hold_out, linear_probe
from mimrefiner.probes.logistic import draw_shots, low_shot
from mimrefiner.probes.similarity import effective_rank
from mimrefiner.study import figures
from mimrefiner.study.intervals import standard_error
from mimrefiner.study.tables import environment

PROBES = ("knn", "linear", "low_shot", "cluster", "rank")
MODELS = ("model", "random weights", "raw pixels")
HEADLINE = {  # probe -> the metrics of table and figure
    "knn": ("accuracy",),
    "linear": ("accuracy",),
    "low_shot": ("accuracy",),
    "cluster": ("ACC", "cluster_silhouette"),
    "rank": ("effective_rank",),
}
LABELLED = {"knn": "k-NN", "linear": "a linear probe", "low_shot": "low-shot classification"}
K = 10
PIXEL_BYTES = 2**32  # raw pixels are left out where they take more than this


def probe(
    encoder: nn.Module | str,
    data: str | tuple[Dataset, Dataset],
    *,
    blocks: str | Sequence[int] = "all",
    pools: Sequence[str] | None = None,
    probes: Sequence[str] = ("knn",),
    shots: Sequence[int | float] = (1, 2, 5),
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
    """Probe every block of an encoder.

    In a process group (``torchrun``) all processes extract features; the first one probes and
    writes, the others return no rows.

    Args:
        encoder: a timm model, or what :func:`mimrefiner.load_encoder` takes.
        data: what :func:`mimrefiner.load_dataset` takes, or (train, test), map-style data sets of
            (image, label).
        blocks: "all" or 0-based blocks.
        pools: "cls", "mean" and joined ones such as "cls+mean_last4"
            (:meth:`mimrefiner.Features.joined`); None takes cls and mean where the model has them.
            With several, the linear probe also reports the one that validation chose.
        probes: of knn, linear, low_shot, cluster, rank.
        shots: of the low-shot probe, images per class or shares of the training set.
        clusters: of the clustering; None takes the number of classes.
        out: folder for report.csv, report.md, report.png and .pdf, and for the rows of every probe;
            None writes nothing.
        resume: take the finished probes from ``out``; they must be of the same weights, data and
            settings.
        cache: folder that keeps the features on disk
            (:func:`mimrefiner.probes.feature_cache.cached_features`), so that an interrupted
            extraction goes on at the next image; None keeps them in memory.
        pretrained: False probes random weights.
        baselines: also raw pixels and the same network with random weights.
        seed: of drawn splits and starts.
        batch_size, num_workers, autocast: see :func:`mimrefiner.extract_features`.
        device: of extraction and probes (k-means and ranks are computed on the CPU); None takes a
            GPU where there is one.

    Returns:
        Tidy rows: model ("model", "random weights", "raw pixels"), probe and the columns of the
            probes.

    Raises:
        InputError: an unknown probe, model, data set or block; no labels where a probe needs them;
            other settings or foreign files in ``out``.
    """
    for name in probes:
        if name not in PROBES:
            raise InputError(f"unknown probe {name!r}: choose from {', '.join(PROBES)}")
    if not probes or len(set(probes)) < len(probes):
        raise InputError(
            f"expected one or more different probes, got {', '.join(probes) or 'none'}"
        )
    check_count("seed", seed, 0)
    title = report_title(encoder, data)
    if isinstance(encoder, str):
        encoder = load_encoder(encoder, pretrained=pretrained)
    train, test = (
        (load_dataset(data, split=part) for part in ("trainval", "test"))
        if isinstance(data, str)
        else data
    )
    grouped, first = distributed.world() > 1, distributed.rank() == 0
    folder = None if out is None else Path(out)
    device = default_device() if device is None else torch.device(device)
    depth, names = (
        len(block_modules(encoder)),
        tuple(pools) if pools is not None else available_pools(encoder),
    )
    plain = check_pools(encoder, sorted({part for name in names for part in parse_pool(name)[0]}))
    numbers = tuple(range(depth)) if blocks == "all" else check_blocks(blocks, depth)
    # Poolings that need other blocks, said before the work
    nothing = [torch.empty(0, 1) for _ in numbers]
    Features(dict.fromkeys(plain, nothing), torch.empty(0), numbers, depth).joined(names)
    if all(isinstance(part, ImageDataset) for part in (train, test)):
        for name in probes:
            _check_labels(
                name, *map(_labels, (train, test)), seed=seed, shots=shots, clusters=clusters
            )
    settings = {
        "weights_sha256": sha256_of(encoder),
        "data": data if isinstance(data, str) else [len(train), len(test)],
        "blocks": list(numbers),
        "pools": list(names),
        "seed": seed,
        "shots": list(shots),
        "clusters": clusters,
        "autocast": str(autocast),
    }
    going_on = folder is not None and distributed.from_first(
        lambda: _goes_on(folder, settings, resume)
    )
    models: dict[str, Callable[[], nn.Module | None]] = {"model": lambda: encoder}
    if baselines:
        models |= {"random weights": lambda: _random_twin(encoder), "raw pixels": lambda: None}
    options = {
        "blocks": blocks,
        "pools": plain,
        "batch_size": batch_size,
        "num_workers": num_workers,
        "device": device,
        "autocast": autocast,
    }

    def extracted(model: str) -> tuple[list[str], tuple[Features, ...]]:
        """The probes that are missing, and the features they need."""
        missing = distributed.from_first(
            lambda: [
                name
                for name in probes
                if not (going_on and _rows_file(folder, model, name).is_file())
            ]
        )
        if not missing:
            return [], ()
        kept = None if cache is None else Path(cache) / model.replace(" ", "_")
        parts = _features(models[model](), train, test, encoder, kept, options)
        return missing, tuple(
            part if model == "raw pixels" else part.joined(names) for part in parts
        )

    if baselines and _too_many_pixels(encoder, train):
        del models["raw pixels"]
    work = ((model, *extracted(model)) for model in models)
    # All processes extract before one of them probes: none waits for it in the next extraction
    if grouped:
        work = list(work)
    tables = []
    for model, missing, features in work if first else ():
        for name in probes:
            if name in missing:
                rows = _run(
                    name, *features, seed=seed, shots=shots, clusters=clusters, device=device
                )
                rows = rows.assign(model=model, probe=name)
                if folder is not None:
                    if not going_on:  # only now: bad input leaves an old report as it is
                        _start_folder(folder, settings)
                        going_on = True
                    write_csv(rows, _rows_file(folder, model, name))
            else:
                rows = pd.read_csv(_rows_file(folder, model, name), keep_default_na=False)
            tables.append(rows)
    if not first:
        return pd.DataFrame(columns=["model", "probe", *COLUMNS])
    table = pd.concat(tables, ignore_index=True)[["model", "probe", *COLUMNS]]
    if folder is not None:
        _write(table, folder, settings, title)
    return table


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over draws of every probe's main metric, per model, block and
    pooling.

    Where nothing was drawn, ``spread`` is the binomial standard error of an accuracy on the test
    images.
    """
    main = table[
        [
            metric in HEADLINE[probe]
            for probe, metric in zip(table["probe"], table["metric"], strict=True)
        ]
    ]
    keys = ["model", "probe", "protocol", "metric", "pool", "block"]
    stats = (
        main.groupby(keys, sort=False)["value"]
        .agg(value="mean", spread="std", draws="size")
        .reset_index()
    )
    stats["n_test"] = main.groupby(keys, sort=False)["n_test"].first().to_numpy()
    alone = (stats["draws"] == 1) & (stats["metric"] == "accuracy")
    stats.loc[alone, "spread"] = [
        standard_error(v, n)
        for v, n in zip(stats.loc[alone, "value"], stats.loc[alone, "n_test"], strict=True)
    ]
    return stats


def report_title(encoder: nn.Module | str, data) -> str:
    """ "MODEL on DATA", with the last part of a model's path."""
    model = encoder.rsplit("/", 1)[-1] if isinstance(encoder, str) else type(encoder).__name__
    return f"{model} on {data if isinstance(data, str) else 'own data'}"


def markdown(table: pd.DataFrame, title: str) -> str:
    """The report as text: per probe and pooling the best block, the last block and the baselines."""
    stats = summary(table)
    lines = [
        f"# Block report: {title}",
        "",
        "Blocks are counted from 1. ± is the standard deviation over draws, or the standard error of",
    ]
    lines += [
        "an accuracy where nothing was drawn. The best block is the best on these test images: an optimistic choice.",
        "",
    ]
    lines += [
        "| probe | pooling | best block | its value | last block | random weights, best | raw pixels | n |",
        "|---|---|---|---|---|---|---|---|",
    ]
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
    return "\n".join(lines) + "\n"


def _number(row) -> str:
    scale = 100 if row["metric"] in ("accuracy", "ACC") else 1
    spread = f" ± {scale * row['spread']:.1f}" if pd.notna(row["spread"]) else ""
    return f"{scale * row['value']:.1f}{spread}"


def _features(
    encoder, train, test, original, cache: Path | None, options: dict
) -> tuple[Features, Features]:
    if encoder is None:
        size = _pixel_size(original)
        return pixel_features(train, size), pixel_features(test, size)
    if cache is None:
        pair = (
            extract_features(encoder, train, **options),
            extract_features(encoder, test, **options),
        )
    else:
        pair = tuple(
            cached_features(encoder, x, cache / part, **options)
            for x, part in ((train, "train"), (test, "test"))
        )
    check_finite(*pair)
    return pair


def _pixel_size(encoder: nn.Module) -> int:
    return min(encoder.pretrained_cfg["input_size"][-1], 64)


def _too_many_pixels(encoder: nn.Module, train: Dataset) -> bool:
    size = 4 * 3 * _pixel_size(encoder) ** 2 * len(train)
    if size > PIXEL_BYTES:
        print(
            f"the baseline of raw pixels is left out: it would take {size / 2**30:.0f} GiB",
            file=sys.stderr,
        )
    return size > PIXEL_BYTES


def _run(
    name: str, train: Features, test: Features, *, seed: int, shots, clusters: int | None, device
) -> pd.DataFrame:
    if name == "knn":
        # Fewer images than neighbours: all of them vote, and the protocol says so
        k = min(K, len(train.y))
        protocol = KNN_PROTOCOL.replace(f"k{K}", f"k{k}")
        common = {
            "protocol": protocol,
            "metric": "accuracy",
            "seed": seed,
            "n_train": len(train.y),
            "n_test": len(test.y),
        }
        return tidy(
            [
                {**common, "block": block, "pool": pool, "value": right.float().mean().item()}
                for pool, hits in knn_hits(train, test, k=k, device=device).items()
                for block, right in zip(test.blocks, hits, strict=True)
            ]
        )
    if name == "linear":
        # Before labels decide what is held out
        check_labels(train.y, LABELLED[name], everywhere=True)
        val, rest = hold_out(train, seed)
        return linear_probe(rest, test, val=val, choose=len(train.x) > 1, seed=seed, device=device)
    if name == "low_shot":
        return low_shot(train, test, shots=shots, seed=seed, device=device)
    return (
        cluster(test, clusters=clusters, seed=seed) if name == "cluster" else effective_rank(test)
    )


def _labels(data: ImageDataset) -> Tensor:
    return torch.full((len(data),), -1) if data.labels is None else torch.from_numpy(data.labels)


def _check_labels(
    name: str, y: Tensor, test_y: Tensor, *, seed: int, shots, clusters: int | None
) -> None:
    """Raise now what the probe ``name`` would raise after the extraction."""
    if name in LABELLED:
        classes = check_labels(y, LABELLED[name], everywhere=name != "low_shot")
        check_test_labels(test_y, LABELLED[name])
        for shot in shots if name == "low_shot" else ():
            draw_shots(y, classes, shot, seed)
    if name == "cluster":
        number_of_clusters(test_y.numpy(), clusters)


def _random_twin(encoder: nn.Module) -> nn.Module:
    """The same architecture with fresh random weights."""
    twin = copy.deepcopy(encoder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if hasattr(twin, "init_weights"):
            twin.init_weights()
        else:
            for module in twin.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
                else:
                    for x in module.parameters(recurse=False):  # position embeddings, layer scales
                        nn.init.trunc_normal_(x, std=0.02)
    return twin


def _goes_on(folder: Path, settings: dict, resume: bool) -> bool:
    """Whether the finished probes in ``folder`` are kept; InputError where other files bear the
    report's names.
    """
    file = folder / "settings.json"
    # A run of notebooks has a manifest too
    checked = own_files(folder) if not _is_ours(file) else [folder / "manifest.json"]
    foreign = [old.name for old in checked if old.exists() and not _is_ours(old)]
    if foreign:
        raise InputError(
            f"{folder} holds {', '.join(foreign)}, which no report wrote: choose another folder with --out"
        )
    if not resume or not file.is_file():
        return False
    there = json.loads(file.read_text())
    different = [name for name, value in settings.items() if there.get(name) != value]
    if different:
        raise InputError(
            f"{folder} holds a report of other {', '.join(different)}: choose another folder or leave out --resume"
        )
    return True


def _is_ours(file: Path) -> bool:
    """Whether ``file`` is the settings or the manifest of a report."""
    try:
        return "weights_sha256" in json.loads(file.read_bytes())
    except (OSError, ValueError, TypeError):
        return False


def own_files(folder: Path) -> list[Path]:
    """Every file that a report may write, whether it is there or not."""
    rows = [_rows_file(folder, model, name) for model in MODELS for name in PROBES]
    names = (
        "report.csv",
        "report.md",
        "report.png",
        "report.pdf",
        "manifest.json",
        "settings.json",
    )
    return [*rows, *(folder / name for name in names)]


def _start_folder(folder: Path, settings: dict) -> None:
    for old in own_files(folder):
        old.unlink(missing_ok=True)
    write_json(settings, folder / "settings.json")


def _rows_file(folder: Path, model: str, name: str) -> Path:
    return folder / f"rows_{name}_{model.replace(' ', '_')}.csv"


def _write(table: pd.DataFrame, folder: Path, settings: dict, title: str) -> None:
    write_csv(table, folder / "report.csv")
    with atomic_file(folder / "report.md") as temporary:
        temporary.write_text(markdown(table, title))
    figures.use_style()
    figures.save_figure(
        figures.plot_report(summary(table), title=f"Block report: {title}"),
        folder / "report",
        table,
    )
    write_json({**environment(), **settings}, folder / "manifest.json")
