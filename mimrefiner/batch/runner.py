"""Notebooks in batch: the models they share first, then one process per notebook."""

import hashlib
import itertools
import json
import os
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from mimrefiner.batch.execute import end_with_parent, entry, failure_file
from mimrefiner.batch.jobs import Board, Job, LocalProcess, SlurmJob, check_slurm, run_jobs
from mimrefiner.batch.parameters import (
    compare_parameters,
    declared_needs,
    declared_parameters,
    parse_seeds,
)
from mimrefiner.data.datasets import data_hash
from mimrefiner.errors import InputError, one_of
from mimrefiner.files import (
    PACKAGE,
    Entry,
    atomic_file,
    check_writable,
    key_of,
    project_folder,
    sha256_of_file,
    write_csv,
    write_json,
)
from mimrefiner.notices import show_notices
from mimrefiner.study import presets, store
from mimrefiner.study.claims import CLAIM_COLUMNS, ROW_COLUMNS, claims_table
from mimrefiner.study.presets import Preset, load_preset
from mimrefiner.study.tables import environment, markdown_table, write_table

EXECUTE = (sys.executable, "-m", "mimrefiner.batch.execute")
TRAIN_SHARED = (
    "import sys; from mimrefiner.batch.runner import train_shared; train_shared(*sys.argv[1:])"
)


@dataclass(frozen=True)
class Batch:
    """How notebooks are executed.

    Attributes:
        gpus: numbers of the GPUs to spread jobs over, one job on each; with none, ``workers`` jobs
            run at once, wherever torch puts them.
        workers: jobs at once; on a CPU they share its cores.
        resume: skip notebooks that are done with the same source, parameters, code and data, and
            whose files are as they were.
        keep_going: after a failure, execute the notebooks that do not need what failed.
        timeout: seconds that one notebook may take; None sets no limit.
        executor: "local" or "slurm".
        slurm: options for submitit, for example ``{"slurm_partition": "gpu"}``.
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
        names: notebooks by name, without suffix, or by number; none means all.
        preset, seeds, out: the parameters that every notebook has.
        parameters: further parameters; each notebook must declare them.
        batch: where and how; the default is one notebook after the other.

    Returns:
        ``out``, which then holds notebooks/, figures/, tables/, results/, claims/, logs/,
        results.csv, claims.csv, claims.md and manifest.json.

    Raises:
        InputError: before any work, a name, a parameter or an option is wrong; at the end, a
            notebook has failed.
    """
    batch, extra, out, seeds = batch or Batch(), parameters or {}, Path(out).resolve(), str(seeds)
    base, seed_list, notebooks = load_preset(preset), parse_seeds(seeds), find_notebooks(names)
    check_batch(batch)
    extra = _checked(notebooks, {"preset": preset, "seeds": seeds, "out": str(out)}, extra)
    check_writable(out)
    here, began = environment(), time.monotonic()
    records = _entries(notebooks, out, {"preset": preset, "seeds": seeds, **extra}, base)
    done = _finished(records) if batch.resume else set()
    models = _model_jobs(base, seed_list, [n for n in notebooks if n not in done], out)
    facts = {name: here[name] for name in ("versions", "git_sha")}
    jobs = [*models.values(), *_notebook_jobs(records, models, facts, batch)]
    board = Board(jobs, out / "logs" / "run.log")
    for notebook, job in zip(notebooks, jobs[len(models) :], strict=True):
        if notebook in done:
            board.say(job, "skipped", "it is done, and nothing it depends on has changed")
        else:
            (out / records[notebook].manifest).unlink(missing_ok=True)
            failure_file(out, job.name).unlink(missing_ok=True)
    _start_jobs(jobs, board, batch, out)
    collect(out)
    _write_manifest(out, {**here, "preset": preset, "seeds": seeds, "parameters": extra})
    _raise_failures([job for job in jobs if job.state in ("failed", "not run")], out)
    _tell(out, time.monotonic() - began)
    return out


def check_batch(batch: Batch) -> None:
    """InputError where this machine cannot do what ``batch`` asks for."""
    if batch.executor == "slurm":
        check_slurm()
        if batch.gpus:
            raise InputError(
                "--gpus pins jobs on this machine; with --executor slurm ask for GPUs with "
                "--slurm gpus_per_node=1"
            )
    elif batch.executor != "local":
        raise InputError(f"--executor must be local or slurm, got {batch.executor!r}")
    elif batch.slurm:
        raise InputError(
            f"--slurm {', '.join(batch.slurm)} is for jobs on a cluster: add --executor slurm, "
            "or leave it out"
        )
    there = torch.cuda.device_count()
    if len(set(batch.gpus)) < len(batch.gpus) or any(not 0 <= gpu < there for gpu in batch.gpus):
        raise InputError(
            f"--gpus must be different numbers of the {there} GPUs here, "
            f"got {','.join(map(str, batch.gpus))}"
        )
    if batch.workers < 1:
        raise InputError(f"--workers must be >= 1, got {batch.workers}")
    if batch.timeout is not None and batch.timeout <= 0:
        raise InputError(f"--timeout must be > 0 minutes, got {batch.timeout / 60:g}")


