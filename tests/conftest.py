from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

import mimrefiner as mr

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def golden():
    """Inputs and outputs of the official implementation, by file name."""
    return lambda name: safetensors.torch.load_file(GOLDEN / f"{name}.safetensors")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def vit():
    """A small ViT with random weights: 3 blocks, patch 8, 32 px."""
    return mr.build_vit(mr.ViTConfig(dim=32, depth=3, num_heads=2))


@pytest.fixture(scope="session")
def digits():
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
