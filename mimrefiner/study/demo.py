"""The demo: the packaged model on the digits of scikit-learn; nothing is downloaded."""

import textwrap
from pathlib import Path

import pandas as pd

from mimrefiner.study.advice import TOKENS
from mimrefiner.study.report import probe

MODEL, DATA = "simmim_digits", "digits"
WIDTH = 25  # letters between the lowest and the highest accuracy
INTRODUCTION = """A ViT of 0.6 M parameters, pre-trained on handwritten digits by filling in hidden
patches, without labels. How good are its features after every block? A test image
takes the class that its 10 nearest training images vote for; {n_test} test images."""


def demo(out: Path | str) -> str:
    """Probe every block of the packaged model; returns a table, advice and where the picture is.

    Args:
        out: the folder of the report, as :func:`mimrefiner.probe` writes it.

    >>> print(demo("demo"))  # doctest: +SKIP
    """
    table = probe(MODEL, DATA, out=out)
    parts = [
        INTRODUCTION.format(n_test=table["n_test"].iloc[0]),
        accuracies(table),
        textwrap.fill(table.attrs["advice"], 86),
        f"The picture: {Path(out) / 'report.png'}",
    ]
    return "\n\n".join(parts)


def accuracies(table: pd.DataFrame) -> str:
    """k-NN accuracy after every block as lines of text, with a mark that moves with the first pool.

    Args:
        table: what :func:`mimrefiner.probe` returns, with k-NN.

    >>> rows = {"model": "model", "probe": "knn", "pool": "cls"}
    >>> rows = [{**rows, "block": 0, "value": 0.5}, {**rows, "block": 1, "value": 0.75}]
    >>> print(accuracies(pd.DataFrame(rows)))
    block  cls token
        1     50.0 %  |*                        |
        2     75.0 %  |                        *|
    """
    votes = table[table["probe"] == "knn"]
    ours = votes[votes["model"] == "model"].pivot(index="block", columns="pool", values="value")
    names = [TOKENS.get(pool, pool) for pool in ours]
    lines, first = ["  ".join(["block", *names])], ours.iloc[:, 0]
    reach = max(first.max() - first.min(), 1e-9)
    for block, values in ours.iterrows():
        cells = [
            f"{100 * value:{len(name) - 2}.1f} %" for name, value in zip(names, values, strict=True)
        ]
        place = round((WIDTH - 1) * (first[block] - first.min()) / reach)
        mark = f"|{'*':>{place + 1}}".ljust(WIDTH + 1) + "|"
        lines.append("  ".join([f"{block + 1:5d}", *cells, mark]))
    for other in ("random weights", "raw pixels"):
        best = votes.loc[votes["model"] == other, "value"]
        if len(best):
            lines.append(f"{other}: {100 * best.max():.1f} %")
    return "\n".join(lines)
