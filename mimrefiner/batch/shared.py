"""One command in several processes that share its runs through a folder."""

import sys
from collections.abc import Sequence
from pathlib import Path

from mimrefiner.batch.jobs import Board, Job, LocalProcess, run_jobs
from mimrefiner.errors import InputError


def share(arguments: Sequence[str], out: Path, gpus: Sequence[int], processes: int = 1) -> None:
    """Run ``mimrefiner ARGUMENTS`` once on each GPU, or in several processes, and wait for all.

    The command must be one whose runs lie in ``out`` and are done by whoever comes first
    (:func:`mimrefiner.files.take_turns`).

    Args:
        arguments: of the command line, without the program's name.
        out: takes a log of every process.
        gpus: numbers of GPUs, each seen by one process; () for none.
        processes: how many to start where there are no ``gpus``.

    Raises:
        InputError: a process ended with an error; its last line is the message.
    """
    if processes < 1:
        raise InputError(f"expected one or more processes, got {processes}")
    slots = list(gpus) or [None] * processes
    names = [f"GPU {gpu}" for gpu in gpus] or [f"process {i + 1}" for i in range(processes)]
    command = [sys.executable, "-m", "mimrefiner", *arguments]
    logs = [out / f"{name.replace(' ', '-').lower()}.log" for name in names]
    jobs = [Job(name, command, log) for name, log in zip(names, logs, strict=True)]
    out.mkdir(parents=True, exist_ok=True)

    def start(job: Job, gpu: int | None) -> LocalProcess:
        return LocalProcess(job, {} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)})

    run_jobs(jobs, start, slots, Board(jobs, out / "processes.log"))
    for job in jobs:
        if job.state == "failed":
            said = " ".join(job.last_lines(1)).removeprefix("mimrefiner: error: ")
            raise InputError(f"{job.name} failed: {said or job.why} ({job.log} has it all)")
