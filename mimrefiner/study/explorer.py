"""The explorer: one HTML file that shows test images as each block sees them, without a network.

Python computes everything (accuracies, maps, neighbours); the page in ``assets/explorer.html`` only
draws it. Its numbers travel as base64 of little-endian int16.
"""

import base64
import hashlib
import html
import io
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from scipy.linalg import orthogonal_procrustes
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from mimrefiner.data.datasets import (
    numbered_together,
    short_name,
    stratified_split,
    train_and_test,
)
from mimrefiner.data.rows import row_of
from mimrefiner.data.sources import check_numbering
from mimrefiner.errors import InputError, one_of
from mimrefiner.files import ASSETS, atomic_file, check_writable
from mimrefiner.models.blocks import depth_of
from mimrefiner.models.encoders import load_encoder
from mimrefiner.models.pools import available_pools
from mimrefiner.models.tokens import input_size
from mimrefiner.probes.checks import check_count
from mimrefiner.probes.features import Features, extract_features, parse_pool, pixel_features
from mimrefiner.probes.knn import knn_hits
from mimrefiner.probes.umap import umap_map
from mimrefiner.progress import progress
from mimrefiner.study.intervals import paired_bootstrap
from mimrefiner.study.pictures import CLASS_PALETTE

logger = logging.getLogger(__name__)

NEIGHBOURS = 8  # shown of every image
K, TEMPERATURE = 10, 0.07  # the vote that accuracies count
MOST = 1500  # images that a page can show
FEW = 50  # below this many images UMAP has nothing to work with
LIMIT = 8_000_000  # bytes of a page
PIXELS = 32  # side of the images whose raw pixels are compared, at most
SIDES = (64, 48, 36, 24)  # pixels of a thumbnail, the first that fits into LIMIT
# Black frames vanish around dark pictures
COLOURS = tuple("#5f6b00" if colour == "#111111" else colour for colour in CLASS_PALETTE)
SHAPES = 4  # of dots: circle, square, triangle, diamond
INT16 = np.dtype("<i2")


@dataclass(frozen=True)
class Settings:
    """What a page shows.

    Attributes:
        pool: the pooling, such as "cls" or "mean" (:meth:`mimrefiner.Features.joined`); None takes
            cls where every model has it, else mean.
        images: at most this many test images are shown, the same share of every class.
        limit: at most this many training images vote, and as many test images are counted.
        map: "umap", or "pca", which takes no time.
        seed: draws the splits, the images and UMAP's start.
    """

    pool: str | None = None
    images: int = 1000
    limit: int = 10_000
    map: str = "umap"
    seed: int = 0

    def __post_init__(self):
        check_count("images", self.images, NEIGHBOURS + 1)
        check_count("limit", self.limit, 2)
        check_count("seed", self.seed, 0)
        one_of("map", self.map, ("umap", "pca"))
        if self.images > MOST:
            raise InputError(f"a page shows at most {MOST:,} images, got {self.images:,}")
        if self.pool is not None:
            parse_pool(self.pool)


@dataclass(frozen=True)
class Side:
    """One model as the page shows it.

    Attributes:
        name: over its map.
        hits: which test images the k-NN vote gets right, (blocks, test images) bool.
        neighbours: rows of the nearest images shown, best first, (blocks, images, NEIGHBOURS).
        maps: places in the plane, (blocks, images, 2), in -1..1.
    """

    name: str
    hits: np.ndarray
    neighbours: np.ndarray
    maps: np.ndarray


