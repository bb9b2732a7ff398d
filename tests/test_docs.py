"""The pages and pictures that scripts write, and the link checker of the documentation site (the
site itself is built by ``make docs``).
"""

import csv
import importlib.util
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pandas as pd
import pytest

import mimrefiner as mr
from mimrefiner.method.refiner import MIMRefiner
from mimrefiner.study.claims import ROW_COLUMNS, claims_table
from mimrefiner.study.tables import markdown_table

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(autouse=True)
def _scripts_find_each_other(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)


def load(name):
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_the_page_of_results_shows_the_measured_tables():
    assert (DOCS / "results.md").read_text() == load("make_results").page()


def test_broken_links_are_found(tmp_path):
    check_links = load("check_links")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "index.html").write_text(
        '<h1 id="top">A</h1><a href="../b.html#here">b</a><a href="https://x.org/y">x</a>'
    )
    (tmp_path / "b.html").write_text('<p id="here"></p><a href="a/#top">a</a><a href="#here">h</a>')
    assert check_links.broken_links(tmp_path) == []
    (tmp_path / "b.html").write_text('<a href="a/#gone">a</a><img src="c.png">')
    assert sorted(check_links.broken_links(tmp_path)) == [
        "a/index.html: ../b.html#here",
        "b.html: a/#gone",
        "b.html: c.png",
    ]


def test_a_raw_notebook_and_a_script_from_elsewhere_are_found(tmp_path):
    check_links = load("check_links")
    (tmp_path / "a.html").write_text('<a href="https://x.org/y.js">y</a><script>own()</script>')
    assert check_links.unrendered(tmp_path) == []
    (tmp_path / "00.ipynb").write_text("{}")
    (tmp_path / "b.html").write_text('<script src="https://cdn.x/a.min.js"></script>')
    assert check_links.unrendered(tmp_path) == [
        "00.ipynb is no page",
        "b.html loads https://cdn.x/a.min.js",
    ]


def test_the_picture_of_the_rooms_shows_the_code():
    assert (DOCS / "house.svg").read_text() == load("make_house").draw(), (
        "rooms or modules have changed: python docs/make_house.py"
    )


def test_the_schematic_is_what_its_script_draws():
    assert (DOCS / "schematic.svg").read_text() == load("make_schematic").draw(), (
        "the script has changed: python docs/make_schematic.py"
    )


def test_the_forest_plot_and_readme_show_the_claims():
    forest, readme = load("make_forest"), load("make_readme")
    claims = forest.read_claims()
    assert forest.missing(claims) == [], "claims were renamed: docs/make_forest.py"
    assert (DOCS / "forest.svg").read_text() == forest.draw(claims), "python docs/make_forest.py"
    text = (ROOT / "README.md").read_text()
    assert text == readme.filled(text), "python docs/make_readme.py"
    assert " nan " not in text
    asked = {question.asked: question.rows for question in load("make_results").ANSWERS}
    assert forest.missing(claims, asked) == [], "claims were renamed: docs/make_results.py"
    with pytest.raises(ValueError, match="0 places for result"):
        readme.filled("no marks")


def claim(text, difference, low, high, verdict, by_seed="", **about):
    known = {"claim": text, "dataset": "digits", "model": "", "pool": "", "n_seeds": "3"}
    known["study"] = ""
    numbers = {"difference": difference, "low": low, "high": high, "by_seed": by_seed}
    return {**known, **numbers, "n_test": "539", "verdict": verdict, **about}


LIFTS = claim("refinement lifts the last block", "5.0", "1.0", "9.0", "seen", "4.0 6.0")
ONE_SEED = claim("refinement lifts the last block", "7.0", "6.0", "8.0", "seen", n_seeds="1")
FASHION = claim("refinement lifts the last block (Fashion)", "-2.0", "-3.0", "-1.0", "opposite") | {
    "dataset": "fashion_mnist"
}


