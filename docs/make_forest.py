"""Draw what was measured as a forest plot: ``python docs/make_forest.py`` writes docs/forest.svg.

Five questions, about three claims each, read from ``figures/claims.csv`` and from what
``experiments/collect.py`` has written of a study, where there is one. The sentences that answer the
questions are made of the same rows; ``docs/make_results.py`` and ``make_readme.py`` use both.
"""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from make_schematic import FAINT, INK, text

ROOT = Path(__file__).parent.parent
PICTURE = Path(__file__).with_name("forest.svg")
STUDIES = ("real", "cifar", "natural")  # NAME of experiments/evidence_NAME_claims.csv
COLOURS = {"seen": "#0064a8", "opposite": "#b0124f", "not seen": "#8c959f", "open": "#8c959f"}
WORDS = {
    "seen": "seen: the interval lies above zero",
    "opposite": "opposite: it lies below zero",
    "not seen": "not seen: it includes zero, or not every seed agrees",
}
DIGITS, FASHION = {"dataset": "digits"}, {"dataset": "fashion_mnist"}
FRUIT = {"dataset": "fruit64", "model": "mae_tiny_64"}
MAE = {"study": "natural", "dataset": "tiny-imagenet", "model": "MAE", "pool": "cls"}
MEAN, SIMMIM = MAE | {"pool": "mean"}, MAE | {"model": "SimMIM"}
REAL, CIFAR = ({"study": name, "dataset": "cifar10", "pool": "cls"} for name in STUDIES[:2])


@dataclass(frozen=True)
class Row:
    """One line of the picture.

    Attributes:
        label: what it is called.
        claim: how the claim's sentence begins.
        about: the columns of the claim that must agree; of a study that is not there, rows are left
            out without a word.
        headline: whether the row is one of the headline claims of the page of results.
        pending: whether the claim is still to be measured, which the sentences say.
    """

    label: str
    claim: str
    about: dict[str, str] = field(default_factory=dict)
    headline: bool = True
    pending: bool = False