def write(
    out: Path | str,
    data: str | tuple[Dataset, Dataset] | dict[str, Dataset],
    before: nn.Module | str,
    after: nn.Module | str | None = None,
    settings: Settings | None = None,
    **loading,
) -> Path:
    """Write one HTML file in which a reader moves through the blocks of one encoder, or of two.

    A slider chooses the block; a map shows test images near each other whose features are alike; a
    click on an image shows its nearest neighbours in that block.

    Args:
        out: the file, under 8 MB.
        data: what :func:`mimrefiner.load_dataset` takes, or (train, test), map-style data sets of
            (image, label), or ``{"train": ..., "test": ...}``.
        before: a timm model, or what :func:`mimrefiner.load_encoder` takes.
        after: another one with as many blocks, shown beside the first; None shows one.
        settings: what the page shows; None takes the defaults.
        loading: batch_size, num_workers, device and autocast, as
            :func:`mimrefiner.extract_features` takes them.

    Raises:
        InputError: encoders of different depth, a pooling that one of them lacks, images without
            labels, a name that is unknown, a file that cannot be written.

    >>> write("explorer.html", "digits", "simmim_digits")  # doctest: +SKIP
    PosixPath('explorer.html')
    """
    settings, out = settings or Settings(), Path(out)
    _check_file(out)
    given = [before] if after is None else [before, after]
    encoders = [load_encoder(x) if isinstance(x, str | Path) else x for x in given]
    pool = _pool_of(encoders, settings.pool)
    train, test = _parts(data, settings)
    features = [_features(encoder, train, test, pool, loading) for encoder in encoders]
    if len(train) < settings.limit and not numbered_together(train, test):
        check_numbering(*(part.y.numpy() for part in features[0]), "the test set")
    rows = _shown(features[0][1].y.numpy(), settings)
    sides, drawn = [], {}
    for name, (bank, shown) in zip(_names(given), features, strict=True):
        sides.append(side(name, bank, shown, rows, settings, sides, drawn))
    facts = {
        "data": short_name(data) if isinstance(data, str) else "own data",
        "pool": pool,
        "voters": len(train),
        "k": min(K, len(train)),
        "map": "PCA" if _draws_pca(len(rows), settings) else "UMAP",
        "seed": settings.seed,
        "pixels": _pixel_accuracy(train, test, min(input_size(x)[-1] for x in encoders)),
    }
    images = [row_of(test, int(row))[0] for row in rows]
    text = page(sides, images, features[0][1].y.numpy()[rows], _classes(test), rows, facts)
    with atomic_file(out) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return out


def _check_file(out: Path) -> None:
    if out.is_dir():
        raise InputError(f"{out} is a folder: expected a file, such as {out / 'explorer.html'}")
    check_writable(out.parent)


def at_most(dataset: Dataset, n: int, seed: int) -> Dataset:
    """``dataset``, or ``n`` of its images, the same share of every class that it knows."""
    if len(dataset) <= n:
        return dataset
    labels = getattr(dataset, "labels", None)
    return Subset(dataset, stratified_split(labels, len(dataset), n, seed)[0])


def side(
    name: str,
    train: Features,
    test: Features,
    rows: np.ndarray,
    settings: Settings,
    others: Sequence[Side] = (),
    drawn: dict[bytes, np.ndarray] | None = None,
) -> Side:
    """What the page shows of one model.

    Args:
        name: the model's.
        train, test: features with one pooling.
        rows: the test images that are shown.
        settings: how the maps are drawn.
        others: the first of them is the model beside whose maps these will stand.
        drawn: maps by what was drawn, to which these are added: refinement leaves early blocks as
            they are, and UMAP takes seconds.
    """
    (hits,) = knn_hits(train, test, k=min(K, len(train.y)), temperature=TEMPERATURE).values()
    (bank,), (shown,) = train.x.values(), test.subset(rows).x.values()
    near = [neighbours(*pair) for pair in zip(bank, shown, strict=True)]
    pca, drawn = _draws_pca(len(rows), settings), {} if drawn is None else drawn
    if pca and settings.map != "pca":
        logger.warning("UMAP needs %d images, and there are %d: PCA draws the maps", FEW, len(rows))
    maps = []
    for x in progress(list(shown), f"maps of {name}", unit="block"):
        key = hashlib.sha256(x.numpy().tobytes()).digest()
        if key not in drawn:
            drawn[key] = pca_map(x) if pca else umap_map(x, seed=settings.seed)
        maps.append(drawn[key])
    maps = aligned(np.stack(maps), others[0].maps if others else None)
    return Side(name, hits.numpy(), np.stack(near), maps)


