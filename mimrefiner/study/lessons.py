"""What lessons say and show: sentences filled from measured values, tables, folded text.

A sentence about a result is chosen by the verdict and takes its numbers from the rows, so that
prose and measurement cannot differ.
"""

from html import escape

import pandas as pd

from mimrefiner.study.intervals import Difference


class Shown:
    """HTML for a notebook, with plain text for where there is none."""

    def __init__(self, html: str, text: str):
        self.html, self.text = html, text

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return self.text


def say(text: str) -> None:
    """Show Markdown in the notebook.

    >>> say("The last block rises by **20.8** points.")  # doctest: +ELLIPSIS
    <IPython.core.display.Markdown object>
    """
    from IPython.display import Markdown, display

    display(Markdown(" ".join(text.split())))


def by_verdict(difference: Difference, *, seen: str, not_seen: str, opposite: str = "") -> str:
    """The sentence that fits what a difference decides; without ``opposite``, that of not seen.

    One seed without an interval decides nothing, and takes the sentence of not seen.

    >>> from mimrefiner.study.intervals import seed_difference
    >>> more = seed_difference([0.8, 0.81, 0.8], [0.7, 0.71, 0.7])
    >>> by_verdict(more, seen="It rises.", not_seen="No change can be told.")
    'It rises.'
    """
    if difference.seen:
        return seen
    return opposite if difference.opposite and opposite else not_seen


def points(difference: Difference) -> str:
    """A difference in points, with its interval where there is one.

    >>> from mimrefiner.study.intervals import seed_difference
    >>> points(seed_difference([0.7], [0.5]))
    '+20.0 points'
    """
    mean, low, high = (
        f"{100 * x:+.1f}" for x in (difference.mean, difference.low, difference.high)
    )
    one_seed = "inf" in high
    return f"{mean} points" + ("" if one_seed else f" (95 % interval {low} to {high})")


def in_words(items) -> str:
    """A list in words.

    >>> in_words([7, 6, 8]), in_words(["one"])
    ('7, 6 and 8', 'one')
    """
    *first, last = map(str, items)
    return f"{', '.join(first)} and {last}" if first else last


def table(frame: pd.DataFrame, caption: str = "", *, digits: int = 1) -> Shown:
    """A table for a notebook: HTML whose cells wrap, numbers with ``digits`` behind the point.

    >>> table(pd.DataFrame({"block": [1, 2], "accuracy": [70.71, 91.5]}, index=["a", "b"]))
       block  accuracy
    a      1      70.7
    b      2      91.5
    """

    def form(x):
        return f"{x:.{digits}f}"

    plain = frame.to_string(float_format=form, line_width=88)
    html = frame.to_html(float_format=form, border=0, na_rep="", justify="left")
    style = "max-width:44em;text-align:left"
    head = f"<p><b>{escape(caption)}</b></p>" if caption else ""
    return Shown(f"<div style='{style}'>{head}{html}</div>", plain)


def folded(title: str, content: str | Shown) -> Shown:
    """Text, or what is shown otherwise, behind a fold; ``title`` is in view.

    >>> folded("settings", "12 blocks")
    settings: 12 blocks
    """
    inside = content.html if isinstance(content, Shown) else f"<pre>{escape(content)}</pre>"
    html = f"<details><summary>{escape(title)}</summary>{inside}</details>"
    return Shown(html, f"{title}: {content}")


def verdicts(claims: pd.DataFrame) -> Shown:
    """Claims as a table of three columns: the claim, what was measured, and the verdict."""
    shown = claims[["claim", "measured", "verdict"]].set_axis(range(1, len(claims) + 1))
    with pd.option_context("display.max_colwidth", None):
        html = table(shown).html
    lines = [f"{row.verdict.upper()}: {row.claim} ({row.measured})" for row in shown.itertuples()]
    return Shown(html, "\n".join(lines))
