"""Ratios on the device at hand, one comparison after another, kept in a JSON file after each.

    python -m tests.benchmarks.ratios --out ratios.json [--device cuda] [--seconds 120] [--small]

Rows say how often a way is faster than the other one. What is asked for first matters most: behind
``--seconds`` no comparison begins. ``python -m experiments.gpu`` runs this.
"""

import argparse
import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

import mimrefiner as mr
from mimrefiner.data.augment import paper_views
from mimrefiner.device import plain_attention
from mimrefiner.files import write_json
from mimrefiner.models.layouts import ViTShape
from mimrefiner.probes.features import Features
from mimrefiner.probes.linear import linear_probe
from mimrefiner.training import cost
from tests.benchmarks.probing import EXTRACTION
from tests.benchmarks.training import compare, looped_loss, step_ways

SHAPES = {
    "Tiny/16": ViTShape(224, 16, 192, 12, 3, 768),
    "S/16": ViTShape(224, 16, 384, 12, 6, 1536),
    "L/16": ViTShape(224, 16, 1024, 24, 16, 4096),
}
BATCHES = {"Tiny/16": 128, "S/16": 64, "L/16": 32}


def row(title: str, seconds: dict[str, float], **more) -> dict:
    """The first way against the second, and what else is known of the first."""
    ours, theirs = list(seconds)
    ratio = round(seconds[theirs] / seconds[ours], 2)
    return {"what": title, ours: seconds[ours], theirs: seconds[theirs], "ratio": ratio, **more}


def loss(device: str, small: bool) -> Iterator[dict]:
    heads, batch, views, dim, size = (2, 16, 4, 32, 512) if small else (8, 256, 12, 256, 65536)
    queue = mr.NNQueue(heads, size, dim).to(device)
    z = torch.randn(heads, batch, 2, dim, device=device)
    p = torch.randn(heads, batch, views, dim, device=device, requires_grad=True)
    index = torch.arange(batch, device=device)
    ways = {
        "batched": lambda: mr.multi_view_nna_loss(z, queue.lookup(z, index), p).sum().backward(),
        "head by head, pair by pair": lambda: (
            looped_loss(z, p, index, queue.z, queue.index, 0.2).sum().backward()
        ),
    }
    yield row(f"loss and queue, {heads} heads, batch {batch}, queue {size}", measured(ways, device))


def steps(device: str, small: bool) -> Iterator[dict]:
    """Stage 2 and stage 3 of three sizes; a batch that does not fit is halved."""
    for name, shape in list(SHAPES.items())[: 1 if small else None]:
        batch = 2 if small else BATCHES[name]
        while batch:
            try:
                yield from _steps(name, shape, batch, device, small)
                break
            except torch.cuda.OutOfMemoryError:
                batch //= 2
            torch.cuda.empty_cache()


def _steps(name: str, s: ViTShape, batch: int, device: str, small: bool) -> list[dict]:
    sizes = {"dim": s.dim, "depth": s.depth, "num_heads": s.num_heads, "patch_size": s.patch_size}
    encoder = mr.build_vit(mr.ViTConfig(image_size=s.image_size, **sizes))
    config = mr.RefineConfig(
        views=paper_views(224, 96, 1 if small else 10),
        blocks=tuple(range(s.depth - 8, s.depth)),
        batch_size=batch,
        queue_size=512 if small else 65536,
    )
    refiner = mr.MIMRefiner(encoder, config).to(device).train()
    crops = config.views.crops
    views = [torch.randn(batch, 3, crop.size, crop.size, device=device) for crop in crops]
    ways, rows = step_ways(refiner, views, torch.arange(batch, device=device), device), []
    for stage in (2, 3):
        encoder.requires_grad_(stage == 3)
        with plain_attention(encoder, torch.device(device)):
            seconds = measured(ways, device, rounds=3)
        work = batch * cost.step_flops(s, config, train_encoder=stage == 3)
        more = {"images_per_second": batch / seconds["mimrefiner"]}
        more["tflop_per_second"] = work / seconds["mimrefiner"] / 1e12
        rows.append(row(f"stage-{stage} step, ViT-{name}, batch {batch}", seconds, **more))
    return rows


def extraction(device: str, small: bool) -> Iterator[dict]:
    batch = 2 if small else 256
    encoder = mr.build_vit(mr.ViTConfig(image_size=224, patch_size=16, dim=384, num_heads=6))
    encoder, images = encoder.to(device).eval(), torch.randn(batch, 3, 224, 224, device=device)
    ways = {
        "all blocks, two poolings": lambda: EXTRACTION["all blocks, pooled inside"](
            encoder, images
        ),
        "plain forward": lambda: EXTRACTION["plain forward"](encoder, images),
    }
    yield row(f"features of {batch} images, ViT-S/16", measured(ways, device))


def probes(device: str, small: bool) -> Iterator[dict]:
    """On this device against the CPU: k-NN, the joint linear grid, low-shot."""
    bank, asked, blocks = (1000, 100, 2) if small else (20_000, 2000, 12)
    y = torch.arange(bank) % 20
    centres = torch.randn(blocks, 20, 192)
    x = 0.5 * torch.randn(blocks, bank, 192) + centres[:, y]
    train = Features({"cls": x}, y, tuple(range(blocks)), blocks)
    test = train.subset(range(asked))
    runs = {
        f"k-NN, {bank} x {asked} x 192, {blocks} blocks": lambda d: mr.knn_hits(
            train, test, device=d
        ),
        f"linear probes, {blocks} blocks x 13 rates, one epoch of {bank}": lambda d: linear_probe(
            train, test, val=test, epochs=1, device=d
        ),
        f"low-shot, {blocks} blocks x 3 draws of 5 images of 20 classes": lambda d: mr.low_shot(
            train, test, shots=(5,), splits=3, device=d
        ),
    }
    for title, run in runs.items():
        ways = {f"on {device}": partial(run, device), "on the CPU": partial(run, "cpu")}
        yield row(title, measured(ways, device, rounds=2))


def measured(ways: dict, device: str, rounds: int = 5) -> dict[str, float]:
    return {name: round(value, 5) for name, value in compare(ways, device, rounds).items()}


COMPARISONS = (loss, steps, extraction, probes)


def main(args: argparse.Namespace) -> None:
    began, rows = time.monotonic(), []
    for comparison in COMPARISONS:
        found = comparison(args.device, args.small)
        while time.monotonic() - began < args.seconds and (one := next(found, None)):
            rows.append(one)
            print(json.dumps(one), flush=True)
            write_json(rows, args.out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--small", action="store_true", help="sizes of a rehearsal")
    torch.manual_seed(0)
    main(parser.parse_args())
