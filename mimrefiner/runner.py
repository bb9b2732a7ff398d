"""Notebooks: strict parameters inside them, and their execution in batch through papermill."""

import ast
import os
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import papermill

from mimrefiner.checkpoint import atomic_file
from mimrefiner.config import describe, load_preset
from mimrefiner.errors import InputError
from mimrefiner.results import CLAIM_COLUMNS, ROW_COLUMNS, Run, claims_markdown, environment, write_csv, write_json

INJECTED = "# Parameters"  # papermill's first line of the cell it adds


def start_run(name: str, names: dict) -> Run:
    """First call of every notebook: check its parameters, say what they resolve to, return the run that collects results.

    Args:
        name: of the notebook, without suffix.
        names: the notebook's ``globals()``, with ``preset``, ``seeds`` and ``out``.

    Raises:
        InputError: a parameter that the notebook does not have (papermill passes misspelt ones on) or one of another type.
    """
    check_parameters(names.get("In", []))
    preset = load_preset(names["preset"])
    run = Run(name, preset, parse_seeds(names["seeds"]), Path(names["out"] or _project_folder() / "runs" / "interactive"))
    check_writable(run.out)
    print(f"{name}: preset {preset.name}, data {preset.dataset}, seeds {', '.join(map(str, run.seeds))}")
    print(describe(preset))
    return run


def check_parameters(cells: list[str]) -> None:
    """Compare the cell papermill injected with the parameters cell above it; ``cells`` are the notebook's inputs so far."""
    injected = [i for i, cell in enumerate(cells) if cell.startswith(INJECTED)]
    if injected:
        declared = assignments(cells[injected[-1] - 1])
        compare_parameters(declared, assignments(cells[injected[-1]]))


def compare_parameters(declared: dict, given: dict) -> None:
    """InputError for a name that was not declared or a value of another type than the default (int passes for float)."""
    valid = ", ".join(f"{name} ({type(value).__name__}, default {value!r})" for name, value in declared.items())
    for name, value in given.items():
        if name not in declared:
            raise InputError(f"unknown parameter {name!r}: this notebook has {valid}")
        expected = type(declared[name])
        if type(value) is not expected and not (expected is float and type(value) is int):
            raise InputError(f"parameter {name} must be {expected.__name__}, got {value!r}: this notebook has {valid}")


def assignments(code: str) -> dict:
    """The plain ``name = literal`` assignments of a cell."""
    found = {}
    for node in ast.parse(code).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = ast.literal_eval(node.value)
    return found


def parse_seeds(seeds: str) -> tuple[int, ...]:
    """ "0,1,2" as integers."""
    try:
        parsed = tuple(int(seed) for seed in str(seeds).split(","))
    except ValueError:
        raise InputError(f"seeds must be whole numbers with commas between, such as 0,1,2, got {seeds!r}") from None
    if min(parsed) < 0 or len(set(parsed)) < len(parsed):
        raise InputError(f"seeds must be different and >= 0, got {seeds!r}")
    return parsed


def run_notebooks(names: list[str], *, preset: str, seeds: str, out: Path, parameters: dict | None = None) -> Path:
    """Execute notebooks one after the other, collect their rows and claims, and say where everything is.

    Args:
        names: of notebooks, without suffix or by their number; none means all.
        preset, seeds, out: the parameters that every notebook has.
        parameters: further ones; a notebook that does not declare one raises before anything runs.

    Returns:
        ``out``, which then holds notebooks/, figures/, results/, claims/, results.csv, claims.csv, claims.md, manifest.json.
    """
    load_preset(preset)
    parse_seeds(seeds)
    notebooks = find_notebooks(names)
    out = Path(out).resolve()
    check_writable(out)
    given = {"preset": preset, "seeds": seeds, "out": str(out), **(parameters or {})}
    for notebook in notebooks:
        compare_parameters(declared_parameters(notebook), given)
    durations, began = {}, time.monotonic()
    for i, notebook in enumerate(notebooks):
        print(f"[{i + 1}/{len(notebooks)}] {notebook.stem}: preset {preset}, seeds {seeds}", flush=True)
        durations[notebook.stem] = _execute(notebook, out, given)
        print(f"[{i + 1}/{len(notebooks)}] {notebook.stem}: done in {durations[notebook.stem]:.0f} s", flush=True)
    collect(out)
    write_json(
        {**environment(), "preset": preset, "seeds": seeds, "parameters": parameters or {}, "seconds": durations},
        out / "manifest.json",
    )
    print(f"\n{(out / 'claims.md').read_text()}")
    print(f"Done in {time.monotonic() - began:.0f} s.")
    for what, where in (("notebooks", "notebooks"), ("figures", "figures"), ("rows", "results.csv"), ("claims", "claims.md")):
        print(f"  {what:10s} {os.path.relpath(out / where)}")
    return out


