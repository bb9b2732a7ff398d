"""See and repair the representations of masked-image models, block by block (MIM-Refiner, arXiv
2402.10093).

Names are imported when they are first asked for, so that ``import mimrefiner`` takes no time:

>>> import mimrefiner as mr
>>> mr.load_preset("tiny").encoder.depth
12
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING

from mimrefiner._torchvision import mend_torchvision

# Before torch is imported: DDP warns every process of an option that the engine needs
if "WORLD_SIZE" in os.environ:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

mend_torchvision()

if TYPE_CHECKING:  # what type checkers and editors see; the names of _ROOMS below
    from mimrefiner.batch.parameters import start_run
    from mimrefiner.config import PretrainConfig, RefineConfig, ViTConfig
    from mimrefiner.data.datasets import load_dataset
    from mimrefiner.errors import InputError
    from mimrefiner.method.losses import multi_view_nna_loss, nna_loss
    from mimrefiner.method.nn_queue import NNQueue
    from mimrefiner.method.refiner import MIMRefiner
    from mimrefiner.models.encoders import build_vit, load_encoder
    from mimrefiner.probes.clustering import cluster
    from mimrefiner.probes.features import Features, extract_features, pixel_features
    from mimrefiner.probes.knn import knn_accuracy, knn_hits, knn_hits_within, knn_predict
    from mimrefiner.probes.linear import linear_probe
    from mimrefiner.probes.linear_grid import linear_grid
    from mimrefiner.probes.logistic import low_shot
    from mimrefiner.study.presets import load_preset
    from mimrefiner.study.report import probe
    from mimrefiner.training.finetune import finetune_recipe
    from mimrefiner.training.pretrain import pretrain
    from mimrefiner.training.refine import refine

    __version__: str

_ROOMS = {  # module -> the public names that come from it
    "batch.parameters": ("start_run",),
    "config": ("PretrainConfig", "RefineConfig", "ViTConfig"),
    "data.datasets": ("load_dataset",),
    "errors": ("InputError",),
    "method.losses": ("multi_view_nna_loss", "nna_loss"),
    "method.nn_queue": ("NNQueue",),
    "method.refiner": ("MIMRefiner",),
    "models.encoders": ("build_vit", "load_encoder"),
    "probes.clustering": ("cluster",),
    "probes.features": ("Features", "extract_features", "pixel_features"),
    "probes.knn": ("knn_accuracy", "knn_hits", "knn_hits_within", "knn_predict"),
    "probes.linear": ("linear_probe",),
    "probes.linear_grid": ("linear_grid",),
    "probes.logistic": ("low_shot",),
    "study.presets": ("load_preset",),
    "study.report": ("probe",),
    "training.finetune": ("finetune_recipe",),
    "training.pretrain": ("pretrain",),
    "training.refine": ("refine",),
}
_MODULES = {name: module for module, names in _ROOMS.items() for name in names}

__all__ = [
    "Features",
    "InputError",
    "MIMRefiner",
    "NNQueue",
    "PretrainConfig",
    "RefineConfig",
    "ViTConfig",
    "build_vit",
    "cluster",
    "extract_features",
    "finetune_recipe",
    "knn_accuracy",
    "knn_hits",
    "knn_hits_within",
    "knn_predict",
    "linear_grid",
    "linear_probe",
    "load_dataset",
    "load_encoder",
    "load_preset",
    "low_shot",
    "multi_view_nna_loss",
    "nna_loss",
    "pixel_features",
    "pretrain",
    "probe",
    "refine",
    "start_run",
]


def __getattr__(name: str):
    if name == "__version__":
        from importlib.metadata import version

        value = version("mimrefiner")
    elif name in _MODULES:
        value = getattr(import_module(f"mimrefiner.{_MODULES[name]}"), name)
    else:
        raise AttributeError(f"module 'mimrefiner' has no attribute {name!r}")
    globals()[name] = value  # asked for once
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, "__version__"})
