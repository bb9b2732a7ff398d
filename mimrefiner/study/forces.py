"""The forces of the NNA loss on unit vectors in the plane: what a lesson draws and an animation."""

import torch
from torch import Tensor

from mimrefiner.method.losses import nna_loss

TEMPERATURE = 0.5
TARGETS = (60, 120, 170, 230, 290, 340)  # degrees: projections of six images, view a
PREDICTIONS = (50, 115, 175, 225, 295, 345)  # predictions from view b
NEIGHBOUR = 15  # of the first image; the others' neighbours lie where their targets lie


def on_circle(degrees) -> Tensor:
    """Unit vectors at these angles, (n, 2).

    >>> on_circle([0, 90]).round().abs().tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    radians = torch.deg2rad(torch.as_tensor(degrees, dtype=torch.float32))
    return torch.stack([radians.cos(), radians.sin()], 1)


def example() -> tuple[Tensor, Tensor, Tensor]:
    """Targets, their neighbours and predictions of the example that is drawn, (6, 2) each."""
    z = on_circle(TARGETS)
    return z, torch.cat([on_circle([NEIGHBOUR]), z[1:]]), on_circle(PREDICTIONS)


def force(z: Tensor, positive: Tensor, p: Tensor) -> tuple[Tensor, float]:
    """Minus the gradient of the loss at every prediction, (n, 2), and the loss.

    >>> z, neighbour, p = example()
    >>> own, swapped = (force(z, positive, p)[0][0] for positive in (z, neighbour))
    >>> float(p[0, 0] * own[1] - p[0, 1] * own[0]) > 0  # anticlockwise, to its own view
    True
    >>> float(p[0, 0] * swapped[1] - p[0, 1] * swapped[0]) < 0  # clockwise, to the neighbour
    True
    """
    p = p.clone().requires_grad_()
    loss = nna_loss(z, positive, p, temperature=TEMPERATURE)
    loss.backward()
    return -p.grad, loss.item()


def paths(z: Tensor, positive: Tensor, p: Tensor, *, steps: int, rate: float = 1.0) -> Tensor:
    """Where the predictions go under the force, (steps + 1, n, 2), kept on the circle.

    >>> z, neighbour, p = example()
    >>> way = paths(z, neighbour, p, steps=60)
    >>> bool((way[-1, 0] @ neighbour[0]) > (way[0, 0] @ neighbour[0]))
    True
    """
    way = [p]
    for _ in range(steps):
        moved = way[-1] + rate * force(z, positive, way[-1])[0]
        way.append(moved / moved.norm(dim=1, keepdim=True))
    return torch.stack(way)
