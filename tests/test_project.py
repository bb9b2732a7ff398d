"""What the project promises as a whole: fixed names, one list of versions, clean imports."""

import inspect
import re
import tomllib
from importlib.metadata import requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import mimrefiner as mr

ROOT = Path(__file__).parent.parent
FIXED_NAMES = (
    "nna_loss",
    "multi_view_nna_loss",
    "NNQueue",
    "load_encoder",
    "load_dataset",
    "extract_features",
    "knn_accuracy",
    "refine",
    "linear_probe",
    "low_shot",
    "cluster",
    "probe",
)


def locked():
    lines = [
        line.split(";")[0].strip() for line in (ROOT / "requirements.lock").read_text().splitlines()
    ]
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


@pytest.mark.parametrize("name", FIXED_NAMES)
def test_fixed_names_exist_and_are_documented(name):
    assert name in mr.__all__
    assert inspect.getdoc(getattr(mr, name))


def test_every_public_name_is_documented():
    for name in mr.__all__:
        assert inspect.getdoc(getattr(mr, name)), name


def test_conda_and_pip_users_get_the_lock():
    environment = (ROOT / "environment.yml").read_text()
    assert re.findall(r"^ +- -r (\S+)$", environment, re.M) == ["requirements.lock"]
    python = re.search(r"python=(\S+)", environment).group(1)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert python in project["requires-python"]


def test_lock_satisfies_pyproject_and_is_what_runs_here():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = {name.lower().replace("_", "-"): value for name, value in locked().items()}
    for line in project["dependencies"] + project["optional-dependencies"]["dev"]:
        requirement = Requirement(line)
        assert requirement.specifier.contains(versions[requirement.name]), line
    assert version("timm") == versions["timm"]
    assert version("torch").split("+")[0] == versions["torch"]


def test_lock_is_complete():
    """Every requirement of a locked package that applies here is locked too (CUDA parts follow from
    torch's own pins).
    """
    names = {name.lower().replace("_", "-") for name in locked()}
    for name in locked():
        for line in requires(name) or ():
            requirement = Requirement(line)
            applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            wanted = requirement.name.lower().replace("_", "-").replace(".", "-")
            if applies and not re.match(r"nvidia|triton|cuda", wanted):
                assert wanted in {n.replace(".", "-") for n in names}, f"{name} needs {wanted}"


def test_lock_has_no_local_versions_and_no_addresses():
    text = (ROOT / "requirements.lock").read_text()
    assert "+" not in text
    assert "://" not in text
    assert "@" not in text


def test_version_is_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == mr.__version__ == version("mimrefiner")
    assert f"version: {mr.__version__}" in (ROOT / "CITATION.cff").read_text()
    assert f"## {mr.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_reading_path_is_short():
    """README's path of an image to the loss: at most six files and 1,200 lines, docstrings too."""
    readme = (ROOT / "README.md").read_text()
    (path,) = re.findall(
        r"Follow an image to the loss.*?(?=\n\n|\nCONTRIBUTING|\n\[CONTRIB)", readme, re.S
    )
    files = re.findall(r"\]\((mimrefiner/\S+?\.py)\)", path)
    assert files[-1] == "mimrefiner/method/losses.py" and 1 < len(files) <= 6
    assert sum(len((ROOT / file).read_text().splitlines()) for file in files) <= 1200
