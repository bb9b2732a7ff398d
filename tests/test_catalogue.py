"""The tables of models and data sets, and the commands that must answer at once."""

import subprocess
import sys

import pytest

import mimrefiner as mr
from mimrefiner.data import catalogue as data_sets
from mimrefiner.models import catalogue as models

SLOW = {"torch", "torchvision", "timm", "numpy", "pandas", "pyarrow", "sklearn", "matplotlib"}


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["--help"], 0, "COMMAND"),
        (["probe", "--help"], 0, "example: mimrefiner probe"),
        (["models"], 0, "d2v2_refined_h14"),
        (["datasets"], 0, "fruit64"),
        (["wrong"], 2, "invalid choice: 'wrong'"),
    ],
)
def test_what_needs_no_library_imports_none(arguments, status, text):
    """So that it answers in a fraction of a second."""
    code = f"""
import sys
from mimrefiner.__main__ import main
try:
    status = main({arguments})
except SystemExit as stopped:
    status = stopped.code
print(status, sorted({SLOW} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == f"{status} []", done.stderr
    assert text in done.stdout + done.stderr


def test_every_data_set_of_the_table_can_be_asked_for(tmp_path, monkeypatch):
    """An embedded one loads, another one fails for what it lacks: network or folder."""

    def refuse(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setenv("MIMREFINER_DATA", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    for name, what in data_sets.CATALOGUE.items():
        if "embedded" in what:
            images = len(mr.load_dataset(name, split="trainval"))
            images += len(mr.load_dataset(name, split="test"))
            assert f" {images:,} images" in what
        else:
            lacking = r"could not be (down)?loaded|does not exist|needs the library datasets"
            with pytest.raises(mr.InputError, match=lacking):
                mr.load_dataset(name.replace("PATH", str(tmp_path / "none")), split="train")


def test_names_are_unique_and_sizes_belong_to_plain_vits():
    names = [row.name for row in models.CATALOGUE]
    assert len(set(names)) == len(names) == len(models.BY_NAME)
    for row in models.CATALOGUE:
        assert bool(row.dim) == bool(row.depth) == bool(row.heads) == bool(row.patch)
        assert not row.dim or row.dim % row.heads == 0
