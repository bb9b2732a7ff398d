"""Result rows, claims and the comparison with the paper's numbers."""

import itertools
import logging
import time
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch

from mimrefiner.files import write_csv
from mimrefiner.models.weights import sha256_of
from mimrefiner.probes.knn import hits_to_rows
from mimrefiner.probes.protocols import KNN, Protocol
from mimrefiner.study.intervals import Difference
from mimrefiner.study.lessons import verdicts
from mimrefiner.study.presets import Preset
from mimrefiner.study.tables import count, device_name, git_sha

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

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
CLAIM_COLUMNS = (
    "notebook",
    "claim",
    "model",
    "dataset",
    "pool",
    "probe",
    "against",
    "measured",
    "difference",  # in points, as are the next two: the interval that decides
    "low",
    "high",
    "by_seed",  # differences with blanks between them
    "verdict",
    "n_seeds",
    "n_test",
    "preset",
)
NOT_A_RESULT = ("run_id", "git_sha", "seconds")  # differ between two runs that agree
PROBE_COLUMNS = (
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


@dataclass(frozen=True)
class About:
    """What a claim is about, so that claims can be grouped; "" where a field does not apply.

    Attributes:
        model: the model or recipe that the claim speaks of.
        dataset: the data set that was measured on; the record's own where it is empty.
        pool: the pooling of the features.
        probe: what measured: the label of a protocol (:mod:`mimrefiner.probes.protocols`).
        against: what the model is compared with.
    """

    model: str = ""
    dataset: str = ""
    pool: str = ""
    probe: str = ""
    against: str = ""


NOTHING_SAID = About()


@dataclass
class Record:
    """One execution of a notebook or command: its folder, and the rows and claims made so far.

    It writes ``results/NAME.csv`` and ``claims/NAME.csv`` under ``out``, where figures lie too.
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
        """Add one result row: every column of ROW_COLUMNS that the record does not know itself.

        ``seconds`` is the wall time from the start of the record to this row.
        """
        own = {
            "run_id": self.run_id,
            "git_sha": git_sha(),
            "preset": self.preset.name,
            "seconds": round(time.monotonic() - self.began, 1),
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
        protocol: Protocol = KNN,
        dataset: str | None = None,
    ) -> None:
        """Add one row per model and block.

        Args:
            models: name -> (encoder, hits). The hits are those of :func:`mimrefiner.knn_hits`,
                (blocks, images), or one value per block; a dictionary gives them by 0-based block.
            pool, seed, n_train, n_test: the columns of these names.
            protocol: how it was measured; its first metric and its unit stand in the rows.
            dataset: the data set, where it differs from the preset's.
        """
        common = {
            "dataset": dataset or self.preset.dataset,
            "n_train": n_train,
            "n_test": n_test,
            "pool": pool,
            "protocol": protocol.name,
            "metric": protocol.metrics[0],
            "seed": seed,
            "unit": protocol.unit,
        }
        for name, (encoder, hits) in models.items():
            known = {"model": name, "weights_sha256": sha256_of(encoder), **common}
            blocks, values = (hits, hits.values()) if isinstance(hits, dict) else (None, hits)
            for row in hits_to_rows(values, blocks=blocks, **known):
                self.add(**row)

    def add_table(
        self, rows: pd.DataFrame, *, unit: str = "share", dataset: str | None = None
    ) -> None:
        """Add the rows of a probe.

        Args:
            rows: the columns of the probes' tables, model and weights_sha256.
            unit: the unit of the values.
            dataset: the data set, where it differs from the preset's.
        """
        for row in rows[list(PROBE_COLUMNS)].to_dict("records"):
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
        about: About = NOTHING_SAID,
    ) -> str:
        """Record what was measured about a claim of the paper and return it as one line.

        Args:
            claim: the claim as a sentence.
            seen: whether it was seen; None where that stays open at this scale.
            measured: what was measured, in words.
            n_test: the number of test images; 0 where none was asked.
            opposite: whether the opposite was seen, beyond its interval.
            n_seeds: how many seeds were measured; None takes all of the record.
            about: what the claim is about.
        """
        verdict = "opposite" if opposite else {True: "seen", False: "not seen", None: "open"}[seen]
        row = {
            "claim": claim,
            **asdict(about),
            "dataset": about.dataset or self.preset.dataset,
            "measured": measured,
            "verdict": verdict,
            "n_seeds": len(self.seeds) if n_seeds is None else n_seeds,
            "n_test": n_test,
            "preset": self.preset.name,
        }
        return self._keep(row)

    def judge(
        self,
        claim: str,
        difference: Difference,
        *,
        n_test: int,
        text: str = "",
        about: About = NOTHING_SAID,
    ) -> str:
        """Record a claim that a difference decides and return it as one line.

        Args:
            claim, n_test, about: as for :meth:`claim`.
            difference: decides the verdict and stands in the line.
            text: comes before the difference.
        """
        line = self.claim(
            claim,
            seen=difference.seen,
            opposite=difference.opposite,
            measured=f"{text}{difference}",
            n_test=n_test,
            n_seeds=len(difference.by_seed),
            about=about,
        )
        self.claims[-1] |= difference.columns()
        return line

    def repeat(self, claims: pd.DataFrame) -> list[str]:
        """Record claims that were measured elsewhere and return one line each.

        Args:
            claims: columns CLAIM_COLUMNS; the notebook's name becomes this record's.
        """
        rows = claims.astype(object).where(claims.notna(), "").to_dict("records")
        return [self._keep({**row, "claim": full_sentence(row)}) for row in rows]

    def _keep(self, row: dict) -> str:
        row = {**row, "notebook": self.name}
        self.claims.append({column: row.get(column) for column in CLAIM_COLUMNS})
        seeds, images = count(row["n_seeds"], "seed"), row["n_test"]
        asked = f"; {seeds}, {images} test images" if images else ""
        return f"{row['verdict'].upper()}: {row['claim']} ({row['measured']}{asked})"

    def scaled(self, n: int) -> int:
        """``n`` epochs, images and the like; a twentieth where a run only shows that it runs.

        >>> from mimrefiner.study.presets import load_preset
        >>> [Record("a", load_preset(name), (0,), Path()).scaled(50) for name in ("tiny", "smoke")]
        [50, 2]
        """
        return max(1, n // 20) if self.preset.name == "smoke" else n

    def finish(self, figures: dict[str, tuple["Figure", pd.DataFrame]]) -> None:
        """Save the figures, write rows and claims, and show the claims: a lesson's last line.

        Args:
            figures: name -> (figure, the data it was drawn from); the file's name begins with the
                number of the lesson.
        """
        from IPython.display import display

        from mimrefiner.study.figures import save_figure

        for name, (figure, data) in figures.items():
            save_figure(figure, self.out / "figures" / f"{self.name[:2]}_{name}", data)
        if self.claims:
            display(verdicts(self.claims_table()))
        self.write()

    def table(self) -> pd.DataFrame:
        """The rows so far, with the columns ROW_COLUMNS."""
        return pd.DataFrame(self.rows, columns=ROW_COLUMNS)

    def claims_table(self) -> pd.DataFrame:
        """The claims so far, with the columns CLAIM_COLUMNS."""
        return pd.DataFrame(self.claims, columns=CLAIM_COLUMNS)

    def write(self) -> None:
        """Write rows and claims; every notebook ends with it."""
        write_csv(self.table(), self.out / "results" / f"{self.name}.csv")
        write_csv(self.claims_table(), self.out / "claims" / f"{self.name}.csv")
        counts = len(self.rows), len(self.claims)
        logger.info("%d rows, %d claims and the figures are in %s", *counts, _short(self.out))


def block_rows(hits: dict[str, torch.Tensor], seed: int) -> pd.DataFrame:
    """Accuracy per block in the form that figures take: label, block, seed, value.

    >>> block_rows({"MAE": torch.tensor([[True, False], [True, True]])}, 0)["value"].tolist()
    [0.5, 1.0]

    Args:
        hits: label -> which images are right, (blocks, images) bool.
        seed: the column of this name.
    """
    rows = [hits_to_rows(right, label=label, seed=seed) for label, right in hits.items()]
    return pd.DataFrame(itertools.chain(*rows), columns=["label", "block", "seed", "value"])


def full_sentence(claim: dict) -> str:
    """A claim's sentence with its model, data set and pooling behind it.

    >>> full_sentence({"claim": "it helps", "model": "MAE", "dataset": "digits", "pool": ""})
    'it helps (MAE, digits)'
    """
    about = [claim[name] for name in ("model", "dataset", "pool") if claim[name]]
    return f"{claim['claim']} ({', '.join(about)})"


def claims_table(claims: pd.DataFrame) -> pd.DataFrame:
    """Claims as they are read: claim, measured, verdict, seeds, test images, notebook.

    Earlier measurements show the interval of the mean over seeds; where that excludes zero and a
    single seed's does not, the verdict says so.
    """
    shown = claims[["claim", "measured", "verdict", "n_seeds", "n_test", "notebook"]].copy()
    low, high = (pd.to_numeric(claims[name]) for name in ("low", "high"))
    excludes_zero = (low > 0) | (high < 0)
    shown.loc[excludes_zero & (claims["verdict"] == "not seen"), "verdict"] = (
        "not seen: not in every seed"
    )
    return shown.rename(columns={"n_seeds": "seeds", "n_test": "test images"})


def _short(path: Path) -> str:
    """``path`` seen from the working folder, else its name, so that notebooks show no machine."""
    try:
        return str(path.resolve().relative_to(Path.cwd().resolve()))
    except ValueError:
        return f".../{path.name}"
