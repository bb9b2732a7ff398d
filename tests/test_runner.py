import json
import os
import signal
import subprocess
import sys
import time

import nbformat
import pandas as pd
import pytest

import mimrefiner as mr
from mimrefiner.batch import runner
from mimrefiner.batch.jobs import Board, Job
from mimrefiner.study.claims import CLAIM_COLUMNS, ROW_COLUMNS


def test_notebooks_are_found_by_name_and_number():
    names = [path.stem for path in runner.find_notebooks([])]
    assert names == sorted(names)
    assert "03_refinement" in names
    assert (
        runner.find_notebooks(["03"])
        == runner.find_notebooks(["03_refinement"])
        == runner.find_notebooks(["03_refinement.ipynb"])
    )
    with pytest.raises(mr.InputError, match="unknown notebook '99': choose from 00_quickstart"):
        runner.find_notebooks(["99"])


def test_nothing_runs_with_a_wrong_parameter(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "LocalProcess", lambda *args: pytest.fail("executed"))
    for change, message in (
        ({"preset": "tinny"}, "unknown preset 'tinny': choose one of smoke, tiny"),
        ({"seeds": "x"}, "seeds must be"),
        ({"parameters": {"seed": 1}}, "unknown parameter 'seed'"),
        ({"parameters": {"preset": "tiny"}}, "give --preset in place of -p preset"),
        (
            {"parameters": {"seeds": "1", "out": "x"}},
            "give --out, --seeds in place of -p out, seeds",
        ),
    ):
        with pytest.raises(mr.InputError, match=message):
            runner.run_notebooks(
                ["00"], **{"preset": "smoke", "seeds": "0", "out": tmp_path, **change}
            )


def test_jobs_are_pinned_one_to_a_gpu(tmp_path, monkeypatch):
    """What a job's own process reads in its environment, on two GPUs named 0 and 3."""
    code = "import os, time; time.sleep(1); print(os.environ['CUDA_VISIBLE_DEVICES'])"
    listed = [Job(name, [sys.executable, "-c", code], tmp_path / f"{name}.log") for name in "abc"]
    runner._start_jobs(
        listed, Board(listed, tmp_path / "run.log"), runner.Batch(gpus=(0, 3)), tmp_path
    )
    assert [job.state for job in listed] == ["done"] * 3
    devices = [job.last_lines(1)[0] for job in listed]
    assert set(devices[:2]) == {"0", "3"} and devices[2] in ("0", "3")
    assert "a: running, on GPU 0" in (tmp_path / "run.log").read_text()


HEAD = 'preset = "smoke"\nseeds = "0"\nout = ""\nfail = False\n'
WRITE = f"""
from pathlib import Path
for what, columns in (("results", {ROW_COLUMNS}), ("claims", {CLAIM_COLUMNS})):
    row = ["1" if name in ("difference", "low", "high") else "NAME" for name in columns]
    lines = [",".join(columns), ",".join(row)]
    (Path(out) / what).mkdir(exist_ok=True)
    (Path(out) / what / "NAME.csv").write_text("\\n".join(lines))
"""


def write_notebook(folder, name, *code, **needs):
    cells = [
        nbformat.v4.new_code_cell(source) for source in (HEAD, *code, WRITE.replace("NAME", name))
    ]
    cells[0].metadata["tags"] = ["parameters"]
    (folder / "notebooks").mkdir(exist_ok=True)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    metadata = {"kernelspec": kernel, "mimrefiner": needs}
    nbformat.write(
        nbformat.v4.new_notebook(cells=cells, metadata=metadata),
        folder / "notebooks" / f"{name}.ipynb",
    )


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project whose notebooks do next to nothing."""
    monkeypatch.setattr(runner, "project_folder", lambda: tmp_path)
    write_notebook(tmp_path, "00_one", "print('one says hello')")
    write_notebook(tmp_path, "01_two", "if fail:\n    raise NameError('it was asked to')")
    return tmp_path


def run(project, **options):
    parameters = options.pop("parameters", {})
    batch = runner.Batch(workers=2, **options)
    return runner.run_notebooks(
        [], preset="smoke", seeds="0", out=project / "out", parameters=parameters, batch=batch
    )


def test_a_failure_is_told_and_a_resumed_run_does_only_what_is_left(project, capsys):
    with pytest.raises(
        mr.InputError, match=r"01_two failed in cell \d: NameError: it was asked to.*--resume"
    ):
        run(project, keep_going=True, parameters={"fail": True})
    told = capsys.readouterr()
    assert "raise NameError('it was asked to')" in told.err  # last lines of the log
    assert "00_one: done" in told.out
    assert list(pd.read_csv(project / "out" / "results.csv")["run_id"]) == ["00_one"]

    run(project, resume=True)  # other parameters: both again
    assert "skipped" not in capsys.readouterr().out
    run(project, resume=True)
    assert capsys.readouterr().out.count(": skipped, it is done") == 2
    (project / "out" / "claims" / "01_two.csv").write_text("changed")
    write_notebook(project, "00_one", "print('one says something else')")
    run(project, resume=True)
    assert "skipped" not in capsys.readouterr().out

    manifest = json.loads((project / "out" / "manifest.json").read_text())
    assert set(manifest) >= {
        "git_sha",
        "device",
        "versions",
        "parameters",
        "preset",
        "seeds",
        "seconds",
    }
    for record in manifest["notebooks"].values():
        assert set(record) >= {
            "key",
            "files",
            "parameters",
            "seconds",
            "started",
            "device",
            "versions",
        }
    assert str(project) not in json.dumps(manifest)
    assert "one says something else" in (project / "out" / "logs" / "00_one.log").read_text()


def test_a_notebook_over_its_time_is_stopped(project):
    write_notebook(project, "01_two", "import time; time.sleep(600)")
    with pytest.raises(mr.InputError, match=r"01_two failed, stopped at its time limit of 0.2 min"):
        runner.run_notebooks(
            ["01"], preset="smoke", seeds="0", out=project / "out", batch=runner.Batch(timeout=12)
        )


def test_the_process_of_a_notebook_imports_nothing_heavy():
    code = """
