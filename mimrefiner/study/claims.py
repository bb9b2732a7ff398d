"""Result rows, claims and the comparison with the paper's numbers."""

import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from mimrefiner.files import write_csv
from mimrefiner.models.weights import sha256_of
from mimrefiner.probes.knn import KNN_PROTOCOL
from mimrefiner.study.intervals import Difference
from mimrefiner.study.presets import Preset
from mimrefiner.study.tables import count, device_name, git_sha

ROW_COLUMNS = (
    "run_id",
    "git_sha",
    "preset",
    "model",
    "weights_sha256",
    "dataset",
    "n_train",
    "n_test",
    "block",
    "pool",
    "protocol",
    "metric",
    "seed",
    "value",
    "unit",
    "seconds",
    "device",
)
CLAIM_COLUMNS = ("notebook", "claim", "measured", "verdict", "n_seeds", "n_test", "preset")
NOT_A_RESULT = ("run_id", "git_sha", "seconds")  # differ between two runs that agree


@dataclass
class Run:
    """One execution of a notebook or command: its folder, and the rows and claims it has made so
    far.

    Files: ``results/NAME.csv``, ``claims/NAME.csv`` and ``figures/NAME_*.{pdf,png,csv}`` under
    ``out``.
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
        own = {
            "run_id": self.run_id,
            "git_sha": git_sha(),
            "preset": self.preset.name,
            "seconds": seconds,
            "device": device_name(),
        }
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
        """Add one row per block; ``models``: name -> (encoder, hits), hits as in
        :func:`mimrefiner.knn_hits`.

        ``blocks``: the 0-based block of every row of hits where they are not all; ``protocol``,
            ``metric``, ``unit``: what was
        measured; a row of hits may also be one value; ``dataset``: where it is not the preset's.
        """
        for name, (encoder, hits) in models.items():
            sha = sha256_of(encoder)
            for block, right in zip(
                range(len(hits)) if blocks is None else blocks, hits, strict=True
            ):
                self.add(
                    model=name,
                    weights_sha256=sha,
                    dataset=dataset or self.preset.dataset,
                    n_train=n_train,
                    n_test=n_test,
                    block=block,
                    pool=pool,
                    protocol=protocol,
                    metric=metric,
                    seed=seed,
                    value=float(np.mean(np.asarray(right))),
                    unit=unit,
                )

    def add_table(
        self, rows: pd.DataFrame, *, unit: str = "share", dataset: str | None = None
    ) -> None:
        """Add the rows of a probe; ``rows``: columns model, weights_sha256 and those of the probes'
        tables; ``dataset``: where it is not the preset's.
        """
        columns = (
            "model",
            "weights_sha256",
            "n_train",
            "n_test",
            "block",
            "pool",
            "protocol",
            "metric",
            "seed",
            "value",
        )
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

        ``seen``: None is not decided at this scale; ``opposite``: not only not seen, but the other
            way round beyond its interval;
        ``n_seeds``: of the measurement, None for all of the run; ``n_test``: 0 where no test image
            was asked; ``preset``: of the
        measurement, where it is not the run's.
        """
        n_seeds = len(self.seeds) if n_seeds is None else n_seeds
        verdict = "opposite" if opposite else {True: "seen", False: "not seen", None: "open"}[seen]
        row = (self.name, claim, measured, verdict, n_seeds, n_test, preset or self.preset.name)
        self.claims.append(dict(zip(CLAIM_COLUMNS, row, strict=True)))
        asked = f"; {count(n_seeds, 'seed')}, {n_test} test images" if n_test else ""
        return f"{verdict.upper()}: {claim} ({measured}{asked})"

    def judge(self, claim: str, difference: Difference, *, n_test: int, text: str = "") -> str:
        """Record a claim that a difference decides and return it as one line; ``text`` comes before
        the measured difference.
        """
        return self.claim(
            claim,
            seen=difference.seen,
            opposite=difference.opposite,
            measured=f"{text}{difference}",
            n_test=n_test,
            n_seeds=len(difference.by_seed),
        )

    def table(self) -> pd.DataFrame:
        return pd.DataFrame(self.rows, columns=ROW_COLUMNS)

    def write(self) -> None:
        """Write rows and claims; called at the end of every notebook."""
        write_csv(self.table(), self.out / "results" / f"{self.name}.csv")
        write_csv(
            pd.DataFrame(self.claims, columns=CLAIM_COLUMNS),
            self.out / "claims" / f"{self.name}.csv",
        )
        print(
            f"{len(self.rows)} rows, {len(self.claims)} claims and the figures are in {_short(self.out)}"
        )


def block_rows(hits: dict[str, torch.Tensor], seed: int) -> pd.DataFrame:
    """Accuracy per block in the form the figures take: label, block, seed, value; ``hits``: label
    -> (blocks, images) bool.
    """
    rows = [
        {"label": label, "block": block, "seed": seed, "value": right.float().mean().item()}
        for label, blocks in hits.items()
        for block, right in enumerate(blocks)
    ]
    return pd.DataFrame(rows)


def claims_table(claims: pd.DataFrame) -> pd.DataFrame:
    """Claims as they are read: claim, measured, verdict, seeds, test images, notebook."""
    shown = claims[["claim", "measured", "verdict", "n_seeds", "n_test", "notebook"]]
    return shown.rename(columns={"n_seeds": "seeds", "n_test": "test images"})


def _short(path: Path) -> str:
    """``path`` seen from the working folder where that is shorter, so that notebooks carry no
    machine paths.
    """
    try:
        return str(path.resolve().relative_to(Path.cwd().resolve()))
    except ValueError:
        return f".../{path.name}"
