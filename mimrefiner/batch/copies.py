"""Copies of the notebooks: without solutions for students, without paths for publication."""

import json
import re
import sys
from pathlib import Path

import nbformat

from mimrefiner.batch.runner import find_notebooks
from mimrefiner.errors import InputError
from mimrefiner.files import atomic_file, project_folder

SOLUTION = "solution"  # tag of the cells that students do not get
ANSWER = "# your answer"
MAX_MB = 3  # of one published notebook
MACHINE_PATH = re.compile(r"(?<![\w.~/])/(home|root|tmp|Users|mnt|opt|usr|var)/[\w./-]*")


def write_student_copies(names: list[str], out: Path) -> list[Path]:
    """Write notebooks in which an empty cell stands for every cell tagged ``solution``.

    Args:
        names: notebooks by name or number; none means all.
        out: the folder of the copies.

    Returns:
        The files written.

    Raises:
        InputError: a copy is there already, perhaps with a student's work, or ``out`` is a file.
    """
    if out.is_file():
        raise InputError(f"{out} is a file: give a folder with --out")
    sources, written = find_notebooks(names), []
    for source in sources:
        if (out / source.name).exists():
            raise InputError(
                f"{out / source.name} exists and may hold somebody's work: "
                "choose another folder with --out"
            )
    for source in sources:
        with atomic_file(out / source.name) as temporary:
            nbformat.write(student_copy(nbformat.read(source, as_version=4)), temporary)
        written.append(out / source.name)
    return written


def student_copy(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook without its solutions: an empty cell stands for a code cell tagged ``solution``,
    and text with that tag is left out.
    """
    kept = []
    for cell in notebook.cells:
        if SOLUTION not in cell.metadata.get("tags", []):
            kept.append(cell)
        elif cell.cell_type == "code":
            kept.append(nbformat.v4.new_code_cell(ANSWER, id=cell.id))
    return nbformat.from_dict({**notebook, "cells": kept})


def publish(run: Path, to: Path) -> list[Path]:
    """Replace the executed notebooks in ``to`` by those of a run, free of paths of this machine.

    Args:
        run: the folder of a run, with ``notebooks/``.
        to: the folder of published notebooks; those that the run does not have stay.

    Returns:
        The files written.

    Raises:
        InputError: the run has no executed notebooks, one is too large or still names a path, or
            ``to`` holds notebooks that were not executed (sources, copies for students). Then
            ``to`` is unchanged.
    """
    sources = sorted(
        file
        for file in (run / "notebooks").glob("[0-9][0-9]_*.ipynb")
        if ".unfinished" not in file.name
    )
    if not sources:
        raise InputError(
            f"no executed notebooks in {run / 'notebooks'}: "
            f"make them with mimrefiner run --out {run}"
        )
    copies = {source.name: _checked_copy(source, run) for source in sources}
    for old in sorted(to.glob("*.ipynb")):
        if to.resolve() == project_folder() / "notebooks" or not _is_executed(old):
            raise InputError(
                f"{to} holds {old.name}, which is no published notebook: "
                "choose another folder with --to"
            )
    for name, copy in copies.items():
        with atomic_file(to / name) as temporary:
            nbformat.write(copy, temporary)
    return [to / name for name in copies]


def _checked_copy(source: Path, run: Path) -> nbformat.NotebookNode:
    """The published copy; InputError where it is too large or still names a path."""
    copy = published_copy(nbformat.read(source, as_version=4), run)
    text = nbformat.writes(copy)
    if found := MACHINE_PATH.search(_without_images(text)):
        raise InputError(
            f"{source.name} still names a path of this machine, {found[0]}: "
            "print a shorter one there"
        )
    if len(text) > MAX_MB * 2**20:
        raise InputError(
            f"{source.name} has {len(text) / 2**20:.1f} MB, more than the {MAX_MB} to publish: "
            "draw smaller figures"
        )
    return copy


def _is_executed(notebook: Path) -> bool:
    try:
        return any(cell.get("outputs") for cell in json.loads(notebook.read_bytes())["cells"])
    except (ValueError, KeyError, TypeError):
        return False


def published_copy(notebook: nbformat.NotebookNode, run: Path) -> nbformat.NotebookNode:
    """The executed notebook without logs, paths and papermill's notes; the values of its parameters
    stand in the cell that declares them.
    """
    cells = []
    for cell in notebook.cells:
        if "injected-parameters" in cell.metadata.get("tags", []):
            lines = [line for line in cell.source.splitlines() if not re.match(r"out = ", line)]
            cells[-1].source = _with_values(cells[-1].source, lines)
            continue
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        if cell.cell_type == "markdown":  # it will lie one folder deeper
            cell.source = cell.source.replace("](../", "](../../")
        if cell.cell_type == "code":
            cell.outputs = [
                _clean(output, run) for output in cell.outputs if output.get("name") != "stderr"
            ]
        cells.append(cell)
    notebook.metadata.pop("papermill", None)
    return nbformat.from_dict({**notebook, "cells": cells})


def _with_values(declaration: str, given: list[str]) -> str:
    """The parameters cell with the values that a run was given; its comments stay."""
    for line in given:
        name, equals, value = line.partition(" = ")
        if equals:
            declaration = re.sub(
                rf"^{name} = .*?(?=  #|$)",
                lambda _, text=f"{name} = {value}": text,
                declaration,
                flags=re.M,
            )
    return declaration


def _clean(output: nbformat.NotebookNode, run: Path) -> nbformat.NotebookNode:
    folders = {
        str(run.resolve()): "RUN",
        str(Path.cwd()): ".",
        sys.prefix: "ENVIRONMENT",
        str(Path.home()): "~",
    }

    def clean(text):
        if isinstance(text, list):
            return [clean(line) for line in text]
        # The longest first, since one folder may lie in another
        for folder in sorted(folders, key=len, reverse=True):
            text = re.sub(rf"{re.escape(folder)}(?![\w-])", folders[folder], text)
        return text

    if "text" in output:
        output.text = clean(output.text)
    for kind in output.get("data", {}):
        if kind.startswith("text/"):
            output.data[kind] = clean(output.data[kind])
    return output


def _without_images(text: str) -> str:
    return re.sub(r'"image/[a-z+]+": ("[^"]*"|\[[^\]]*\])', '"image"', text)
