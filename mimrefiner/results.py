"""Result rows, claims and the comparison with the paper's numbers."""

import functools
import json
import os
import platform
import re
import subprocess
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from mimrefiner.checkpoint import atomic_file, sha256_of
from mimrefiner.config import Preset
from mimrefiner.intervals import Difference

ROW_COLUMNS = (
    "run_id", "git_sha", "preset", "model", "weights_sha256", "dataset", "n_train", "n_test", "block", "pool", "protocol",
    "metric", "seed", "value", "unit", "seconds", "device",
)  # fmt: skip
KNN_PROTOCOL = "knn_k10_t0.07_standardized"
CLAIM_COLUMNS = ("notebook", "claim", "measured", "verdict", "n_seeds", "n_test", "preset")
NOT_A_RESULT = ("run_id", "git_sha", "seconds")  # differ between two runs that agree
PAPER_VALUES = Path(__file__).parent / "assets" / "paper_values.csv"


@dataclass
class Run:
    """One execution of a notebook or command: its folder, and the rows and claims it has made so far.

    Files: ``results/NAME.csv``, ``claims/NAME.csv`` and ``figures/NAME_*.{pdf,png,csv}`` under ``out``.
    """

    name: str
    preset: Preset
    seeds: tuple[int, ...]
    out: Path
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    rows: list[dict] = field(default_factory=list)
    claims: list[dict] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def presets(self) -> list[tuple[int, Preset]]:
        """(seed, the preset with that seed) for every seed."""
        return [(seed, self.preset.with_seed(seed)) for seed in self.seeds]

    def add(self, **values) -> None:
        """Add one result row; every column of ROW_COLUMNS that is not the run's own must be given.

        ``seconds`` is the wall time from the start of the run to this row.
        """
        seconds = round(time.monotonic() - self.began, 1)
        own = {"run_id": self.run_id, "git_sha": git_sha(), "preset": self.preset.name, "seconds": seconds, "device": device_name()}
        row = {**own, **values}
        if set(row) != set(ROW_COLUMNS):
            raise ValueError(f"expected the columns {ROW_COLUMNS}, got {sorted(row)}")
        self.rows.append({column: row[column] for column in ROW_COLUMNS})

    def add_blocks(
        self,
        models: dict,
        pool: str,
        seed: int,
        n_train: int,
        n_test: int,
        *,
        blocks=None,
        protocol=KNN_PROTOCOL,
        metric="accuracy",
        unit="share",
        dataset: str | None = None,
    ) -> None:
        """Add one row per block; ``models``: name -> (encoder, hits), hits as in :func:`mimrefiner.knn_hits`.

        ``blocks``: the 0-based block of every row of hits where they are not all; ``protocol``, ``metric``, ``unit``: what was
        measured; a row of hits may also be one value; ``dataset``: where it is not the preset's.
        """
        for name, (encoder, hits) in models.items():
            sha = sha256_of(encoder)
            for block, right in zip(range(len(hits)) if blocks is None else blocks, hits, strict=True):
                self.add(
                    model=name, weights_sha256=sha, dataset=dataset or self.preset.dataset, n_train=n_train, n_test=n_test,
                    block=block, pool=pool, protocol=protocol, metric=metric, seed=seed,
                    value=float(np.mean(np.asarray(right))), unit=unit,
                )  # fmt: skip

    def add_table(self, rows: pd.DataFrame, *, unit: str = "share", dataset: str | None = None) -> None:
        """Add the rows of a probe; ``rows``: columns model, weights_sha256 and those of the probes' tables; ``dataset``: where
        it is not the preset's."""
        columns = ("model", "weights_sha256", "n_train", "n_test", "block", "pool", "protocol", "metric", "seed", "value")
        for row in rows[list(columns)].to_dict("records"):
            self.add(dataset=dataset or self.preset.dataset, unit=unit, **row)

    def claim(
        self,
        claim: str,
        *,
        seen: bool | None,
        measured: str,
        n_test: int,
        opposite: bool = False,
        n_seeds: int | None = None,
        preset: str | None = None,
    ) -> str:
        """Record what was measured about a claim of the paper and return it as one line.

        ``seen``: None is not decided at this scale; ``opposite``: not only not seen, but the other way round beyond its interval;
        ``n_seeds``: of the measurement, None for all of the run; ``n_test``: 0 where no test image was asked; ``preset``: of the
        measurement, where it is not the run's.
        """
        n_seeds = len(self.seeds) if n_seeds is None else n_seeds
        verdict = "opposite" if opposite else {True: "seen", False: "not seen", None: "open"}[seen]
        row = (self.name, claim, measured, verdict, n_seeds, n_test, preset or self.preset.name)
        self.claims.append(dict(zip(CLAIM_COLUMNS, row, strict=True)))
        asked = f"; {count(n_seeds, 'seed')}, {n_test} test images" if n_test else ""
        return f"{verdict.upper()}: {claim} ({measured}{asked})"

    def judge(self, claim: str, difference: Difference, *, n_test: int, text: str = "") -> str:
        """Record a claim that a difference decides and return it as one line; ``text`` comes before the measured difference."""
        return self.claim(
            claim, seen=difference.seen, opposite=difference.opposite, measured=f"{text}{difference}", n_test=n_test,
            n_seeds=len(difference.by_seed),
        )  # fmt: skip

    def table(self) -> pd.DataFrame:
        return pd.DataFrame(self.rows, columns=ROW_COLUMNS)

    def write(self) -> None:
        """Write rows and claims; called at the end of every notebook."""
        write_csv(self.table(), self.out / "results" / f"{self.name}.csv")
        write_csv(pd.DataFrame(self.claims, columns=CLAIM_COLUMNS), self.out / "claims" / f"{self.name}.csv")
        print(f"{len(self.rows)} rows, {len(self.claims)} claims and the figures are in {_short(self.out)}")