def test_the_forest_plot_draws_interval_seeds_and_verdict():
    forest, claims = load("make_forest"), [ONE_SEED, LIFTS, FASHION]
    assert [found.claim for found in forest.find(claims)] == [LIFTS, FASHION]
    svg = ElementTree.fromstring(forest.draw(claims))
    thick = [line for line in svg.iter(f"{SVG}line") if line.get("stroke-width") == "3"]
    drawn = [(float(x.get("x1")), float(x.get("x2")), x.get("stroke")) for x in thick]
    colours = forest.COLOURS["seen"], forest.COLOURS["opposite"]
    ends = [(1.0, 9.0, colours[0]), (-3.0, -1.0, colours[1])]
    assert drawn == [
        (round(forest.place(low), 1), round(forest.place(high), 1), ink) for low, high, ink in ends
    ]
    seeds = [float(c.get("cx")) for c in svg.iter(f"{SVG}circle") if c.get("r") == "2.6"]
    assert seeds == [round(forest.place(x), 1) for x in (4.0, 6.0)]
    words = " ".join(text.text for text in svg.iter(f"{SVG}text"))
    assert "+5.0  [+1.0, +9.0]" in words and "−2.0  [−3.0, −1.0]" in words


def test_a_study_of_its_own_comes_first_where_it_is_there(tmp_path):
    forest = load("make_forest")
    folders = tmp_path / "figures", tmp_path / "experiments"
    for folder, name, rows in zip(
        folders,
        ("claims.csv", "evidence_real_claims.csv"),
        ([LIFTS], [LIFTS | {"dataset": "cifar10", "model": "ViT-S/14", "pool": "cls"}]),
        strict=True,
    ):
        folder.mkdir()
        pd.DataFrame(rows).drop(columns="study").to_csv(folder / name, index=False)
    claims = forest.read_claims(tmp_path)
    assert [found.row.label for found in forest.find(claims)] == [
        "CIFAR-10 (a real ViT-S/14)",
        "digits",
    ]
    lacking = " ".join(forest.missing(claims))
    waits = forest.Row("CIFAR-10", forest.LONGER, forest.REAL, pending=True)
    longer = LIFTS | {"claim": forest.LONGER, "study": "real", "dataset": "cifar10", "pool": "cls"}
    assert forest.missing(claims, {"more?": (waits,)}) == []
    assert forest.missing([*claims, longer], {"more?": (waits,)}) == ["more? CIFAR-10"]
    assert forest.full_answer(claims, (waits,)) == "Not measured yet: CIFAR-10."
    assert "a real ViT-S/14" in lacking and "our MAE" not in lacking


def test_the_sentences_follow_the_verdicts():
    forest, claims = load("make_forest"), [LIFTS, FASHION]
    assert forest.sentences(claims) == [
        "**Does refinement lift the last block?** Yes: digits +5.0; the opposite: "
        "Fashion-MNIST −2.0."
    ]
    assert forest.summary(claims) == (
        "Refinement lifts the last block in 1 of 2 settings, most of all on digits, by 5.0 points "
        "of k-NN accuracy; it beats the same computation spent on more pre-training in 0 of 0."
    )
    unseen = LIFTS | {"verdict": "not seen"}
    assert forest.sentences([unseen]) == [
        "**Does refinement lift the last block?** No effect is seen: digits +5.0."
    ]


def test_the_scale_of_the_forest_plot_keeps_order():
    place = load("make_forest").place
    at = [place(x) for x in (-99, -25, -10, -2, -1, 0, 1, 2, 10, 45, 99)]
    assert at == sorted(at)
    assert at[0] == at[1] == 290 and at[-1] == at[-2] == 690
    assert at[6] - at[5] == pytest.approx(at[5] - at[4]) == pytest.approx(at[7] - at[6])


def test_the_hero_shows_its_numbers():
    hero = load("make_hero")
    assert (DOCS / "hero.svg").read_text() == hero.draw(hero.read()), "python docs/make_hero.py"


