"""``mimrefiner demo``: a table, the advice and a picture, from what the package holds."""

import re
from pathlib import Path

import pandas as pd
import pytest

from mimrefiner.__main__ import main
from mimrefiner.commands import probing
from mimrefiner.study import demo

README = Path(__file__).parent.parent / "README.md"
NUMBER = r"[+-]?\d+\.\d"


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """The folder of a demo, what it said, and what it opened."""
    folder, opened = tmp_path_factory.mktemp("demo"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probing.webbrowser, "open", opened.append)
        patch.setattr("socket.socket.connect", lambda *_: pytest.fail("asked the network"))
        patch.setenv("MIMREFINER_CACHE", str(folder / "empty"))
        said = []
        patch.setattr("builtins.print", lambda *words, **_: said.append(" ".join(words)))
        assert main(["demo", "--out", str(folder / "demo"), "--open"]) == 0
    assert not (folder / "empty").exists()  # nothing was trained, nothing fetched
    return folder / "demo", "\n".join(said), opened


def test_demo_shows_every_block_the_advice_and_a_picture(shown):
    folder, said, opened = shown
    rows = pd.read_csv(folder / "report.csv")
    cls = rows[(rows["model"] == "model") & (rows["pool"] == "cls")].set_index("block")["value"]
    assert len(cls) == 12
    for block, value in cls.items():
        assert re.search(rf"^ +{block + 1} +{100 * value:.1f} %", said, re.M)
    advice = re.search(r"Take block \d+'s (cls token|patch mean): \+(\S+) points", said)
    assert advice and float(advice[2]) > 5  # the packaged model has its peak inside
    picture = folder / "report.png"
    assert f"The picture: {picture}" in said and picture.stat().st_size > 10_000
    assert opened == [picture.as_uri()]


def test_readme_shows_what_the_demo_says(shown):
    """One or two images may be counted otherwise on another processor."""
    ours, theirs = (
        text.partition("The picture")[0]
        for text in (
            re.findall(r"<!-- demo -->\n```\n(.*?)```\n", README.read_text(), re.S)[0],
            shown[1],
        )
    )
    ours, theirs = (text.replace("*", "").replace("|", "") for text in (ours, theirs))
    assert re.sub(NUMBER, "", ours).split() == re.sub(NUMBER, "", theirs).split()
    numbers = [[float(x) for x in re.findall(NUMBER, text)] for text in (ours, theirs)]
    assert len(numbers[0]) > 24 and numbers[0] == pytest.approx(numbers[1], abs=0.6)


def test_accuracies_name_the_baselines():
    rows = pd.DataFrame(
        {
            "model": ["model", "model", "random weights", "raw pixels"],
            "probe": "knn",
            "pool": ["cls", "mean", "cls", "pixels"],
            "block": 0,
            "value": [0.5, 0.25, 0.4, 0.9],
        }
    )
    assert demo.accuracies(rows).splitlines() == [
        "block  cls token  patch mean",
        f"    1     50.0 %      25.0 %  |*{' ' * 24}|",
        "random weights: 40.0 %",
        "raw pixels: 90.0 %",
    ]
