"""Notebooks in batch: shared models first, then one process per notebook through papermill."""

import hashlib
import itertools
import json
import os
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
import pandas as pd
import torch

from mimrefiner.batch import execute
from mimrefiner.batch.execute import end_with_parent, record_file, sha256
from mimrefiner.batch.jobs import Board, Job, LocalProcess, SlurmJob, check_slurm, run_jobs
from mimrefiner.batch.parameters import compare_parameters, declared_parameters, parse_seeds
from mimrefiner.data.datasets import data_hash
from mimrefiner.errors import InputError
from mimrefiner.files import (
    PACKAGE,
    atomic_file,
    check_writable,
    project_folder,
    write_csv,
    write_json,
)
from mimrefiner.study import presets, store
from mimrefiner.study.claims import CLAIM_COLUMNS, ROW_COLUMNS, claims_table
from mimrefiner.study.presets import Preset, load_preset
from mimrefiner.study.tables import environment, markdown_table, write_table

TRAIN_SHARED = (
    "import sys; from mimrefiner.batch.runner import train_shared; train_shared(*sys.argv[1:])"
)


@dataclass(frozen=True)
class Batch:
    """How notebooks are executed.

    Args:
        gpus: numbers of the GPUs to spread jobs over, one job on each; none: ``workers`` jobs at
            once without pinning.
        workers: jobs at once; on a CPU they share its cores.
        resume: skip notebooks that are done with the same source, parameters, code and data, and
            whose files are as they were.
        keep_going: after a failure, execute the notebooks that do not need what failed.
        timeout: seconds that one notebook may take; None: any.
        executor: "local" or "slurm" (``slurm`` then holds options for submitit, such as
            ``{"slurm_partition": "gpu"}``).
    """

    gpus: tuple[int, ...] = ()
    workers: int = 1
    resume: bool = False
    keep_going: bool = False
    timeout: float | None = None
    executor: str = "local"
    slurm: dict = field(default_factory=dict)


def run_notebooks(
    names: list[str],
    *,
    preset: str,
    seeds: str,
    out: Path,
    parameters: dict | None = None,
    batch: Batch | None = None,
) -> Path:
    """Train the models that notebooks share, execute each notebook in a process of its own, and
    collect rows and claims.

    Args:
        names: of notebooks, without suffix or by their number; none means all.
        preset, seeds, out: the parameters that every notebook has.
        parameters: further ones; a notebook that does not declare one raises before anything runs.
        batch: where and how; default one after the other.

    Returns:
        ``out``, which then holds notebooks/, figures/, tables/, results/, claims/, logs/,
        results.csv, claims.csv, claims.md and manifest.json.

    Raises:
        InputError: before any work for wrong names, parameters or options; at the end for notebooks
            that failed.
    """
    batch, parameters = batch or Batch(), parameters or {}
    base, seed_list, notebooks, out = (
        load_preset(preset),
        parse_seeds(seeds),
        find_notebooks(names),
        Path(out).resolve(),
    )
    check_batch(batch)
    if taken := {"preset", "seeds", "out"} & parameters.keys():
        raise InputError(
            f"give {', '.join(f'--{name}' for name in sorted(taken))} in place of -p {', '.join(sorted(taken))}"
        )
    check_writable(out)
    given = {"preset": preset, "seeds": seeds, "out": str(out), **parameters}
    for notebook in notebooks:
        compare_parameters(declared_parameters(notebook), given)
    common = _inputs_hash(base)
    here = environment()
    facts = {
        "parameters": {"preset": preset, "seeds": seeds, **parameters},
        "versions": here["versions"],
        "git_sha": here["git_sha"],
    }
    jobs, began = _model_jobs(base, seed_list, notebooks, out), time.monotonic()
    trained = tuple(job.name for job in jobs)
    for notebook in notebooks:
        key = hashlib.sha256(
            json.dumps([common, notebook.read_text(), preset, seeds, parameters]).encode()
        ).hexdigest()[:16]
        call = {
            "notebook": str(notebook),
            "out": str(out),
            "parameters": given,
            "facts": {"key": key, **facts},
        }
        command = [sys.executable, "-P", execute.__file__, json.dumps(call)]
        job = Job(
            notebook.stem, command, out / "logs" / f"{notebook.stem}.log", timeout=batch.timeout
        )
        job.needs = _needed(notebook, jobs[: len(trained)], batch)
        job.state = "skipped" if batch.resume and _is_done(out, notebook.stem, key) else "waiting"
        if reads_other_notebooks(notebook):  # they come first, and what they do anew makes it stale
            others = jobs[len(trained) :]
            job.needs += tuple(other.name for other in others)
            if any(other.state != "skipped" for other in others):
                job.state = "waiting"
        jobs.append(job)
    if all(job.state == "skipped" for job in jobs[len(trained) :]):
        jobs = jobs[len(trained) :]
    for job in jobs:
        if job.state == "waiting":
            record_file(out, job.name).unlink(missing_ok=True)
    board = Board(jobs, out / "logs" / "run.log")
    for job in (job for job in jobs if job.state == "skipped"):
        board.say(job, "skipped", "it is done, and nothing it depends on has changed")
    _start_jobs(jobs, board, batch, out)
    collect(out)
    records = _records(out)
    for name, record in records.items():  # on a cluster it is not that of this process
        record["device"] = ", ".join(
            pd.read_csv(out / "results" / f"{name}.csv")["device"].unique()
        )
    seconds = {name: record["seconds"] for name, record in records.items()}
    manifest = {
        **here,
        "preset": preset,
        "seeds": seeds,
        "parameters": parameters,
        "notebooks": records,
        "seconds": seconds,
    }
    write_json(manifest, out / "manifest.json")
    _raise_failures([job for job in jobs if job.state in ("failed", "not run")], out)
    print(f"\n{(out / 'claims.md').read_text()}")
    print(f"Done in {time.monotonic() - began:.0f} s.")
    for what, where in (
        ("notebooks", "notebooks"),
        ("figures", "figures"),
        ("tables", "tables"),
        ("rows", "results.csv"),
        ("claims", "claims.md"),
    ):
        print(f"  {what:10s} {os.path.relpath(out / where)}")
    return out


