"""Make ``import torchvision`` (and so ``import timm``) work beside a CPU-only torch.

A torchvision wheel that was compiled for another build of torch cannot load its C++ operators. Its
Python part then fails with ``operator torchvision::nms does not exist``, although nothing here
needs an operator: it is enough to declare two schemas. That happens when somebody first asks for
torchvision, and only where its plain import fails.
"""

import sys
from importlib.machinery import ModuleSpec, SourceFileLoader

_schemas = []  # torch forgets a schema with the object that declared it


def mend_torchvision() -> None:
    """From now on, importing torchvision declares the operators that it misses."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__module__ != __name__]
    sys.meta_path.insert(0, _Finder())


class _Finder:
    """Lets the other finders look for torchvision and gives what they find a mending loader."""

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        if name != "torchvision":
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None:
                if type(spec.loader) is SourceFileLoader:
                    spec.loader = _Loader(spec.loader.name, spec.loader.path)
                return spec
        return None


class _Loader(SourceFileLoader):
    """Loads as usual; after the one error that it knows, declares the schemas and loads again."""

    def exec_module(self, module) -> None:
        try:
            super().exec_module(module)
        except RuntimeError as error:
            if "torchvision::nms" not in str(error):
                raise
            for name in [name for name in sys.modules if name.startswith("torchvision.")]:
                del sys.modules[name]
                vars(module).pop(name.split(".")[1], None)
            _declare_schemas()
            super().exec_module(module)


def _declare_schemas() -> None:
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _schemas.append(library)