def train_shared(model: str, preset: str, seed: str) -> None:
    """Train one of :data:`mimrefiner.study.store.TRAINED`, in the process of a job."""
    end_with_parent()
    os.environ["MIMREFINER_PROGRESS"] = "log"
    show_notices()
    store.TRAINED[model](load_preset(preset, int(seed)))


def find_notebooks(names: list[str]) -> list[Path]:
    """The notebooks of the project that are called for by full name or leading number; none means
    all, in order.
    """
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
    return list(dict.fromkeys(chosen)) or there


def collect(out: Path) -> None:
    """Join the rows and claims of all notebooks in ``out`` that are done."""
    done = _records(out)
    for what, columns in (("results", ROW_COLUMNS), ("claims", CLAIM_COLUMNS)):
        frames = [pd.read_csv(out / what / f"{name}.csv") for name in done]
        frames = [frame for frame in frames if len(frame)]
        joined = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=columns)
        write_csv(joined, out / f"{what}.csv")
    claims = claims_table(pd.read_csv(out / "claims.csv"))
    write_table(claims, out / "tables" / "claims")
    with atomic_file(out / "claims.md") as temporary:
        temporary.write_text(markdown_table(claims), encoding="utf-8")


def _checked(notebooks: list[Path], given: dict, extra: dict) -> dict:
    """``extra`` in the types that notebooks declare.

    Raises:
        InputError: a parameter that a notebook does not declare, or that has its own option.
    """
    if taken := sorted(given.keys() & extra.keys()):
        options = ", ".join(f"--{name}" for name in taken)
        raise InputError(f"give {options} in place of -p {', '.join(taken)}")
    for notebook in notebooks:
        fitting = compare_parameters(declared_parameters(notebook), given | extra)
        extra = {name: fitting[name] for name in extra}
    return extra


def _entries(notebooks: list[Path], out: Path, parameters: dict, base: Preset) -> dict[Path, Entry]:
    """Notebook -> its record, whose settings hold all that decides what the notebook writes."""
    common = {"parameters": parameters, "inputs": _inputs_hash(base)}
    return {n: entry(out, n.stem, {"source": sha256_of_file(n), **common}) for n in notebooks}


def _finished(records: dict[Path, Entry]) -> set[Path]:
    """The notebooks that are done; one that reads what others write is not, where they are not."""
    done = {notebook for notebook, record in records.items() if record.facts() is not None}
    readers = {notebook for notebook in records if declared_needs(notebook).reads}
    return done if records.keys() - done <= readers else done - readers


def _model_jobs(
    preset: Preset, seeds: tuple[int, ...], notebooks: list[Path], out: Path
) -> dict[tuple[str, int], Job]:
    """(model, seed) -> job, for the models that the notebooks share and the store does not hold;
    the others start from the pre-trained one.
    """
    asked = {model for notebook in notebooks for model in declared_needs(notebook).trains}
    for model in asked:
        one_of("shared model", model, tuple(store.TRAINED))
    jobs: dict[tuple[str, int], Job] = {}
    for model, seed in itertools.product(store.TRAINED, seeds):
        if model in asked and not store.is_stored(model, preset.with_seed(seed)):
            command = [sys.executable, "-c", TRAIN_SHARED, model, preset.name, str(seed)]
            first = jobs.get(("pretrained", seed))
            jobs[model, seed] = Job(
                f"{model}, seed {seed}",
                command,
                out / "logs" / f"{model}_seed{seed}.log",
                needs=(first.name,) if first else (),
            )
    return jobs


def _notebook_jobs(
    records: dict[Path, Entry], models: dict[tuple[str, int], Job], facts: dict, batch: Batch
) -> list[Job]:
    """One job per notebook.

    It waits for the models that the notebook asks for, and for the other notebooks where it reads
    what they write. Where workers share the cores it waits for all pre-training, which takes them
    all.
    """
    needs, jobs = {notebook: declared_needs(notebook) for notebook in records}, []
    writers = tuple(notebook.stem for notebook in records if not needs[notebook].reads)
    for notebook, record in records.items():
        out, settings = record.folder, record.settings
        call = {
            "notebook": str(notebook),
            "out": str(out),
            "parameters": {**settings["parameters"], "out": str(out)},
            "settings": settings,
            "facts": facts,
        }
        asked = {*needs[notebook].trains, *(("pretrained",) if batch.workers > 1 else ())}
        trained = tuple(job.name for (model, _), job in models.items() if model in asked)
        job = Job(
            notebook.stem,
            [*EXECUTE, json.dumps(call)],
            out / "logs" / f"{notebook.stem}.log",
            needs=trained + (writers if needs[notebook].reads else ()),
            timeout=batch.timeout,
        )
        jobs.append(job)
    return jobs


