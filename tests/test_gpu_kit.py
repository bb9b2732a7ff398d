"""The kit for whoever has a GPU: parts end in time and tell, the table shows what there is."""

import json
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pretend_gpu import pretend_gpu

from experiments import gpu, gpu_parts, gpu_table
from mimrefiner.errors import InputError
from mimrefiner.files import CHECKOUT


@pytest.fixture
def kit(tmp_path):
    return gpu_parts.Kit.opened(tmp_path / "kit", "smoke", None)


def test_without_a_gpu_one_line_says_what_to_do(tmp_path):
    with pytest.raises(InputError, match=r"no GPU here .*--preset smoke"):
        gpu_parts.Kit.opened(tmp_path / "kit", "gpu", None)
    assert not (tmp_path / "kit").exists()


@pytest.fixture
def planned(monkeypatch):
    """Parts by name, for these tests alone."""
    parts = {}
    monkeypatch.setattr(gpu_parts, "PARTS", parts)
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    return parts


def late(*_):
    time.sleep(60)


def stubborn(*_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)


def wrong(*_):
    raise ValueError("no such thing")


def unfit(*_):
    raise InputError("give another one")


def test_parts_run_at_once_and_each_ends_in_its_own_way(kit, planned, tmp_path):
    def meet(mine, other):
        """Ends only beside the other part: one after another, both would be cut off."""
        (tmp_path / mine).touch()
        while not (tmp_path / other).exists():
            time.sleep(0.02)

    planned |= {"fine": lambda *_: meet("a", "b"), "late": late, "stubborn": stubborn}
    planned |= {"wrong": wrong, "unfit": unfit, "also fine": lambda *_: meet("b", "a")}
    known = gpu.side_by_side(kit, list(planned), limit=5, left=2)
    assert {part["part"]: part["ended"] for part in known} == {
        "fine": "finished",
        "late": "cut off after 5 s",
        "stubborn": "cut off after 5 s",
        "wrong": "failed: ValueError: no such thing",
        "unfit": "failed: give another one",
        "also fine": "finished",
    }


def test_what_a_part_started_ends_with_it(kit, planned, tmp_path):
    note = tmp_path / "pid"

    def parent(*_):
        child = subprocess.Popen(["sleep", "60"])
        note.write_text(str(child.pid))
        time.sleep(60)

    planned["parent"] = parent
    gpu.side_by_side(kit, ["parent"], limit=1.5, left=2)
    pid = note.read_text()
    assert any(has_ended(pid) or time.sleep(0.05) for _ in range(50))


def test_what_ignores_the_wish_to_end_is_killed_though_its_parent_has_gone(
    kit, planned, tmp_path, monkeypatch
):
    note = tmp_path / "pid"
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True)"

    def parent(*_):
        command = [sys.executable, "-c", f"{deaf}; time.sleep(60)"]
        child = subprocess.Popen(command, stdout=subprocess.PIPE)
        child.stdout.readline()  # it is deaf by now
        note.write_text(str(child.pid))
        time.sleep(60)

    planned["parent"] = parent
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    gpu.side_by_side(kit, ["parent"], limit=3, left=2)
    pid = note.read_text()
    assert any(has_ended(pid) or time.sleep(0.05) for _ in range(50))


def has_ended(pid: str) -> bool:
    """Whether a process is gone, or waits only for somebody to ask how it ended (Linux)."""
    status = Path("/proc") / pid / "stat"
    return not status.exists() or status.read_text().split()[2] == "Z"


def test_time_that_is_over_leaves_parts_out_and_the_table_says_so(kit, planned, monkeypatch):
    planned |= {name: late for names, _ in gpu.SCHEDULE for name in names}
    monkeypatch.setattr(gpu, "RESERVE", 0)
    monkeypatch.setattr(gpu, "LEAST", 0.1)
    text = gpu.run_kit(kit, minutes=2.5 / 60)
    known = {
        part["part"]: part["ended"] for part in json.loads((kit.out / "parts.json").read_text())
    }
    assert set(known) == {name for names, _ in gpu.SCHEDULE for name in names}
    assert known["card"].startswith("cut off after 0 s") and "left out: no time" in known.values()
    assert text == (kit.out / "table.md").read_text() and "left out: no time" in text


def test_the_rung_is_the_largest_that_fits(kit):
    """Preset smoke on 128 images: 4 epochs of MAE, 1 + 1 of refinement, 2 steps each."""
    kit.write("data", {"train": 128, "test": 64})
    alone = [{"stage": stage, "ms": 100.0} for stage in (1, 2, 3)]
    kit.write("pace-alone", alone)
    for i, name in enumerate(gpu_parts.PACES):
        kit.write(name, [{"stage": stage, "ms": 100.0 + 50 * i} for stage in (1, 2, 3)])
    whole = 8 * 0.1 + 4 * 0.3  # the slowest of those at once counts
    for seconds, share in ((whole / 0.8, 1.0), (0.99 * whole / 0.8, 0.8), (0.0, 0.01)):
        chosen = gpu_parts.rung(kit, seconds)
        assert chosen["share"] == share
        assert chosen["planned_seconds"] == pytest.approx(share * whole, abs=0.06)
    training = kit.training(0.5, seed=2)
    assert (training.pretrain.epochs, training.refine.refine_epochs) == (2, 0.5)
    assert training.refine.seed == 2 and training.refine.warmup_epochs == 0.125


