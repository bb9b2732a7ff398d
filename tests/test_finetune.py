from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import mimrefiner as mr
from mimrefiner.data.datasets import ImageDataset
from mimrefiner.models.weights import sha256_of
from mimrefiner.study import store
from mimrefiner.training.finetune import finetune


def colours(labels):
    """Noisy images whose class is their colour."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 60, (64, 32, 32, 3), dtype=np.uint8)
    pixels[np.arange(64), :, :, np.arange(64) % 3] += 150
    return ImageDataset(
        "colours", "train", lambda row: Image.fromarray(pixels[row]), labels, length=64
    )


def test_labels_are_learnt_with_what_computation_there_is(monkeypatch):
    preset = mr.load_preset("smoke")
    config = replace(preset.refine, batch_size=32, frozen_blocks=1, refine_base_lr=2e-2)
    # Classes need not start at 0
    encoder, data = (mr.build_vit(preset.encoder), colours(np.arange(64) % 3 + 5))
    losses, cross_entropy = [], F.cross_entropy
    monkeypatch.setattr(
        F, "cross_entropy", lambda *given: losses.append(cross_entropy(*given)) or losses[-1]
    )
    before = sha256_of(encoder)
    result = finetune(encoder, data, config, flops=4e9)
    tuned, steps = result.encoder, len(losses)
    assert result.history["step"].iloc[-1] == steps - 1 and result.history["loss"].iloc[
        0
    ] == pytest.approx(losses[0].item())
    assert (
        result.epochs == steps * 32 / 64
        and result.flops == pytest.approx(4e9, rel=0.5 / steps)
        and result.seconds > 0
    )
    # From nothing
    assert losses[0].item() == pytest.approx(np.log(3), rel=1e-3) and losses[-1] < 0.5 * losses[0]
    assert sha256_of(encoder) == before != sha256_of(tuned)
    assert torch.equal(tuned.blocks[0].attn.qkv.weight, encoder.blocks[0].attn.qkv.weight)
    assert not torch.equal(tuned.blocks[1].attn.qkv.weight, encoder.blocks[1].attn.qkv.weight)
    finetune(encoder, data, config, flops=2e9)
    assert len(losses) - steps == pytest.approx(steps / 2, abs=1)
    with pytest.raises(mr.InputError, match="a label for every image"):
        finetune(encoder, colours(None), config, flops=1e9)


def test_a_fine_tuned_encoder_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("MIMREFINER_CACHE", str(tmp_path))
    tuned = store.finetuned(mr.load_preset("smoke"), 2e-3)
    monkeypatch.setattr(store, "finetune", None)
    again = store.finetuned(mr.load_preset("smoke"), 2e-3)
    assert sha256_of(again.encoder) == sha256_of(tuned.encoder)
    assert len(again.history) == len(tuned.history) > 0
    assert (again.epochs, again.flops, again.seconds) == (tuned.epochs, tuned.flops, tuned.seconds)
