"""Projector and predictor of every refined block, computed together.

The weights of all heads are stacked, so each layer is one batched matrix product and one batch
norm, whatever the number of heads. Values, gradients and running statistics equal those of separate
heads.
"""

import torch
from torch import Tensor, nn

from mimrefiner import distributed


class Heads(nn.Module):
    """The contrastive heads of MIM-Refiner (``src/models/ssl/nnclr_head.py`` of the released code).

    Projector: Linear, BN, GELU, Linear, BN, GELU, Linear, BN; predictor: Linear, BN, GELU, Linear.
    There are no biases, and weights start Xavier-uniform. A head has about 8.9 M parameters at the
    paper's widths and ``dim`` 1024.

    Args:
        heads: number of heads.
        dim: width of the encoder's blocks.
        hidden_dim, out_dim: hidden and output width of the projector (paper: 2048, 256).
        predictor_dim: hidden width of the predictor (paper: 4096).
    """

    def __init__(
        self,
        heads: int,
        dim: int,
        hidden_dim: int = 2048,
        out_dim: int = 256,
        predictor_dim: int = 4096,
    ):
        super().__init__()
        self.heads = heads
        self.projector = nn.Sequential(
            StackedLinear(heads, dim, hidden_dim),
            StackedBatchNorm(heads, hidden_dim),
            nn.GELU(),
            StackedLinear(heads, hidden_dim, hidden_dim),
            StackedBatchNorm(heads, hidden_dim),
            nn.GELU(),
            StackedLinear(heads, hidden_dim, out_dim),
            StackedBatchNorm(heads, out_dim),
        )
        self.predictor = nn.Sequential(
            StackedLinear(heads, out_dim, predictor_dim),
            StackedBatchNorm(heads, predictor_dim),
            nn.GELU(),
            StackedLinear(heads, predictor_dim, out_dim),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Project and predict.

        Args:
            x: pooled features of each head's block, (rows, heads, dim). All views of the batch come
                together, because the batch statistics are taken over all of them.

        Returns:
            Projections ``z`` and predictions ``p``, each (rows, heads, out_dim).
        """
        z = self.projector(x)
        return z, self.predictor(z)


class StackedLinear(nn.Module):
    """One bias-free linear layer per head: (rows, heads, inputs) -> (rows, heads, outputs)."""

    def __init__(self, heads: int, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, inputs, outputs))
        for weight in self.weight:
            nn.init.xavier_uniform_(weight)

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x.transpose(0, 1), self.weight).transpose(0, 1)


class StackedBatchNorm(nn.BatchNorm1d):
    """One batch norm per head over the rows of (rows, heads, dim); no statistic crosses heads."""

    def __init__(self, heads: int, dim: int):
        super().__init__(heads * dim)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and distributed.world() > 1:
            return batch_norm(x.flatten(1), self).view(x.shape)
        return super().forward(x.flatten(1)).view(x.shape)


def batch_norm(x: Tensor, norm: nn.BatchNorm1d) -> Tensor:
    """``norm`` in training mode with the statistics of all processes: (rows, channels).

    One message goes forward and one back: the processes' means and variances are gathered and
    combined, in float32. Every process has the same number of rows. The result equals this
    process's rows of ``norm(gather(x))``. (``nn.SyncBatchNorm`` refuses CPUs.)
    """
    variance, average = torch.var_mean(x.float(), 0, correction=0)
    # (world, channels) each
    variances, averages = distributed.gather(torch.stack([variance, average])[None]).unbind(1)
    average = averages.mean(0)
    variance = variances.mean(0) + (averages - average).square().mean(0)
    with torch.no_grad():
        rows = len(x) * distributed.world()
        norm.num_batches_tracked += 1
        norm.running_mean.lerp_(average, norm.momentum)
        norm.running_var.lerp_(variance * rows / (rows - 1), norm.momentum)
    scale = norm.weight * (variance + norm.eps).rsqrt()
    return ((x.float() - average) * scale + norm.bias).to(x.dtype)
