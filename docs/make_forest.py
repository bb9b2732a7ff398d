"""Draw what was measured as a forest plot: ``python docs/make_forest.py`` writes docs/forest.svg.

Five questions, about three claims each, read from ``figures/claims.csv``; the sentences that answer
them are made of the same rows. ``docs/make_results.py`` puts both on the page of results and into
README.
"""

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from make_schematic import FAINT, INK, text

ROOT = Path(__file__).parent.parent
CLAIMS, PICTURE = ROOT / "figures" / "claims.csv", Path(__file__).with_name("forest.svg")
COLOURS = {"seen": "#0064a8", "opposite": "#b0124f", "not seen": "#8c959f", "open": "#8c959f"}
WORDS = {
    "seen": "seen: the interval lies above zero",
    "opposite": "opposite: it lies below zero",
    "not seen": "not seen: it includes zero, or not every seed agrees",
}
DIGITS, FASHION = {"dataset": "digits"}, {"dataset": "fashion_mnist"}
FRUIT = {"dataset": "fruit64", "model": "mae_tiny_64"}
MAE = {"dataset": "tiny-imagenet", "model": "MAE", "pool": "cls"}
MEAN, SIMMIM = MAE | {"pool": "mean"}, MAE | {"model": "SimMIM"}


@dataclass(frozen=True)
class Row:
    """One line of the picture.

    Attributes:
        label: what it is called.
        claim: how the claim's sentence begins.
        about: the columns of the claim that must agree.
        headline: whether the row is one of the headline claims of the page of results.
    """

    label: str
    claim: str
    about: dict[str, str] = field(default_factory=dict)
    headline: bool = True


PEAK = "the best block for k-NN"
LIFTS = "refinement lifts the last block"
LONGER = "refinement beats as much computation spent on masked pre-training"
QUESTIONS: dict[str, tuple[Row, ...]] = {
    "Is an earlier block better than the last one before refinement?": (
        Row("digits", f"{PEAK} (cls)", DIGITS),
        Row("fruit photos", "photographs: the best block (cls) of the MAE comes before", FRUIT),
        Row("Tiny-ImageNet (MAE)", PEAK, MAE, headline=False),
        Row("Tiny-ImageNet (SimMIM)", PEAK, SIMMIM, headline=False),
    ),
    "Does refinement lift the last block?": (
        Row("digits", LIFTS, DIGITS),
        Row("Fashion-MNIST", LIFTS, FASHION),
        Row("Tiny-ImageNet (MAE)", LIFTS, MAE),
        Row("Tiny-ImageNet (SimMIM)", LIFTS, SIMMIM, headline=False),
        Row("fruit photos (never trained on)", f"photographs: {LIFTS}", FRUIT),
    ),
    "Does it beat the same computation spent on more pre-training?": (
        Row("digits", LONGER, DIGITS),
        Row("Tiny-ImageNet (cls token)", LONGER, MAE),
        Row("Tiny-ImageNet (patch mean)", LONGER, MEAN),
    ),
    "Is the refined last block better than no training at all?": (
        Row("raw pixels (digits)", "the refined last block beats raw pixels", DIGITS),
        Row("raw pixels (Tiny-ImageNet)", "the refined last block beats raw pixels", MAE),
        Row(
            "random weights (fruit photos)",
            "photographs: the refined last block beats that of random weights",
            FRUIT,
            headline=False,
        ),
    ),
    "Which ingredients of the recipe matter (digits)?": (
        Row("several heads instead of one", "several heads beat one", DIGITS, headline=False),
        Row("20 neighbours instead of 1", "drawing among 20 neighbours", DIGITS, headline=False),
        Row("batch as negatives", "swapping the positive alone beats", DIGITS, headline=False),
    ),
}
ASKED = {  # what the sentences answer: question -> its words there
    "Does refinement lift the last block?": "Does refinement lift the last block?",
    "Does it beat the same computation spent on more pre-training?": (
        "Does it beat the same computation spent on more pre-training?"
    ),
    "Which ingredients of the recipe matter (digits)?": "Which ingredients matter?",
}


