"""Jobs in processes of their own: in order of need, several at once, watched, timed out, and all
gone when this process ends.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mimrefiner.errors import InputError

POLL_SECONDS = 0.2
SHUTDOWN_SECONDS = 300  # that torchrun gives its workers to save
LOG_SECONDS = 10  # between two plain lines about a job that runs


@dataclass
class Job:
    """``command``: what its process runs; ``needs``: names of jobs that must be done before."""

    name: str
    command: list[str]
    log: Path
    needs: tuple[str, ...] = ()
    timeout: float | None = None  # seconds
    state: str = (
        "waiting"  # then running, then done, failed or not run; skipped where nothing is to do
    )
    seconds: float = 0.0
    why: str = ""

    def last_lines(self, n: int) -> list[str]:
        """Of the log, without empty ones."""
        if not self.log.is_file():
            return []
        with self.log.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - 8192))
            lines = stream.read().decode(errors="replace").splitlines()
        return [line.rstrip() for line in lines if line.strip()][-n:]


class LocalProcess:
    """A job on this machine. It ends with this process, however that ends: its standard input is a
    pipe that then closes.
    """

    def __init__(self, job: Job, variables: dict[str, str]):
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
        status = self.process.poll()
        if status is not None:
            self.process.stdin.close()
        return status

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()


class SlurmJob:
    """A job in the queue of a cluster, through submitit. The cluster keeps the time limit, so that
    waiting does not count.
    """

    def __init__(self, job: Job, folder: Path, options: dict, cluster: str = "slurm"):
        import submitit

        executor = submitit.AutoExecutor(folder, cluster=cluster)
        minutes = {"timeout_min": max(1, round(job.timeout / 60))} if job.timeout else {}
        executor.update_parameters(name=job.name.replace(" ", "-"), **minutes, **options)
        self.job = executor.submit(run_logged, job.command, job.log)

    def poll(self) -> int | None:
        if not self.job.done():
            return None
        return 0 if self.job.exception() is None else 1

    def kill(self) -> None:
        self.job.cancel()


def run_logged(command: list[str], log: Path) -> None:
    """What a cluster's node runs; CalledProcessError where it fails."""
    with Path(log).open("wb") as stream:
        subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, check=True
        )


def torchrun(arguments: Sequence[str], processes: int) -> None:
    """Run ``mimrefiner ARGUMENTS`` by several processes of this machine and print what they say: a
    launcher for notebooks.

    Interrupting it sends SIGTERM, at which training saves a checkpoint, and waits until all
    processes have ended.

    Raises:
        InputError: it ended with an error, or there is no process to start.
    """
    if processes < 1:
        raise InputError(f"expected one or more processes, got {processes}")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
    ]
    variables = {
        **os.environ,
        "MIMREFINER_PROGRESS": "log",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN_SECONDS),
    }
    streams = {
        "stdin": subprocess.DEVNULL,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
    }
    # a session of its own: Jupyter interrupts all processes of the kernel's, and torchrun would end
    # the workers unsaved
    job = subprocess.Popen(
        [*command, "-m", "mimrefiner", *arguments], env=variables, start_new_session=True, **streams
    )
    try:
        _print_lines(job)
    except KeyboardInterrupt:
        job.terminate()
        _print_lines(job)
        raise
    finally:
        job.kill()  # after a second interrupt; nothing where it has ended
        job.wait()
        job.stdout.close()
    if job.returncode:
        raise InputError(
            f"mimrefiner {' '.join(arguments)} ended with status {job.returncode}: its last lines above say why"
        )


def _print_lines(job: subprocess.Popen) -> None:
    """All that ``job`` says until it ends."""
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
            "--executor slurm needs Slurm's sbatch, which is not on this machine: use --executor local"
        )


