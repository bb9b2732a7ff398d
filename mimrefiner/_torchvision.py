"""Make ``import torchvision`` (and so ``import timm``) work beside a CPU-only torch.

A torchvision wheel that was compiled for another torch build cannot load its C++ operators, and its Python part then fails on
``operator torchvision::nms does not exist`` although nothing here needs an operator. Declaring the two schemas is enough.
Where the plain import succeeds, nothing else happens.
"""

import sys

import torch

_schemas = None  # must stay alive: the schemas are unregistered with the object

try:
    import torchvision
except RuntimeError as error:
    if "torchvision::nms" not in str(error):
        raise
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    _schemas = torch.library.Library("torchvision", "FRAGMENT")
    _schemas.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _schemas.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401
