"""Tables as csv, Markdown and LaTeX, and how numbers, versions and machines are written in them."""

import functools
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from mimrefiner.files import CHECKOUT, atomic_file, write_csv


def write_table(frame: pd.DataFrame, path: Path, *, printed: Sequence[str] | None = None) -> None:
    """Write ``frame`` without its index as ``path``.csv, .md and .tex (LaTeX, booktabs).

    Args:
        frame: the table.
        path: the files' path without suffix.
        printed: the columns that a page has room for, where the table is long; LaTeX then breaks it
            over pages (longtable).
    """
    write_csv(frame, path.with_suffix(".csv"))
    shown = frame if printed is None else frame[list(printed)]
    form = {}
    if printed is not None:
        # These break into lines
        wide = [shown[column].astype(str).str.len().max() > 20 for column in shown]
        form = {
            "longtable": True,
            "column_format": "".join(r"p{0.2\linewidth}" if w else "l" for w in wide),
        }
    latex = shown.to_latex(index=False, escape=True, na_rep="", float_format="%.4g", **form)
    text = {".md": markdown_table(frame), ".tex": latex}
    for suffix, table in text.items():
        with atomic_file(path.with_suffix(suffix)) as temporary:
            temporary.write_text(table, encoding="utf-8")


def markdown_table(frame: pd.DataFrame) -> str:
    """``frame`` without its index as Markdown; missing values are empty.

    >>> print(markdown_table(pd.DataFrame({"model": ["MAE"], "k-NN": [0.5], "sd": [None]})), end="")
    | model | k-NN | sd |
    | --- | --- | --- |
    | MAE | 0.5 |  |
    """
    cells = [[_cell(value) for value in row] for row in frame.itertuples(index=False)]
    lines = [list(frame.columns), ["---"] * len(frame.columns), *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(value) -> str:
    if isinstance(value, str):
        return value.replace("|", "\\|")
    return "" if pd.isna(value) else f"{value:.4g}" if isinstance(value, float) else str(value)


def count(n: int, noun: str) -> str:
    """A number with its noun.

    >>> count(1, "seed"), count(3, "seed")
    ('1 seed', '3 seeds')
    """
    return f"{n} {noun}" + ("s" if n != 1 else "")


def collected(folder: Path, columns: Sequence[str]) -> pd.DataFrame:
    """What the notebooks of a run have written into one of its folders, as one table.

    >>> collected(Path("nowhere"), ["claim", "verdict"]).columns.tolist()
    ['claim', 'verdict']
    """
    parts = [pd.read_csv(file) for file in sorted(folder.glob("[0-9][0-9]_*.csv"))]
    parts = [part for part in parts if len(part)]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=list(columns))


def mean_sd(values) -> str:
    """Mean and standard deviation over seeds as text in percent; one seed has no deviation.

    >>> mean_sd([0.5, 0.6]), mean_sd([0.5])
    ('55.0 ± 7.1', '50.0')
    """
    values = 100 * np.asarray(values, float)
    spread = f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""
    return f"{values.mean():.1f}{spread}"


PACKAGES = (
    "mimrefiner",
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "scikit-learn",
    "pandas",
    "papermill",
)


def environment() -> dict:
    """Versions and hardware for a manifest; nothing that names the machine or its folders."""
    memory = None
    if hasattr(os, "sysconf"):
        memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    return {
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "git_sha": git_sha(),
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": memory,
    }


def _processor() -> str:
    """The processor's model where the system tells it, else its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


@functools.cache
def git_sha() -> str:
    """The commit of the checkout that holds this package; "" outside one.

    It ends in "-dirty" where files are changed.
    """
    if not (CHECKOUT / ".git").exists():
        return ""
    try:
        sha = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "-uno")
    except (OSError, subprocess.CalledProcessError):
        return ""
    return sha + ("-dirty" if changed else "")


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=CHECKOUT, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@functools.cache
def device_name() -> str:
    """The GPU's name, or the processor's architecture and thread count."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU ({platform.machine()}, {count(torch.get_num_threads(), 'thread')})"