def block_rows(hits: dict[str, torch.Tensor], seed: int) -> pd.DataFrame:
    """Accuracy per block in the form the figures take: label, block, seed, value; ``hits``: label -> (blocks, images) bool."""
    rows = [
        {"label": label, "block": block, "seed": seed, "value": right.float().mean().item()}
        for label, blocks in hits.items()
        for block, right in enumerate(blocks)
    ]
    return pd.DataFrame(rows)


def write_csv(frame: pd.DataFrame, path: Path) -> None:
    """Write ``frame`` without its index, whole or not at all."""
    with atomic_file(path) as temporary:
        frame.to_csv(temporary, index=False)


def write_table(frame: pd.DataFrame, path: Path, *, printed: Sequence[str] | None = None) -> None:
    """Write ``frame`` without its index as ``path``.csv, .md and .tex (LaTeX, booktabs).

    ``printed``: the columns that a page has room for, where the table is long: LaTeX then breaks it over pages (longtable).
    """
    write_csv(frame, path.with_suffix(".csv"))
    shown = frame if printed is None else frame[list(printed)]
    form = {}
    if printed is not None:
        wide = [shown[column].astype(str).str.len().max() > 20 for column in shown]  # these break into lines
        form = {"longtable": True, "column_format": "".join(r"p{0.2\linewidth}" if w else "l" for w in wide)}
    latex = shown.to_latex(index=False, escape=True, na_rep="", float_format="%.4g", **form)
    text = {".md": markdown_table(frame), ".tex": latex}
    for suffix, table in text.items():
        with atomic_file(path.with_suffix(suffix)) as temporary:
            temporary.write_text(table)