@dataclass(frozen=True)
class Found:
    """A row of the picture with its claim; numbers are in points."""

    question: str
    row: Row
    claim: dict[str, str]

    def number(self, name: str) -> float:
        """A number of the claim; nan where there is none."""
        return float(self.claim[name] or "nan")

    @property
    def verdict(self) -> str:
        """The verdict of the claim."""
        return self.claim["verdict"]

    @property
    def by_seed(self) -> list[float]:
        """The difference of every seed."""
        return [float(x) for x in self.claim["by_seed"].split()]


def read_claims(file: Path = CLAIMS) -> list[dict[str, str]]:
    """The rows of a table of claims, all as text."""
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def find(claims: Sequence[dict[str, str]]) -> list[Found]:
    """The rows of the picture that are in ``claims``; of several alike the one of most seeds."""
    found = []
    for question, rows in QUESTIONS.items():
        for row in rows:
            fits = [
                claim
                for claim in claims
                if claim["claim"].startswith(row.claim)
                and claim["difference"]
                and all(claim[name] == value for name, value in row.about.items())
                and ("model" in row.about or not claim["model"])
            ]
            if fits:
                found.append(Found(question, row, max(fits, key=lambda c: int(c["n_seeds"]))))
    return found


def missing(claims: Sequence[dict[str, str]]) -> list[str]:
    """The rows of the picture that ``claims`` do not have, in words."""
    there = {(found.question, found.row.label) for found in find(claims)}
    return [
        f"{question} {row.label}"
        for question, rows in QUESTIONS.items()
        for row in rows
        if (question, row.label) not in there
    ]


# ---- sentences


def points(value: float) -> str:
    """A difference with its sign.

    >>> points(-3.26)
    '−3.3'
    """
    return f"{value:+.1f}".replace("-", "−")


def listed(found: Iterable[Found]) -> str:
    """Labels with their differences, as part of a sentence."""
    words = [f"{f.row.label} ({points(f.number('difference'))})" for f in found]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def answer(found: Sequence[Found]) -> str:
    """What the verdicts of one question say, as a sentence.

    Differences are in points of k-NN accuracy.
    """
    by = {verdict: [f for f in found if f.verdict == verdict] for verdict in WORDS}
    parts = [f"yes on {listed(by['seen'])}"] if by["seen"] else []
    parts += [f"not seen on {listed(by['not seen'])}"] if by["not seen"] else []
    parts += [f"the opposite on {listed(by['opposite'])}"] if by["opposite"] else []
    if not by["seen"] and not by["opposite"]:
        return f"This cannot be told at this scale: {listed(found)} all lie within their intervals."
    sentence = "; ".join(parts)
    return f"{sentence[0].upper()}{sentence[1:]}."


def sentences(claims: Sequence[dict[str, str]]) -> list[str]:
    """A question in bold and its answer, for the questions in ASKED."""
    found = find(claims)
    return [
        f"**{words}** {answer(of_question)}"
        for question, words in ASKED.items()
        if (of_question := [f for f in found if f.question == question])
    ]


def summary(claims: Sequence[dict[str, str]]) -> str:
    """Everything in one sentence."""
    found = find(claims)
    lifted, longer = (
        [f for f in found if f.question == question] for question in list(QUESTIONS)[1:3]
    )
    seen = [f for f in lifted if f.verdict == "seen"]
    beats = [f for f in longer if f.verdict == "seen"]
    return (
        f"Refinement lifts the last block in {len(seen)} of {len(lifted)} settings, by "
        f"{', '.join(points(f.number('difference')) for f in seen)} points of k-NN accuracy "
        f"({', '.join(f.row.label for f in seen)}), and beats the same computation spent on more "
        f"pre-training in {len(beats)} of {len(longer)} ({', '.join(f.row.label for f in beats)})."
    )


# ---- the picture

WIDTH, LINE, LABELS, LEFT, RIGHT = 900, 21, 36, 290, 690
TICKS = (-20, -10, -5, -2, -1, 0, 1, 2, 5, 10, 20, 40)
LINEAR = 2.0  # points on either side of zero, between which the scale is linear
ENDS = (-25.0, 45.0)  # points at the ends of the axis


