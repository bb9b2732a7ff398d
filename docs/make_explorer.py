"""Write the explorer that the site shows, and its picture: ``python docs/make_explorer.py``.

It takes the packaged model and digits, and needs the extra ``browser`` and a chromium. Another one,
such as of two encoders, takes its place by ``python docs/make_explorer.py FILE.html``.
"""

import io
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from mimrefiner.__main__ import main as mimrefiner

PAGE = Path(__file__).with_name("explorer.html")
PICTURE = PAGE.with_suffix(".png")
SIZE = {"width": 1280, "height": 860}


def picture(page: Path, block: int | None = None) -> Image.Image:
    """What a browser shows of an explorer, at ``block`` (from 1) or where it begins."""
    browser_file = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))))
    address = page.as_uri() + (f"#block={block}" if block else "")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=browser_file, args=["--no-sandbox"])
        shown = browser.new_page(viewport=SIZE, color_scheme="light")
        shown.goto(address)
        shown.wait_for_selector("body[data-ready]")
        shown.wait_for_timeout(1000)  # points are on their way
        pixels = shown.screenshot()
        browser.close()
    return Image.open(io.BytesIO(pixels)).convert("RGB")


def main(arguments: Sequence[str]) -> None:
    """Write the page, or copy the one that is given, and take its picture."""
    if arguments:
        shutil.copyfile(arguments[0], PAGE)
    else:
        mimrefiner(["explore", "simmim_digits", "digits", "--out", str(PAGE)])
    small = picture(PAGE).resize((800, round(800 * SIZE["height"] / SIZE["width"])))
    # Few colours: a quarter of the bytes
    small.quantize(128).save(PICTURE, optimize=True)
    print(f"{PAGE.name} and {PICTURE.name} are written")


if __name__ == "__main__":
    main(sys.argv[1:])