def check_batch(batch: Batch) -> None:
    """InputError for options that can not be met here."""
    if batch.executor == "slurm":
        check_slurm()
        if batch.gpus:
            raise InputError(
                "--gpus pins jobs on this machine; with --executor slurm ask for GPUs with --slurm gpus_per_node=1"
            )
    elif batch.executor != "local":
        raise InputError(f"--executor must be local or slurm, got {batch.executor!r}")
    elif batch.slurm:
        raise InputError(
            f"--slurm {', '.join(batch.slurm)} is for jobs on a cluster: add --executor slurm, or leave it out"
        )
    there = torch.cuda.device_count()
    if len(set(batch.gpus)) < len(batch.gpus) or any(not 0 <= gpu < there for gpu in batch.gpus):
        raise InputError(
            f"--gpus must be different numbers of the {there} GPUs here, got {','.join(map(str, batch.gpus))}"
        )
    if batch.workers < 1:
        raise InputError(f"--workers must be >= 1, got {batch.workers}")
    if batch.timeout is not None and batch.timeout <= 0:
        raise InputError(f"--timeout must be > 0 minutes, got {batch.timeout / 60:g}")


def shared_models(notebook: Path) -> list[str]:
    """The models of :data:`mimrefiner.study.store.MODELS` that a notebook's code asks the store
    for, solutions aside.
    """
    return [name for name in store.MODELS if re.search(rf"\bstore\.{name}\(", _code(notebook))]


def _code(notebook: Path) -> str:
    cells = nbformat.read(notebook, as_version=4).cells
    return "\n".join(
        c.source
        for c in cells
        if c.cell_type == "code" and "solution" not in c.metadata.get("tags", [])
    )


def reads_other_notebooks(notebook: Path) -> bool:
    """Whether a notebook's code reads the claims that others of the same run have written."""
    return 'run.out / "claims"' in _code(notebook)


def train_shared(model: str, preset: str, seed: str) -> None:
    """The body of a job's process that trains one of :data:`mimrefiner.study.store.MODELS`."""
    end_with_parent()
    os.environ["MIMREFINER_PROGRESS"] = "log"
    store.MODELS[model](load_preset(preset, int(seed)))


def find_notebooks(names: list[str]) -> list[Path]:
    """The notebooks called for, in order: all, or by full name or leading number."""
    folder = project_folder() / "notebooks"
    there = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not there:
        raise InputError("no notebooks here: run this from a checkout of the project")
    chosen = []
    for name in names:
        matches = [n for n in there if n.stem == Path(name).stem or n.stem.split("_")[0] == name]
        if not matches:
            raise InputError(
                f"unknown notebook {name!r}: choose from {', '.join(n.stem for n in there)}"
            )
        chosen += matches
    return chosen or there


