"""Readers of what was measured beforehand and is committed in ``experiments/``."""

from pathlib import Path

import pandas as pd

from mimrefiner.files import project_folder


def experiments_folder() -> Path:
    """The folder of the committed rows, in the checkout."""
    return project_folder() / "experiments"


def evidence() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows and claims of the natural images: those of the GPU where there are any."""
    folder = experiments_folder()
    name = next(
        name for name in ("natural-gpu", "natural") if (folder / f"evidence_{name}.csv").is_file()
    )
    rows, claims = (pd.read_csv(folder / f"evidence_{name}{part}.csv") for part in ("", "_claims"))
    return rows, claims


def ablation_rows(preset_name: str) -> pd.DataFrame:
    """The rows of the ablations of a preset; none where the file is missing."""
    file = experiments_folder() / f"ablations_{preset_name}.csv"
    return pd.read_csv(file) if file.is_file() else pd.DataFrame()
