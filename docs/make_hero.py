"""Draw the first picture of README: the method at the left, what it does at the right.

::

    python docs/make_hero.py                         # from the digits in figures/
    python docs/make_hero.py experiments/real        # from the rows of experiments/trials.py
    python docs/make_hero.py experiments/evidence_real.csv    # the same, collected

The second form reads ``rows/MODEL-SEED.csv`` under the folder, the third one table of all: before,
refined, masked (the same computation spent on more masked pre-training) and raw pixels. All write
docs/hero.svg and, beside it, the numbers that were drawn as docs/hero.csv.
"""

import csv
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from make_schematic import FAINT, INK, LINE, PULL, QUEUE, TRAINED, arrow, box, photograph, text, tip

HERE = Path(__file__).parent
PICTURE, NUMBERS = HERE / "hero.svg", HERE / "hero.csv"
PROTOCOL = "knn_k10_t0.07_standardized"
NAMES = {  # what rows and figures call a model -> its name in the picture
    "before": "before",
    "refined": "refined",
    "refined (EMA)": "refined",
    "masked": "same compute",
    "same compute": "same compute",
    "pre-trained longer": "same compute",
    "raw pixels": "raw pixels",
}
COLOURS = {"before": "#4c72a0", "refined": PULL, "same compute": "#7b4ea3", "raw pixels": "#57606a"}
WORDS = {"same compute": "same compute, more masking"}
ENCODERS = {"real-encoder": "a ViT-S/14 that had been trained to find salient regions"}  # by preset
TITLES = {"digits": "digits", "cifar10": "CIFAR-10", "tiny-imagenet": "Tiny-ImageNet"}
COLUMNS = ("preset", "dataset", "n_test", "model", "seed", "block", "value")


@dataclass(frozen=True)
class Point:
    """The k-NN accuracy (a share) of one model and seed after one block (0-based)."""

    preset: str
    dataset: str
    n_test: int
    model: str
    seed: int
    block: int
    value: float


# ---- reading


def from_trials(folder: Path, pool: str = "cls") -> list[Point]:
    """What ``experiments/trials.py`` has written: the data set that the models were trained on.

    Args:
        folder: of the study, or the file that ``experiments/collect.py`` makes of it.
        pool: the pooling of the features.

    Raises:
        SystemExit: the rows of the encoder before refinement, or of the refined one, are missing.
    """
    is_table = folder.suffix == ".csv"
    files = [folder] if is_table else sorted((folder / "rows").glob("*.csv"))
    rows = [row for file in files for row in _rows(file) if row.get("model") in NAMES]
    for model in ("before", "refined"):
        if model not in {row["model"] for row in rows}:
            sys.exit(f"make_hero: {folder} has no rows of the model {model}")
    dataset = next(row["dataset"] for row in rows if row["model"] == "before")
    asked = {"dataset": dataset, "protocol": PROTOCOL}
    return [
        _point({**row, "model": NAMES[row["model"]]})
        for row in rows
        if row["pool"] in (pool, "pixels") and asked.items() <= row.items()
    ]


def from_digits(figures: Path) -> list[Point]:
    """The published figure of refinement on digits; raw pixels by their distance in the claims."""
    (file,) = figures.glob("0[1-9]_before_after.csv")
    rows = [row for row in _rows(file) if row["pool"].startswith("cls") and row["label"] in NAMES]
    (claim,) = (
        claim
        for claim in _rows(figures / "claims.csv")
        if claim["claim"] == "the refined last block beats raw pixels"
        and (claim["dataset"], claim["model"]) == ("digits", "")
    )
    facts = {"preset": "tiny", "dataset": "digits", "n_test": claim["n_test"]}
    found = [_point({**row, **facts, "model": NAMES[row["label"]]}) for row in rows]
    refined = mean_line(found, "refined")[-1]
    value = (refined - float(claim["difference"])) / 100
    pixels = {**facts, "model": "raw pixels", "seed": 0, "block": 0, "value": round(value, 4)}
    return [*found, _point(pixels)]


def _rows(file: Path) -> list[dict[str, str]]:
    if not file.is_file():
        sys.exit(f"make_hero: {file} does not exist")
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def _point(row: dict) -> Point:
    kinds = {"n_test": int, "seed": int, "block": int, "value": float}
    return Point(**{name: kinds.get(name, str)(row[name]) for name in COLUMNS})


def read(file: Path = NUMBERS) -> list[Point]:
    """The numbers that were drawn last."""
    return [_point(row) for row in _rows(file)]