def run_jobs(
    jobs: list[Job], start: Callable, slots: list, board: "Board", *, keep_going: bool = False
) -> None:
    """Run every job whose needs are done, the first in the list first, one per slot; states tell
    how it went.

    Args:
        jobs: those in state ``waiting`` are run.
        start: (job, slot) -> object with ``poll()``, None or an exit status, and ``kill()``.
        slots: what a running job occupies, such as the number of a GPU.
        keep_going: after a failure go on with all that does not need it; otherwise stop what runs.
    """
    free, running = list(slots), {}
    by_name = {job.name: job for job in jobs}
    try:
        while True:
            for job in jobs:
                if job.state == "waiting" and free:
                    needs = {by_name[name].state for name in job.needs}
                    if needs & {"failed", "not run"}:
                        board.say(job, "not run", f"it needs {', '.join(job.needs)}")
                    elif needs <= {"done", "skipped"}:
                        slot = free.pop(0)
                        running[job.name] = (start(job, slot), slot, time.monotonic())
                        board.say(job, "running", "" if slot is None else f"on GPU {slot}")
            if not running:
                break
            time.sleep(POLL_SECONDS)
            for name, (process, slot, began) in list(running.items()):
                job, status = by_name[name], process.poll()
                job.seconds = time.monotonic() - began
                if (
                    status is None
                    and job.timeout
                    and job.seconds > job.timeout
                    and isinstance(process, LocalProcess)
                ):
                    process.kill()
                    job.why = f"stopped at its time limit of {job.timeout / 60:g} min"
                    status = 1
                if status is not None:
                    del running[name]
                    free.append(slot)
                    if status < 0:
                        job.why = f"ended by signal {-status}"
                    board.say(job, "failed" if status else "done", job.why)
                    if status and not keep_going:
                        return
            board.refresh()
    finally:
        for name, (process, _, _) in running.items():
            process.kill()
            board.say(by_name[name], "not run", "stopped")
        for job in jobs:
            if job.state == "waiting":
                board.say(job, "not run", "")


class Board:
    """How far all jobs are: a table that redraws itself in a terminal, plain lines elsewhere; the
    lines also go to ``log``.
    """

    def __init__(self, jobs: list[Job], log: Path):
        self.jobs, self.log = jobs, log
        self.live = sys.stdout.isatty()
        self.drawn, self.last, self.told = 0, time.monotonic(), {}
        log.parent.mkdir(parents=True, exist_ok=True)

    def say(self, job: Job, state: str, detail: str) -> None:
        """Set the job's state and tell it."""
        job.state, job.why = state, detail if state in ("failed", "not run") else job.why
        place = f"[{self.jobs.index(job) + 1}/{len(self.jobs)}]"
        seconds = f" after {job.seconds:.0f} s" if state in ("done", "failed") else ""
        self._line(f"{place} {job.name}: {state}{seconds}{f', {detail}' if detail else ''}")
        self.refresh(now=True)

    def refresh(self, now: bool = False) -> None:
        """Draw the table again, or say what the running jobs last wrote if that is ten seconds ago."""
        if not now and time.monotonic() - self.last < (0.5 if self.live else LOG_SECONDS):
            return
        if self.live:
            self._draw()
        elif not now:
            for job in self.jobs:
                said = job.last_lines(1) if job.state == "running" else []
                if said and self.told.get(job.name) != said:
                    self.told[job.name] = said
                    self._line(f"    {job.name}: {said[0]}")
        if self.live or not now:
            self.last = time.monotonic()

    def _line(self, text: str) -> None:
        with self.log.open("a") as stream:
            stream.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        if not self.live:
            print(text, flush=True)

    def _draw(self) -> None:
        width, height = shutil.get_terminal_size()
        names = max(len(job.name) for job in self.jobs)
        lines = []
        for job in self.jobs:
            said = job.last_lines(1) if job.state == "running" else [job.why]
            seconds = f"{job.seconds:5.0f} s" if job.seconds else ""
            lines.append(
                f"{job.name:{names}s}  {job.state:8s} {seconds:7s}  {said[0] if said else ''}"[
                    : width - 1
                ]
            )
        lines = lines[-(height - 1) :]
        up = f"\x1b[{self.drawn}A" if self.drawn else ""
        print(up + "".join(f"\x1b[2K{line}\n" for line in lines), end="", flush=True)
        self.drawn = len(lines)