def collect(out: Path) -> None:
    """Join the rows and claims of all notebooks in ``out`` that ended well."""
    for what, columns in (("results", ROW_COLUMNS), ("claims", CLAIM_COLUMNS)):
        frames = [pd.read_csv(out / what / f"{name}.csv") for name in _records(out)]
        frames = [frame for frame in frames if len(frame)]
        write_csv(
            pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=columns),
            out / f"{what}.csv",
        )
    claims = claims_table(pd.read_csv(out / "claims.csv"))
    write_table(claims, out / "tables" / "claims")
    with atomic_file(out / "claims.md") as temporary:
        temporary.write_text(markdown_table(claims))


def _model_jobs(
    preset: Preset, seeds: tuple[int, ...], notebooks: list[Path], out: Path
) -> list[Job]:
    """One job per seed and model that the notebooks share, where the store does not hold it yet;
    all need the pre-trained one.
    """
    asked = {model for notebook in notebooks for model in shared_models(notebook)}
    jobs: dict[str, Job] = {}
    for model, seed in itertools.product(store.MODELS, seeds):
        if model in asked and not store.is_stored(model, preset.with_seed(seed)):
            command = [sys.executable, "-c", TRAIN_SHARED, model, preset.name, str(seed)]
            name, first = f"{model}, seed {seed}", f"pretrained, seed {seed}"
            needs = (first,) if first in jobs else ()
            jobs[name] = Job(name, command, out / "logs" / f"{model}_seed{seed}.log", needs)
    return list(jobs.values())


def _needed(notebook: Path, models: list[Job], batch: Batch) -> tuple[str, ...]:
    """The jobs a notebook waits for: of the models it asks for, and, where workers share the cores,
    all pre-training, which takes them all.
    """
    asked = set(shared_models(notebook)) | ({"pretrained"} if batch.workers > 1 else set())
    return tuple(job.name for job in models if job.name.split(",")[0] in asked)


def _start_jobs(jobs: list[Job], board: Board, batch: Batch, out: Path) -> None:
    if batch.executor == "slurm":

        def start(job, slot):
            return SlurmJob(job, out / "logs" / "slurm", batch.slurm)

        slots = [None] * len(jobs)
    else:
        slots, cores = list(batch.gpus) or [None] * batch.workers, os.cpu_count() or 1
        shared = batch.workers > 1 and "OMP_NUM_THREADS" not in os.environ and not batch.gpus

        def start(job, slot):
            at_once = min(
                batch.workers, len(jobs) if job.needs else sum(not other.needs for other in jobs)
            )
            threads = {"OMP_NUM_THREADS": str(max(1, cores // at_once))} if shared else {}
            return LocalProcess(
                job, threads if slot is None else {"CUDA_VISIBLE_DEVICES": str(slot)}
            )

    run_jobs(jobs, start, slots, board, keep_going=batch.keep_going)


def _raise_failures(jobs: list[Job], out: Path) -> None:
    """Say what failed with the last lines of its log, then raise one line."""
    said = []
    for job in jobs:
        record = _records(out, "failed").get(job.name)
        what = (
            f"failed in cell {record['cell']}: {record['error']}"
            if record
            else f"{job.state}{job.why and f', {job.why}'}"
        )
        said.append(f"{job.name} {what}")
        if job.state == "failed":
            lines = "\n".join(f"    {line}" for line in job.last_lines(12))
            print(
                f"\n{job.name} {what}\n{lines}\n    (all of it: {os.path.relpath(job.log)})",
                file=sys.stderr,
            )
    if said:
        raise InputError(f"{'; '.join(said)}. What is done is kept: run the same with --resume")


def _inputs_hash(preset: Preset) -> str:
    """Hash of what every notebook depends on: the package's files, the preset's data, torch."""
    folder = PACKAGE
    digest = hashlib.sha256(torch.__version__.encode())
    for file in sorted(
        f for f in folder.rglob("*") if f.is_file() and "__pycache__" not in f.parts
    ):
        digest.update(f"{file.relative_to(folder)} {sha256(file)}\n".encode())
    for split in ("train", "test"):
        digest.update(data_hash(presets.load_split(preset, split)).encode())
    return digest.hexdigest()


def _is_done(out: Path, name: str, key: str) -> bool:
    record = _records(out).get(name)
    return (
        bool(record)
        and record["key"] == key
        and all(sha256(out / f) == sha for f, sha in record["files"].items())
    )


def _records(out: Path, state: str = "done") -> dict[str, dict]:
    """What the jobs of all notebooks in ``out`` have recorded, by name."""
    records = {
        file.stem: json.loads(file.read_text()) for file in sorted((out / "jobs").glob("*.json"))
    }
    return {name: record for name, record in records.items() if record["state"] == state}
