"""The import hook for torchvision, in fresh processes."""

import subprocess
import sys
import textwrap

import pytest

# A torchvision that needs an operator which its torch does not know, as beside a CPU-only torch
FAILING = """
import torch
from torchvision import transforms  # must go before the second try, with all it registered
if "nms" not in torch.library.declared:
    raise RuntimeError("operator torchvision::nms does not exist")
version = 1
"""
TORCH = """
declared = {}
class Library:
    def __init__(self, *names):
        self.names = names
    def define(self, schema):
        declared[schema.split("(")[0]] = self.names
"""


@pytest.fixture
def python(tmp_path):
    """Runs code in a fresh process that finds a stand-in torch and the given torchvision first."""

    def run(torchvision: str, code: str) -> list[str]:
        for name, body in {
            "torch/__init__.py": "from torch import library",
            "torch/library.py": TORCH,
            "torchvision/__init__.py": torchvision,
            "torchvision/data.txt": "",
            "torchvision/transforms/__init__.py": "print('transforms')",
            "torchvision/transforms/v2.py": "from torchvision import version",
        }.items():
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(body)
        code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{textwrap.dedent(code)}"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.split("\n")[:-1]

    return run


def test_a_torchvision_that_misses_its_operators_is_imported_again(python):
    code = """
    import mimrefiner
    assert "torch" not in sys.modules
    import torchvision.transforms.v2 as v2
    import torch
    print(v2.version, sorted(torch.library.declared), sorted(set(torch.library.declared.values())))
    """
    expected = "1 ['nms', 'qnms'] [('torchvision', 'FRAGMENT')]"
    assert python(FAILING, code) == ["transforms", "transforms", expected]


def test_a_torchvision_that_loads_is_left_alone(python):
    code = "import mimrefiner, torchvision; print('torch' in sys.modules, torchvision.version)"
    assert python("version = 2", code) == ["False 2"]


@pytest.mark.parametrize("error", ["RuntimeError('no libjpeg')", "ImportError('nms')"])
def test_other_errors_pass_through(python, error):
    code = """
    import mimrefiner
    try:
        import torchvision
    except Exception as error:
        print(repr(error), "torch" in sys.modules, "torchvision" in sys.modules)
    """
    assert python(f"raise {error}", code) == [f"{error} False False"]


def test_a_missing_torchvision_is_missing(python):
    code = """
    import mimrefiner
    sys.path.clear()
    try:
        import torchvision
    except ModuleNotFoundError as error:
        print(error)
    """
    assert python("", code) == ["No module named 'torchvision'"]


def test_looking_for_torchvision_imports_and_disarms_nothing(python):
    code = """
    import importlib.util, mimrefiner
    spec = importlib.util.find_spec("torchvision")
    print(spec.loader.is_package("torchvision"), "torchvision" in sys.modules)
    import torchvision
    print(torchvision.version)
    """
    assert python(FAILING, code) == ["True False", "transforms", "transforms", "1"]


def test_tools_find_an_ordinary_loader(python):
    """Reloading, pickling, data files and source of the mended module."""
    code = """
    import importlib, importlib.resources, inspect, pickle
    import mimrefiner, torchvision
    loader = pickle.loads(pickle.dumps(torchvision.__spec__.loader))
    print(loader.get_filename("torchvision") == torchvision.__file__)
    print(importlib.resources.files("torchvision").joinpath("data.txt").is_file())
    print("second try" in inspect.getsource(torchvision))
    importlib.reload(sys.modules["mimrefiner._torchvision"])
    importlib.reload(mimrefiner)
    print(importlib.reload(torchvision).version)
    """
    lines = python(FAILING, code)
    assert [line for line in lines if line != "transforms"] == ["True", "True", "True", "1"]


def test_the_installed_torchvision_serves_timm_and_loader_processes(tmp_path):
    """Whatever torch it was compiled for; a spawned loader starts with nothing imported."""
    (tmp_path / "work.py").write_text(
        textwrap.dedent("""
        import mimrefiner as mr
        import timm
        import torchvision.transforms.v2
        from torch.utils.data import DataLoader

        def sizes(rows):
            import torchvision
            return torchvision.__name__, [image.size for image, _ in rows]

        if __name__ == "__main__":
            data = mr.load_dataset("digits", split="val").take(2)
            options = {"num_workers": 1, "multiprocessing_context": "spawn"}
            print(timm.create_model("test_vit").num_features)
            print(list(DataLoader(data, batch_size=2, collate_fn=sizes, **options)))
        """)
    )
    done = subprocess.run(
        [sys.executable, tmp_path / "work.py"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout.split("\n")[:2] == ["64", "[('torchvision', [(32, 32), (32, 32)])]"], (
        done.stderr
    )
