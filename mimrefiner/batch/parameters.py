"""A notebook's parameters: what it declares, whether what was given fits, and the run that begins
with them.
"""

import ast
import json
from pathlib import Path

from mimrefiner.errors import InputError
from mimrefiner.files import check_writable, project_folder
from mimrefiner.study.claims import Run
from mimrefiner.study.presets import describe, load_preset
from mimrefiner.study.tables import device_name

INJECTED = "# Parameters"  # papermill's first line of the cell it adds


def start_run(name: str, names: dict) -> Run:
    """First call of every notebook: check its parameters, say what they resolve to, return the run
    that collects results.

    Args:
        name: of the notebook, without suffix.
        names: the notebook's ``globals()``, with ``preset``, ``seeds`` and ``out``.

    Raises:
        InputError: a parameter that the notebook does not have (papermill passes misspelt ones on)
            or one of another type.
    """
    check_parameters(names.get("In", []))
    preset = load_preset(names["preset"])
    run = Run(
        name,
        preset,
        parse_seeds(names["seeds"]),
        Path(names["out"] or project_folder() / "runs" / "interactive"),
    )
    check_writable(run.out)
    print(
        f"{name}: preset {preset.name}, data {preset.dataset}, seeds {', '.join(map(str, run.seeds))}, on {device_name()}"
    )
    print(describe(preset))
    return run


def check_parameters(cells: list[str]) -> None:
    """Compare the cell papermill injected with the parameters cell above it; ``cells`` are the
    notebook's inputs so far.
    """
    injected = [i for i, cell in enumerate(cells) if cell.startswith(INJECTED)]
    if injected:
        declared = assignments(cells[injected[-1] - 1])
        compare_parameters(declared, assignments(cells[injected[-1]]))


def compare_parameters(declared: dict, given: dict) -> None:
    """InputError for a name that was not declared or a value of another type than the default (int
    passes for float).
    """
    valid = ", ".join(
        f"{name} ({type(value).__name__}, default {value!r})" for name, value in declared.items()
    )
    for name, value in given.items():
        if name not in declared:
            raise InputError(f"unknown parameter {name!r}: this notebook has {valid}")
        expected = type(declared[name])
        if type(value) is not expected and not (expected is float and type(value) is int):
            raise InputError(
                f"parameter {name} must be {expected.__name__}, got {value!r}: this notebook has {valid}"
            )


def declared_parameters(notebook: Path) -> dict:
    """Names and defaults in the cell tagged ``parameters``."""
    # Nbformat takes a second to import, in every kernel
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if "parameters" in cell["metadata"].get("tags", []):
            return assignments("".join(cell["source"]))
    raise InputError(f"{notebook.name} has no cell tagged parameters")


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
        raise InputError(
            f"seeds must be whole numbers with commas between, such as 0,1,2, got {seeds!r}"
        ) from None
    if min(parsed) < 0 or len(set(parsed)) < len(parsed):
        raise InputError(f"seeds must be different and >= 0, got {seeds!r}")
    return parsed