def place(value: float) -> float:
    """Where a difference lies: linear up to LINEAR, logarithmic beyond."""

    def warped(v: float) -> float:
        size = abs(v) if abs(v) <= LINEAR else LINEAR * (1 + math.log(abs(v) / LINEAR))
        return math.copysign(size, v)

    first, last = map(warped, ENDS)
    value = warped(max(ENDS[0], min(ENDS[1], value)))
    return LEFT + (RIGHT - LEFT) * (value - first) / (last - first)


def mark(found: Found, y: float) -> list[str]:
    """Interval, seeds, mean and numbers of one row at height ``y``."""
    colour, middle, verdict = COLOURS[found.verdict], y - 4, found.verdict
    mean, low, high = (found.number(name) for name in ("difference", "low", "high"))
    parts = [text(LABELS, y, found.row.label, 13, INK, "start")]
    numbers = points(mean)
    if not math.isnan(low):
        parts.append(
            f"<line x1='{place(low):.1f}' x2='{place(high):.1f}' y1='{middle}' y2='{middle}' "
            f"stroke='{colour}' stroke-width='3' stroke-linecap='round'/>"
        )
        numbers += f"  [{points(low)}, {points(high)}]"
    seeds = found.by_seed if len(found.by_seed) > 1 else []
    parts += [
        f"<circle cx='{place(x):.1f}' cy='{middle}' r='2.6' fill='white' stroke='{colour}'/>"
        for x in seeds
    ]
    fill = "white" if verdict == "open" else colour
    x = place(mean)
    parts.append(
        f"<path d='M{x - 6:.1f},{middle} L{x:.1f},{middle - 6} L{x + 6:.1f},{middle} "
        f"L{x:.1f},{middle + 6} z' fill='{fill}' stroke='white' stroke-width='1'/>"
    )
    parts.append(text(RIGHT + 18, y, numbers, 12.5, INK, "start"))
    return parts


def draw(claims: Sequence[dict[str, str]]) -> str:
    """The picture as SVG."""
    found = find(claims)
    y, parts = 64, []
    for question in dict.fromkeys(f.question for f in found):
        y += LINE + 6
        parts.append(text(16, y, question, 13.5, INK, "start", "bold"))
        for of_question in (f for f in found if f.question == question):
            y += LINE
            parts += mark(of_question, y)
    bottom = y + 14
    axis = []
    for tick in TICKS:
        ink, width = (INK, 1.4) if tick == 0 else ("#e4e8ec", 1)
        axis.append(
            f"<line x1='{place(tick):.1f}' x2='{place(tick):.1f}' y1='76' y2='{bottom}' "
            f"stroke='{ink}' stroke-width='{width}'/>"
        )
        axis.append(text(place(tick), bottom + 16, points(tick)[:-2] if tick else "0", 11, FAINT))
    under = "points of k-NN accuracy; circles are seeds; logarithmic beyond ±2"
    axis.append(text((LEFT + RIGHT) / 2, bottom + 36, under, 12, FAINT))
    axis.append(text(RIGHT + 18, 64, "points [95 % interval]", 12, FAINT, "start"))
    title = "What was measured: five questions"
    head = [text(16, 28, title, 16, INK, "start", "bold")]
    x = 16
    for verdict, words in WORDS.items():
        head.append(f"<circle cx='{x + 6}' cy='45' r='5' fill='{COLOURS[verdict]}'/>")
        head.append(text(x + 17, 49, words, 12, FAINT, "start"))
        x += 42 + 6.1 * len(words)
    height = bottom + 50
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {height}' width='{WIDTH}' "
        "role='img' aria-label='Forest plot: differences in k-NN accuracy with their intervals, "
        f"{len(found)} claims in {len(QUESTIONS)} questions'>"
        f"<rect width='100%' height='100%' rx='8' fill='white'/>"
        f"{''.join([*head, *axis, *parts])}</svg>\n"
    )


if __name__ == "__main__":
    claims = read_claims()
    for lacking in missing(claims):
        print(f"no such claim: {lacking}")
    PICTURE.write_text(draw(claims), encoding="utf-8")
    print(f"{PICTURE.name} written: {len(find(claims))} claims")
