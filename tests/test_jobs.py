import os
import signal
import subprocess
import sys

import pytest

from mimrefiner.batch import jobs
from mimrefiner.errors import InputError


class Fake:
    """Ends with ``status`` when asked the third time."""

    def __init__(self, status):
        self.status, self.asked, self.killed = status, 0, False

    def poll(self):
        self.asked += 1
        return self.status if self.asked > 2 else None

    def kill(self):
        self.killed = True


def run(tmp_path, monkeypatch, needs, failing=(), slots=(None,), **options):
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0)
    listed = [
        jobs.Job(name, [], tmp_path / f"{name}.log", tuple(need)) for name, need in needs.items()
    ]
    started, at_once = {}, []

    def start(job, slot):
        started[job.name] = Fake(int(job.name in failing))
        running = [j.name for j in listed if j.state == "running"] + [job.name]
        at_once.append((slot, len(running)))
        return started[job.name]

    jobs.run_jobs(listed, start, list(slots), jobs.Board(listed, tmp_path / "run.log"), **options)
    return {job.name: job.state for job in listed}, started, at_once


def test_needs_come_first_and_slots_bound_what_runs(tmp_path, monkeypatch):
    needs = {"notebook": ["model"], "model": [], "free": [], "more": []}
    states, started, at_once = run(tmp_path, monkeypatch, needs, slots=(0, 1))
    assert set(states.values()) == {"done"}
    assert list(started)[:2] == ["model", "free"]
    assert max(n for _, n in at_once) == 2
    assert {slot for slot, _ in at_once} == {0, 1}


def test_after_a_failure_the_rest_stops(tmp_path, monkeypatch):
    states, started, _ = run(
        tmp_path, monkeypatch, {"a": [], "b": [], "c": []}, failing="a", slots=(0, 1)
    )
    assert states == {"a": "failed", "b": "not run", "c": "not run"}
    assert started["b"].killed


def test_keep_going_leaves_out_only_what_needs_the_failed(tmp_path, monkeypatch):
    needs = {"a": [], "b": ["a"], "c": ["b"], "d": []}
    states, *_ = run(tmp_path, monkeypatch, needs, failing="a", keep_going=True)
    assert states == {"a": "failed", "b": "not run", "c": "not run", "d": "done"}
    told = (tmp_path / "run.log").read_text()
    assert "b: not run, it needs a" in told and "c: not run, it needs b" in told


def test_what_is_skipped_is_not_waited_for(tmp_path):
    done, job = (
        jobs.Job("a", [], tmp_path / "a", state="skipped"),
        jobs.Job("b", [], tmp_path, ("a",)),
    )
    board = jobs.Board([done, job], tmp_path / "run.log")
    jobs.run_jobs([done, job], lambda job, slot: Fake(0), [None], board)
    assert (done.state, job.state) == ("skipped", "done")


def test_a_terminal_shows_a_bar_for_every_job_that_runs(tmp_path, capsys):
    job = jobs.Job("01_two", [], tmp_path / "log")
    board = jobs.Board([job], tmp_path / "run.log")
    board.live, board.last = True, 0
    board.say(job, "running", "on GPU 3")
    job.log.write_text("first\n\nstep 5 of 10\n")
    board.refresh()
    *_, line = capsys.readouterr().out.split("\r")
    assert line.split() == ["01_two", "00:00,", "step", "5", "of", "10"]
    job.seconds = 12
    board.say(job, "done", "")
    shown = capsys.readouterr().out
    assert shown.endswith("[1/1] 01_two: done after 12 s\n")
    assert board.bars == {}
    lines = [line.split(" ", 2)[2] for line in (tmp_path / "run.log").read_text().splitlines()]
    assert lines == ["[1/1] 01_two: running, on GPU 3", "[1/1] 01_two: done after 12 s"]


def test_a_log_has_a_line_when_a_job_writes_something_new(tmp_path, capsys):
    job = jobs.Job("01_two", [], tmp_path / "log")
    board = jobs.Board([job], tmp_path / "run.log")
    board.say(job, "running", "")
    for text in ("step 5", "step 5", "step 6"):
        job.log.write_text(text)
        board.last = -jobs.LOG_SECONDS
        board.refresh()
        board.refresh()  # too early
    assert capsys.readouterr().out.splitlines() == [
        "[1/1] 01_two: running",
        "    01_two: step 5",
        "    01_two: step 6",
    ]


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import time; time.sleep(60)", "stopped at its time limit of 0.01 min"),
        ("import os; os.kill(os.getpid(), 9)", "ended by signal 9"),
        ("raise SystemExit(3)", ""),
    ],
)
def test_why_a_process_ended_is_said(tmp_path, monkeypatch, code, why):
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0.01)
    timeout = 0.6 if "time" in why else None
    job = jobs.Job("a", [sys.executable, "-c", code], tmp_path / "log", timeout=timeout)
    board = jobs.Board([job], tmp_path / "run.log")
    jobs.run_jobs([job], lambda job, slot: jobs.LocalProcess(job, {}), [None], board)
    assert (job.state, job.why) == ("failed", why)


def test_slurm_jobs_run_through_submitit(tmp_path):
    pytest.importorskip("submitit", reason="needs the extra slurm")
    for status in (0, 1):
        command = [sys.executable, "-c", f"print('hello'); raise SystemExit({status})"]
        job = jobs.Job("a b", command, tmp_path / "log", timeout=120)
        handle = jobs.SlurmJob(job, tmp_path / "slurm", {}, cluster="local")
        handle.job.wait()
        assert handle.poll() == status
        assert job.last_lines(1) == ["hello"]


def test_without_slurm_it_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(InputError, match=r"pip install 'mimrefiner\[slurm\]'"):
        jobs.check_slurm()


def test_a_launcher_shows_what_the_processes_say_and_names_a_failure(capsys, tmp_path):
    with pytest.raises(InputError, match=r"mimrefiner refine --preset tyni .* ended with status 1"):
        jobs.torchrun(["refine", "--preset", "tyni", "--out", str(tmp_path)], 1)
    assert "unknown preset 'tyni'" in capsys.readouterr().out
    with pytest.raises(InputError, match="expected one or more processes, got 0"):
        jobs.torchrun(["models"], 0)


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")
def test_an_interrupted_launcher_lets_training_save(tmp_path):
    """Interrupted as Jupyter does it: SIGINT to all processes of the kernel's group."""
    arguments = [
        "refine",
        "--preset",
        "tiny",
        "--model",
        "simmim_digits",
        "--heads",
        "1",
        "--out",
        str(tmp_path / "out"),
    ]
    # Tests may run where the signal is ignored
    script = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    script += f"from mimrefiner.batch import jobs; jobs.torchrun({arguments!r}, 1)"
    variables = os.environ | {"MIMREFINER_CACHE": str(tmp_path / "cache")}
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        env=variables,
    ) as kernel:
        said = [next(line for line in kernel.stdout if "stage 2" in line)]
        os.killpg(kernel.pid, signal.SIGINT)
        said += kernel.stdout.readlines()
    assert kernel.returncode != 0
    assert any("stopped at stage 2" in line for line in said)
    assert list((tmp_path / "out" / "checkpoints").glob("stage2-step*.pt"))
