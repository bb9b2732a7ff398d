"""What is measured at the end of every epoch of stages 2 and 3: k-NN accuracies, collapse,
throughput, memory.
"""

import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils.data import Dataset

from mimrefiner import distributed
from mimrefiner.errors import InputError
from mimrefiner.files import atomic_file, goes_on_without
from mimrefiner.method.refiner import MIMRefiner
from mimrefiner.probes.features import extract_features
from mimrefiner.probes.knn import knn_accuracy
from mimrefiner.training import engine

COLLAPSED = 0.2  # of the spread of N(0, 1) vectors


@dataclass(frozen=True)
class Monitor:
    """k-NN of the last block (before the final LayerNorm) and of every head's first projector
    layer, the authors' proxy for downstream quality, and the spread of the queue.

    Attributes:
        reference, held_out: data sets with ``labels``; the images of ``held_out`` are classified by
            those of ``reference``.
        folder: ``epochs.csv`` is rewritten there after every epoch; None for no file.
        tensorboard: also write TensorBoard events to ``folder`` (needs the ``tensorboard``
            package).
        k: neighbours.
        num_workers: loader processes.

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
                    "watching by k-NN (--watch) needs a label for every image, and the data set has images without"
                )
        if self.tensorboard and (self.folder is None or find_spec("tensorboard") is None):
            raise InputError(
                "TensorBoard events need a folder and the package: pip install 'mimrefiner[tensorboard]'"
            )

    def __call__(self, refiner: MIMRefiner, epochs: list[dict]) -> None:
        """Add this epoch's values to the last row of ``epochs``, warn of collapse, write the files
        (process 0).
        """
        row = epochs[-1]
        for block, spread in zip(refiner.blocks, queue_spread(refiner).tolist(), strict=True):
            row[f"spread_head{block}"] = spread
            if spread < COLLAPSED and distributed.rank() == 0:  # the queue is the same everywhere
                print(
                    f"stage {row['stage']}, epoch {row['epoch']:g}: the head on block {block} collapses (its projections spread "
                    f"{spread:.2f}, 1 for random directions): lower the learning rate or raise the temperature",
                    file=sys.stderr,
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
        training, device = encoder.training, next(encoder.parameters()).device
        blocks = sorted({*refiner.blocks, refiner.depth - 1})
        where = {"device": device, "autocast": torch.bfloat16 if device.type == "cuda" else None}
        parts = [
            extract_features(
                encoder.eval(),
                data,
                blocks=blocks,
                pools=(pool,),
                num_workers=self.num_workers,
                **where,
            )
            for data in (self.reference, self.held_out)
        ]
        encoder.train(training)
        x, labels = (
            [[f.to(device) for f in part.x[pool]] for part in parts],
            [part.y.to(device) for part in parts],
        )
        result = {"knn_last_block": self._knn([f[-1] for f in x], labels)}
        for head, block in enumerate(refiner.blocks):
            inputs = [f[blocks.index(block)] for f in x]
            # This head reads behind the final norm (of the pooled token; exact for cls)
            if block == refiner.depth - 1:
                norm = engine.whole(dict(encoder.norm.named_parameters()))
                inputs = [
                    functional_call(encoder.norm, {n: w.to(device) for n, w in norm.items()}, f)
                    for f in inputs
                ]
            result[f"knn_head{block}"] = self._knn(
                [f @ refiner.heads.projector[0].weight[head] for f in inputs], labels
            )
        return result

    def _knn(self, x: list[Tensor], labels: list[Tensor]) -> float:
        return knn_accuracy(x[0], labels[0], x[1], labels[1], k=min(self.k, len(x[0])))

    def _write_events(self, row: dict) -> None:
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(self.folder) as writer:
            for name, value in row.items():
                if name not in ("stage", "epoch"):
                    writer.add_scalar(f"stage{row['stage']}/{name}", value, row["epoch"])


def queue_spread(refiner: MIMRefiner) -> Tensor:
    """How much the directions in every head's queue differ, (heads,): 1 for random directions, 0
    when all are the same.
    """
    unit = refiner.queue.unit
    return unit.var(1, correction=0).sum(-1).sqrt()