PEAK = "the best block for k-NN"
LIFTS = "refinement lifts the last block"
LONGER = "refinement beats as much computation spent on masked pre-training"
QUESTIONS: dict[str, tuple[Row, ...]] = {
    "Is an earlier block better than the last one before refinement?": (
        Row("CIFAR-10 (a real ViT-S/14)", PEAK, REAL),
        Row("CIFAR-10 (our MAE)", PEAK, CIFAR),
        Row("digits", f"{PEAK} (cls)", DIGITS),
        Row("fruit photos (MAE)", PEAK, MAE | {"dataset": "fruit64"}, headline=False),
        Row("Tiny-ImageNet (MAE)", PEAK, MAE, headline=False),
        Row("Tiny-ImageNet (SimMIM)", PEAK, SIMMIM, headline=False),
    ),
    "Does refinement lift the last block?": (
        Row("CIFAR-10 (a real ViT-S/14)", LIFTS, REAL),
        Row("CIFAR-10 (our MAE)", LIFTS, CIFAR),
        Row("digits", LIFTS, DIGITS),
        Row("Fashion-MNIST", LIFTS, FASHION),
        Row("Tiny-ImageNet (MAE)", LIFTS, MAE),
        Row("Tiny-ImageNet (SimMIM)", LIFTS, SIMMIM, headline=False),
        Row("fruit photos (packaged MAE, not trained on)", f"photographs: {LIFTS}", FRUIT),
    ),
    "Does it beat the same computation spent on more pre-training?": (
        Row("CIFAR-10 (a real ViT-S/14)", LONGER, REAL),
        Row("CIFAR-10 (our MAE)", LONGER, CIFAR),
        Row("digits", LONGER, DIGITS),
        Row("Tiny-ImageNet (cls token)", LONGER, MAE),
        Row("Tiny-ImageNet (patch mean)", LONGER, MEAN),
    ),
    "Is the refined last block better than no training at all?": (
        Row("raw pixels (CIFAR-10)", "the refined last block beats raw pixels", REAL),
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
        Row("four heads (not one)", "several heads beat one", DIGITS, headline=False),
        Row("neighbours (not the own view)", "neighbours beat the image", DIGITS, headline=False),
        Row("the intended pairing of views", "the intended pairing", DIGITS, headline=False),
        Row("20 neighbours (not the nearest)", "drawing among 20", DIGITS, False, pending=True),
        Row("swapping the positive alone", "swapping the positive", DIGITS, False, pending=True),
    ),
}
ASKED = {  # what the sentences answer: question -> its words there
    "Is an earlier block better than the last one before refinement?": (
        "Is an earlier block better before refinement?"
    ),
    "Does refinement lift the last block?": "Does refinement lift the last block?",
    "Does it beat the same computation spent on more pre-training?": (
        "Does it beat the same computation spent on more pre-training?"
    ),
    "Is the refined last block better than no training at all?": (
        "Is the refined last block better than no training at all?"
    ),
    "Which ingredients of the recipe matter (digits)?": "Which ingredients matter (digits)?",
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
    def full_verdict(self) -> str:
        """The verdict, and where a single seed decided against the interval of the mean, that."""
        excludes_zero = self.number("low") > 0 or self.number("high") < 0
        doubtful = excludes_zero and self.verdict == "not seen"
        return "not seen: not in every seed" if doubtful else self.verdict

    @property
    def by_seed(self) -> list[float]:
        """The difference of every seed."""
        return [float(x) for x in self.claim["by_seed"].split()]


def read_claims(root: Path = ROOT) -> list[dict[str, str]]:
    """All claims as text, with the column ``study``: "" for those of the notebooks."""
    files = {"": root / "figures" / "claims.csv"}
    files |= {name: root / "experiments" / f"evidence_{name}_claims.csv" for name in STUDIES}
    claims = []
    for study, file in files.items():
        if file.is_file():
            with file.open(newline="", encoding="utf-8") as stream:
                claims += [{**row, "study": study} for row in csv.DictReader(stream)]
    return claims


def find(
    claims: Sequence[dict[str, str]], questions: dict[str, tuple[Row, ...]] = QUESTIONS
) -> list[Found]:
    """The rows of ``questions`` that are in ``claims``; of several alike the one of most seeds."""
    found = []
    for question, rows in questions.items():
        for row in rows:
            fits = [
                claim
                for claim in claims
                if claim["claim"].startswith(row.claim)
                and claim["difference"]
                and all(claim[name] == value for name, value in ({"study": ""} | row.about).items())
                and ("model" in row.about or claim["study"] or not claim["model"])
            ]
            if fits:
                found.append(Found(question, row, max(fits, key=lambda c: int(c["n_seeds"]))))
    return found


def missing(
    claims: Sequence[dict[str, str]], questions: dict[str, tuple[Row, ...]] = QUESTIONS
) -> list[str]:
    """The rows whose claim is there or not against what ``pending`` says, in words."""
    there = {(found.question, found.row.label) for found in find(claims, questions)}
    studies = {claim["study"] for claim in claims}
    return [
        f"{question} {row.label}"
        for question, rows in questions.items()
        for row in rows
        if row.about.get("study", "") in studies and ((question, row.label) in there) == row.pending
    ]


# ---- sentences


def points(value: float) -> str:
    """A difference with its sign.

    >>> points(-3.26)
    '−3.3'
    """
    return f"{value:+.1f}".replace("-", "−")


def listed(found: Sequence[Found]) -> str:
    """Labels with their differences, as part of a sentence."""
    words = [f"{f.row.label} {points(f.number('difference'))}" for f in found]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def answer(found: Sequence[Found]) -> str:
    """What the verdicts of one question say, as a sentence; differences are in points."""
    by = {verdict: [f for f in found if f.verdict == verdict] for verdict in WORDS}
    if not by["seen"] and not by["opposite"]:
        return f"No effect is seen: {listed(found)}."
    named = (("yes", "seen"), ("not seen", "not seen"), ("the opposite", "opposite"))
    parts = [f"{words}: {listed(by[verdict])}" for words, verdict in named if by[verdict]]
    sentence = "; ".join(parts)
    return f"{sentence[0].upper()}{sentence[1:]}."


def sentences(claims: Sequence[dict[str, str]]) -> list[str]:
    """A question in bold and its answer, for the questions in ASKED."""
    return [
        f"**{words}** {full_answer(claims, QUESTIONS[question])}"
        for question, words in ASKED.items()
        if find(claims, {question: QUESTIONS[question]})
    ]


def full_answer(claims: Sequence[dict[str, str]], rows: Sequence[Row]) -> str:
    """What was found for ``rows``, and which of them are still to be measured."""
    found, studies = find(claims, {"": rows}), {claim["study"] for claim in claims}
    parts = [answer(found)] if found else []
    waiting = [r.label for r in rows if r.pending and r.about.get("study", "") in studies]
    if waiting:
        parts.append(f"Not measured yet: {', '.join(waiting)}.")
    return " ".join(parts)


def summary(claims: Sequence[dict[str, str]]) -> str:
    """Everything in one sentence."""
    found = find(claims)
    lifted, longer = (
        [f for f in found if f.question == question] for question in list(QUESTIONS)[1:3]
    )
    seen, beats = ([f for f in part if f.verdict == "seen"] for part in (lifted, longer))
    sentence = f"Refinement lifts the last block in {len(seen)} of {len(lifted)} settings"
    if seen:
        most = max(seen, key=lambda f: f.number("difference"))
        gain = f"{most.number('difference'):.1f} points of k-NN accuracy"
        sentence += f", most of all on {most.row.label}, by {gain}"
    return (
        f"{sentence}; it beats the same computation spent on more pre-training in {len(beats)} of "
        f"{len(longer)}."
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
