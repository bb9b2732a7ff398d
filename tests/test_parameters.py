import json

import pytest

import mimrefiner as mr
from mimrefiner import files
from mimrefiner.batch import parameters

DECLARED = 'preset = "tiny"  # a comment\nseeds = "0"\nshare = 0.5\n'


def test_assignments_are_read_without_running_anything():
    assert parameters.assignments(DECLARED) == {"preset": "tiny", "seeds": "0", "share": 0.5}


def test_parameters_that_fit_pass():
    parameters.check_parameters(["", DECLARED, '# Parameters\npreset = "smoke"\nshare = 1\n'])
    parameters.check_parameters(["", DECLARED])
    parameters.check_parameters([])


@pytest.mark.parametrize(
    ("injected", "message"),
    [
        (
            'persets = "smoke"',
            r"unknown parameter 'persets': this notebook has preset \(str, default 'tiny'\), seeds",
        ),
        ("preset = [3]", r"parameter preset must be str, got \[3\]"),
        ("seeds = (0, 1)", r"parameter seeds must be str, got \(0, 1\)"),
        ('share = "half"', "parameter share must be float, got 'half'"),
    ],
)
def test_a_misspelt_or_ill_typed_parameter_is_named(injected, message):
    with pytest.raises(mr.InputError, match=message):
        parameters.check_parameters(["", DECLARED, f"# Parameters\n{injected}\n"])


def test_needs_are_read_from_the_metadata(tmp_path):
    notebook = tmp_path / "00_one.ipynb"
    for metadata, needs in (
        ({}, parameters.Needs()),
        ({"mimrefiner": {"trains": ["refined"]}}, parameters.Needs(trains=("refined",))),
        ({"mimrefiner": {"reads": ["claims"]}}, parameters.Needs(reads=("claims",))),
    ):
        notebook.write_text(json.dumps({"metadata": metadata, "cells": []}))
        assert parameters.declared_needs(notebook) == needs
    notebook.write_text(json.dumps({"metadata": {"mimrefiner": {"train": ["refined"]}}}))
    with pytest.raises(mr.InputError, match=r"00_one.ipynb, metadata mimrefiner: .*'train'"):
        parameters.declared_needs(notebook)


def test_seeds_are_parsed():
    assert parameters.parse_seeds("0,2,1") == parameters.parse_seeds("0, 2, 1") == (0, 2, 1)
    for wrong in ("a", "", "0,0", "-1", "1.5"):
        with pytest.raises(mr.InputError, match="seeds must be"):
            parameters.parse_seeds(wrong)


def test_an_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(mr.InputError, match=r"cannot write to .*choose another folder with --out"):
        files.check_writable(tmp_path / "file" / "below")


def test_a_full_disk_is_said_and_leaves_no_half_file(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(mr.InputError, match="No space left on device"):
        files.check_writable(tmp_path)
    assert list(tmp_path.iterdir()) == []
