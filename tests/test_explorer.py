"""The explorer: what the page holds, and the page by hand in headless Chromium."""

import base64
import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import mimrefiner as mr
from mimrefiner.study import explorer
from mimrefiner.study.explorer import Settings

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
EVIL = (
    "</script><script>document.title='evil'</script><img src=x onerror=\"document.title='evil'\">"
)


class Pictures(torch.utils.data.Dataset):
    """Noisy images whose class shows as their brightness."""

    def __init__(self, n, seed, classes=("dark", "grey", EVIL), labelled=True):
        rng = np.random.default_rng(seed)
        y = np.arange(n) % len(classes)
        noise = rng.integers(0, 90, (n, 32, 32, 3))
        self.pixels = (noise + 70 * y[:, None, None, None]).astype(np.uint8)
        self.labels, self.classes = (y if labelled else None), list(classes)

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, i):
        return Image.fromarray(self.pixels[i]), -1 if self.labels is None else int(self.labels[i])


def content(text: str) -> dict:
    """What the script of a page reads, as JSON.parse reads it."""
    (inside,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    return json.loads(inside)


def unpacked(text: str, *shape: int) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<i2").reshape(shape)


def other_vit(seed=1):
    return mr.build_vit(mr.ViTConfig(dim=32, depth=3, num_heads=2), seed=seed)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A page of two encoders on 45 images; its file and what it was made from."""
    out = tmp_path_factory.mktemp("explorer") / "new" / "explorer.html"
    data, encoders = (Pictures(60, 0), Pictures(45, 1)), (other_vit(1), other_vit(2))
    explorer.write(out, data, *encoders, Settings(map="pca", images=30))
    return out, data, encoders


def test_page_holds_what_was_measured(written):
    out, data, encoders = written
    page = content(out.read_text(encoding="utf-8"))
    labels = unpacked(page["labels"], 30)
    assert np.bincount(labels).tolist() == [10, 10, 10]
    assert page["classes"] == ["dark", "grey", EVIL]
    assert (page["voters"], page["tested"], page["k"]) == (60, 45, 10)
    assert [model["name"] for model in page["models"]] == [
        "VisionTransformer before",
        "VisionTransformer after",
    ]
    for encoder, model in zip(encoders, page["models"], strict=True):
        train, test = (mr.extract_features(encoder, part, pools=("cls",)) for part in data)
        shares = mr.knn_hits(train, test)["cls"].float().mean(1)
        assert model["accuracy"] == pytest.approx((100 * shares).tolist(), abs=1e-3)
        places = unpacked(model["places"], 3, 30, 2)
        assert np.abs(places).max() == 32767
    pixels = [mr.pixel_features(part, 32) for part in data]
    assert page["pixels"] == pytest.approx(100 * mr.knn_hits(*pixels)["pixels"].float().mean())
    assert all(unpacked(model["hits"], 3, 30).max() == 1 for model in page["models"])


def test_title_states_the_finding(written):
    text = written[0].read_text(encoding="utf-8")
    before, after = (model["accuracy"][-1] for model in content(text)["models"])
    title = f"Last block: {before:.1f} → {after:.1f}\u00a0% k-NN accuracy"
    assert f"<title>{title}</title>" in text and f"<h1>{title}</h1>" in text


def test_one_encoder_is_told_by_its_peak():
    nothing = np.zeros((3, 4, 2))
    last_best = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]], bool)
    title, subtitle = explorer.finding([explorer.Side("m", last_best, nothing, nothing)], "digits")
    assert title == "k-NN accuracy is highest after the last block: 75.0 %"
    assert subtitle == "m on 4 test images of digits."


def test_neighbours_in_the_page_equal_a_naive_search(written):
    out, data, encoders = written
    page = content(out.read_text(encoding="utf-8"))
    rows = explorer.stratified_split(data[1].labels, 45, 30, 0)[0]
    for encoder, model in zip(encoders, page["models"], strict=True):
        train, test = (
            mr.extract_features(encoder, part, pools=("cls",)).x["cls"].double() for part in data
        )
        found = unpacked(model["neighbours"], 3, 30, 8)
        for block in range(3):
            mean, std = train[block].mean(0), train[block].std(0) + 1e-6
            x = (test[block][rows] - mean) / std
            for i in range(30):
                cosine = [
                    float(x[i] @ x[j] / x[i].norm() / x[j].norm()) if i != j else -2
                    for j in range(30)
                ]
                assert [cosine[j] for j in found[block, i]] == pytest.approx(
                    sorted(cosine, reverse=True)[:8], abs=1e-5
                )
                assert i not in found[block, i] and len(set(found[block, i])) == 8


def test_names_cannot_leave_their_place(written):
    text = written[0].read_text(encoding="utf-8")
    assert EVIL not in text and "<img" not in text
    assert text.count("</script>") == 2  # the data and the page's own
    near = np.zeros((1, 9, 8), int)
    sides = [explorer.Side(EVIL, np.ones((1, 9), bool), near, np.zeros((1, 9, 2)))]
    images = [Image.new("RGB", (8, 8))] * 9
    facts = {"data": EVIL}
    named = explorer.page(sides, images, np.arange(9) % 2, [EVIL, EVIL], np.arange(9), facts)
    assert EVIL not in named and "&lt;/script&gt;" in named


def test_same_seed_same_bytes(written, tmp_path):
    out, data, encoders = written
    again = explorer.write(tmp_path / "again.html", data, *encoders, Settings(map="pca", images=30))
    assert again.read_bytes() == out.read_bytes()
    other = explorer.write(
        tmp_path / "other.html", data, *encoders, Settings(map="pca", images=30, seed=1)
    )
    assert other.read_bytes() != out.read_bytes()


def test_a_full_page_stays_under_its_limit_and_loads_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 255, (96, 80, 3), dtype=np.uint8) for _ in range(50)]
    images = [Image.fromarray(noise[i % 50]) for i in range(explorer.MOST)]
    n, blocks = len(images), 24
    near, xy = rng.integers(0, n, (blocks, n, 8)), rng.uniform(-1, 1, (blocks, n, 2))
    sides = [explorer.Side(name, rng.random((blocks, n)) < 0.5, near, xy) for name in ("a", "b")]
    given = (sides, images, np.arange(n) % 200, None, np.arange(n), {"data": "noise"})
    text = explorer.page(*given)
    page = content(text)
    assert 4e6 < len(text.encode()) <= explorer.LIMIT == 8_000_000
    looks = {tuple(look) for look in page["looks"]}
    assert len(page["classes"]) == 200 and len(looks) == 56  # colours and shapes begin again
    template = (explorer.ASSETS / "explorer.html").read_text(encoding="utf-8")
    loads = r"https?:|//\w|url\(|@import|fetch\(|XMLHttp|<link(?! rel=.icon. href=.data:)"
    assert not re.findall(loads, template)
    monkeypatch.setattr(explorer, "LIMIT", len(text.encode()) - 1)
    assert content(explorer.page(*given))["sprite"]["side"] < page["sprite"]["side"] == 64
    monkeypatch.setattr(explorer, "LIMIT", 2**20)
    with pytest.raises(mr.InputError, match="show fewer images than 1,500 with --images"):
        explorer.page(*given)


def test_classes_take_colours_like_their_images():
    images = [Image.new("RGB", (16, 16), c) for c in ("#e76300", "#a6d854", "#bd1f01")]
    colours = [colour for colour, _ in explorer.looks(images, np.arange(3))]
    palette = list(explorer.COLOURS[:3])
    assert sorted(colours) == sorted(palette)
    assert colours[2] == "#bd1f01"
    grey = [Image.new("RGB", (16, 16), (v, v, v)) for v in (250, 120, 10)]
    assert [colour for colour, _ in explorer.looks(grey, np.arange(3))] == palette


def test_maps_are_turned_towards_each_other():
    rng = np.random.default_rng(0)
    first = rng.normal(size=(50, 2))
    angle = 2.1
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    mirror = np.diag([1.0, -1.0])
    maps = np.stack([first, 3 * first @ turn + 5, first @ mirror])
    placed = explorer.aligned(maps)
    assert np.abs(placed).max() == pytest.approx(1)
    np.testing.assert_allclose(placed[1], placed[0], atol=1e-9)
    np.testing.assert_allclose(placed[2], placed[0], atol=1e-9)
    beside = explorer.aligned(np.stack([first @ turn]), placed[:1])
    np.testing.assert_allclose(beside, placed[:1], atol=1e-9)


def test_first_image_is_a_typical_one():
    label = np.array([0, 0, 0, 1, 1, 1])
    near = np.array([[1, 2], [3, 4], [0, 3], [4, 5], [3, 5], [0, 1]])[None]  # right: 2 0 1 2 2 0
    side = explorer.Side("m", np.ones((1, 6), bool), near, np.zeros((1, 6, 2)))
    assert explorer.typical([side], label) == 2  # 1 right; the mean is 7/6


def test_umap_draws_where_there_are_enough_images(tmp_path, monkeypatch, caplog):
    seeds = []

    def umap_map(x, *, seed):
        seeds.append(seed)
        return x[:, :2].numpy()

    monkeypatch.setattr(explorer, "umap_map", umap_map)
    pages = []
    after = other_vit()
    torch.nn.init.normal_(after.blocks[-1].mlp.fc2.weight)
    for images in (49, 50):
        data = (Pictures(40, 0), Pictures(60, 1))
        settings = Settings(images=images, seed=3)
        out = explorer.write(tmp_path / "x.html", data, other_vit(), after, settings)
        pages.append(content(out.read_text(encoding="utf-8")))
    assert [page["map"] for page in pages] == ["PCA", "UMAP"]
    assert seeds == [3, 3, 3, 3]  # 3 blocks, and the last one of an encoder that is else the same
    assert "UMAP needs 50 images, and there are 49" in caplog.text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"map": "tsne"}, "unknown map 'tsne': choose one of umap, pca"),
        ({"images": 5}, "images must be a whole number >= 9, got 5"),
        ({"images": 5000}, "a page shows at most 1,500 images, got 5,000"),
        ({"pool": "max"}, "unknown pooling 'max'"),
    ],
)
def test_wrong_settings_are_one_line(change, words):
    with pytest.raises(mr.InputError, match=re.escape(words)) as caught:
        Settings(**change)
    assert "\n" not in str(caught.value)


def test_wrong_input_is_one_line_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(explorer, "extract_features", lambda *a, **k: pytest.fail("worked"))
    data = (Pictures(40, 0), Pictures(30, 1))
    deeper = mr.build_vit(mr.ViTConfig(dim=32, depth=4, num_heads=2))
    with pytest.raises(mr.InputError, match="have 3 and 4 blocks"):
        explorer.write(tmp_path / "x.html", data, other_vit(), deeper)
    with pytest.raises(mr.InputError, match="is a folder: expected a file"):
        explorer.write(tmp_path, data, other_vit())
    unlabelled = (data[0], Pictures(30, 1, labelled=False))
    with pytest.raises(mr.InputError, match="has no labels"):
        explorer.write(tmp_path / "x.html", unlabelled, other_vit())
    with pytest.raises(mr.InputError, match="unknown data set 'fruits'"):
        explorer.write(tmp_path / "x.html", "fruits", other_vit())
    with pytest.raises(mr.InputError, match="expected 9 test images or more, got 6"):
        explorer.write(tmp_path / "x.html", (data[0], Pictures(6, 1)), other_vit())
    assert not (tmp_path / "x.html").exists()


@pytest.fixture(params=[(1280, 860, False), (375, 812, True)], ids=["wide", "phone"])
def opened(request, written):
    """The page in a browser; fails on any request and on any error or warning of a script."""
    if BROWSER is None:
        pytest.skip("no chromium is installed")
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="needs the extra browser: pip install 'mimrefiner[browser]'"
    )
    width, height, touch = request.param
    trouble = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        context = browser.new_context(
            viewport={"width": width, "height": height}, has_touch=touch, is_mobile=touch
        )
        page = context.new_page()
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("console", lambda said: trouble.append(said.text))
        address = written[0].as_uri()

        def answer(route):
            if route.request.url.split("#")[0] == address:
                return route.continue_()
            trouble.append(route.request.url)
            return route.abort()

        page.route(lambda url: not url.startswith("data:"), answer)
        page.goto(address)
        page.wait_for_selector("body[data-ready]", timeout=60_000)
        yield page
        browser.close()
    assert trouble == []


def shown_neighbours(page, model: int) -> list[int]:
    cells = page.locator(".row").nth(model).locator(".cell")
    return [int(image) for image in cells.evaluate_all("all => all.map(c => c.dataset.image)")]


def press_image(page, model: int, image: int) -> None:
    """Click or tap the place of an image on a map."""
    canvas = page.locator(".map canvas").nth(model)
    canvas.scroll_into_view_if_needed()
    page.wait_for_timeout(700)  # points are on their way
    box = canvas.bounding_box()
    x, y = page.evaluate(
        "([model, image]) => explorer.placeOf(explorer.models[model], image)", [model, image]
    )
    touch = page.evaluate("navigator.maxTouchPoints > 0")
    (page.touchscreen.tap if touch else page.mouse.click)(box["x"] + x, box["y"] + y)


def test_page_by_hand(opened, written):
    data = content(written[0].read_text(encoding="utf-8"))
    found = [unpacked(model["neighbours"], 3, 30, 8) for model in data["models"]]
    start = data["start"]
    for model in range(2):
        assert shown_neighbours(opened, model) == [start, *found[model][2, start]]

    width = opened.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert width[0] <= width[1]
    heights = opened.locator("button").evaluate_all("all => all.map(b => b.offsetHeight)")
    assert min(heights) >= 32  # a finger must hit it

    # Raw pixels are a level line among the accuracies, with a name that stays inside
    line = opened.locator("#chart line.pixels")
    assert line.get_attribute("y1") == line.get_attribute("y2")
    chart = opened.locator("#chart").bounding_box()
    words = opened.locator("#chart text.value").filter(has_text="raw pixels").bounding_box()
    assert words["x"] + words["width"] <= chart["x"] + chart["width"] + 1
    assert f"raw pixels get {data['pixels']:.1f} %" in opened.locator("#how").inner_text()

    slider = opened.locator("#block")
    slider.fill("1")
    for model in range(2):
        assert shown_neighbours(opened, model) == [start, *found[model][0, start]]
    assert opened.locator("#said").inner_text().startswith("Block 1")
    slider.press("ArrowRight")
    assert shown_neighbours(opened, 1) == [start, *found[1][1, start]]

    # An image that lies apart from the others, so that no other one is hit
    places = unpacked(data["models"][1]["places"], 3, 30, 2)[1].astype(float)
    apart = ((places[:, None] - places) ** 2).sum(2) + 1e12 * np.eye(30)
    apart[:, [start, *found[1][1, start]]] = 0
    image = int(apart.min(1).argmax())
    press_image(opened, 1, image)
    for model in range(2):
        assert shown_neighbours(opened, model) == [image, *found[model][1, image]]

    # Closer up the chosen image stays where it is and the others move away from it
    ask = "images => images.map(i => explorer.placeOf(explorer.models[1], i))"
    far = np.array(opened.evaluate(ask, [image, start]))
    opened.get_by_role("button", name="Zoom in").click()
    close = np.array(opened.evaluate(ask, [image, start]))
    assert close[0] == pytest.approx(far[0], abs=8)
    assert close[1] - close[0] == pytest.approx(1.6 * (far[1] - far[0]), abs=16)
    opened.get_by_role("button", name="Zoom out").click()

    # A neighbour becomes the next image, by Enter; names are words, whatever they hold
    first = int(found[0][1, image, 0])
    opened.locator(".row").first.locator(".cell").nth(1).press("Enter")
    assert shown_neighbours(opened, 0)[0] == first
    opened.keyboard.press("ArrowLeft")
    assert shown_neighbours(opened, 0) == [first, *found[0][0, first]]
    assert opened.title() == opened.locator("h1").inner_text()
    assert EVIL in opened.locator("#legend").inner_text()
    labels = unpacked(data["labels"], 30)
    kinds = opened.locator(".row").first.locator(".cell.right").count()
    assert kinds == (labels[found[0][0, first]] == labels[first]).sum()


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_words_stand_out(scheme):
    """WCAG AA: 4.5 : 1 for every colour in which words are written."""
    template = (explorer.ASSETS / "explorer.html").read_text(encoding="utf-8")
    theme = re.findall(r":root \{(.*?)\}", template, re.S)[scheme]
    colours = dict(re.findall(r"--(\w+): (#\w{6})", theme))
    for ground in ("paper", "panel"):
        for ink in ("ink", "quiet", "before", "after", "right", "wrong"):
            pair = [_luminance(colours[name]) for name in (ground, ink)]
            assert (max(pair) + 0.05) / (min(pair) + 0.05) >= 4.5, (ground, ink)


def _luminance(colour: str) -> float:
    parts = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])
