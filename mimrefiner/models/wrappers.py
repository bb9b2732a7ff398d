"""What stands around a model: wrappers of torch come off before training goes by its names."""

import copy

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def unwrapped(model: nn.Module) -> nn.Module:
    """``model`` without what ``torch.compile``, DataParallel or DDP put around it.

    Training goes by the names of parameters, and a wrapper stands before each of them.

    >>> layer = nn.Linear(2, 2)
    >>> unwrapped(nn.DataParallel(layer)) is layer
    True
    """
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, nn.DataParallel | DistributedDataParallel):
            model = model.module
        else:
            return model


def in_float32(model: nn.Module) -> nn.Module:
    """``model`` unwrapped, as training takes it: a copy where its weights are not float32.

    >>> in_float32(nn.Linear(2, 2).half()).weight.dtype
    torch.float32
    """
    model = unwrapped(model)
    if all(x.dtype == torch.float32 for x in model.parameters()):
        return model
    return copy.deepcopy(model).float()
