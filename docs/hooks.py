"""The site shows the project's own notebooks (the executed copy where one was made of this source,
else the source) and the pages of the root.
"""

import json
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
PAGES = {
    "REPRODUCING.md": "reproducing.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}


def same_text(*notebooks):
    """Whether the notebooks have the same prose, and so belong together."""
    cells = [json.loads(notebook.read_text())["cells"] for notebook in notebooks]
    one, other = (["".join(c["source"]) for c in x if c["cell_type"] == "markdown"] for x in cells)
    return one == other


def on_files(files, config):
    for source in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        executed = source.parent / "executed" / source.name
        shown = executed if executed.is_file() and same_text(source, executed) else source
        files.append(File.generated(config, f"notebooks/{source.name}", abs_src_path=str(shown)))
    for name, page in PAGES.items():
        text = (ROOT / name).read_text().replace("](docs/", "](")
        # Not part of the site
        text = re.sub(r"\[([^\]]+)\]\((?:figures|mimrefiner|tests|examples)[^)]*\)", r"\1", text)
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """Pages in ``docs/`` link to the notebooks' place in the repository; on the site they lie among
    the pages.
    """
    return markdown.replace("](../notebooks/", "](notebooks/")


def on_post_page(output, page, config):
    """Links between notebooks lead to pages of the site; mkdocs-jupyter leaves them as they are."""
    if not page.file.src_uri.startswith("notebooks/"):
        return output
    return re.sub(
        r'href="(?!https?:)([^"#]*/)?(\d\d_\w+)\.ipynb(#[^"]*)?"', r'href="../\2/\3"', output
    )