def neighbours(bank: Tensor, shown: Tensor, k: int = NEIGHBOURS) -> np.ndarray:
    """Rows of the ``k`` most similar other images of every image, best first, (images, k).

    Features (images, dim) are standardised with mean and unbiased standard deviation of ``bank``,
    as in :func:`mimrefiner.knn_predict`, and compared by cosine.

    >>> x = torch.tensor([[2.0, 1.0], [1.0, 3.0], [2.0, 1.1], [1.1, 3.0]])
    >>> neighbours(x, x, 1)[:, 0]
    array([2, 3, 0, 1])
    """
    mean, std = bank.mean(0), bank.std(0) + 1e-6
    x = nn.functional.normalize((shown - mean) / std, dim=1, eps=1e-12)
    cosine = x @ x.T
    cosine.fill_diagonal_(-torch.inf)
    return cosine.topk(min(k, len(x) - 1), dim=1).indices.numpy()


def pca_map(x: Tensor) -> np.ndarray:
    """The first two principal components of standardised features (images, dim), (images, 2).

    >>> pca_map(torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]])).round(2)[:, 0]
    array([-1.73,  0.  ,  1.73])
    """
    x = x.double().numpy()
    x = (x - x.mean(0)) / (x.std(0) + 1e-6)
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    signs = np.sign(vt[np.arange(2), np.abs(vt[:2]).argmax(1)])  # svd leaves them open
    return u[:, :2] * s[:2] * signs


def aligned(maps: np.ndarray, towards: np.ndarray | None = None) -> np.ndarray:
    """Maps (blocks, images, 2) that fill the square -1..1, turned so that points move little.

    Every map is turned or mirrored (orthogonal Procrustes) towards the map of the block before it
    and, where given, towards the same block of ``towards``.

    >>> square = np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0], [-1.0, 0.5]])
    >>> turned = np.stack([square, square @ [[0.0, 1.0], [-1.0, 0.0]]])
    >>> first, second = aligned(turned)
    >>> bool(np.allclose(first, second))
    True
    """
    placed = []
    for block, xy in enumerate(maps):
        xy = _unit(xy)
        targets = [_unit(placed[-1])] if placed else []
        targets += [] if towards is None else [_unit(towards[block])]
        if targets:
            xy = xy @ orthogonal_procrustes(xy, np.sum(targets, 0))[0]
        low, high = xy.min(0), xy.max(0)
        half = max((high - low).max() / 2, 1e-9)
        placed.append((xy - (low + high) / 2) / half)
    return np.stack(placed)


def _unit(xy: np.ndarray) -> np.ndarray:
    """Points around their mean, at a mean squared distance of one."""
    xy = xy - xy.mean(0)
    return xy / max(math.sqrt((xy**2).sum(1).mean()), 1e-9)


def page(
    sides: Sequence[Side],
    images: Sequence[Image.Image],
    labels: np.ndarray,
    classes: Sequence[str] | None,
    rows: np.ndarray,
    facts: dict,
) -> str:
    """The HTML of the explorer.

    Args:
        sides: one model or two.
        images: the test images that are shown.
        labels: their classes, (images,).
        classes: names of the classes; None names them by number.
        rows: the shown images' rows among the test images that were counted.
        facts: what the page says about itself: data, pool, voters, k, map, seed, and pixels, the
            accuracy of raw pixels in percent, or None.

    Raises:
        InputError: the page would be larger than LIMIT.
    """
    title, subtitle = finding(sides, facts["data"])
    present, label = np.unique(labels, return_inverse=True)
    content = {
        **facts,
        "classes": [f"class {c}" if classes is None else str(classes[c]) for c in present],
        "looks": looks(images, label),
        "labels": _packed(label),
        "temperature": TEMPERATURE,
        "tested": sides[0].hits.shape[1],
        "start": typical(sides, label),
        "models": [_model(one, rows) for one in sides],
    }
    template = (ASSETS / "explorer.html").read_text(encoding="utf-8")
    for mark, words in (("TITLE", title), ("SUBTITLE", subtitle)):
        escaped = html.escape(words.replace(" %", "\u00a0%"))
        template = template.replace(f"<!--{mark}-->", escaped)
    for size in SIDES:
        content["sprite"] = sprite(images, size)
        # No class name can end the script: JSON may write < as an escape
        inside = json.dumps(content, sort_keys=True).replace("<", "\\u003c")
        text = template.replace("<!--DATA-->", inside)
        if len(text.encode()) <= LIMIT:
            return text
    raise InputError(
        f"the page would take {len(text) / 1e6:.1f} MB, more than {LIMIT / 1e6:.0f}: "
        f"show fewer images than {len(images):,} with --images"
    )