def test_clock_counts_optimiser_steps():
    x = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([x], lr=0.1)
    with gpu_parts.Clock((2, 4), torch.device("cpu")) as clock:
        for step in range(5):
            time.sleep(0.02 if step in (2, 3) else 0)
            optimizer.step()
    optimizer.step()
    assert clock.done == 5 and list(clock.times) == [2, 4]
    assert 0.02 <= clock.seconds(2, 4) < 0.2


def test_table_tells_of_tests_that_were_cut_off(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "tests.txt").write_text(
        "collected 3 items\n"
        "tests/test_cuda.py::test_a[x] PASSED    [ 33%]\n"
        "tests/test_cuda.py::test_b FAILED       [ 66%]\n"
        "tests/test_cuda.py::test_c "
    )
    text = gpu_table.table(tmp_path)
    assert "1 passed, 1 failed" in text and "- test_b: failed" in text and "test_c" not in text


def test_rehearsal_of_every_part(kit, monkeypatch):
    """In this process, with little data: what each writes, and the table of it."""
    monkeypatch.setattr(gpu_parts, "WARM", 1)
    monkeypatch.setattr(gpu_parts, "TIMED", 1)
    gpu_parts.PARTS["data"](kit, 10)
    sizes = kit.read("data")
    assert sizes == {"train": 256, "test": 128}
    for name in ("card", "pace-alone"):
        gpu_parts.PARTS[name](kit, 10)
    for name in gpu_parts.PACES:
        kit.write(name, kit.read("pace-alone"))
    assert [row["stage"] for row in kit.read("pace-alone")] == [1, 2, 3]
    for name in ("mae", "refined-1", "masked", "labels"):
        gpu_parts.PARTS[name](kit, 1000)
        facts = kit.read(name)
        assert len(facts["knn_cls"]) == 4 and 0 <= facts["five_shot"] <= 1
    kept = {file.stem: file.stat().st_size for file in (kit.out / "encoders").iterdir()}
    assert set(kept) == {"before", "refined-1", "masked", "labels"}
    parameters = 4 * 12 * 32**2  # of the blocks' products
    assert all(2 * parameters < size < 4 * parameters for size in kept.values())  # half precision
    text = gpu_table.table(kit.out)
    for title in ("## Card", "## Pace of training", "## Training"):
        assert title in text
    assert "ms, 5 at once" in text and "100% of the preset's" in text


def test_rehearsal_under_the_pretend_gpu(kit, monkeypatch):
    """Trainings of a few steps; the profiler alone knows no pretence."""
    monkeypatch.setattr(gpu_parts, "WARM", 1)
    monkeypatch.setattr(gpu_parts, "TIMED", 1)
    monkeypatch.setattr(gpu_parts, "COPIED", 2**16)
    monkeypatch.setitem(gpu_parts.SIDE, "cuda", 16)
    monkeypatch.setattr(gpu_parts, "_profiled", lambda *_: {"kernels_a_step": 1})
    gpu_parts.PARTS["data"](kit, 10)
    with pretend_gpu() as gpu:
        gpu.peak = 2**30
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda *_: None)
        for name in ("card", "pace-alone"):
            gpu_parts.PARTS[name](kit, 10)
        for name in ("mae", "refined-2", "labels"):
            gpu_parts.PARTS[name](kit, 0)
    assert kit.read("card")["card"] == "pretend GPU"
    assert "pageable_128_kib_behind_a_kernel_ms" in kit.read("card")
    assert all(row["peak_gib"] == 1 for row in kit.read("pace-alone"))
    assert kit.read("rung")["share"] == gpu_parts.LADDER[0]
    assert kit.read("refined-2")["seed"] == 2 and 0 <= kit.read("labels")["linear"] <= 1


def test_little_has_to_be_installed():
    """Packages for notebooks and pictures may be missing where the kit runs."""
    missing = ("papermill", "nbformat", "umap", "matplotlib", "seaborn", "IPython", "pyarrow")
    code = f"import sys; sys.modules |= dict.fromkeys({missing!r}); "
    code += "import experiments.gpu, tests.benchmarks.ratios, mimrefiner as mr; "
    code += "mr.refine, mr.pretrain, mr.extract_features, mr.low_shot, mr.linear_probe"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=CHECKOUT
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("code", [0, 1])
def test_tests_are_a_command_whose_status_counts(kit, monkeypatch, code):
    run = []
    monkeypatch.setattr(
        gpu_parts.subprocess,
        "run",
        lambda command, **_: run.append(command) or SimpleNamespace(returncode=code),
    )
    with pytest.raises(SystemExit) if code else nullcontext():
        gpu_parts.PARTS["tests"](kit, 100)
    assert {"pytest", "pretend", "tests/test_cuda.py"} <= set(run[0])


def test_ratios_get_their_options(kit, monkeypatch):
    run = []
    monkeypatch.setattr(
        gpu_parts.runpy, "run_module", lambda name, **_: run.append([name, *gpu_parts.sys.argv])
    )
    monkeypatch.setattr(gpu_parts.os, "chdir", lambda folder: None)
    monkeypatch.setattr(gpu_parts.sys, "path", [])
    monkeypatch.setattr(gpu_parts.sys, "argv", [])
    gpu_parts.PARTS["ratios"](kit, 100)
    assert run[0][0] == "tests.benchmarks.ratios"
    assert {"--small", "80", kit.file("ratios")} <= set(run[0])
