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


def python_of(solution):
    return re.findall(r"```python\n(.*?)```", solution.source, re.S)


def with_solutions(notebook, project):
    """A project that holds the notebook alone, with the code of its solutions as last cells."""
    copy = nbformat.read(notebook, as_version=4)
    for cell in [cell for cell in copy.cells if _is_solution(cell)]:
        copy.cells += map(nbformat.v4.new_code_cell, python_of(cell))
    (project / "notebooks").mkdir(parents=True)
    nbformat.write(copy, project / "notebooks" / notebook.name)
    return project


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=NAMES)
def test_notebook_and_its_solutions_run_at_smoke(notebook, tmp_path, monkeypatch):
    project = with_solutions(notebook, tmp_path / "project")
    monkeypatch.setattr(runner, "project_folder", lambda: project)
    tmp_path = tmp_path / "out"
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
    check_what_a_reader_sees(nbformat.reads(executed, as_version=4))


def check_what_a_reader_sees(executed):
    """Lines fit a page, and a sentence says what was seen."""
    said = []
    for output in (o for c in executed.cells if c.cell_type == "code" for o in c.outputs):
        if output.get("name") == "stdout":
            assert max(map(len, output.text.splitlines())) <= 100, output.text
        said.append(output.get("data", {}).get("text/markdown", ""))
    assert any("**What was seen" in text for text in said)
    assert not re.search(r"\bnan\b", " ".join(said))


def test_two_runs_with_one_seed_agree(tmp_path):
    """Of the notebooks that draw at random beside the shared models, whose training has its tests
    elsewhere.
    """
    tables = []
    for name in ("a", "b"):
        runner.run_notebooks(["02", "07"], preset="smoke", seeds="0", out=tmp_path / name)
        tables.append(
            pd.read_csv(tmp_path / name / "results.csv").drop(columns=list(claims.NOT_A_RESULT))
        )
    pd.testing.assert_frame_equal(*tables)


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
    """Prose first, short cells, no outputs; questions, exercises and folded solutions."""
    cells = nbformat.read(notebook, as_version=4).cells
    assert cells[0].cell_type == "markdown"
    assert cells[0].source.startswith(f"# {notebook.stem[:2]} · ")
    assert "Time on 2 cores" in cells[0].source
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert "parameters" in code[0].metadata.tags
    assert "start_run" in code[1].source
    assert "run.finish(" in code[-1].source
    for cell in code:
        assert cell.outputs == []
        assert cell.execution_count is None
        assert sum(map(bool, cell.source.splitlines())) <= 15, cell.source
        assert max(map(len, cell.source.splitlines())) <= 88, cell.source
        assert not re.search(r"is_published|== .smoke", cell.source)
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert "**Because**" in text
    assert "**Predict" in text or notebook.stem[:2] in ("02", "09")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=NAMES)
def test_two_questions_and_three_exercises_of_which_one_is_implemented(notebook):
    cells = nbformat.read(notebook, as_version=4).cells
    (asked,) = (cell.source for cell in cells if "## Exercises" in cell.source)
    questions, exercises = asked.split("## Questions")[1].split("## Exercises")
    assert re.findall(r"^(\d)\. ", questions, re.M) == ["1", "2"]
    assert re.findall(r"^(\d)\. ", exercises, re.M) == ["1", "2", "3"]
    assert exercises.count("**Implement it**") == 1
    (cell,) = (cell for cell in cells if "exercise" in cell.metadata.get("tags", []))
    assert "assert " in cell.source and "is not None" in cell.source
    (name,) = re.findall(r"^def (\w+)", cell.source, re.M)
    solutions = [cell for cell in cells if _is_solution(cell)]
    for solution in solutions:  # folded where GitHub folds
        assert re.match(r"<details><summary>Solution[^<]*</summary>\n\n", solution.source)
        assert solution.source.endswith("\n\n</details>")
    (answer,) = (c for s in solutions for c in python_of(s) if f"def {name}(" in c)
    assert "assert " in answer or "print(" in answer


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
    models = asked & store.TRAINED.keys()
    if "encoders" in asked:
        strings = {node.value for node in nodes if isinstance(node, ast.Constant)}
        models |= {store.STAGES[name][0] for name in strings & store.STAGES.keys()}
    assert set(needs.trains) == models
    assert set(needs.reads) == folders - {"figures", "tables"}  # which it writes


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
