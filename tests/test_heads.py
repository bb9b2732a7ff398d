import pytest
import torch
from torch import nn

from mimrefiner.method.heads import Heads


def separate_head(heads: Heads, which: int, dim: int):
    """The same head from plain torch layers, with copied weights."""
    layers = []
    for layer in [*heads.projector, *heads.predictor]:
        if isinstance(layer, nn.GELU):
            layers.append(nn.GELU())
        elif isinstance(layer, nn.BatchNorm1d):
            layers.append(nn.BatchNorm1d(layer.num_features // heads.heads))
        else:
            weight = layer.weight[which].detach()
            layers.append(nn.Linear(*weight.shape, bias=False))
            layers[-1].weight.data.copy_(weight.T)
    n = len(heads.projector)
    return nn.Sequential(*layers[:n]), nn.Sequential(*layers[n:])


def test_batched_heads_equal_separate_heads_in_value_gradient_and_statistics():
    heads = Heads(3, 10, hidden_dim=12, out_dim=6, predictor_dim=14)
    x = torch.randn(20, 3, 10, requires_grad=True)
    z, p = heads(x)
    (z.square().sum() + (p**3).sum()).backward()
    for which in range(3):
        projector, predictor = separate_head(heads, which, 10)
        x_alone = x[:, which].detach().requires_grad_(True)
        z_alone = projector(x_alone)
        p_alone = predictor(z_alone)
        (z_alone.square().sum() + (p_alone**3).sum()).backward()
        assert torch.allclose(z[:, which], z_alone, atol=1e-5) and torch.allclose(
            p[:, which], p_alone, atol=1e-5
        )
        assert torch.allclose(x.grad[:, which], x_alone.grad, rtol=1e-4, atol=1e-4)
        stacked, alone = [*heads.projector, *heads.predictor], [*projector, *predictor]
        for many, one in zip(stacked, alone, strict=True):
            if isinstance(one, nn.Linear):
                assert torch.allclose(
                    many.weight.grad[which].T, one.weight.grad, rtol=1e-3, atol=1e-3
                )
            if isinstance(one, nn.BatchNorm1d):
                part = slice(which * one.num_features, (which + 1) * one.num_features)
                assert torch.allclose(many.running_mean[part], one.running_mean, atol=1e-6)
                assert torch.allclose(many.running_var[part], one.running_var, atol=1e-5)


def test_widths_of_the_paper():
    """Linear(D, 2048), Linear(2048, 2048), Linear(2048, 256); Linear(256, 4096), Linear(4096, 256);
    no biases but the norms'.
    """
    with torch.device("meta"):
        heads = Heads(1, 1024)
    shapes = [tuple(x.shape) for x in heads.parameters() if x.ndim == 3]
    assert shapes == [
        (1, 1024, 2048),
        (1, 2048, 2048),
        (1, 2048, 256),
        (1, 256, 4096),
        (1, 4096, 256),
    ]
    assert sum(x.numel() for x in heads.parameters()) / 1e6 == pytest.approx(8.9, abs=0.1)
