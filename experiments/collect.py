"""Collect a study of :mod:`experiments.trials`: its rows, trainings and choices, and its claims.

What is measured so far under FOLDER becomes ``evidence_NAME.csv`` beside this file, with
``_claims``, ``_training``, ``_history`` and ``_choice``; the page of results and a notebook show
them. It may be called again whenever more is finished::

    python -m experiments.collect FOLDER --name real --called "ViT-S/14"
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from experiments import measure
from experiments.claims import (
    BEST,
    LAST,
    MORE_PRETRAINING,
    PIXELS,
    REFINED,
    Claim,
    Found,
    Recipe,
    Side,
    judge,
)
from experiments.measure import Measured
from mimrefiner.data.datasets import short_name
from mimrefiner.errors import InputError
from mimrefiner.files import write_csv
from mimrefiner.probes.protocols import KMEANS, LINEAR, SHOTS, Protocol, low_shot
from mimrefiner.study.claims import Record
from mimrefiner.study.presets import load_preset

HERE = Path(__file__).parent
MASKED = Side("as much masked pre-training", "{recipe} masked")
SPEAKING = {  # trial -> what refinement does better if the trial's change matters
    "one head": "a head on each of the last four blocks beats one on the last",
    "placed heads": "heads on the last third beat heads placed by measurement",
    "random blocks": "heads on the last third beat heads on random blocks",
    "own view": "nearest neighbours beat the image's own view",
    "no stage 2": "training the heads first helps",
    "colours kept": "changing the colours of views helps",
    "published pairing": "the intended pairing of views beats the published one",
    "negatives swapped": "negatives that are no neighbours beat those that are",
    "labels": "refinement beats as much fine-tuning with labels",
}


def claims() -> list[Claim]:
    """Who is compared with whom; what was not measured is left out later."""
    rows = []
    for pool in ("cls", "mean"):
        rows += [
            Claim("the best block for k-NN beats the last one", BEST, LAST, pool),
            Claim("the best pre-trained block beats raw pixels", BEST, PIXELS, pool),
            Claim("refinement lifts the last block", REFINED, LAST, pool),
            Claim("the refined last block beats the best block before", REFINED, BEST, pool),
            Claim("the refined last block beats raw pixels", REFINED, PIXELS, pool),
            Claim(MORE_PRETRAINING, REFINED, MASKED, pool),
        ]
        for trial, text in SPEAKING.items():
            rows.append(Claim(text, REFINED, Side(trial, f"{{recipe}} {trial}"), pool))
    few = [low_shot(shot) for shot in SHOTS]
    probes: list[tuple[Protocol, str]] = [(LINEAR, "linear probe accuracy")]
    probes += [(protocol, f"{protocol.label} accuracy") for protocol in few]
    probes += [(KMEANS, "cluster accuracy")]
    more = "refinement raises more than as much masked pre-training"
    return rows + [
        Claim(f"{text}: {what} of the last block", REFINED, theirs, "cls", protocol)
        for protocol, what in probes
        for text, theirs in (("refinement raises", LAST), (more, MASKED))
    ]


def measured(folder: Path, name: str) -> tuple[Found, pd.DataFrame]:
    """What the trials under ``folder`` have measured: as claims read it, and all rows.

    Args:
        folder: of a :class:`experiments.trials.Study`.
        name: the encoder's; the models are called ``name``, ``name refined``, ``name masked``...

    Raises:
        InputError: nothing was measured before refinement.
    """
    found, tables = {}, []
    for file in sorted((folder / "rows").glob("*.npz")):
        table = pd.read_csv(file.with_suffix(".csv"))
        tables.append(table)
        trial, seed = table["model"].iloc[0], int(file.stem.rpartition("-")[2])
        model = {"before": name, "raw pixels": trial}.get(trial, f"{name} {trial}")
        with np.load(file) as arrays:
            hits, best = {}, {}
            for key, values in arrays.items():
                if key.startswith("best "):
                    best[tuple(key.split(" ")[1:])] = int(values)
                else:
                    shares = values if values.dtype == bool else values / measure.DRAWS
                    hits[tuple(key.split(" ", 2))] = torch.from_numpy(shares)
        found[model, seed] = Measured(table.to_dict("records"), hits, best)
    if (name, 0) not in found:
        raise InputError(f"{folder / 'rows'} has no before-0.npz: measure the trial before first")
    return found, pd.concat(tables, ignore_index=True)


def judged(found: Found, name: str) -> pd.DataFrame:
    """The claims that the measurements can answer, data set by data set."""
    seeds = sorted(seed for model, seed in found if model == f"{name} refined")
    preset = load_preset("natural")  # a record asks for one; nothing of it is shown
    record, recipe = Record("evidence", preset, (0,), Path()), Recipe(name, preset, tuple(seeds))
    for data in dict.fromkeys(key[0] for key in found[name, 0].hits):
        for claim in claims():
            judge(claim, found, recipe, data, record)
    return record.claims_table()


def trainings(folder: Path) -> Iterator[tuple[dict, pd.DataFrame]]:
    """Facts and history of every finished training under ``folder``."""
    for file in sorted((folder / "runs").glob("*/manifest.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        settings, facts = content["settings"], content["facts"]
        known = {"training": settings["trial"], "seed": settings["seed"]}
        row = {
            **known,
            "TFLOP": round(facts["flops"] / 1e12, 1),
            "minutes": round(facts["seconds"] / 60),
            "weights_sha256": facts["weights_sha256"],
            "git_sha": facts["git_sha"],
            "settings": json.dumps(facts["trained_with"]),
        }
        history = pd.read_csv(file.parent / "history.csv")
        yield row, history.assign(**known, weights_sha256=facts["weights_sha256"])


def collect(folder: Path, name: str, called: str) -> None:
    """Write the five tables of the study under ``folder``."""
    found, rows = measured(folder, called)
    done = list(trainings(folder))
    tables = {
        "": rows.assign(dataset=rows["dataset"].map(short_name)),
        "_claims": judged(found, called),
        "_training": pd.DataFrame([row for row, _ in done]),
        "_history": pd.concat([_short(history) for _, history in done]),
    }
    if (folder / "rows" / "choice.csv").is_file():
        tables["_choice"] = pd.read_csv(folder / "rows" / "choice.csv")
    for part, table in tables.items():
        write_csv(table, HERE / f"evidence_{name}{part}.csv")


def _short(history: pd.DataFrame) -> pd.DataFrame:
    """Numbers with five digits, also those of a learning rate of 1e-6."""
    numbers = history.select_dtypes("float").columns
    history[numbers] = history[numbers].map(lambda x: float(f"{x:.5g}"))
    return history


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m experiments.collect", description=__doc__.splitlines()[0]
    )
    parser.add_argument("folder", type=Path, help="the --out of the trials")
    parser.add_argument("--name", required=True, help="of the tables, such as real")
    parser.add_argument("--called", required=True, help="what claims call the encoder")
    args = parser.parse_args()
    try:
        collect(args.folder, args.name, args.called)
    except InputError as error:
        sys.exit(f"collect: error: {error}")


if __name__ == "__main__":
    main()
