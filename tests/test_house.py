"""The house: rooms, the one direction of their imports, and walls between modules."""

import ast
import doctest
import inspect
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

import mimrefiner as mr

CHECKOUT = Path(__file__).parent.parent
# A room may import from rooms to its right, and from its own. Rooms in one group do not meet.
ROOMS = (
    {"experiments"},
    {"__main__"},
    {"commands"},
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


# Rooms that talk to a terminal or a notebook
SPEAKING = {"__main__", "commands", "batch", "experiments"}
LONGEST = 60  # lines of one function, with its docstring


def prints(trees: dict[str, ast.Module]) -> list[str]:
    """The calls of ``print`` in rooms that should log."""
    return [
        f"{name}, line {node.lineno}"
        for name, tree in trees.items()
        if room_of(name) not in SPEAKING and ".assets." not in name
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
    ]


def long_functions(trees: dict[str, ast.Module]) -> list[str]:
    return [
        f"{name}.{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for name, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > LONGEST
    ]


def test_print_belongs_to_the_command_line():
    assert prints(modules(CHECKOUT)) == []
    planted = {
        "mimrefiner.study.store": ast.parse("print(1)"),
        "mimrefiner.__main__": ast.parse("print(1)"),
    }
    assert prints(planted) == ["mimrefiner.study.store, line 1"]


def test_functions_are_short():
    assert long_functions(modules(CHECKOUT)) == []
    body = "    x = 1\n" * LONGEST
    assert long_functions({"a": ast.parse(f"def f():\n{body}")}) == ["a.f: 61 lines"]


def test_public_names_are_the_same_in_every_list():
    """``__all__``, the table that loads them, what type checkers see, and completion."""
    tree = ast.parse((CHECKOUT / "mimrefiner" / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    for_checkers = {
        (node.module.removeprefix("mimrefiner."), alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert {(room, name) for room, names in mr._ROOMS.items() for name in names} == for_checkers
    assert sorted(name for _, name in for_checkers) == sorted(mr.__all__)
    assert {*mr.__all__, "__version__"} <= set(dir(mr))


@pytest.mark.parametrize("name", mr.__all__)
def test_every_public_name_has_an_example(name):
    assert ">>> " in (inspect.getdoc(getattr(mr, name)) or "")


@pytest.mark.parametrize(
    "name",
    sorted(
        name.removesuffix(".__init__")
        for name in modules(CHECKOUT)
        if ".assets." not in name and not name.endswith("__main__")
    ),
)
def test_examples_in_docstrings_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MIMREFINER_CACHE", str(tmp_path))
    said = []
    runner = doctest.DocTestRunner()
    for examples in doctest.DocTestFinder().find(import_module(name)):
        runner.run(examples, out=said.append)
    assert runner.failures == 0, "".join(said)