import sys
import mimrefiner.batch.execute
print({name.split(".")[0] for name in sys.modules} & {"torch", "torchvision", "timm", "pandas"})
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "set()"


BATCH = """
import sys
from pathlib import Path
from mimrefiner.batch import runner
folder = Path(sys.argv[1])
runner.project_folder = lambda: folder
batch = runner.Batch(resume=True)
runner.run_notebooks([], preset="smoke", seeds="0", out=folder / "out", batch=batch)
"""


def test_killed_and_run_again_it_completes(project):
    wait = "import os, time\nfrom pathlib import Path\npid = Path(out) / 'pid'\n"
    wait += "if not pid.exists():\n    pid.write_text(str(os.getpid()))\n    time.sleep(600)"
    write_notebook(project, "01_two", wait)
    command, pid = [sys.executable, "-c", BATCH, str(project)], project / "out" / "pid"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as first:
        try:
            wait_for(lambda: pid.exists() and pid.read_text())
        finally:
            first.send_signal(signal.SIGKILL)
    wait_for(lambda: not alive(int(pid.read_text())))  # the kernel ends with the batch
    assert not (project / "out" / "claims.md").exists()
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "00_one: skipped" in again.stdout
    assert "01_two: done" in again.stdout
    assert list(pd.read_csv(project / "out" / "results.csv")["run_id"]) == ["00_one", "01_two"]
    assert not list((project / "out").rglob("*unfinished*"))


def wait_for(condition):
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def alive(pid):
    """Whether a process runs (one that ended and was not fetched by its parent does not)."""
    try:
        os.kill(pid, 0)
        status = subprocess.run(
            ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True
        ).stdout
    except OSError:
        return False
    return not status.startswith("Z")


def test_shared_models_are_those_that_notebooks_declare(tmp_path, monkeypatch):
    monkeypatch.setattr(runner.store, "is_stored", lambda model, preset: preset.refine.seed == 1)
    write_notebook(tmp_path, "02_three", trains=["refined", "pretrained"])
    notebook = tmp_path / "notebooks" / "02_three.ipynb"
    jobs = runner._model_jobs(mr.load_preset("smoke"), (0, 1), [notebook], tmp_path)
    assert list(jobs) == [("pretrained", 0), ("refined", 0)]
    assert jobs["refined", 0].needs == ("pretrained, seed 0",)
    write_notebook(tmp_path, "02_three", trains=["refind"])
    with pytest.raises(mr.InputError, match="unknown shared model 'refind': choose one of pretr"):
        runner._model_jobs(mr.load_preset("smoke"), (0, 1), [notebook], tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpus": (99,)}, "--gpus must be different numbers of the"),
        ({"workers": 0}, "--workers must be >= 1, got 0"),
        ({"timeout": -60}, "--timeout must be > 0 minutes, got -1"),
        (
            {"slurm": {"gpus_per_node": 1}},
            "--slurm gpus_per_node is for jobs on a cluster: add --executor slurm",
        ),
        ({"executor": "pbs"}, "--executor must be local or slurm, got 'pbs'"),
    ],
)
def test_options_that_can_not_be_met_are_named(options, message):
    with pytest.raises(mr.InputError, match=message):
        runner.check_batch(runner.Batch(**options))


def test_notebooks_that_read_what_others_write_come_last(project):
    write_notebook(project, "00_one", "print('one reads')", reads=["claims"])
    records = runner._entries(
        runner.find_notebooks([]), project / "out", {}, mr.load_preset("smoke")
    )
    first, second = runner._notebook_jobs(records, {}, {}, runner.Batch())
    assert (first.name, first.needs) == ("00_one", ("01_two",))
    assert (second.name, second.needs) == ("01_two", ())


def test_a_notebook_that_reads_is_stale_where_another_is(project, capsys):
    write_notebook(project, "00_one", "print('one reads')", reads=["claims"])
    run(project)
    run(project, resume=True)
    assert capsys.readouterr().out.count(": skipped, it is done") == 2
    write_notebook(project, "01_two", "print('changed')")
    run(project, resume=True)
    assert "skipped" not in capsys.readouterr().out


def test_models_share_the_cores_and_notebooks_wait_for_them(project, monkeypatch):
    write_notebook(
        project, "02_three", "import os; print('threads', os.environ['OMP_NUM_THREADS'])"
    )
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("MIMREFINER_CACHE", str(project / "cache"))
    monkeypatch.setattr(runner.os, "cpu_count", lambda: 6)
    started = {}

    class Started(runner.LocalProcess):
        def __init__(self, job, variables):
            started[job.name] = variables
            super().__init__(job, variables)

    def one_model(preset, seeds, notebooks, out):
        command = [sys.executable, "-c", runner.TRAIN_SHARED, "pretrained", "smoke", "0"]
        job = runner.Job("pretrained, seed 0", command, out / "logs" / "pretrained_seed0.log")
        return {("pretrained", 0): job}

    monkeypatch.setattr(runner, "LocalProcess", Started)
    monkeypatch.setattr(runner, "_model_jobs", one_model)
    run(project)
    assert next(iter(started)) == "pretrained, seed 0" and started["pretrained, seed 0"] == {
        "OMP_NUM_THREADS": "6"
    }
    assert started["00_one"] == started["02_three"] == {"OMP_NUM_THREADS": "3"}
    assert "threads 3" in (project / "out" / "logs" / "02_three.log").read_text()
