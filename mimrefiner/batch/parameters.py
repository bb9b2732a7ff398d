"""What a notebook declares (parameters and needs), whether what is given fits, and the record that
begins with it.
"""

import ast
import json
from dataclasses import dataclass
from pathlib import Path

from mimrefiner.errors import InputError
from mimrefiner.files import check_writable, project_folder
from mimrefiner.notices import show_notices
from mimrefiner.study.claims import Record
from mimrefiner.study.lessons import folded
from mimrefiner.study.presets import describe, load_preset
from mimrefiner.study.tables import device_name

INJECTED = "# Parameters"  # papermill's first line of the cell it adds


def start_run(name: str, names: dict) -> Record:
    """Check a notebook's parameters, print what they resolve to, and return the record of results.

    In a notebook all settings stand behind a fold.

    Every notebook calls it first. From then on notices of the package are shown.

    Args:
        name: the notebook's, without suffix.
        names: the notebook's ``globals()``, with ``preset``, ``seeds`` and ``out``.

    Raises:
        InputError: a parameter that the notebook does not have (papermill passes misspelt ones on)
            or one of another type.

    >>> from tempfile import mkdtemp
    >>> import mimrefiner as mr
    >>> parameters = {"preset": "smoke", "seeds": "0,1", "out": mkdtemp()}
    >>> run = mr.start_run("my_notebook", parameters)  # doctest: +ELLIPSIS
    my_notebook: preset smoke, data digits, seeds 0, 1, on ...
    >>> [seed for seed, preset in run.presets()]
    [0, 1]
    """
    show_notices()
    names.update(check_parameters(names.get("In", [])))
    preset, seeds = load_preset(names["preset"]), parse_seeds(names["seeds"])
    out = Path(names["out"] or project_folder() / "runs" / "interactive")
    check_writable(out)
    said = f"preset {preset.name}, data {preset.dataset}, seeds {', '.join(map(str, seeds))}"
    print(f"{name}: {said}, on {device_name()}")
    if "In" in names:  # in a notebook
        from IPython.display import display

        display(folded("all settings", describe(preset)))
    return Record(name, preset, seeds, out)


def check_parameters(cells: list[str]) -> dict:
    """What papermill injected, in the types of the parameters cell above it.

    Args:
        cells: the notebook's inputs so far.

    Raises:
        InputError: a parameter that does not fit.
    """
    injected = [i for i, cell in enumerate(cells) if cell.startswith(INJECTED)]
    if injected:
        declared = assignments(cells[injected[-1] - 1])
        return compare_parameters(declared, assignments(cells[injected[-1]]))
    return {}


def compare_parameters(declared: dict, given: dict) -> dict:
    """``given`` in the types of the defaults: papermill's ``-p seeds 0`` is the text "0".

    Raises:
        InputError: a name that was not declared, or a value that its type cannot hold as it is.

    >>> compare_parameters({"seeds": "0", "share": 0.5, "steps": 10}, {"seeds": 1, "share": "0.25"})
    {'seeds': '1', 'share': 0.25}
    """
    converted = {}
    valid = ", ".join(
        f"{name} ({type(value).__name__}, default {value!r})" for name, value in declared.items()
    )
    for name, value in given.items():
        if name not in declared:
            raise InputError(f"unknown parameter {name!r}: this notebook has {valid}")
        expected = type(declared[name])
        try:
            converted[name] = _converted(value, expected)
        except (ValueError, OverflowError):
            raise InputError(
                f"parameter {name} must be {expected.__name__}, got {value!r}: "
                f"this notebook has {valid}"
            ) from None
    return converted


def _converted(value, kind: type):
    """``value`` as ``kind``; ValueError where something would be lost."""
    if type(value) is kind:
        return value
    numbers = (int, float)
    if kind is str and type(value) in numbers:
        return str(value)
    if kind is bool and str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    if kind in numbers and type(value) in (*numbers, str) and float(value) == kind(value):
        return kind(value)
    raise ValueError


def declared_parameters(notebook: Path) -> dict:
    """Names and defaults in the cell tagged ``parameters``."""
    # nbformat takes a second to import, papermill four, and every kernel imports this module
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if "parameters" in cell["metadata"].get("tags", []):
            return assignments("".join(cell["source"]))
    raise InputError(f"{notebook.name} has no cell tagged parameters")


@dataclass(frozen=True)
class Needs:
    """What must be there before a notebook runs in batch.

    Attributes:
        trains: models of :data:`mimrefiner.study.store.TRAINED` that are trained once for all.
        reads: folders of the run, for example "claims", whose files other notebooks write.
    """

    trains: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()


def declared_needs(notebook: Path) -> Needs:
    """What the notebook's metadata declare under ``mimrefiner``; nothing without such an entry.

    Raises:
        InputError: an entry that is neither ``trains`` nor ``reads``.
    """
    metadata = json.loads(notebook.read_text(encoding="utf-8"))["metadata"]
    try:
        return Needs(**{name: tuple(v) for name, v in metadata.get("mimrefiner", {}).items()})
    except TypeError as error:
        raise InputError(f"{notebook.name}, metadata mimrefiner: {error}") from None


def assignments(code: str) -> dict:
    """The plain ``name = literal`` assignments of a cell.

    >>> assignments('preset = "tiny"  # a comment\\nshare = 0.5')
    {'preset': 'tiny', 'share': 0.5}
    """
    found = {}
    for node in ast.parse(code).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = ast.literal_eval(node.value)
    return found


def parse_seeds(seeds: str) -> tuple[int, ...]:
    """Seeds from a text.

    >>> parse_seeds("0, 1, 2")
    (0, 1, 2)
    """
    try:
        parsed = tuple(int(seed) for seed in str(seeds).split(","))
    except ValueError:
        raise InputError(
            f"seeds must be whole numbers with commas between, such as 0,1,2, got {seeds!r}"
        ) from None
    if min(parsed) < 0 or len(set(parsed)) < len(parsed):
        raise InputError(f"seeds must be different and >= 0, got {seeds!r}")
    return parsed
