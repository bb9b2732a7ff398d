"""Which block to take: chosen on validation images, judged on test images."""

from dataclasses import dataclass, replace

import pandas as pd
import torch

from mimrefiner.probes.features import Features
from mimrefiner.probes.knn import knn_hits
from mimrefiner.probes.linear import hold_out
from mimrefiner.probes.protocols import KNN
from mimrefiner.study.intervals import paired_bootstrap
from mimrefiner.study.tables import count

VALIDATION = 5_000  # images that choose, at most
LEAST = 10  # images that choose, at least; with fewer there is no advice
TOKENS = {"cls": "cls token", "mean": "patch mean"}


@dataclass(frozen=True)
class Advice:
    """A block that validation images chose, and its k-NN accuracy beside that of the last block.

    ``str`` gives the advice as a sentence.

    Attributes:
        block, last: the chosen block and the last one that was probed, 0-based.
        pool: the pooling that was chosen with the block; the last block is measured with it too.
        accuracy: of the chosen block, on test images, 0..1.
        gain, low, high: the difference to the last block with its 95 % interval over test images.
        n_val, n_test: how many images chose, and how many were asked then.
    """

    block: int
    last: int
    pool: str
    accuracy: float
    gain: float
    low: float
    high: float
    n_val: int
    n_test: int

    @property
    def token(self) -> str:
        """The pooling in words."""
        return TOKENS.get(self.pool, self.pool)

    @property
    def finding(self) -> str:
        """What was found, as the title of a figure.

        >>> Advice(7, 11, "cls", 0.8, 0.087, 0.061, 0.113, 126, 539).finding
        "Block 8's cls token beats the last block by 8.7 points"
        """
        place, points = f"Block {self.block + 1}'s {self.token}", f"{100 * self.gain:.1f} points"
        if self.block == self.last:
            return f"No block beats the last one ({self.token}, {100 * self.accuracy:.1f} %)"
        if self.low > 0:
            return f"{place} beats the last block by {points}"
        return f"No block is clearly better than the last one ({self.token})"

    def __str__(self) -> str:
        """The advice.

        >>> print(Advice(7, 11, "cls", 0.8, 0.087, 0.061, 0.113, 126, 539))  # doctest: +ELLIPSIS
        Take block 8's cls token: +8.7 points of k-NN accuracy over the last block (95 % interval...
        >>> print(Advice(11, 11, "cls", 0.8, 0, 0, 0, 126, 539))
        Take the last block's cls token: no earlier block did better on 126 validation images.
        """
        chosen = count(self.n_val, "validation image")
        if self.block == self.last:
            return f"Take the last block's {self.token}: no earlier block did better on {chosen}."
        place = f"block {self.block + 1}"
        gain, low, high = (f"{100 * x:+.1f}" for x in (self.gain, self.low, self.high))
        interval = f"95 % interval {low} to {high}, {count(self.n_test, 'test image')}"
        if self.low > 0:
            return (
                f"Take {place}'s {self.token}: {gain} points of k-NN accuracy over the last block "
                f"({interval}; chosen on {chosen})."
            )
        return (
            f"Stay with the last block's {self.token}: {place}, the choice of {chosen}, changes "
            f"k-NN accuracy by {gain} points, which may be chance ({interval})."
        )


def choice_rows(
    train: Features, test: Features, *, seed: int, device: torch.device | str
) -> pd.DataFrame:
    """What validation images say of every block, and what test images say of the chosen one.

    A tenth of the training images, VALIDATION at most, choose; the others vote. Of equally good
    blocks the last one is chosen, and of equally good poolings the first. On test images all
    training images vote, as in the report.

    Args:
        train, test: features of the same blocks and poolings.
        seed: draws the validation images.
        device: where k-NN computes.

    Returns:
        One row per pooling and block (0-based): val_accuracy and n_val; for the chosen one also
            its accuracy on test images, the difference to the last block with low and high (95 %),
            all shares, and n_test.
    """
    share = min(0.1, VALIDATION / len(train.y))
    val, bank = hold_out(train, seed, share)
    on_val = _hits(bank, val, device)
    rows = [
        {"pool": pool, "block": block, "val_accuracy": share, "n_val": len(val.y)}
        for pool, right in on_val.items()
        for block, share in zip(test.blocks, right.float().mean(1).tolist(), strict=True)
    ]
    table = pd.DataFrame(rows)
    best = table[table["val_accuracy"] == table["val_accuracy"].max()]
    chosen = best["block"].idxmax()
    pool, block = table.loc[chosen, ["pool", "block"]]
    two = [test.blocks.index(block), len(test.blocks) - 1]
    right = _hits(*(_some_blocks(part, pool, two) for part in (train, test)), device)[pool]
    gain, low, high = paired_bootstrap(right[0].numpy(), right[1].numpy())
    found = {"accuracy": right[0].float().mean().item(), "difference": gain}
    for name, value in {**found, "low": low, "high": high, "n_test": len(test.y)}.items():
        table.loc[chosen, name] = value
    return table


def _hits(train: Features, test: Features, device) -> dict[str, torch.Tensor]:
    return knn_hits(train, test, k=min(KNN.settings["k"], len(train.y)), device=device)


def _some_blocks(features: Features, pool: str, places: list[int]) -> Features:
    x, blocks = features.x[pool], tuple(features.blocks[i] for i in places)
    return replace(features, x={pool: [x[i] for i in places]}, blocks=blocks)


def advice_from(rows: pd.DataFrame) -> Advice | None:
    """The advice of :func:`choice_rows`; None of one block, or of fewer than LEAST images."""
    if rows["block"].nunique() < 2 or rows["n_val"].iloc[0] < LEAST:
        return None
    numbers = ["accuracy", "difference", "low", "high", "n_test"]
    # A missing number that was read from a file is an empty text
    found = rows[numbers].apply(pd.to_numeric)
    row = found.dropna().index[0]
    *shares, n_test = found.loc[row]
    block, last = int(rows.loc[row, "block"]), int(rows["block"].max())
    n_val = int(rows["n_val"].iloc[0])
    return Advice(block, last, rows.loc[row, "pool"], *map(float, shares), n_val, int(n_test))
