"""See and repair the representations of masked-image models, block by block (MIM-Refiner, arXiv 2402.10093)."""

import os

if "WORLD_SIZE" in os.environ:  # before torch is imported: DDP warns every process of an option that distributed.py needs
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import mimrefiner._torchvision  # noqa: F401  before anything imports torchvision or timm

# isort: split
from mimrefiner.config import PretrainConfig, RefineConfig, ViTConfig
from mimrefiner.data import load_dataset
from mimrefiner.errors import InputError
from mimrefiner.features import Features, extract_features, pixel_features
from mimrefiner.losses import multi_view_nna_loss, nna_loss
from mimrefiner.models import build_vit, load_encoder
from mimrefiner.nn_queue import NNQueue
from mimrefiner.parameters import start_run
from mimrefiner.presets import load_preset
from mimrefiner.probes.clustering import cluster
from mimrefiner.probes.knn import knn_accuracy, knn_hits, knn_hits_within, knn_predict
from mimrefiner.probes.linear import linear_probe
from mimrefiner.probes.logistic import low_shot
from mimrefiner.refiner import MIMRefiner
from mimrefiner.report import probe
from mimrefiner.train import pretrain, refine

__version__ = "0.1.0"

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
    "knn_accuracy",
    "knn_hits",
    "knn_hits_within",
    "knn_predict",
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