def _model(one: Side, rows: np.ndarray) -> dict:
    """One model in the form that the page reads."""
    return {
        "name": one.name,
        "accuracy": [round(100 * float(right.mean()), 4) for right in one.hits],
        "hits": _packed(one.hits[:, rows]),
        "neighbours": _packed(one.neighbours),
        "places": _packed(np.rint(32767 * one.maps)),
    }


def finding(sides: Sequence[Side], data: str) -> tuple[str, str]:
    """What the page shows, as a title and a sentence, in percent of the test images.

    >>> hits = np.array([[True, True, True, False], [True, False, True, False]])
    >>> nothing = np.zeros((2, 4, 2))
    >>> finding([Side("mae", hits, nothing, nothing)], "digits")[0]
    'k-NN accuracy peaks at block 1 (75.0 %); the last block has 50.0 %'
    """
    accuracy = [100 * side.hits.mean(1) for side in sides]
    best = [f"block {line.argmax() + 1} ({line.max():.1f} %)" for line in accuracy]
    last = [f"{line[-1]:.1f}" for line in accuracy]
    images = f"{sides[0].hits.shape[1]:,} test images of {data}"
    if len(sides) == 2:
        points, low, high = (
            f"{100 * x:+.1f}".replace("-", "−")
            for x in paired_bootstrap(sides[1].hits[-1], sides[0].hits[-1])
        )
        title = f"Last block: {last[0]} → {last[1]} % k-NN accuracy"
        change = f"{points} points (95 % interval {low} to {high}) on {images}"
        return title, f"{change}. Best before: {best[0]}; best after: {best[1]}."
    (line,) = accuracy
    if line.argmax() == len(line) - 1:
        title = f"k-NN accuracy is highest after the last block: {last[0]} %"
    else:
        title = f"k-NN accuracy peaks at {best[0]}; the last block has {last[0]} %"
    return title, f"{sides[0].name} on {images}."


def typical(sides: Sequence[Side], label: np.ndarray) -> int:
    """The image whose right neighbours after the last block are nearest in number to the mean.

    The page opens with it, so that its first example is neither the best nor the worst.
    """
    apart = np.zeros(len(label))
    for model in sides:
        right = (label[model.neighbours[-1]] == label[:, None]).sum(1)
        apart += np.abs(right - right.mean())
    return int(apart.argmin())


