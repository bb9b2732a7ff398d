"""What is measured at the end of every epoch of stages 2 and 3: k-NN accuracies and collapse."""

import logging
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import Dataset

from mimrefiner import distributed
from mimrefiner.errors import InputError
from mimrefiner.files import atomic_file, goes_on_without
from mimrefiner.method.refiner import MIMRefiner
from mimrefiner.probes.features import extract_features
from mimrefiner.probes.knn import knn_accuracy
from mimrefiner.training import engine

logger = logging.getLogger(__name__)

COLLAPSED = 0.2  # of the spread of N(0, 1) vectors


@dataclass(frozen=True)
class Monitor:
    """k-NN accuracies and the spread of the queue, measured whenever it is called.

    The accuracies are those of the last block (before the final LayerNorm) and of every head's
    first projector layer, the authors' proxy for downstream quality.

    Attributes:
        reference, held_out: data sets with ``labels``; the images of ``held_out`` are classified by
            those of ``reference``.
        folder: ``epochs.csv`` is rewritten there after every epoch; None writes no file.
        tensorboard: also write TensorBoard events to ``folder`` (needs the ``tensorboard``
            package).
        k: how many neighbours vote.
        num_workers: processes that load images.

    Raises:
        InputError: images without labels; TensorBoard events without the package or a folder to
            write them to.
    """

    reference: Dataset
    held_out: Dataset
    folder: Path | None = None
    tensorboard: bool = False
    k: int = 10
    num_workers: int = 0

    def __post_init__(self):
        for data in (self.reference, self.held_out):
            labels = getattr(data, "labels", ())  # others are seen when they are read
            if labels is None or min(labels, default=0) < 0:
                raise InputError(
                    "watching by k-NN (--watch) needs a label for every image, "
                    "and the data set has images without"
                )
        if self.tensorboard and (self.folder is None or find_spec("tensorboard") is None):
            raise InputError(
                "TensorBoard events need a folder and the package: "
                "pip install 'mimrefiner[tensorboard]'"
            )

    def __call__(self, refiner: MIMRefiner, epochs: list[dict]) -> None:
        """Add this epoch's values to the last row of ``epochs``.

        The first process warns of collapse and writes the files.
        """
        row = epochs[-1]
        for block, spread in zip(refiner.blocks, queue_spread(refiner).tolist(), strict=True):
            row[f"spread_head{block}"] = spread
            if spread < COLLAPSED and distributed.rank() == 0:  # the queue is the same everywhere
                logger.warning(
                    "stage %s, epoch %g: the head on block %s collapses (its projections spread "
                    "%.2f, 1 for random directions): lower the learning rate or raise the "
                    "temperature",
                    *(row["stage"], row["epoch"], block, spread),
                )
        row |= self._accuracies(refiner)  # by all processes together
        if distributed.rank() == 0:
            if self.folder is not None:
                with (
                    goes_on_without("epochs.csv"),
                    atomic_file(Path(self.folder) / "epochs.csv") as temporary,
                ):
                    pd.DataFrame(epochs).to_csv(temporary, index=False)
            if self.tensorboard:
                with goes_on_without("TensorBoard events"):
                    self._write_events(row)

    @torch.no_grad()
    def _accuracies(self, refiner: MIMRefiner) -> dict[str, float]:
        encoder, pool = refiner.encoder, refiner.config.pool
        device = next(encoder.parameters()).device
        blocks = sorted({*refiner.blocks, refiner.depth - 1})
        how = {"device": device, "autocast": torch.bfloat16 if device.type == "cuda" else None}
        parts = [
            extract_features(
                encoder, data, blocks=blocks, pools=(pool,), num_workers=self.num_workers, **how
            )
            for data in (self.reference, self.held_out)
        ]
        x = [[block.to(device) for block in part.x[pool]] for part in parts]
        labels = [part.y.to(device) for part in parts]
        result = {"knn_last_block": self._knn([blocks[-1] for blocks in x], labels)}
        for head, block in enumerate(refiner.blocks):
            inputs = [part[blocks.index(block)] for part in x]
            if block == refiner.depth - 1:
                inputs = _normed(encoder.norm, inputs)
            weight = refiner.heads.projector[0].weight[head]
            result[f"knn_head{block}"] = self._knn([part @ weight for part in inputs], labels)
        return result

    def _knn(self, x: list[Tensor], labels: list[Tensor]) -> float:
        return knn_accuracy(x[0], labels[0], x[1], labels[1], k=min(self.k, len(x[0])))

    def _write_events(self, row: dict) -> None:
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(self.folder) as writer:
            for name, value in row.items():
                if name not in ("stage", "epoch"):
                    writer.add_scalar(f"stage{row['stage']}/{name}", value, row["epoch"])


def _normed(norm: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    """Pooled tokens behind the final norm, as the last block's head reads them (exact for cls)."""
    weights = engine.whole(dict(norm.named_parameters()))
    weights = {name: x.to(inputs[0].device) for name, x in weights.items()}
    return [functional_call(norm, weights, x) for x in inputs]


def queue_spread(refiner: MIMRefiner) -> Tensor:
    """How much the directions in every head's queue differ, (heads,).

    It is 1 for random directions and 0 where all are the same.
    """
    unit = refiner.queue.unit
    return unit.var(1, correction=0).sum(-1).sqrt()
