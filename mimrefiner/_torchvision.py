"""Make ``import torchvision`` (and so ``import timm``) work beside a CPU-only torch.

A torchvision wheel that was compiled for another torch build cannot load its C++ operators, and its
Python part then fails on ``operator torchvision::nms does not exist`` although nothing here needs
an operator. It is enough to declare the two schemas. Nothing is imported before somebody asks for
torchvision, and where its plain import succeeds nothing else happens.
"""

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_schemas = []  # must stay alive: the schemas are unregistered with the object


def mend_torchvision() -> None:
    """From now on the first import of torchvision declares the operators that it misses."""
    if "torchvision" not in sys.modules and not any(isinstance(x, _Finder) for x in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds torchvision where it lies, with a loader that can mend it."""

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        if name != "torchvision":
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """The plain loader; after the one error that it knows it declares the schemas and loads again."""

    def __init__(self, plain: Loader):
        self.plain = plain

    def __getattr__(self, name: str):  # is_package, get_data and what else tools ask of a loader
        return getattr(self.plain, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.plain.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        try:
            self.plain.exec_module(module)
        except RuntimeError as error:
            if "torchvision::nms" not in str(error):
                raise
            for name in [name for name in sys.modules if name.startswith("torchvision.")]:
                del sys.modules[name]
            _declare_schemas()
            self.plain.exec_module(module)


def _declare_schemas() -> None:
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _schemas.append(library)