def write(points: Sequence[Point], file: Path = NUMBERS) -> None:
    """Keep the numbers that are drawn."""
    with file.open("w", newline="", encoding="utf-8") as stream:
        table = csv.writer(stream, lineterminator="\n")
        table.writerow(COLUMNS)
        table.writerows([getattr(p, name) for name in COLUMNS] for p in points)


# ---- what is said


def lines_of(points: Sequence[Point], model: str) -> dict[int, list[float]]:
    """Seed -> accuracy in percent after every block."""
    found: dict[int, dict[int, float]] = {}
    for p in points:
        if p.model == model:
            found.setdefault(p.seed, {})[p.block] = 100 * p.value
    return {seed: [line[b] for b in sorted(line)] for seed, line in sorted(found.items())}


def mean_line(points: Sequence[Point], model: str) -> list[float]:
    """Accuracy in percent after every block, mean over seeds; [] where there is no such model."""
    lines = lines_of(points, model).values()
    return [statistics.fmean(values) for values in zip(*lines, strict=True)]


def finding(points: Sequence[Point]) -> str:
    """What the picture shows, as a sentence."""
    before, refined, same = (mean_line(points, m) for m in ("before", "refined", "same compute"))
    data = TITLES.get(points[0].dataset, points[0].dataset)
    best = max(range(len(before)), key=before.__getitem__)
    where = f"block {best + 1} of {len(before)}"
    encoder = ENCODERS.get(points[0].preset)
    whose = f" of {encoder}" if encoder else ""
    sentence = (
        f"On {data}, refinement takes the last block{whose} from {before[-1]:.1f} to "
        f"{refined[-1]:.1f} % k-NN accuracy ({_seeds(points, 'refined')}); "
        f"the best block before was {where} with {before[best]:.1f} %"
    )
    if same:
        sentence += f", and the same compute spent on more masking gives {same[-1]:.1f} % "
        sentence += f"({_seeds(points, 'same compute')})"
    else:
        sentence += ". What the same compute gives if it is spent on more masking is not measured"
    pixels = mean_line(points, "raw pixels")
    if pixels and pixels[-1] > refined[-1]:
        sentence += f". Raw pixels do better still ({pixels[-1]:.1f} %): these images are easy"
    return f"{sentence}."


def _seeds(points: Sequence[Point], label: str) -> str:
    number = len(lines_of(points, label))
    return "1 seed" if number == 1 else f"{number} seeds"


# ---- the picture

WIDTH, HEIGHT = 900, 330
LEFT, RIGHT, TOP, BOTTOM = 520, 752, 66, 272
STEP, BLOCK, FIRST, FLOOR = 23, 18, 124, 196


def method(depth: int = 12, heads: int = 4) -> list[str]:
    """The left half: image, blocks, heads, queue."""
    title = "Contrastive heads on the last blocks, for a short while"
    parts = [text(16, 28, title, 14.5, INK, "start", "bold")]
    parts += [photograph(16, FLOOR - 6, 72, (0, 0, 1)), arrow(93, FLOOR + 30, 117, FLOOR + 30)]
    for i in range(depth):
        x, last = FIRST + STEP * i, i >= depth - heads
        parts.append(box(x, FLOOR - 6, BLOCK, 72, "#fdebd3" if last else "white"))
        parts.append(text(x + BLOCK / 2, FLOOR + 80, str(i + 1), 10, FAINT))
        if last:
            parts.append(arrow(x + BLOCK / 2, FLOOR - 6, x + BLOCK / 2, FLOOR - 28))
            parts.append(box(x - 1, FLOOR - 62, BLOCK + 2, 32, TRAINED))
    end = FIRST + STEP * depth
    parts.append(text(FIRST, FLOOR + 100, "a pre-trained ViT", 12, INK, "start"))
    parts.append(text(FIRST, FLOOR - 42, "a head on each of the last blocks", 12, INK, "start"))
    start = FIRST + STEP * (depth - heads)
    parts += [
        box(start - 84 + 24 * i, 62, 21, 15, TRAINED if i == 4 else QUEUE, 2) for i in range(8)
    ]
    parts.append(text(start - 92, 74, "queue of other images", 12, INK, "end"))
    middle = start + 21.5
    parts.append(arrow(middle, FLOOR - 66, middle, 82, PULL, 3))
    parts.append(text(middle + 9, 104, "pulled to its", 11.5, PULL, "start", "bold"))
    parts.append(text(middle + 9, 119, "nearest neighbour", 11.5, PULL, "start", "bold"))
    parts.append(text(end - STEP + BLOCK, FLOOR + 100, "labels: none", 12, FAINT, "end"))
    return parts