def trial_rows(folder, model, seed, values, pool="cls"):
    """A file as ``experiments/trials.py`` writes it, with rows that the picture must leave out."""
    folder.mkdir(parents=True, exist_ok=True)
    common = {
        "preset": "real-encoder",
        "dataset": "cifar10",
        "n_test": 10000,
        "model": model,
        "seed": seed,
        "pool": pool,
    }
    common |= {"protocol": "knn_k10_t0.07_standardized", "metric": "accuracy"}
    rows = [{**common, "block": block, "value": value} for block, value in enumerate(values)]
    rows += [{**rows[0], "value": 0.01, "dataset": "fruit64"}]
    rows += [{**rows[0], "value": 0.02, "protocol": "linear_10epochs"}]
    rows += [{**rows[0], "value": 0.03, "pool": "mean"}]
    with (folder / f"{model.replace(' ', '_')}-{seed}.csv").open("w", newline="") as stream:
        table = csv.DictWriter(stream, ROW_COLUMNS, restval="")
        table.writeheader()
        table.writerows(rows)


@pytest.fixture
def trials(tmp_path):
    """A folder of rows as the study of an encoder leaves it."""
    rows = tmp_path / "rows"
    trial_rows(rows, "before", 0, [0.40, 0.70, 0.60])
    trial_rows(rows, "raw pixels", 0, [0.31], pool="pixels")
    trial_rows(rows, "masked", 0, [0.40, 0.71, 0.62])
    trial_rows(rows, "one head", 0, [0.40, 0.71, 0.99])
    trial_rows(rows, "refined", 0, [0.40, 0.70, 0.74])
    trial_rows(rows, "refined", 1, [0.40, 0.72, 0.78])
    (rows / "choice.csv").write_text("trial,block,value\nrefined,0,0.5\n")
    return tmp_path


def test_the_hero_takes_the_rows_of_trials(trials, tmp_path):
    hero = load("make_hero")
    points = hero.from_trials(trials)
    assert hero.mean_line(points, "refined") == pytest.approx([40, 71, 76])
    assert hero.finding(points) == (
        "On CIFAR-10, refinement takes the last block of a ViT-S/14 that had been trained to find "
        "salient regions from 60.0 to 76.0 % k-NN accuracy (2 seeds); the best block before was "
        "block 2 of 3 with 70.0 %, and the same compute spent on more masking gives 62.0 % "
        "(1 seed)."
    )
    without = hero.finding([point for point in points if point.model != "same compute"])
    assert without.endswith(
        "70.0 %. What the same compute gives if it is spent on more masking is not measured."
    )
    hero.write(points, tmp_path / "hero.csv")
    assert hero.read(tmp_path / "hero.csv") == points
    table = pd.concat(pd.read_csv(file) for file in sorted((trials / "rows").glob("*-*.csv")))
    table.to_csv(tmp_path / "evidence_real.csv", index=False)
    assert hero.from_trials(tmp_path / "evidence_real.csv") == points
    for file in (trials / "rows").glob("refined-*.csv"):
        file.unlink()
    with pytest.raises(SystemExit, match="has no rows of the model refined"):
        hero.from_trials(trials)


def test_the_hero_draws_lines_and_names(trials):
    hero = load("make_hero")
    svg = ElementTree.fromstring(hero.draw(hero.from_trials(trials)))
    words = [text.text for text in svg.iter(f"{SVG}text")]
    for expected in ("CIFAR-10: last block 60.0 → 76.0 %", "raw pixels 31.0", "same compute 62.0"):
        assert expected in words
    lines = [x for x in svg.iter(f"{SVG}polyline") if x.get("stroke") == hero.COLOURS["refined"]]
    (mean,) = [line for line in lines if line.get("stroke-width") == "2.6"]
    assert len(lines) == 3  # two seeds and their mean
    heights = [float(xy.split(",")[1]) for xy in mean.get("points").split()]
    assert len(heights) == 3 and heights == sorted(heights, reverse=True)  # up is better