def looks(images: Sequence[Image.Image], label: np.ndarray) -> list[tuple[str, int]]:
    """Colour and shape of every class: of all colours that are used, one like its images.

    Where there are more classes than colours, colours begin again with another shape.
    """
    pixels = np.stack([np.asarray(x.convert("RGB").resize((8, 8))) for x in images])
    pixels = pixels.reshape(len(images), -1, 3) / 255
    # A thing stands out from what is around it by its colour
    weight = np.ptp(pixels, axis=2, keepdims=True)
    mean = (pixels * weight).sum(1) / (weight.sum(1) + 1e-6)
    classes = [label == c for c in range(label.max() + 1)]
    mean = np.stack([mean[chosen].mean(0) for chosen in classes])
    n = len(COLOURS)
    free = [(COLOURS[i % n], (i + i // n) % SHAPES) for i in range(len(mean))]
    colours = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c, _ in free])
    apart = ((mean[:, None] - colours) ** 2).sum(2)
    apart *= np.array([[weight[chosen].mean()] for chosen in classes])
    # Grey images leave the order as it is
    order = linear_sum_assignment(apart + 1e-3 * (1 - np.eye(len(mean))))[1]
    return [free[i] for i in order]


def sprite(images: Sequence[Image.Image], size: int) -> dict:
    """All images on one sheet of thumbnails: its columns, a thumbnail's side and a data URI."""
    size = min(size, max(min(image.size) for image in images))
    columns = math.ceil(math.sqrt(len(images)))
    sheet = Image.new("RGB", (columns * size, math.ceil(len(images) / columns) * size))
    for i, image in enumerate(images):
        small = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS)
        sheet.paste(small, (i % columns * size, i // columns * size))
    file = io.BytesIO()
    sheet.save(file, "WEBP", quality=82)
    text = base64.b64encode(file.getvalue()).decode()
    return {"columns": columns, "side": size, "address": f"data:image/webp;base64,{text}"}


def _packed(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values, dtype=INT16).tobytes()).decode()


def _parts(data, settings: Settings) -> tuple[Dataset, Dataset]:
    """Training and test images, at most ``limit`` of each."""
    data = train_and_test(data, settings.seed)
    if any(getattr(part, "labels", ()) is None for part in data):
        raise InputError("the explorer counts right neighbours, and this data set has no labels")
    if len(data[1]) <= NEIGHBOURS:
        raise InputError(f"expected {NEIGHBOURS + 1} test images or more, got {len(data[1])}")
    return tuple(at_most(part, settings.limit, settings.seed) for part in data)


def _classes(dataset: Dataset) -> Sequence[str] | None:
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return getattr(dataset, "classes", None)


def _pool_of(encoders: Sequence[nn.Module], pool: str | None) -> str:
    depths = [depth_of(encoder) for encoder in encoders]
    if len(set(depths)) > 1:
        raise InputError(
            f"the encoders have {depths[0]} and {depths[1]} blocks: one slider needs equally many"
        )
    shared = set.intersection(*(set(available_pools(encoder)) for encoder in encoders))
    if pool is None:
        return "cls" if "cls" in shared else "mean"
    if missing := [part for part in parse_pool(pool)[0] if part not in shared]:
        raise InputError(f"an encoder has no {missing[0]} token: choose --pool mean")
    return pool


def _features(encoder, train: Dataset, test: Dataset, pool: str, loading: dict):
    pools = parse_pool(pool)[0]
    return tuple(
        extract_features(encoder, part, pools=pools, **loading).joined((pool,))
        for part in (train, test)
    )


def _pixel_accuracy(train: Dataset, test: Dataset, size: int) -> float | None:
    """k-NN accuracy of raw pixels in percent, the encoders' rival that costs nothing."""
    bank, asked = (pixel_features(part, min(size, PIXELS)) for part in (train, test))
    (hits,) = knn_hits(bank, asked, k=min(K, len(bank.y)), temperature=TEMPERATURE).values()
    return round(100 * float(hits.float().mean()), 4)


def _shown(labels: np.ndarray, settings: Settings) -> np.ndarray:
    if len(labels) <= settings.images:
        return np.arange(len(labels))
    return stratified_split(labels, len(labels), settings.images, settings.seed)[0]


def _draws_pca(images: int, settings: Settings) -> bool:
    return settings.map == "pca" or images < FEW


def _names(given: Sequence[nn.Module | str]) -> list[str]:
    """What the models are called: the last part of a path, all of it where two are alike."""
    full = [
        str(x) if isinstance(x, str | Path) else f"{type(x).__name__} {word}"
        for x, word in zip(given, ("before", "after"), strict=False)
    ]
    short = [name.rsplit("/", 1)[-1].removesuffix(".safetensors") for name in full]
    return short if len(set(short)) == len(short) else full
