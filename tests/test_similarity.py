from itertools import permutations

import pytest
import timm
import torch

import mimrefiner as mr
from mimrefiner.probes.features import Features
from mimrefiner.probes.similarity import (
    _grams,
    _hsic,
    attention_distance,
    attention_maps,
    cka,
    effective_rank,
)


def make(*blocks):
    return Features(
        {"cls": list(blocks)},
        torch.zeros(len(blocks[0]), dtype=torch.long),
        tuple(range(len(blocks))),
        len(blocks),
    )


def test_cka_knows_rotations_and_unrelated_features():
    x = torch.randn(400, 8)
    rotation = torch.linalg.qr(torch.randn(8, 8))[0]
    table = cka(make(x, torch.randn(400, 30)), make(3 * x @ rotation + 5, x), batch_size=100)
    assert torch.allclose(table[0], torch.ones(2), atol=1e-4)
    assert table[1].abs().max() < 0.1


def test_unbiased_hsic_equals_the_average_over_quadruples():
    """HSIC is a U-statistic: brute force over all ordered quadruples of different images."""
    x, y = torch.randn(6, 2).double(), torch.randn(6, 3).double()
    k, l = x @ x.T, y @ y.T  # noqa: E741
    terms = [
        k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q]) for i, j, q, r in permutations(range(6), 4)
    ]

    assert _hsic(_grams([x])[0], _grams([y])[0]).item() == pytest.approx(
        torch.stack(terms).mean().item()
    )


def test_cka_does_not_depend_on_the_batch_size_on_average():
    torch.manual_seed(1)
    x = torch.randn(2000, 5)
    y = x @ torch.randn(5, 5) + 0.5 * torch.randn(2000, 5)
    small, large = (cka(make(x), make(y), batch_size=size).item() for size in (20, 1000))
    assert small == pytest.approx(large, abs=0.05)


def test_cka_refuses_other_images_and_too_few():
    with pytest.raises(mr.InputError, match="the same images"):
        cka(make(torch.randn(10, 3)), make(torch.randn(11, 3)))
    with pytest.raises(mr.InputError, match="at least 4 images"):
        cka(make(torch.randn(3, 3)), make(torch.randn(3, 3)))
    with pytest.raises(mr.InputError, match="no features with pooling 'mean': there are cls"):
        cka(make(torch.randn(9, 3)), make(torch.randn(9, 3)), pool_b="mean")


def test_effective_rank_counts_directions():
    line = torch.randn(500, 1) @ torch.randn(1, 16)
    ranks = effective_rank(make(line, torch.randn(5000, 16)[:500]))["value"].tolist()
    assert ranks[0] == pytest.approx(1, abs=1e-3)
    assert 15 < ranks[1] <= 16


def test_attention_equals_timms_own(vit):
    images = torch.randn(2, 3, 32, 32)
    maps = attention_maps(vit, images)
    block = vit.blocks[0]
    block.attn.fused_attn = False
    seen = []
    block.attn.attn_drop.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        vit.forward_features(images)
    patches = seen[0][:, :, 1:, 1:]
    assert torch.allclose(maps[0], patches / patches.sum(-1, keepdim=True), atol=1e-6)


def test_uniform_attention_has_the_mean_distance(vit):
    for block in vit.blocks:
        torch.nn.init.zeros_(block.attn.qkv.weight)
        torch.nn.init.zeros_(block.attn.qkv.bias)
    distances = attention_distance(vit, torch.randn(2, 3, 32, 32))
    y, x = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    places = 8 * torch.stack([y.flatten(), x.flatten()], 1)
    assert distances.shape == (3, 2)
    assert torch.allclose(distances, torch.cdist(places, places).mean().expand(3, 2), atol=1e-3)


def test_attention_of_another_kind_is_refused():
    with pytest.raises(mr.InputError, match="timm's VisionTransformer"):
        attention_maps(
            timm.create_model("hiera_tiny_224", num_classes=0, img_size=64),
            torch.randn(1, 3, 64, 64),
        )