def test_lists_of_claims_agree_and_show_the_interval_that_decides():
    """Six claims once showed an interval without zero beside the bare verdict "not seen"."""
    claims = pd.read_csv(ROOT / "figures" / "claims.csv")
    assert (ROOT / "figures" / "claims.md").read_text() == markdown_table(claims_table(claims))
    assert (claims["low"] >= 0)[claims["verdict"] == "seen"].all()
    assert (claims["high"] <= 0)[claims["verdict"] == "opposite"].all()
    shown, unsure = claims_table(claims)["verdict"], (claims["low"] > 0) | (claims["high"] < 0)
    few = shown[unsure & (claims["verdict"] == "not seen")]
    assert (few == "not seen: not in every seed").all()


@pytest.fixture
def hooks():
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    pytest.importorskip("latex2mathml", reason="needs the extra docs")
    return load("hooks")


def test_the_home_page_is_the_first_screen_of_readme(hooks):
    text = hooks.home((ROOT / "README.md").read_text())
    assert text.startswith("# mimrefiner") and "mimrefiner probe MODEL DATA" in text
    assert "](hero.svg)" in text and "](forest.svg)" in text and "](reproducing.md)" in text
    assert "<!--" not in text and "](mimrefiner/" not in text and "## Lessons" not in text


def test_math_needs_no_network_and_leaves_code_alone(hooks):
    page = r"<p>It costs $5, and $z_i^{\top} p$ &lt; 1.</p><pre>a $x$ b</pre><p>$$\frac{a}{b}$$</p>"
    drawn = hooks.in_words(page)
    assert drawn.count("<math") == 2 and 'display="block"' in drawn and "<mfrac>" in drawn
    assert "<pre>a $x$ b</pre>" in drawn and "It costs $5" in drawn
    assert "arg" in hooks.math(r"$\arg\max_q q$") and "\\" not in hooks.math(r"$\arg\max_q q$")
    with pytest.raises(ValueError, match="cannot be drawn as MathML"):
        hooks.math(r"$\nosuchthing x$")
    scripts = '<script src="https://cdn.x/a.js"></script><script>own()</script>'
    assert hooks.CDN.sub("", scripts) == "<script>own()</script>"


def test_colab_is_offered_where_it_can_work(hooks):
    line = hooks.colab("https://github.com/some/one.git", "00_quickstart.ipynb")
    assert "colab.research.google.com/github/some/one/blob/main/notebooks/00_quickstart" in line
    assert "pip install git+https://github.com/some/one<" in line
    assert hooks.colab("https://example.org/a/b", "x.ipynb") == hooks.colab(None, "x.ipynb") == ""


def test_the_example_of_readme_fits_the_encoder_that_it_names(monkeypatch):
    """It once took a recipe for patches of 4 px, which a ViT of patches of 16 px refuses."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    load_encoder, load_dataset, refined = mr.load_encoder, mr.load_dataset, []

    def refine(encoder, dataset, config):
        refined.append(MIMRefiner(encoder, config))
        return SimpleNamespace(ema_encoder=encoder)

    def small(name, **_):
        assert name == "vit_base_patch16_224.mae"
        return load_encoder("vit_tiny_patch16_224", pretrained=False)  # as deep, and patches of 16

    def some(name, split):
        assert name == "imagefolder:PATH"
        return load_dataset("fruit64", split=split).take(10)

    monkeypatch.setattr(mr, "load_encoder", small)
    monkeypatch.setattr(mr, "load_dataset", some)
    monkeypatch.setattr(mr, "refine", refine)
    exec(code, {})
    assert refined[0].config.resolve_blocks(12) == (8, 9, 10, 11)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "REPRODUCING.md"])
def test_links_of_root_pages_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text())
    here = [link for link in links if not link.startswith("http")]
    assert here and [link for link in here if not (ROOT / link).exists()] == []
