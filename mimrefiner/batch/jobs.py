"""Jobs in processes of their own: each starts when what it needs is done, several run at once, and
all end with this process.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

from tqdm import tqdm

from mimrefiner.errors import InputError

POLL_SECONDS = 0.2
SHUTDOWN_SECONDS = 300  # that torchrun gives its workers to save
BAR_SECONDS, LOG_SECONDS = 0.5, 10  # between two looks at what the running jobs write


@dataclass
class Job:
    """One process to run, and how it went.

    Attributes:
        name: what the job is called.
        command: the program and its arguments.
        log: the file that takes all that the process prints.
        needs: names of the jobs that must be done before this one starts.
        timeout: seconds that it may run; None sets no limit.
        state: "waiting", "running", "done", "failed" or "not run"; "skipped" where nothing is left
            to do.
        seconds: how long it ran.
        why: the reason of a failure in words, where it is known.
    """

    name: str
    command: list[str]
    log: Path
    needs: tuple[str, ...] = ()
    timeout: float | None = None
    state: str = "waiting"
    seconds: float = 0.0
    why: str = ""

    def last_lines(self, n: int) -> list[str]:
        """The last ``n`` lines of the log that are not empty."""
        if not self.log.is_file():
            return []
        with self.log.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - 8192))
            lines = stream.read().decode(errors="replace").splitlines()
        return [line.rstrip() for line in lines if line.strip()][-n:]


class LocalProcess:
    """A job on this machine. Its standard input is a pipe, which closes when this process ends, by
    whatever cause; the job ends then too.
    """

    def __init__(self, job: Job, variables: dict[str, str]):
        self.job, self.began = job, time.monotonic()
        with job.log.open("wb") as log:
            self.process = subprocess.Popen(
                job.command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **variables},
            )

    def poll(self) -> int | None:
        """The exit status, None while it runs; past its time limit the job is killed."""
        status, limit = self.process.poll(), self.job.timeout
        if status is None and limit and time.monotonic() - self.began > limit:
            self.kill()
            self.job.why = f"stopped at its time limit of {limit / 60:g} min"
            return 1
        if status is not None:
            self.process.stdin.close()
            if status < 0:
                self.job.why = f"ended by signal {-status}"
        return status

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()


class SlurmJob:
    """A job in the queue of a cluster, through submitit. The cluster keeps the time limit, so that
    waiting in the queue does not count.
    """

    def __init__(self, job: Job, folder: Path, options: dict, cluster: str = "slurm"):
        import submitit

        executor = submitit.AutoExecutor(folder, cluster=cluster)
        minutes = {"timeout_min": max(1, round(job.timeout / 60))} if job.timeout else {}
        executor.update_parameters(name=job.name.replace(" ", "-"), **minutes, **options)
        self.job = executor.submit(run_logged, job.command, job.log)

    def poll(self) -> int | None:
        """0 or 1 when the job has ended, None before."""
        if not self.job.done():
            return None
        return 0 if self.job.exception() is None else 1

    def kill(self) -> None:
        self.job.cancel()


def run_logged(command: list[str], log: Path) -> None:
    """Run ``command`` on a node of a cluster; CalledProcessError where it fails."""
    with Path(log).open("wb") as stream:
        subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, check=True
        )


def torchrun(arguments: Sequence[str], processes: int) -> None:
    """Run ``mimrefiner ARGUMENTS`` in several processes of this machine and print what they say.

    Notebooks call it. An interrupt sends SIGTERM, at which training saves a checkpoint; the call
    then waits until all processes have ended.

    Args:
        arguments: of the command line, without the program's name.
        processes: how many to start.

    Raises:
        InputError: there is no process to start, or the run ended with an error.
    """
    if processes < 1:
        raise InputError(f"expected one or more processes, got {processes}")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    variables = {
        **os.environ,
        "MIMREFINER_PROGRESS": "log",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN_SECONDS),
    }
    job = subprocess.Popen(
        [sys.executable, *launcher, "-m", "mimrefiner", *arguments],
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # Jupyter interrupts all processes of the kernel's session, and torchrun, if it were there,
        # would end its workers before they have saved
        start_new_session=True,
    )
    try:
        _print_lines(job)
    except KeyboardInterrupt:
        job.terminate()
        _print_lines(job)
        raise
    finally:
        job.kill()  # after a second interrupt; a process that has ended stays as it is
        job.wait()
        job.stdout.close()
    if job.returncode:
        raise InputError(
            f"mimrefiner {' '.join(arguments)} ended with status {job.returncode}: "
            "its last lines above say why"
        )


def _print_lines(job: subprocess.Popen) -> None:
    """Print all that ``job`` says until it ends."""
    for line in job.stdout:
        print(line, end="", flush=True)
    job.wait()


def check_slurm() -> None:
    """InputError unless jobs can be handed to Slurm from here."""
    try:
        import submitit  # noqa: F401
    except ImportError:
        raise InputError(
            "--executor slurm needs submitit: pip install 'mimrefiner[slurm]'"
        ) from None
    if not shutil.which("sbatch"):
        raise InputError(
            "--executor slurm needs Slurm's sbatch, which is not on this machine: "
            "use --executor local"
        )


def run_jobs(
    jobs: list[Job], start: Callable, slots: list, board: "Board", *, keep_going: bool = False
) -> None:
    """Run the jobs in state "waiting", each as soon as its needs are done and a slot is free.

    Of several that could start, the first in the list does. The states of the jobs tell how it
    went.

    Args:
        jobs: all jobs, those that are skipped too.
        start: (job, slot) -> object with ``poll()``, which returns None or an exit status, and
            ``kill()``.
        slots: what a running job occupies, for example the number of a GPU.
        board: is told every change of a state.
        keep_going: after a failure, go on with all jobs that do not need the one that failed;
            otherwise stop those that run.
    """
    waiting = {job.name: job for job in jobs if job.state == "waiting"}
    order = TopologicalSorter(
        {job.name: [need for need in job.needs if need in waiting] for job in waiting.values()}
    )
    order.prepare()
    place = {name: i for i, name in enumerate(waiting)}
    free, ready, running = list(slots), [], {}
    try:
        while order.is_active():
            ready = sorted([*ready, *order.get_ready()], key=place.get)
            while ready and free:
                job, slot = waiting[ready.pop(0)], free.pop(0)
                running[job.name] = (job, start(job, slot), slot, time.monotonic())
                board.say(job, "running", "" if slot is None else f"on GPU {slot}")
            if not running:
                break  # what is left needs a job that failed
            time.sleep(POLL_SECONDS)
            for job, slot, status in _ended(running):
                free.append(slot)
                board.say(job, "failed" if status else "done", job.why)
                if status == 0:
                    order.done(job.name)
                elif not keep_going:
                    return
            board.refresh()
    finally:
        for job, process, *_ in running.values():
            process.kill()
            board.say(job, "not run", "stopped")
        for job in waiting.values():
            if job.state == "waiting":
                lacks = [n for n in job.needs if n in waiting and waiting[n].state != "done"]
                board.say(job, "not run", f"it needs {', '.join(lacks)}" if lacks else "")
        board.close()


def _ended(running: dict) -> Iterator[tuple[Job, object, int]]:
    """Take the jobs that have ended out of ``running``: (job, its slot, its exit status)."""
    for name, (job, process, slot, began) in list(running.items()):
        status = process.poll()
        job.seconds = time.monotonic() - began
        if status is not None:
            del running[name]
            yield job, slot, status


class Board:
    """How far all jobs are: a line for every change, which also goes to ``log``, and what the
    running jobs last wrote: one bar for each in a terminal, a line every ten seconds elsewhere.
    """

    def __init__(self, jobs: list[Job], log: Path):
        self.jobs, self.log = jobs, log
        self.live = sys.stdout.isatty()
        self.bars: dict[str, tqdm] = {}  # of the running jobs, in a terminal
        self.told: dict[str, list[str]] = {}
        self.last = time.monotonic()
        log.parent.mkdir(parents=True, exist_ok=True)

    def say(self, job: Job, state: str, detail: str) -> None:
        """Set the job's state and tell it."""
        job.state, job.why = state, detail if state in ("failed", "not run") else job.why
        place = f"[{self.jobs.index(job) + 1}/{len(self.jobs)}]"
        seconds = f" after {job.seconds:.0f} s" if state in ("done", "failed") else ""
        if job.name in self.bars:
            self.bars.pop(job.name).close()
        self._line(f"{place} {job.name}: {state}{seconds}{f', {detail}' if detail else ''}")
        if self.live and state == "running":
            form = {"bar_format": "{desc} {elapsed}{postfix}", "dynamic_ncols": True}
            self.bars[job.name] = tqdm(desc=job.name, file=sys.stdout, leave=False, **form)

    def refresh(self) -> None:
        """Show what the running jobs last wrote, unless that was shown a moment ago."""
        if time.monotonic() - self.last < (BAR_SECONDS if self.live else LOG_SECONDS):
            return
        self.last = time.monotonic()
        for job in (job for job in self.jobs if job.state == "running"):
            said = job.last_lines(1)
            if job.name in self.bars:
                self.bars[job.name].set_postfix_str("".join(said))
            elif said and self.told.get(job.name) != said:
                self.told[job.name] = said
                self._line(f"    {job.name}: {said[0]}")

    def close(self) -> None:
        """Remove the bars."""
        while self.bars:
            self.bars.popitem()[1].close()

    def _line(self, text: str) -> None:
        with self.log.open("a", encoding="utf-8") as stream:
            stream.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        if self.live:
            tqdm.write(text, file=sys.stdout)  # above the bars
        else:
            print(text, flush=True)
