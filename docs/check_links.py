"""Check a built site: ``python docs/check_links.py runs/site``. Links and images inside it lead
somewhere, every notebook is a page, and nothing is loaded from elsewhere. Nothing is fetched.
"""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """``links``: what the page refers to; ``anchors``: what can be referred to in it."""

    def __init__(self, file: Path):
        super().__init__()
        self.links, self.anchors = [], set()
        self.feed(file.read_text())

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors |= {attrs.get("id"), attrs.get("name")}
        self.links += [attrs[key] for key in ("href", "src") if attrs.get(key)]


def broken_links(site: Path) -> list[str]:
    """ "page: link" for every link in ``site`` that leads to no file or to no anchor."""
    pages = {file.resolve(): Page(file) for file in site.rglob("*.html")}
    broken = []
    for file, page in pages.items():
        if file.name == "404.html":  # its links hold where the site will be served
            continue
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            target = target / "index.html" if target.is_dir() else target
            known = pages.get(target)
            if not target.is_file() or (
                parts.fragment and known and unquote(parts.fragment) not in known.anchors
            ):
                broken.append(f"{file.relative_to(site.resolve())}: {link}")
    return broken


def unrendered(site: Path) -> list[str]:
    """The notebooks that lie in ``site`` as they are and are no page; and what is loaded from
    elsewhere.
    """
    raw = [f"{file.name} is no page" for file in sorted(site.rglob("*.ipynb"))]
    kinds = "(?:js|css|png|svg)"
    loaded = rf"<(?:script|link|img)\b[^>]*(?:src|href)=\"?(https?://[^\"\s>]+\.{kinds}[^\"\s>]*)"
    return raw + [
        f"{file.relative_to(site)} loads {address}"
        for file in sorted(site.rglob("*.html"))
        for address in re.findall(loaded, file.read_text())
    ]


if __name__ == "__main__":
    found = broken_links(Path(sys.argv[1])) + unrendered(Path(sys.argv[1]))
    print("\n".join(found) or "all links lead somewhere, and nothing is loaded from elsewhere")
    sys.exit(bool(found))
