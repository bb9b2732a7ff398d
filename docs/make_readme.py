"""Write what README takes from elsewhere, between its marks: ``python docs/make_readme.py``.

``<!-- result -->`` is the sentence under the first picture, ``<!-- measured -->`` the answers to
the forest plot's questions, ``<!-- lessons -->`` the notebooks' own titles. Every number comes from
the committed tables. ``<!-- demo -->`` alone is filled by hand, from ``mimrefiner demo``, and
compared by a test.
"""

import json
import re
from pathlib import Path

import make_forest
import make_hero
import pandas as pd

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
EVIDENCE = ROOT / "experiments" / "evidence_real.csv"


def parts() -> dict[str, str]:
    """The name of a place in README -> its Markdown."""
    claims = make_forest.read_claims()
    return {
        "result": " ".join(
            [make_hero.finding(make_hero.read()), beyond(claims), few_labels(EVIDENCE)]
        ),
        "measured": "\n\n".join([make_forest.summary(claims), *make_forest.sentences(claims)]),
        "lessons": lessons(ROOT / "notebooks"),
    }


def beyond(claims: list[dict[str, str]]) -> str:
    """Whether the real encoder's last block gets above its best block before; "" where unknown."""
    best = make_forest.Row("", "the refined last block beats the best block", make_forest.REAL)
    found = make_forest.find(claims, {"": (best,)})
    if not found:
        return ""
    mean, low, high = map(make_forest.points, map(found[0].number, ("difference", "low", "high")))
    words = "is" if found[0].verdict == "seen" else "is not shown to be"
    gain = f"{mean} points, 95 % interval {low} to {high}"
    return f"The refined last block {words} better than the best block before ({gain})."


def few_labels(file: Path) -> str:
    """What refinement changes where labels are few, as a sentence; "" where it is not measured."""
    if not file.is_file():
        return ""
    rows = pd.read_csv(file)
    rows = rows[(rows["dataset"] == "cifar10") & (rows["pool"] == "cls")]
    rows = rows[rows["protocol"] == "logistic_1shot"]
    means = 100 * rows.pivot_table("value", "block", "model")
    first, last = means["before"].first_valid_index(), means.iloc[-1]  # best before, and last
    return (
        f"With one labelled image of each class the last block goes from {last['before']:.1f} to "
        f"{last['refined']:.1f} % (block {first + 1} before: {means.loc[first, 'before']:.1f} %)."
    )


def lessons(folder: Path) -> str:
    """The notebooks by number, with the title that each gives itself."""
    lines = []
    for file in sorted(folder.glob("[0-9][0-9]_*.ipynb")):
        source = json.loads(file.read_text(encoding="utf-8"))["cells"][0]["source"]
        number, _, title = "".join(source).splitlines()[0].lstrip("# ").partition(" · ")
        lines.append(f"- [{number}](notebooks/{file.name}) {title}")
    return "\n".join(lines)


def filled(readme: str) -> str:
    """README with the parts between their marks.

    Raises:
        ValueError: a part has no marks, or more than one pair.
    """
    for name, text in parts().items():
        between = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
        readme, n = between.subn(lambda marks, text=text: f"{marks[1]}{text}\n{marks[2]}", readme)
        if n != 1:
            raise ValueError(f"README has {n} places for {name}, expected one")
    return readme


if __name__ == "__main__":
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"{README.name} is up to date")
