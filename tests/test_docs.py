"""The page of results and the link checker of the documentation site (the site itself is built by
``make docs``).
"""

import importlib.util
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"


def load(name):
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
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


def test_the_picture_of_the_rooms_shows_the_code():
    assert (DOCS / "house.svg").read_text() == load("make_house").draw(), (
        "rooms or modules have changed: python docs/make_house.py"
    )


def test_the_schematic_is_what_its_script_draws():
    assert (DOCS / "schematic.svg").read_text() == load("make_schematic").draw(), (
        "the script has changed: python docs/make_schematic.py"
    )
