"""Every notebook is executed at preset smoke; what it writes is checked, and its form."""

import ast
import itertools
import re
import subprocess
import sys
from importlib import import_module

import nbformat
import pandas as pd
import pytest

from mimrefiner.batch import parameters, runner
from mimrefiner.study import claims, store
from mimrefiner.study.presets import load_preset

NOTEBOOKS = runner.find_notebooks([])
NAMES = [path.stem for path in NOTEBOOKS]
OURS = ("mimrefiner", "experiments")


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory):
    """A cache that holds the models notebooks share: training takes a second each, a process for
    each would take seven.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIMREFINER_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("MIMREFINER_PROGRESS", "log")
        for train, seed in itertools.product(store.TRAINED.values(), (0, 1)):
            train(load_preset("smoke", seed))
        yield


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=NAMES)
def test_notebook_runs_at_smoke(notebook, tmp_path):
    runner.run_notebooks([notebook.stem], preset="smoke", seeds="0,1", out=tmp_path)
    rows = pd.read_csv(tmp_path / "results.csv")
    assert tuple(rows.columns) == claims.ROW_COLUMNS
    assert rows.drop(columns="git_sha").notna().all(axis=None)
    assert rows.loc[rows["unit"] == "share", "value"].between(0, 1).all()
    found = pd.read_csv(tmp_path / "claims.csv")
    assert len(found) > 0
    assert set(found["verdict"]) <= {"seen", "not seen", "opposite", "open"}
    figures = {path.suffix for path in (tmp_path / "figures").iterdir()}
    assert figures == {".pdf", ".png", ".csv"}
    executed = (tmp_path / "notebooks" / notebook.name).read_text()
    assert str(tmp_path) not in executed.replace(f'out = \\"{tmp_path}\\"', "")
    assert not list(tmp_path.rglob("*unfinished*"))


def test_two_runs_with_one_seed_agree(tmp_path, monkeypatch):
    """Of the notebooks in which more is drawn at random than in the shared models; each run trains
    its own models.
    """
    tables = []
    for name in ("a", "b"):
        monkeypatch.setenv("MIMREFINER_CACHE", str(tmp_path / name / "cache"))
        runner.run_notebooks(
            ["01", "02", "05", "07", "08"], preset="smoke", seeds="0", out=tmp_path / name
        )
        tables.append(
            pd.read_csv(tmp_path / name / "results.csv").drop(columns=list(claims.NOT_A_RESULT))
        )
    pd.testing.assert_frame_equal(*tables)


def test_a_cell_starts_several_processes_and_shows_what_they_say(tmp_path):
    runner.run_notebooks(
        ["03"], preset="smoke", seeds="0", out=tmp_path, parameters={"processes": 2}
    )
    executed = nbformat.read(tmp_path / "notebooks" / "03_refinement.ipynb", as_version=4)
    (said,) = (cell.outputs for cell in executed.cells if "jobs.torchrun" in cell.source)
    said = "".join(output.get("text", "") for output in said)
    assert "ema_encoder.safetensors" in said and re.search(
        r"last block: [\d.]+ % by 2 processes", said
    )


def test_plain_papermill_runs_and_refuses_a_misspelt_parameter(tmp_path):
    notebook = next(path for path in NOTEBOOKS if path.stem == "00_quickstart")
    command = [
        sys.executable,
        "-m",
        "papermill",
        str(notebook),
        str(tmp_path / "out.ipynb"),
        "-p",
        "out",
        str(tmp_path),
    ]
    fine = subprocess.run([*command, "-p", "preset", "smoke"], capture_output=True, text=True)
    assert fine.returncode == 0, fine.stderr
    wrong = subprocess.run([*command, "-p", "perset", "smoke"], capture_output=True, text=True)
    assert wrong.returncode != 0
    assert "unknown parameter 'perset'" in wrong.stderr


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=NAMES)
def test_form(notebook):
    """Prose first, short cells, no outputs, exercises with hidden solutions."""
    cells = nbformat.read(notebook, as_version=4).cells
    assert cells[0].cell_type == "markdown"
    assert cells[0].source.startswith(f"# {notebook.stem[:2]} · ")
    assert "Time on 2 cores" in cells[0].source
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert "parameters" in code[0].metadata.tags
    assert "start_run" in code[1].source
    for cell in code:
        assert cell.outputs == []
        assert cell.execution_count is None
        assert sum(map(bool, cell.source.splitlines())) <= 15, cell.source
        if "solution" in cell.metadata.get("tags", []):
            assert cell.metadata.jupyter.source_hidden
    (exercises,) = (cell.source for cell in cells if "## Exercises" in cell.source)
    assert re.findall(r"^(\d)\. ", exercises.split("## Exercises")[1], re.M) == ["1", "2", "3"]
    assert any("solution" in cell.metadata.get("tags", []) for cell in code)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=NAMES)
def test_every_name_that_a_notebook_takes_from_the_house_exists(notebook, monkeypatch):
    monkeypatch.syspath_prepend(NOTEBOOKS[0].parent.parent)  # experiments/
    cells = nbformat.read(notebook, as_version=4).cells
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    nodes, house, missing = list(ast.walk(ast.parse(code))), {}, []
    for node in nodes:
        if isinstance(node, ast.Import):
            house |= {a.asname: import_module(a.name) for a in node.names if a.asname == "mr"}
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in OURS:
            for alias in node.names:
                try:
                    house[alias.name] = import_module(f"{node.module}.{alias.name}")
                except ModuleNotFoundError:
                    if not hasattr(import_module(node.module), alias.name):
                        missing.append(f"{node.module}.{alias.name}")
    attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
    for node in attributes:
        owner = house.get(ast.unparse(node.value))
        if owner is not None and not hasattr(owner, node.attr):
            missing.append(ast.unparse(node))
    assert missing == []


ON_OTHER_DATA = {"00_quickstart": {"pretrained", "refined"}}  # where no packaged model fits


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=NAMES)
def test_what_a_notebook_declares_is_what_its_code_uses(notebook):
    cells = nbformat.read(notebook, as_version=4).cells
    code = [c for c in cells if c.cell_type == "code" and not _is_solution(c)]
    nodes = [node for cell in code for node in ast.walk(ast.parse(cell.source))]
    taken = {
        alias.name
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.module == "mimrefiner.study.store"
        for alias in node.names
    }
    asked = taken | {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "store"
    }
    folders = {
        node.right.value
        for node in nodes
        if isinstance(node, ast.BinOp) and ast.unparse(node.left) == "run.out"
    }
    needs = parameters.declared_needs(notebook)
    models = asked & store.TRAINED.keys() - ON_OTHER_DATA.get(notebook.stem, set())
    assert set(needs.trains) == models
    assert set(needs.reads) == folders - {"figures", "tables", "models"}  # which it writes


def _is_solution(cell):
    return "solution" in cell.metadata.get("tags", [])


class Noted(dict):
    """A dict that keeps the names that were asked for."""

    def __init__(self, *args):
        super().__init__(*args)
        self.read = set()

    def __getitem__(self, name):
        self.read.add(name)
        return super().__getitem__(name)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=NAMES)
def test_every_declared_parameter_is_read(notebook, tmp_path):
    declared = parameters.declared_parameters(notebook)
    given = Noted(declared | {"preset": "smoke", "out": str(tmp_path)})
    parameters.start_run(notebook.stem, given)
    cells = nbformat.read(notebook, as_version=4).cells
    code = [
        c.source
        for c in cells
        if c.cell_type == "code"
        and not {"parameters", "solution"} & set(c.metadata.get("tags", []))
    ]
    loaded = {
        n.id
        for c in code
        for n in ast.walk(ast.parse(c))
        if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)
    }
    assert set(declared) <= given.read | loaded
