"""The house: rooms, the one direction of their imports, and walls between modules."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parent.parent
# A room may import from rooms to its right, and from its own. Rooms in one group do not meet.
ROOMS = (
    {"experiments"},
    {"__main__"},
    {"__init__"},
    {"batch"},
    {"study"},
    {"probes"},
    {"training"},
    {"method"},
    {"models", "data"},
    {"root files"},
)
FLOOR = {room: floor for floor, group in enumerate(ROOMS) for room in group}


def modules(root: Path) -> dict[str, ast.Module]:
    """Dotted name -> syntax tree of every module of the package and of the experiments."""
    files = [file for room in ("mimrefiner", "experiments") for file in (root / room).rglob("*.py")]
    dotted = {
        file.relative_to(root).with_suffix("").as_posix().replace("/", "."): file for file in files
    }
    return {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in dotted.items()}


def room_of(module: str) -> str:
    first, *rest = module.split(".")
    if first == "experiments":
        return first
    if not rest:
        return "__init__"
    return rest[0] if rest[0] in FLOOR else "root files"


def imports(name: str, tree: ast.Module, known: dict) -> set[tuple[str, str]]:
    """(module, name taken from it or "") of everything imported from the house, late or early."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []  # for type checkers only: nothing is imported
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                is_module = inner in known or f"{inner}.__init__" in known
                found.add((inner, "") if is_module else (node.module, alias.name))
    return {
        (module, taken)
        for module, taken in found
        if module.split(".")[0] in ("mimrefiner", "experiments")
    }


def problems(root: Path) -> list[str]:
    """What the house does not allow: one line each."""
    trees, found, edges = modules(root), [], {}
    for name, tree in trees.items():
        here = room_of(name)
        edges[name] = set()
        for module, taken in imports(name, tree, trees):
            there = room_of(module)
            same = here == there
            if not same and FLOOR[there] <= FLOOR[here]:
                found.append(f"{name} imports {module}: {here} may not use {there}")
            private = next(
                (
                    part
                    for part in (*module.split("."), taken)
                    if part.startswith("_") and not part.startswith("__")
                ),
                None,
            )
            if private and module != "mimrefiner._torchvision":
                found.append(f"{name} reaches into {module} for {private}")
            if module in trees:
                edges[name].add(module)
        aliases = {m.rsplit(".", 1)[-1] for m, taken in imports(name, tree, trees) if not taken}
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id in aliases
                and node.attr.startswith("_")
                and not node.attr.startswith("__")
            ):
                found.append(f"{name} reaches into {node.value.id} for {node.attr}")
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        found.append(f"a circle of imports: {' -> '.join(error.args[1])}")
    return sorted(found)


def test_imports_go_one_way_without_circles_and_leave_private_names_alone():
    assert problems(CHECKOUT) == []


@pytest.mark.parametrize(
    ("file", "line", "complaint"),
    [
        (
            "mimrefiner/data/views.py",
            "from mimrefiner.probes.knn import knn_hits",
            "data may not use probes",
        ),
        (
            "mimrefiner/models/masked.py",
            "def late():\n    from mimrefiner.data import augment",
            "models may not use data",
        ),
        (
            "mimrefiner/method/heads.py",
            "from mimrefiner.method import refiner",
            "a circle of imports",
        ),
        (
            "mimrefiner/files.py",
            "def late():\n    from mimrefiner import progress, files",
            "a circle of imports",
        ),
        ("mimrefiner/study/store.py", "from mimrefiner.data.augment import _mix", "reaches into"),
        (
            "mimrefiner/study/store.py",
            "from mimrefiner.data import augment\nx = augment._mix",
            "for _mix",
        ),
    ],
)
def test_planted_offences_are_found(tmp_path, file, line, complaint):
    for name in modules(CHECKOUT):
        source = CHECKOUT / (name.replace(".", "/") + ".py")
        target = tmp_path / source.relative_to(CHECKOUT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    assert problems(tmp_path) == []
    with (tmp_path / file).open("a", encoding="utf-8") as stream:
        stream.write(f"\n{line}\n")
    assert any(complaint in problem for problem in problems(tmp_path))
