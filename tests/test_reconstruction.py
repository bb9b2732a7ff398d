from dataclasses import replace

import numpy as np
import pytest
import torch

from mimrefiner.models import masked
from mimrefiner.probes.reconstruction import (
    DecoderConfig,
    DecoderPerBlock,
    reconstruction,
    relative_improvement,
)

SMALL = DecoderConfig(depth=1, dim=16, heads=2)


def test_one_decoder_equals_mae_with_that_block_as_its_last(vit):
    """The decoder of the last block is MAE's, but for the encoder's final norm."""
    model = DecoderPerBlock(vit, SMALL)
    mae = masked.MAE(vit, 1, 16, 2)
    mae.decoder = model.decoders[-1]
    mae.encoder.norm = torch.nn.Identity()
    x, mask = torch.randn(4, 3, 32, 32), masked.random_mask(4, 16, 0.75)
    losses = model(x, mask)
    assert losses.shape == (3,)
    assert torch.allclose(losses[-1], mae(x, mask), atol=1e-6)


def test_decoders_do_not_touch_the_encoder_or_each_other(vit):
    model = DecoderPerBlock(vit, SMALL)
    model(torch.randn(4, 3, 32, 32), masked.random_mask(4, 16, 0.75))[1].backward()
    assert all(x.grad is None for x in vit.parameters())
    touched = [
        any(x.grad is not None and bool(x.grad.any()) for x in decoder.parameters())
        for decoder in model.decoders
    ]
    assert touched == [False, True, False]


def test_training_lowers_the_loss_and_repeats(vit, digits):
    train, test = digits["train"].take(128), digits["test"].take(64)
    short = replace(SMALL, epochs=0.25, batch_size=32)
    long = replace(short, epochs=15, base_lr=2e-2)
    few, _ = reconstruction(vit, train, test, short)
    more, model = reconstruction(vit, train, test, long)
    assert (more["value"] < few["value"] - 0.05).all()
    vit.train().pos_embed.requires_grad_(False)
    again, _ = reconstruction(vit, train, test, long)
    assert more.equals(again)
    assert vit.training
    # As it was
    assert [name for name, x in vit.named_parameters() if not x.requires_grad] == ["pos_embed"]
    assert [
        p.shape for p in model.predict(torch.randn(2, 3, 32, 32), masked.random_mask(2, 16, 0.75))
    ] == [(2, 16, 192)] * 3


def test_relative_improvement_sums_to_the_net_change():
    change = relative_improvement([0.2, 0.6, 1.0, 0.8])
    assert change == pytest.approx([0.5, 0.5, -0.25])
    assert np.array_equal(relative_improvement([3.0, 3.0]), [0.0])
