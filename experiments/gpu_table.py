"""What a run of :mod:`experiments.gpu` found, as Markdown: every part that wrote anything."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree

CONFIRMED = ("PASSED", "FAILED", "ERROR", "SKIPPED")  # as pytest -v ends its lines


def table(out: Path) -> str:
    """All sections of the folder ``out`` that have something to show."""
    sections = {
        "Parts": rows_of(_read(out, "parts"), ("part", "ended", "seconds")),
        "Card": _card(_read(out, "card")),
        "Tests on the device": _tests(out),
        "Ratios (how often the first way is faster)": _ratios(_read(out, "ratios")),
        "Pace of training": _paces(out),
        "Training": _trainings(out),
    }
    shown = [f"## {title}\n\n{text}" for title, text in sections.items() if text]
    return "\n\n".join(shown) + "\n"


def rows_of(rows: Iterable[dict] | None, columns: tuple[str, ...]) -> str:
    """Rows as a Markdown table; "" without any.

    >>> print(rows_of([{"part": "card", "seconds": 3.0}], ("part", "seconds")))
    | part | seconds |
    |---|---|
    | card | 3.0 |
    """
    lines = [f"| {' | '.join(str(row.get(name, '')) for name in columns)} |" for row in rows or ()]
    head = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return "\n".join([*head, *lines]) if lines else ""


def _read(out: Path, name: str):
    file = out / f"{name}.json"
    return json.loads(file.read_text()) if file.is_file() else None


def _card(facts: dict | None) -> str:
    if facts is None:
        return ""
    packages = ", ".join(f"{name} {number}" for name, number in facts.pop("packages").items())
    facts = {**facts, "packages": packages}
    return rows_of([{"what": name, "": x} for name, x in facts.items()], ("what", ""))


def _tests(out: Path) -> str:
    """Counts, the tests that did not pass, and what tests measured; also of a run cut off."""
    log = out / "logs" / "tests.txt"
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    found = {}
    for line in lines:
        words = line.split()
        if len(words) > 1 and "::" in words[0] and words[1] in CONFIRMED:
            found[words[0].split("::", 1)[1]] = words[1]
    if not found:
        return lines[-1] if lines else ""
    counts = ", ".join(f"{n} {what.lower()}" for what, n in Counter(found.values()).items())
    bad = [f"- {name}: {what.lower()}" for name, what in found.items() if what in CONFIRMED[1:3]]
    return "\n".join([counts, *bad, *_properties(out / "tests.xml")])


def _properties(file: Path) -> list[str]:
    if not file.is_file():
        return []
    lines = []
    for case in ElementTree.parse(file).iter("testcase"):
        for x in case.iter("property"):
            lines.append(f"- {case.get('name')}: {x.get('name')} {x.get('value')}")
    return lines


def _ratios(rows: list[dict] | None) -> str:
    columns = ("what", "ratio", "seconds", "images_per_second", "tflop_per_second")
    shown = []
    for row in rows or ():
        seconds = next(x for name, x in row.items() if name != "what")
        numbers = {name: round(row[name], 2) for name in columns[3:] if name in row}
        shown.append({**row, "seconds": seconds, **numbers})
    return rows_of(shown, columns)


def _paces(out: Path) -> str:
    """Every stage alone, and the slowest where several processes share the device."""
    alone = _read(out, "pace-alone") or []
    beside = [
        rows for file in sorted(out.glob("pace-[0-9]*.json")) if (rows := _read(out, file.stem))
    ]
    for row in alone:
        ms = [other["ms"] for rows in beside for other in rows if other["stage"] == row["stage"]]
        if ms:
            row[f"ms, {len(beside)} at once"] = max(ms)
    names = dict.fromkeys(name for row in alone for name in row)
    return rows_of(alone, tuple(names))


def _trainings(out: Path) -> str:
    rows = []
    for file in (out / "mae.json", *sorted(out.glob("refined-*.json"))):
        rows.append(_read(out, file.stem))
    rows += [_read(out, name) for name in ("masked", "labels")]
    shown = [_training(row) for row in rows if row]
    names = dict.fromkeys(name for row in shown for name in row)
    text = rows_of(shown, tuple(names))
    chosen = _read(out, "rung")
    if text and chosen:
        text += f"\n\nEpochs are {chosen['share']:.0%} of the preset's; the last block is meant."
    return text


def _training(row: dict) -> dict:
    kept = ("model", "seed", "epochs", "train_seconds")
    shown = {name: row.get(name, "") for name in kept}
    for pool in ("cls", "mean"):
        blocks = row.get(f"knn_{pool}")
        shown[f"k-NN {pool}"] = f"{blocks[-1]:.1%}" if blocks else ""
        shown[f"best block, {pool}"] = f"{max(blocks):.1%}" if blocks else ""
    for name in ("linear", "five_shot"):
        shown[name.replace("_", "-")] = f"{row[name]:.1%}" if name in row else ""
    return shown
