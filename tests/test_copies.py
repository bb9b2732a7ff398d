import json

import nbformat
import pytest

import mimrefiner as mr
from mimrefiner.batch import copies, runner

NOTEBOOKS = runner.find_notebooks([])


@pytest.mark.parametrize("source", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_solutions_are_gone_from_copies_and_all_else_is_there(source):
    notebook = nbformat.read(source, as_version=4)
    solutions = [
        cell for cell in notebook.cells if copies.SOLUTION in cell.metadata.get("tags", [])
    ]
    assert len(solutions) >= 2
    copy = copies.student_copy(notebook)
    nbformat.validate(copy)
    assert [cell.source for cell in copy.cells] == [
        cell.source for cell in notebook.cells if cell not in solutions
    ]


def test_an_empty_cell_stands_for_a_solution_in_code():
    new = nbformat.v4
    cells = [new.new_code_cell("1 + 1", metadata={"tags": [copies.SOLUTION]})]
    copy = copies.student_copy(new.new_notebook(cells=cells))
    assert [cell.source for cell in copy.cells] == [copies.ANSWER]


def test_copies_do_not_replace_a_students_work(tmp_path):
    (path,) = copies.write_student_copies(["02"], tmp_path / "course")
    assert "# your turn" in path.read_text() and "<details>" not in path.read_text()
    path.write_text("my answers")
    with pytest.raises(mr.InputError, match="exists and may hold somebody's work"):
        copies.write_student_copies([], tmp_path / "course")
    assert path.read_text() == "my answers"
    assert list(path.parent.iterdir()) == [path]


def executed_notebook(run, text):
    new = nbformat.v4
    cells = [
        new.new_markdown_cell("# 00 · Title, ![a picture](../docs/a.svg), [next](01_two.ipynb)"),
        new.new_code_cell(
            'preset = "tiny"  # which\nout = ""  # where', metadata={"tags": ["parameters"]}
        ),
        new.new_code_cell(
            f'# Parameters\npreset = "smoke"\nout = "{run}"',
            metadata={"tags": ["injected-parameters"], "papermill": {}},
        ),
        new.new_code_cell(
            "start_run()",
            outputs=[
                new.new_output("stream", name="stdout", text=text),
                new.new_output("stream", name="stderr", text="step 3"),
            ],
        ),
    ]
    metadata = {"papermill": {"output_path": f"{run}/x.ipynb", "parameters": {"out": str(run)}}}
    (run / "notebooks").mkdir(parents=True, exist_ok=True)
    nbformat.write(
        new.new_notebook(cells=cells, metadata=metadata), run / "notebooks" / "00_one.ipynb"
    )


def test_published_copies_show_parameters_and_no_machine(tmp_path):
    run, to = tmp_path / "run", tmp_path / "executed"
    executed_notebook(run, f"preset smoke, on CPU\nfigures are in {run}/figures\n")
    to.mkdir()
    other = nbformat.read(run / "notebooks" / "00_one.ipynb", as_version=4)
    nbformat.write(other, to / "09_other.ipynb")
    assert copies.publish(run, to) == [to / "00_one.ipynb"]
    assert "](../../docs/a.svg), [next](01_two.ipynb)" in (to / "00_one.ipynb").read_text()
    text = (to / "00_one.ipynb").read_text()
    assert str(tmp_path) not in text
    assert "papermill" not in text
    cells = json.loads(text)["cells"]
    assert [line.rstrip() for line in cells[1]["source"]] == [
        'preset = "smoke"  # which',
        'out = ""  # where',
    ]
    # The third cell
    assert "".join(cells[2]["outputs"][0]["text"]).startswith("preset smoke, on CPU")
    assert len(cells[2]["outputs"]) == 1
    assert sorted(file.name for file in to.iterdir()) == ["00_one.ipynb", "09_other.ipynb"]
    assert copies.publish(run, to) == [to / "00_one.ipynb"]


@pytest.mark.parametrize("name", ["00_one.ipynb", "essay.ipynb"])
def test_notebooks_that_were_not_published_stay(tmp_path, name, monkeypatch):
    run, to = tmp_path / "run", tmp_path / "notebooks"
    executed_notebook(run, "fine")
    to.mkdir()
    (to / name).write_text(NOTEBOOKS[0].read_text())
    with pytest.raises(
        mr.InputError,
        match=f"holds {name}, which is no published notebook: choose another folder with --to",
    ):
        copies.publish(run, to)
    (to / name).write_bytes((run / "notebooks" / "00_one.ipynb").read_bytes())
    # Sources that somebody has executed
    monkeypatch.setattr(copies, "project_folder", lambda: tmp_path)
    with pytest.raises(mr.InputError, match="which is no published notebook"):
        copies.publish(run, to)
    assert [file.name for file in to.iterdir()] == [name]


def test_copies_need_a_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(mr.InputError, match="file is a file: give a folder with --out"):
        copies.write_student_copies(["02"], tmp_path / "file")


def test_a_path_that_is_left_is_an_error_and_nothing_changes(tmp_path):
    executed_notebook(tmp_path / "run", "data from /mnt/disk/images\n")
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "00_one.ipynb").write_text("before")
    with pytest.raises(mr.InputError, match="names a path of this machine, /mnt/disk/images"):
        copies.publish(tmp_path / "run", tmp_path / "to")
    assert (tmp_path / "to" / "00_one.ipynb").read_text() == "before"
    with pytest.raises(mr.InputError, match="no executed notebooks in"):
        copies.publish(tmp_path / "nowhere", tmp_path / "to")
