"""The notebooks by hand: headless Chromium opens JupyterLab, runs all cells, moves a slider.
Skipped where there is no browser.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from urllib.error import URLError
from urllib.request import urlopen

import nbformat
import pytest

from mimrefiner.batch import runner

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
if BROWSER is None:
    pytest.skip("no chromium is installed", allow_module_level=True)
playwright = pytest.importorskip(
    "playwright.sync_api", reason="needs the extra browser: pip install 'mimrefiner[browser]'"
)

MINUTES = 60_000  # milliseconds


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab over copies of the notebooks with preset smoke; its address."""
    folder = tmp_path_factory.mktemp("lab")
    for source in runner.find_notebooks([]):
        notebook = nbformat.read(source, as_version=4)
        (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
        cell.source += f'\npreset = "smoke"\nout = "{folder}/out"'
        nbformat.write(notebook, folder / source.name)
    settings = folder / "config/lab/user-settings/@jupyterlab/notebook-extension"
    settings.mkdir(parents=True)
    # All cells are laid out, so that a test finds what has been scrolled out of view
    (settings / "tracker.jupyterlab-settings").write_text('{"windowingMode": "none"}')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    options = [
        f"--port={port}",
        "--no-browser",
        "--allow-root",
        "--IdentityProvider.token=",
        f"--ServerApp.root_dir={folder}",
    ]
    variables = {
        **os.environ,
        "MIMREFINER_CACHE": str(folder / "cache"),
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
    }
    # Left by tests that called the command line; a kernel under it counts as one without a reader
    variables.pop("MIMREFINER_PROGRESS", None)
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options], env=variables, stdout=log, stderr=log
        )
        try:
            _wait_for(f"{address}/api")
            yield address
        finally:
            server.terminate()
            server.wait()


@pytest.fixture
def page(tmp_path):
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        yield page
        page.screenshot(path=tmp_path / "last.png")  # to look at
        browser.close()


def _run_all_cells(page, lab, name):
    """Open a notebook and run it; once more where JupyterLab, asked too early, lost the cells."""
    for _ in range(3):
        page.goto(f"{lab}/lab/tree/{name}.ipynb?reset")
        _wait_for(
            f"{lab}/api/kernels",
            lambda kernels: any(
                k["execution_state"] == "idle" and k["connections"] for k in kernels
            ),
        )
        idle = page.get_by_text("Kernel status: Idle").or_(
            page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]")
        )
        idle.first.wait_for(timeout=2 * MINUTES)
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_text("Run All Cells", exact=True).click()
        # Too early, and JupyterLab asks which kernel to take
        select = page.locator(".jp-Dialog button.jp-mod-accept")
        done = page.locator(".jp-InputArea-prompt", has_text=re.compile(r"\[\d+\]"))
        for _ in range(60):
            page.wait_for_timeout(1000)
            if done.count():
                return
            if select.is_visible():
                select.click()
    pytest.fail(f"no cell was run:\n{page.locator('body').inner_text()[-2000:]}")


def _wait_until_done(page):
    """The last cell has said where things are; a failure shows what the page shows."""
    said = page.get_by_text("claims and the figures are in")
    for _ in range(8 * 60):
        if said.count():
            return
        if page.locator("[data-mime-type='application/vnd.jupyter.error']").count():
            break
        page.wait_for_timeout(1000)
    pytest.fail(
        f"the notebook did not come to its end:\n{page.locator('body').inner_text()[-2000:]}"
    )


def test_quickstart_runs_by_hand(page, lab):
    _run_all_cells(page, lab, "00_quickstart")
    _wait_until_done(page)
    # A figure comes after the words
    page.locator(".jp-RenderedImage img").nth(1).wait_for(timeout=MINUTES, state="attached")
    assert page.locator("[data-mime-type='application/vnd.jupyter.error']").count() == 0


def test_moving_the_block_slider_changes_the_picture(page, lab):
    _run_all_cells(page, lab, "07_clusters")
    _wait_until_done(page)
    slider = page.locator(".widget-slider .noUi-handle").first
    try:
        slider.wait_for(timeout=MINUTES)
    except playwright.TimeoutError:
        pytest.fail(f"no slider is shown:\n{page.locator('.jp-Notebook').inner_text()}")
    slider.scroll_into_view_if_needed()
    picture = page.locator(".jp-OutputArea-output:has(.widget-slider) img").first
    picture.wait_for(timeout=MINUTES)
    before = picture.get_attribute("src")
    slider.press("ArrowRight")  # it begins at the left end
    slider.press("ArrowRight")
    shown = "document.querySelector('.jp-OutputArea-output:has(.widget-slider) img')"
    page.wait_for_function(
        f"before => {shown}?.src !== before",
        arg=before,
        timeout=MINUTES,
    )


def _wait_for(address, good=bool, seconds=120):
    deadline = time.monotonic() + seconds
    while True:
        try:
            answer = json.load(urlopen(address))
            if good(answer):
                return
        except URLError:
            pass
        assert time.monotonic() < deadline, f"JupyterLab did not start: {address}"
        time.sleep(0.3)
