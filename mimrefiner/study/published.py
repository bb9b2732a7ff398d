"""Readers of what was measured beforehand and is committed in ``experiments/``."""

from pathlib import Path

import pandas as pd

from mimrefiner.files import project_folder


def experiments_folder() -> Path:
    """The folder of the committed rows, in the checkout."""
    return project_folder() / "experiments"


def study(name: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows and claims of the study ``name``, such as natural or real."""
    file = experiments_folder() / f"evidence_{name}.csv"
    return pd.read_csv(file), pd.read_csv(file.with_name(f"evidence_{name}_claims.csv"))


def evidence() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows and claims of the natural images: those of the GPU where there are any."""
    on_gpu = (experiments_folder() / "evidence_natural-gpu.csv").is_file()
    return study("natural-gpu" if on_gpu else "natural")


def ablation_rows(preset_name: str) -> pd.DataFrame:
    """The rows of the ablations of a preset; none where the file is missing."""
    file = experiments_folder() / f"ablations_{preset_name}.csv"
    return pd.read_csv(file) if file.is_file() else pd.DataFrame()