def _start_jobs(jobs: list[Job], board: Board, batch: Batch, out: Path) -> None:
    if batch.executor == "slurm":
        slots: list = [None] * len(jobs)
        start = partial(_start_on_cluster, folder=out / "logs" / "slurm", options=batch.slurm)
    else:
        slots = list(batch.gpus) or [None] * batch.workers
        start = partial(_start_here, jobs=jobs, batch=batch)
    run_jobs(jobs, start, slots, board, keep_going=batch.keep_going)


def _start_on_cluster(job: Job, slot: None, folder: Path, options: dict) -> SlurmJob:
    return SlurmJob(job, folder, options)


def _start_here(job: Job, slot: int | None, jobs: list[Job], batch: Batch) -> LocalProcess:
    """Start ``job`` on the GPU ``slot``; without GPUs it gets its share of the cores."""
    if slot is not None:
        return LocalProcess(job, {"CUDA_VISIBLE_DEVICES": str(slot)})
    if batch.workers == 1 or "OMP_NUM_THREADS" in os.environ:
        return LocalProcess(job, {})
    could_run = len(jobs) if job.needs else sum(not other.needs for other in jobs)
    threads = (os.cpu_count() or 1) // min(batch.workers, could_run)
    return LocalProcess(job, {"OMP_NUM_THREADS": str(max(1, threads))})


def _write_manifest(out: Path, facts: dict) -> None:
    """Write what the whole run is and what is recorded of each notebook."""
    records = _records(out)
    for name, record in records.items():  # on a cluster it is not the device of this process
        rows = pd.read_csv(out / "results" / f"{name}.csv")
        record["device"] = ", ".join(rows["device"].unique())
    seconds = {name: record["seconds"] for name, record in records.items()}
    write_json({**facts, "notebooks": records, "seconds": seconds}, out / "manifest.json")


def _raise_failures(jobs: list[Job], out: Path) -> None:
    """Show the last lines of every log of a failed job, then raise one line about all of them."""
    said = []
    for job in jobs:
        file, what = failure_file(out, job.name), f"{job.state}{job.why and f', {job.why}'}"
        if file.is_file():
            failure = json.loads(file.read_text(encoding="utf-8"))
            what = f"failed in cell {failure['cell']}: {failure['error']}"
        said.append(f"{job.name} {what}")
        if job.state == "failed":
            print(f"\n{said[-1]}", file=sys.stderr)
            for line in job.last_lines(12):
                print(f"    {line}", file=sys.stderr)
            print(f"    (all of it: {os.path.relpath(job.log)})", file=sys.stderr)
    if said:
        raise InputError(f"{'; '.join(said)}. What is done is kept: run the same with --resume")


def _tell(out: Path, seconds: float) -> None:
    """Print the claims and where everything is."""
    claims = (out / "claims.md").read_text(encoding="utf-8")
    print(f"\n{claims}")
    print(f"Done in {seconds:.0f} s.")
    places = {"rows": "results.csv", "claims": "claims.md"}
    for what in ("notebooks", "figures", "tables", "rows", "claims"):
        print(f"  {what:10s} {os.path.relpath(out / places.get(what, what))}")


def _inputs_hash(preset: Preset) -> str:
    """Hash of what every notebook depends on: the package's files, the preset's data, torch."""
    digest = hashlib.sha256(torch.__version__.encode())
    for file in sorted(PACKAGE.rglob("*")):
        if file.is_file() and "__pycache__" not in file.parts:
            digest.update(f"{file.relative_to(PACKAGE)} {sha256_of_file(file)}\n".encode())
    for split in ("train", "test"):
        digest.update(data_hash(presets.load_split(preset, split)).encode())
    return digest.hexdigest()


def _records(out: Path) -> dict[str, dict]:
    """What is recorded of every notebook in ``out`` that is done, by name."""
    found = {}
    for file in sorted((out / "jobs").glob("*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        if "facts" in content:  # records of earlier versions have none
            settings, facts = content["settings"], content["facts"]
            found[file.stem] = {
                "key": key_of(settings),
                "parameters": settings["parameters"],
                **facts,
                "files": content["files"],
            }
    return found
