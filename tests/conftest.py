"""Fixtures of all tests, and the device that they run on.

Tests run on the CPU, whatever the machine has; ``pytest -m cuda --device cuda`` runs those that
need a GPU. ``--device pretend`` rehearses them under tests/pretend_gpu.py.
"""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser):
    what = "where tests with the mark cuda run; without it they are left out"
    parser.addoption("--device", choices=("cpu", "cuda", "pretend"), default="cpu", help=what)


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: needs a GPU, see --device")
    if config.getoption("--device") != "cuda":
        # Before torch is imported, hence no import of it at the top; processes of tests inherit it
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import mimrefiner  # noqa: F401  it mends a torchvision that tests import before it


def pytest_collection_modifyitems(config, items):
    if config.getoption("--device") == "cpu":
        left_out = pytest.mark.skip(reason="needs a GPU: pytest -m cuda --device cuda")
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(left_out)


@pytest.fixture
def golden():
    """Inputs and outputs of the official implementation, by file name."""
    import safetensors.torch

    return lambda name: safetensors.torch.load_file(GOLDEN / f"{name}.safetensors")


@pytest.fixture(autouse=True)
def _seeded():
    import torch

    torch.manual_seed(0)


@pytest.fixture
def vit():
    """A small ViT with random weights: 3 blocks, patch 8, 32 px."""
    import mimrefiner as mr

    return mr.build_vit(mr.ViTConfig(dim=32, depth=3, num_heads=2))


@pytest.fixture(scope="session")
def digits():
    import mimrefiner as mr

    return {
        split: mr.load_dataset("digits", split=split)
        for split in ("train", "val", "test", "trainval")
    }


@pytest.fixture
def image_folder(tmp_path):
    """ImageNet layout: two classes, train and val."""
    rng = np.random.default_rng(0)
    for part, n in (("train", 10), ("val", 3)):
        for name in ("ant", "bee"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{i}.png")
    return tmp_path
