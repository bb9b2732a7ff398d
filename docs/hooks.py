"""The site shows README's first screen, the project's own notebooks (the executed copy where there
is one, else the source) and the pages of the root; nothing on it is loaded from elsewhere.
"""

import base64
import html
import json
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File
from mkdocs_jupyter.plugin import NotebookFile

ROOT = Path(__file__).parent.parent
PAGES = {
    "REPRODUCING.md": "reproducing.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
LEAVES_OUT = ("figures", "mimrefiner", "tests", "examples", "experiments", "LICENSE", "CITATION")
HOME_ENDS = "## Your own encoder"  # the home page has README down to this heading
CDN = re.compile(r"<script[^>]*?(?:src=\"https?://[^>]*>.*?|type=\"module\".*?)</script>", re.S)
MATH = re.compile(r"\$\$(.+?)\$\$|(?<![\\$])\$(?!\s)([^$\n]+?)(?<!\s)\$(?!\d)", re.S)


def notebooks() -> list[Path]:
    """The sources of the lessons, in order."""
    return sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def shown(source: Path) -> Path:
    """The executed copy of a lesson where it was made of this source, else the source."""
    executed = source.parent / "executed" / source.name
    return executed if executed.is_file() and prose(executed) == prose(source) else source


def prose(notebook: Path) -> list[str]:
    """The text of a notebook, in which copies in ``executed/`` lead one folder further up."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    text = ("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    return [words.replace("](../../", "](../") for words in text]


def on_config(config):
    """The lessons stand in the menu as they are numbered, and a page that no one put there is a
    guide.
    """
    lessons = [f"notebooks/{source.name}" for source in notebooks()]
    config.nav.insert(1, {"Lessons": lessons})
    (guides,) = (part["Guides"] for part in config.nav if "Guides" in part)
    named = json.dumps(config.nav)
    guides += sorted(p.name for p in (ROOT / "docs").glob("*.md") if f'"{p.name}"' not in named)
    return config


def notebook_page(config, path: str, file: Path) -> NotebookFile:
    """A notebook as mkdocs-jupyter makes a page of it, wherever its file lies."""
    page = NotebookFile(File.generated(config, path, abs_src_path=str(file)), **config)
    page.abs_src_path = str(file)  # else it would be sought in docs/
    return page


def on_files(files, config):
    for source in notebooks():
        files.append(notebook_page(config, f"notebooks/{source.name}", shown(source)))
        if picture := first_picture(shown(source)) or published_picture(source):
            files.append(File.generated(config, f"cards/{source.stem}.png", content=picture))
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=of_site((ROOT / name).read_text())))
    return files


def of_site(text: str) -> str:
    """A page of the root as a page of the site: links as they are there, or none."""
    text = text.replace("](docs/", "](")
    for name, page in PAGES.items():
        text = text.replace(f"]({name}", f"]({page}")
    left_out = "|".join(LEAVES_OUT)
    return re.sub(rf"\[([^\]]+)\]\((?:{left_out}|notebooks/executed)[^)]*\)", r"\1", text)


def first_picture(notebook: Path) -> bytes | None:
    """The first picture among the outputs of a notebook; None where there is none."""
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        for output in cell.get("outputs", ()):
            if "image/png" in output.get("data", {}):
                return base64.b64decode("".join(output["data"]["image/png"]))
    return None


def published_picture(source: Path) -> bytes | None:
    """The first published figure of a lesson; None where there is none."""
    pictures = sorted((ROOT / "figures").glob(f"{source.name[:2]}_*.png"))
    return pictures[0].read_bytes() if pictures else None


def home(readme: str) -> str:
    """README's first screens."""
    above = readme.partition(HOME_ENDS)[0]
    return of_site(re.sub(r"<!-- .*? -->\n", "", above))


def cards(files) -> str:
    """The lessons as cards: picture and title."""
    there, parts = {file.src_uri for file in files}, []
    for source in notebooks():
        heading = json.loads(source.read_text(encoding="utf-8"))["cells"][0]["source"]
        number, _, title = "".join(heading).splitlines()[0].lstrip("# ").partition(" · ")
        link, picture = f"notebooks/{source.name}", f"cards/{source.stem}.png"
        drawn = f"[![{title}]({picture})]({link})\n\n    " if picture in there else ""
        parts.append(f"-   {drawn}**{number}** [{title}]({link})")
    return '<div class="grid cards" markdown>\n\n' + "\n\n".join(parts) + "\n\n</div>\n"


def on_page_markdown(markdown, page, config, files):
    """Pages in ``docs/`` link to the notebooks' place in the repository; on the site they lie among
    the pages.
    """
    if page.file.src_uri == "index.md":
        readme = home((ROOT / "README.md").read_text(encoding="utf-8"))
        markdown = markdown.replace("<!-- README -->", readme).replace(
            "<!-- lessons -->", cards(files)
        )
    return markdown.replace("](../notebooks/", "](notebooks/")


def math(text: str) -> str:
    """LaTeX between dollars as MathML, which browsers draw by themselves.

    Raises:
        ValueError: a command that the converter does not know.

    >>> math("no dollars")
    'no dollars'
    """

    def drawn(found) -> str:
        block, inline = found.groups()
        source = re.sub(r"\\arg\b", r"\\operatorname{arg}", html.unescape(block or inline))
        tree = convert(source, display="block" if block else "inline")
        if "\\" in tree:
            raise ValueError(f"this LaTeX cannot be drawn as MathML: {source}")
        return tree

    return MATH.sub(drawn, text)


def in_words(page: str) -> str:
    """:func:`math` on the paragraphs, lists and tables of a page, not on its code."""
    code = re.compile(r"(<(pre|code|script|style|clipboard-copy)\b.*?</\2>)", re.S)
    parts, at = [], 0
    for found in code.finditer(page):
        parts += [math(page[at : found.start()]), found[0]]
        at = found.end()
    return "".join([*parts, math(page[at:])])


def colab(repo_url: str, name: str) -> str:
    """A line that opens a notebook in Colab; "" where the repository is not on GitHub."""
    found = re.match(r"https://github\.com/([\w.-]+/[\w.-]+?)(?:\.git|/)?$", repo_url or "")
    if not found:
        return ""
    link = f"https://colab.research.google.com/github/{found[1]}/blob/main/notebooks/{name}"
    install = f"<code>%pip install git+https://github.com/{found[1]}</code>"
    return f'<p class="colab"><a href="{link}">Open in Colab</a>; its first cell: {install}</p>'


def on_post_page(output, page, config):
    """Notebooks: links between them lead to pages of the site, math is drawn without a network."""
    if not page.file.src_uri.startswith("notebooks/"):
        return output
    output = CDN.sub("", output)
    before, wrapper, inside = output.partition('<div class="jupyter-wrapper">')
    line = colab(config.repo_url, Path(page.file.src_uri).name)
    output = before + line + wrapper + in_words(inside)
    output = re.sub(r'href="(?:\.\./)+docs/(\w+)\.md(#[^"]*)?"', r'href="../../\1/\2"', output)
    output = re.sub(r'src="(?:\.\./)+docs/(\w+\.(?:svg|gif|png))"', r'src="../../\1"', output)
    for name, there in PAGES.items():
        page_of = f'href="../../{Path(there).stem}/"'
        output = re.sub(rf'href="(?:\.\./)+{re.escape(name)}"', page_of, output)
    return re.sub(
        r'href="(?!https?:)([^"#]*/)?(\d\d_\w+)\.ipynb(#[^"]*)?"', r'href="../\2/\3"', output
    )
