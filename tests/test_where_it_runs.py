"""Homes, variables, terminals, kernels and launchers as people have them."""

import ast
import io
import os
import pwd
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch

import mimrefiner as mr
from mimrefiner.__main__ import main
from mimrefiner.batch.execute import execute, kernel_of
from mimrefiner.batch.parameters import compare_parameters
from mimrefiner.files import PACKAGE, cache_folder, data_folder, expanded, variable_folder
from mimrefiner.probes.umap import own_class_share, shared_neighbours, umap_map


@pytest.mark.parametrize("folder", [cache_folder, data_folder])
def test_folders_by_variable(folder, monkeypatch, tmp_path):
    variable = {"cache_folder": "MIMREFINER_CACHE", "data_folder": "MIMREFINER_DATA"}
    variable = variable[folder.__name__]
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv(variable, raising=False)
    default = folder()
    assert default.is_relative_to(tmp_path / ".cache" / "mimrefiner")
    for text, expected in (
        ("", default),
        ("  ", default),
        ("~/x", tmp_path / "x"),
        ("/data/images\r", Path("/data/images")),
    ):
        monkeypatch.setenv(variable, text)
        assert folder() == expected


@pytest.fixture
def homeless(monkeypatch):
    """A user of a container: no HOME, no entry in the list of users."""

    def nobody(*args):
        raise KeyError("uid not found")

    for variable in ("HOME", "MIMREFINER_CACHE", "MIMREFINER_DATA"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.setattr(pwd, "getpwnam", nobody)


def test_no_home_is_said_where_it_is_needed(homeless, monkeypatch):
    for ask in (cache_folder, data_folder):
        with pytest.raises(mr.InputError, match="no home folder is known here: set MIMREFINER_CA"):
            ask()
    with pytest.raises(mr.InputError, match="~/x: no home folder is known here"):
        expanded("~/x")
    monkeypatch.setenv("MIMREFINER_CACHE", "~/x")
    with pytest.raises(mr.InputError, match="give a whole path"):
        cache_folder()
    monkeypatch.setenv("MIMREFINER_CACHE", "/somewhere")
    assert variable_folder("MIMREFINER_CACHE") == cache_folder() == Path("/somewhere")


PROBE = ["probe", "simmim_digits", "digits", "--no-baselines", "--blocks", "11", "--pools", "mean"]


def test_no_home_is_needed_where_all_folders_are_given(homeless, tmp_path, capsys):
    """With the endings that lists written on Windows have, and spaces between probes."""
    more = ["--probes", "knn, rank", "--out", f"{tmp_path / 'report'}\r", "--cache", "c\r\n"]
    where = os.getcwd()
    try:
        os.chdir(tmp_path)
        assert main([PROBE[0], f"{PROBE[1]}\r", *PROBE[2:], *more]) == 0
    finally:
        os.chdir(where)
    assert "simmim_digits on digits" in capsys.readouterr().out
    assert (tmp_path / "report" / "report.csv").is_file() and (tmp_path / "c").is_dir()
    # An error about no file that was named stays an error of ours, not one of the missing home
    assert main(["probe", str(tmp_path), "digits", "--out", str(tmp_path / "x")]) == 2


def test_a_terminal_without_signs_gets_all_lines(monkeypatch, tmp_path):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert main([*PROBE, "--out", str(tmp_path / "report")]) == 0
    out.flush()
    said = out.buffer.getvalue().decode("ascii")
    assert "?" in said and "report.pdf are in" in said
    assert "±" in (tmp_path / "report" / "report.md").read_text(encoding="utf-8")


def test_text_files_are_utf8_everywhere():
    """No text is read or written in the encoding that the locale happens to have."""
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            modes = [x.value for x in node.args if isinstance(x, ast.Constant)]
            text = name in ("read_text", "write_text") or (
                name == "open" and any(mode in ("r", "w", "a", "x") for mode in modes)
            )
            with_encoding = any(k.arg == "encoding" for k in node.keywords) or "utf-8" in modes
            if text and not with_encoding:
                found.append(f"{file.relative_to(PACKAGE)}:{node.lineno}")
    assert found == []


def test_a_launcher_that_is_none_is_said(monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(["datasets"]) == 2
    assert "WORLD_SIZE is 4 and RANK is not set: start" in capsys.readouterr().err
    for alone in ("1", "", " "):
        monkeypatch.setenv("WORLD_SIZE", alone)
        assert main(["datasets"]) == 0


def test_an_unexpected_error_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("mimrefiner.data.catalogue.table", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["datasets"])


DECLARED = {"seeds": "0", "share": 0.5, "steps": 10, "quick": False}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"seeds": 0}, {"seeds": "0"}),
        ({"seeds": "0,1"}, {"seeds": "0,1"}),
        ({"share": 1}, {"share": 1.0}),
        ({"share": "0.25"}, {"share": 0.25}),
        ({"steps": "20"}, {"steps": 20}),
        ({"steps": 20.0}, {"steps": 20}),
        ({"quick": "True"}, {"quick": True}),
    ],
)
def test_parameters_are_converted_where_nothing_is_lost(given, expected):
    found = compare_parameters(DECLARED, given)
    assert found == expected
    assert {k: type(x) for k, x in found.items()} == {k: type(x) for k, x in expected.items()}


NOT_CONVERTED = (
    {"steps": 20.5},
    {"steps": "many"},
    {"steps": True},
    {"steps": "1e400"},
    {"share": [1]},
    {"seeds": [0]},
    {"seeds": None},
    {"quick": 2},
)


@pytest.mark.parametrize("given", NOT_CONVERTED)
def test_other_values_are_refused(given):
    with pytest.raises(mr.InputError, match=r"must be .*this notebook has seeds"):
        compare_parameters(DECLARED, given)


def test_a_kernel_that_does_not_exist_is_replaced_and_said(tmp_path, capfd):
    code = nbformat.v4.new_code_cell("import sys\nprint(sys.executable)")
    notebook = nbformat.v4.new_notebook(cells=[code])
    notebook.metadata.kernelspec = {"name": "no_such_kernel", "display_name": "x"}
    notebook.metadata.language_info = {"name": "python"}
    nbformat.write(notebook, tmp_path / "a.ipynb")
    assert kernel_of(tmp_path / "a.ipynb") == ("python3", "no_such_kernel")
    execute(tmp_path / "a.ipynb", tmp_path / "out", {})
    done = nbformat.read(tmp_path / "out" / "notebooks" / "a.ipynb", as_version=4)
    assert done.cells[-1].outputs[0].text.strip() == sys.executable
    last = capfd.readouterr().out.strip().splitlines()[-1]
    assert last == f"there is no kernel 'no_such_kernel' here: a.ipynb ran in {sys.executable}"


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
def test_maps_of_very_few_points(n):
    x = torch.randn(n, 5)
    points = umap_map(x)
    assert points.shape == (n, 2) and np.isfinite(points).all()
    share = own_class_share(points, [0] * n)
    near = shared_neighbours(points, points)
    assert (np.isnan(share) and np.isnan(near)) if n == 1 else share == near == 1