def markdown_table(frame: pd.DataFrame) -> str:
    """``frame`` without its index as Markdown; missing values are empty."""
    cells = [[_cell(value) for value in row] for row in frame.itertuples(index=False)]
    lines = [list(frame.columns), ["---"] * len(frame.columns), *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(value) -> str:
    if isinstance(value, str):
        return value.replace("|", "\\|")
    return "" if pd.isna(value) else f"{value:.4g}" if isinstance(value, float) else str(value)


def count(n: int, noun: str) -> str:
    """ "1 seed", "3 seeds"."""
    return f"{n} {noun}" + ("s" if n != 1 else "")


def readable(text: str) -> str:
    """Names of protocols in ``text`` as people say them: "logistic_1shot" is "1-shot", "logistic_0.01" "1 %", "knn" "k-NN"."""
    text = re.sub(r"logistic_(\d+)shot", r"\1-shot", text)
    text = re.sub(r"logistic_(0\.\d+)", lambda share: f"{100 * float(share[1]):g} %", text)
    text = re.sub(r"\blinear(_\w+)?\b", "linear probe", text)
    return re.sub(r"\bknn(_k\w+(\.\w+)?)?\b", "k-NN", text).replace("kmeans", "k-means")


def mean_sd(values) -> str:
    """Mean and standard deviation over seeds as text (percent); the deviation is left out for one seed."""
    values = 100 * np.asarray(values, float)
    return f"{values.mean():.1f}" if len(values) == 1 else f"{values.mean():.1f} ± {values.std(ddof=1):.1f}"


def paper_values() -> pd.DataFrame:
    """The published numbers, with source and confidence, one per row."""
    return pd.read_csv(PAPER_VALUES)


def compare(measured: pd.DataFrame, pairs: dict[str, str] | None = None) -> pd.DataFrame:
    """Every published number beside what was measured; a missing measurement stays empty, nothing is copied across.

    Args:
        measured: result rows with a column ``paper_id`` that says which paper row they measure
            ("model|backbone|dataset|protocol|metric") and one row per seed; rows without one are passed over.
        pairs: reasons why a measurement is not comparable, by paper_id.

    Returns:
        The paper's rows with measured mean, sd, n_seeds, difference, comparable ("yes", "no" or empty) and why_not.
    """
    paper = paper_values()
    keys = ["model", "backbone", "dataset", "protocol", "metric"]
    paper["paper_id"] = paper[keys].fillna("").agg("|".join, axis=1)
    if "paper_id" in measured and len(measured):
        summary = measured.groupby("paper_id")["value"].agg(measured="mean", sd="std", n_seeds="size").reset_index()
    else:
        summary = pd.DataFrame(columns=["paper_id", "measured", "sd", "n_seeds"])
    table = paper.merge(summary, on="paper_id", how="left")
    table["difference"] = table["measured"].astype(float) - table["value"]
    reasons = pairs or {}
    table["why_not"] = table["paper_id"].map(reasons).where(table["measured"].notna(), "").fillna("")
    table["comparable"] = np.where(table["measured"].isna(), "", np.where(table["why_not"] == "", "yes", "no"))
    return table


def claims_table(claims: pd.DataFrame) -> pd.DataFrame:
    """Claims as they are read: claim, measured, verdict, seeds, test images, notebook."""
    shown = claims[["claim", "measured", "verdict", "n_seeds", "n_test", "notebook"]]
    return shown.rename(columns={"n_seeds": "seeds", "n_test": "test images"})


def environment() -> dict:
    """Versions and hardware for a manifest; nothing that names the machine or its folders."""
    from mimrefiner import __version__  # late: the package imports this module

    names = ("torch", "torchvision", "timm", "numpy", "scikit-learn", "pandas", "papermill")
    return {
        "python": platform.python_version(),
        "versions": {"mimrefiner": __version__, **{name: version(name) for name in names}},
        "git_sha": git_sha(),
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30) if hasattr(os, "sysconf") else None,
    }


def _processor() -> str:
    """The processor's model where the system tells it, else its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


@functools.cache
def git_sha() -> str:
    """Commit of the checkout this package lies in, "-dirty" behind it where files are changed; "" outside one."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return ""
    try:
        sha = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return sha.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")


@functools.cache
def device_name() -> str:
    """The GPU's name, or the processor's architecture and thread count."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU ({platform.machine()}, {count(torch.get_num_threads(), 'thread')})"


def write_json(value: dict, path: Path) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, default=str) + "\n")


def _short(path: Path) -> str:
    """``path`` seen from the working folder where that is shorter, so that notebooks carry no machine paths."""
    try:
        return str(path.resolve().relative_to(Path.cwd().resolve()))
    except ValueError:
        return f".../{path.name}"