def result(points: Sequence[Point]) -> list[str]:
    """The right half: accuracy after every block."""
    shown = {name: mean_line(points, name) for name in COLOURS}
    before, refined = shown["before"], shown["refined"]
    values = [v for line in shown.values() for v in line]
    values += [v for name in COLOURS for line in lines_of(points, name).values() for v in line]
    room = 0.06 * (max(values) - min(values))
    low, high = max(0.0, min(values) - room), min(100.0, max(values) + room)
    depth = len(before)

    def x(block: int) -> float:
        return LEFT + (RIGHT - LEFT) * block / max(1, depth - 1)

    def y(value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (value - low) / (high - low)

    data = TITLES.get(points[0].dataset, points[0].dataset)
    title = f"{data}: last block {before[-1]:.1f} → {refined[-1]:.1f} %"
    parts = [text(LEFT - 34, 28, title, 14.5, INK, "start", "bold")]
    under = f"k-NN accuracy (%), {points[0].n_test:,} test images"
    parts.append(text(LEFT - 34, 48, under, 11.5, FAINT, "start"))
    step = next(s for s in (1, 2, 5, 10, 20, 50) if (high - low) / s <= 6)
    tick = -(-low // step) * step
    while tick <= high:
        parts.append(_line([(LEFT, y(tick)), (RIGHT, y(tick))], "#e4e8ec", 1))
        parts.append(text(LEFT - 8, y(tick) + 4, f"{tick:.0f}", 11, FAINT, "end"))
        tick += step
    every = -(-depth // 12)
    for b in range(depth):
        if (b + 1) % every == 0 or b == 0:
            parts.append(text(x(b), BOTTOM + 17, str(b + 1), 10.5, FAINT))
    parts.append(text((LEFT + RIGHT) / 2, BOTTOM + 35, "after block", 11.5, FAINT))
    if shown["raw pixels"]:
        level = y(max(shown["raw pixels"]))
        parts.append(_line([(LEFT, level), (RIGHT, level)], COLOURS["raw pixels"], 1.4, "5 4"))
    for name in ("same compute", "before", "refined"):
        seeds, ink = lines_of(points, name), COLOURS[name]
        for line in seeds.values() if len(seeds) > 1 else ():
            parts.append(_line([(x(b), y(v)) for b, v in enumerate(line)], ink, 0.9, opacity=0.4))
        if shown[name]:
            parts.append(_line([(x(b), y(v)) for b, v in enumerate(shown[name])], ink, 2.6))
    parts.append(arrow(RIGHT + 6, y(before[-1]), RIGHT + 6, y(refined[-1]), PULL, 2.5))
    return parts + _labels(shown, y)


def _labels(shown: dict[str, list[float]], y) -> list[str]:
    """Names at the right ends of the lines, moved apart where they would meet."""
    ends = {name: line[-1] for name, line in shown.items() if line}
    parts, free = [], float("-inf")  # the highest place that is free
    for name, value in sorted(ends.items(), key=lambda pair: -pair[1]):
        at = max(y(value) + 4, free)
        first, _, second = WORDS.get(name, name).partition(", ")
        style = (COLOURS[name], "start", "bold" if name in ("refined", "before") else "normal")
        parts.append(text(RIGHT + 16, at, f"{first} {value:.1f}", 12, *style))
        if second:
            parts.append(text(RIGHT + 16, at + 13, second, 10.5, *style))
        free = at + (30 if second else 16)
    return parts


def _line(points: Sequence[tuple], ink: str, width: float, dash="", opacity=1.0) -> str:
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dashes = f" stroke-dasharray='{dash}'" if dash else ""
    faint = f" opacity='{opacity}'" if opacity < 1 else ""
    return (
        f"<polyline points='{places}' fill='none' stroke='{ink}' stroke-width='{width}' "
        f"stroke-linejoin='round'{dashes}{faint}/>"
    )


def draw(points: Sequence[Point]) -> str:
    """The picture as SVG."""
    rule = f"<line x1='450' x2='450' y1='20' y2='{HEIGHT - 20}' stroke='#e4e8ec'/>"
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {HEIGHT}' width='{WIDTH}' "
        f"role='img' aria-label='Contrastive heads on the last blocks; {finding(points)}'>"
        f"<defs>{tip('tip', LINE)}{tip('pull', PULL)}</defs>"
        f"<rect width='100%' height='100%' rx='8' fill='white'/>"
        f"{''.join([*method(), rule, *result(points)])}</svg>\n"
    )


def main(arguments: Sequence[str]) -> None:
    """Draw, keep the numbers, and say what was found."""
    points = from_trials(Path(arguments[0])) if arguments else from_digits(HERE.parent / "figures")
    write(points)
    PICTURE.write_text(draw(read()), encoding="utf-8")
    print(finding(points))


if __name__ == "__main__":
    main(sys.argv[1:])