def find_notebooks(names: list[str]) -> list[Path]:
    """The notebooks called for, in order: all, or by full name or leading number."""
    folder = _project_folder() / "notebooks"
    there = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not there:
        raise InputError("no notebooks here: run this from a checkout of the project")
    chosen = []
    for name in names:
        matches = [n for n in there if n.stem == Path(name).stem or n.stem.split("_")[0] == name]
        if not matches:
            raise InputError(f"unknown notebook {name!r}: choose from {', '.join(n.stem for n in there)}")
        chosen += matches
    return chosen or there


def declared_parameters(notebook: Path) -> dict:
    """Names and defaults in the cell tagged ``parameters``."""
    for cell in nbformat.read(notebook, as_version=4).cells:
        if "parameters" in cell.metadata.get("tags", []):
            return assignments(cell.source)
    raise InputError(f"{notebook.name} has no cell tagged parameters")


def collect(out: Path) -> None:
    """Join the rows and claims of all notebooks in ``out``."""
    for what, columns in (("results", ROW_COLUMNS), ("claims", CLAIM_COLUMNS)):
        frames = [pd.read_csv(file) for file in sorted((out / what).glob("*.csv"))]
        frames = [frame for frame in frames if len(frame)]
        write_csv(pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=columns), out / f"{what}.csv")
    with atomic_file(out / "claims.md") as temporary:
        temporary.write_text(claims_markdown(pd.read_csv(out / "claims.csv")))


def check_writable(folder: Path) -> None:
    """InputError unless files can be written under ``folder``."""
    try:
        with atomic_file(folder / ".writable") as temporary:
            temporary.write_text("x")
        (folder / ".writable").unlink()
    except OSError as error:
        raise InputError(f"cannot write to {folder} ({error.strerror}): choose another folder with --out") from error


def _execute(notebook: Path, out: Path, parameters: dict) -> float:
    began = time.monotonic()
    os.environ["MIMREFINER_PROGRESS"] = "log"  # kernels inherit it: a bar cannot be drawn through papermill
    (out / "notebooks").mkdir(parents=True, exist_ok=True)
    unfinished = out / "notebooks" / f"{notebook.stem}.unfinished.ipynb"
    try:
        executed = papermill.execute_notebook(
            notebook, unfinished, parameters, cwd=str(notebook.parent), progress_bar=sys.stderr.isatty(),
            stdout_file=sys.stdout, stderr_file=sys.stderr, extra_arguments=["--log-level=ERROR"],
        )  # fmt: skip
    except papermill.PapermillExecutionError as error:
        raise InputError(
            f"{notebook.stem} failed in cell {error.exec_count}: {error.ename}: {error.evalue} (see {os.path.relpath(unfinished)})"
        ) from error
    for key in ("input_path", "output_path"):
        executed.metadata.papermill.pop(key, None)  # machine paths
    executed.metadata.papermill.parameters.pop("out", None)
    with atomic_file(out / "notebooks" / notebook.name) as temporary:
        nbformat.write(executed, temporary)
    unfinished.unlink()
    return time.monotonic() - began


def _project_folder() -> Path:
    """The checkout this package lies in, else the nearest folder above the working one with notebooks, else that one."""
    for folder in (Path(__file__).resolve().parent.parent, Path.cwd(), *Path.cwd().parents):
        if (folder / "notebooks").is_dir():
            return folder
    return Path.cwd()
