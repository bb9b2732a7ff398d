"""How fast training is, as ratios measured side by side in one run, and what bounds it.

    python -m tests.benchmarks.training loss|step|refine|augment|memory|attention|compiled
        [--device cuda] [--small] [--vit l16]
    torchrun --nproc-per-node 2 -m tests.benchmarks.training processes [--device cuda] [--small]

Each comparison alternates between the ways and prints medians. ``--small`` is for machines with
little memory or time; the sizes in use are printed. ``refine`` compares with lightly's parts where
that package is installed, and says so where it is not. Results are kept in docs/scaling.md.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from unittest.mock import patch

import torch
import torch.nn.functional as F
from PIL import Image

import mimrefiner as mr
from mimrefiner import distributed
from mimrefiner.data.augment import paper_views, small_views
from mimrefiner.data.views import (
    DRAWS,
    Order,
    loaded_crops,
    photometric,
    resident_crops,
    size_groups,
    view_batches,
)
from mimrefiner.device import plain_attention
from mimrefiner.method.heads import Heads
from mimrefiner.method.losses import multi_view_nna_loss
from mimrefiner.method.nn_queue import NNQueue
from mimrefiner.models.layouts import ViTShape
from mimrefiner.models.masked import build_masked_model, random_mask
from mimrefiner.progress import Meter
from mimrefiner.training import cost, engine
from mimrefiner.training.memory import recomputed
from mimrefiner.training.optim import layer_decay_groups
from mimrefiner.training.refine import forward_backward
from tests.benchmarks.harness import own_peak

LIGHTLY = "lightly's NNCLR parts"
# Those of "refine"
VITS = {"s16": ViTShape(224, 16, 384, 12, 6, 1536), "l16": ViTShape(224, 16, 1024, 24, 16, 4096)}


adamw = partial(torch.optim.AdamW, lr=1e-5, fused=True)


def compare(ways: dict, device: str, repeats: int, warm_ups: int = 1) -> dict[str, float]:
    """Median seconds of every function in ``ways``, called in turns.

    On a CPU the seconds that the process computed, so that other work on the machine counts less.
    """
    clock = time.process_time if device == "cpu" else time.perf_counter
    seconds = {name: [] for name in ways}
    for turn in range(repeats + warm_ups):
        for name, way in ways.items():
            began = clock()
            way()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn >= warm_ups:
                seconds[name].append(clock() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def table(title: str, seconds: dict[str, float]) -> None:
    first = next(iter(seconds.values()))
    print(f"\n{title}\n")
    print("| way | seconds | relative to the first |\n|---|---|---|")
    for name, value in seconds.items():
        print(f"| {name} | {value:.3f} | {value / first:.2f} |")


def looped_loss(z, p, index, queue_z, queue_index, temperature):
    """One head and one pair of views at a time, the queue normalised on every call: (heads,)
    losses.
    """
    losses = []
    for head in range(z.shape[0]):
        terms = []
        for a in range(z.shape[2]):
            target = F.normalize(z[head, :, a], dim=-1)
            similarity = target @ F.normalize(queue_z[head], dim=-1).T
            similarity = torch.where(index[:, None] == queue_index, -1.0, similarity)
            neighbour = F.normalize(queue_z[head][similarity.argmax(-1)], dim=-1)
            for b in range(p.shape[2]):
                if a != b:
                    predicted = F.normalize(p[head, :, b], dim=-1)
                    logits = target @ predicted.T
                    positive = (neighbour * predicted).sum(-1)
                    logits = torch.diagonal_scatter(logits, positive) / temperature
                    terms.append(
                        F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))
                    )
        losses.append(torch.stack(terms).mean())
    return torch.stack(losses)


def loss(device: str, small: bool, repeats: int) -> None:
    """(a) Loss and queue alone."""
    heads, batch, views, dim, size = (8, 64, 12, 256, 16384) if small else (8, 256, 12, 256, 65536)
    queue = NNQueue(heads, size, dim).to(device)
    z = torch.randn(heads, batch, 2, dim, device=device)
    p = torch.randn(heads, batch, views, dim, device=device, requires_grad=True)
    index = torch.arange(batch, device=device)

    def batched():
        multi_view_nna_loss(z, queue.lookup(z, index), p).sum().backward()

    def looped():
        looped_loss(z, p, index, queue.z, queue.index, 0.2).sum().backward()

    if repeats > 1:
        values = [
            multi_view_nna_loss(z, queue.lookup(z, index), p),
            looped_loss(z, p, index, queue.z, queue.index, 0.2),
        ]
        assert torch.allclose(*values, rtol=1e-4)
    ways = {
        "batched": batched,
        "one head and pair at a time": looped,
        "batched, lookup alone": lambda: queue.lookup(z, index),
    }
    title = (
        f"(a) loss and queue, {heads} heads, batch {batch}, {views} views, dim {dim}, "
        f"queue {size}, {device}"
    )
    table(title, compare(ways, device, repeats, warm_ups=int(repeats > 1)))


def refiner_and_views(device: str, small: bool):
    """ViT and batch for (b) and (e)."""
    size, local, batch = (64, 32, 16) if small else (224, 96, 64)
    dim, depth, heads = (192, 12, 3) if small else (384, 12, 6)
    vit = mr.build_vit(
        mr.ViTConfig(image_size=size, patch_size=16, dim=dim, depth=depth, num_heads=heads)
    )
    config = mr.RefineConfig(
        views=paper_views(size, local),
        blocks=tuple(range(depth - 8, depth)),
        batch_size=batch,
        queue_size=8192 if small else 65536,
    )
    refiner = mr.MIMRefiner(vit, config).to(device).train()
    views = [
        torch.randn(batch, 3, crop.size, crop.size, device=device) for crop in config.views.crops
    ]
    return refiner, views, torch.arange(batch, device=device)


def separate_heads(refiner, device: str) -> list[Heads]:
    """The heads of ``refiner`` as one module each, for the loops."""
    single = [Heads(1, refiner.encoder.embed_dim).to(device) for _ in refiner.blocks]
    for head, one in enumerate(single):
        one.load_state_dict(
            {
                name: x[head : head + 1]
                if x.ndim == 3
                else x.unflatten(0, (len(single), -1))[head]
                if x.ndim
                else x
                for name, x in refiner.heads.state_dict().items()
            }
        )
    return single


def step(device: str, small: bool, repeats: int) -> None:
    """(b) Whole stage-2 and stage-3 steps."""
    refiner, views, index = refiner_and_views(device, small)
    ways = step_ways(refiner, views, index, device)
    for stage in (2, 3):
        refiner.encoder.requires_grad_(stage == 3)
        encoder = refiner.encoder
        title = (
            f"(b) stage-{stage} step, ViT dim {encoder.embed_dim}, depth {len(encoder.blocks)}, "
            f"{views[0].shape[-1]} px, {len(refiner.blocks)} heads, batch {len(index)}, 12 views, "
            f"queue {refiner.queue.size}, {device}"
        )
        table(title, compare(ways, device, repeats))


def step_ways(refiner, views, index, device: str) -> dict:
    """Forward and backward of one step, batched, and by loops over heads and pairs of views."""
    single = separate_heads(refiner, device)

    def ours():
        refiner.zero_grad()
        forward_backward(refiner, (views, index, None), top_k=1)

    def looped():
        refiner.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            features = refiner.features(views)
            outputs = [
                one(features[:, :, head : head + 1].flatten(0, 1))
                for head, one in enumerate(single)
            ]
            z, p = (
                torch.cat([o[i].transpose(0, 1) for o in outputs])
                .unflatten(1, (len(views), -1))
                .transpose(1, 2)
                .float()
                for i in range(2)
            )
            total = looped_loss(
                z[:, :, :2].detach(), p, index, refiner.queue.z, refiner.queue.index, 0.2
            ).sum()
        total.backward()

    return {"mimrefiner": ours, "one head and pair at a time": looped}


def processes(device: str, small: bool, repeats: int) -> None:
    """A stage-3 step in every one of the processes that torchrun started, each with a batch of its
    own: what the group costs.
    """
    with engine.processes():
        refiner, views, index = refiner_and_views(device, small)
        through = engine.averaged(refiner.encoder), engine.averaged(refiner.heads)

        def ours():
            refiner.zero_grad()
            forward_backward(refiner, (views, index, None), top_k=1, through=through)

        def behind():
            refiner.zero_grad()
            forward_backward(refiner, (views, index, None), top_k=1)
            grads = [x.grad for x in refiner.parameters() if x.grad is not None]
            flat = torch.cat([x.flatten() for x in grads])
            torch.distributed.all_reduce(flat)
            for x, part in zip(
                grads, (flat / distributed.world()).split([x.numel() for x in grads]), strict=True
            ):
                x.copy_(part.view_as(x))

        def alone():
            refiner.zero_grad()
            with (
                patch.object(distributed, "world", lambda: 1),
                patch.object(distributed, "rank", lambda: 0),
            ):
                forward_backward(refiner, (views, index, None), top_k=1)

        ways = {
            "in the group": ours,
            "in the group, gradients in one message behind": behind,
            "alone": alone,
        }
        seconds, world = compare(ways, device, repeats), distributed.world()
        if distributed.rank() == 0:
            table(
                f"stage-3 step of each of {world} processes, batch {len(index)} each, {device}",
                seconds,
            )


def refine(
    device: str, small: bool, repeats: int, vit: str = "s16", only: str | None = None
) -> None:
    """(c) Whole stage-3 steps of a ViT, optimiser included, in bfloat16, each peak memory in a
    process of its own.
    """
    batch, size = (4, 8192) if small else (64, 65536)
    shape, names = (
        VITS[vit],
        ["mimrefiner", "plain loop", *([LIGHTLY] if find_spec("lightly") else [])],
    )
    # peaks first: what this process will hold would be missing there
    held = {name: peak_of(name, device, vit, small) for name in names} if only is None else {}
    sizes = {"dim": shape.dim, "depth": shape.depth, "num_heads": shape.num_heads}
    encoder = mr.build_vit(mr.ViTConfig(image_size=224, patch_size=16, **sizes))
    config = mr.RefineConfig(
        views=paper_views(),
        blocks=tuple(range(shape.depth - 8, shape.depth)),
        batch_size=batch,
        queue_size=size,
    )
    refiner = mr.MIMRefiner(encoder, config).to(device).train()
    views = [
        torch.randn(batch, 3, crop.size, crop.size, device=device) for crop in config.views.crops
    ]
    index = torch.arange(batch, device=device)
    make = {
        "mimrefiner": partial(ours_stage_3, refiner, index),
        "plain loop": partial(plain_stage_3, refiner, index, device),
    }
    make[LIGHTLY] = partial(lightly_stage_3, refiner, device)
    if only is not None:
        make[only]()(views)
        print(torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else own_peak())
        return
    ways = {name: make[name]() for name in names}
    with plain_attention(refiner, torch.device(device)):
        seconds = compare(
            {name: lambda way=way: way(views) for name, way in ways.items()}, device, repeats
        )
    table(
        f"(c) stage-3 step, ViT-{vit}, 8 heads, batch {batch}, 12 views of 224 and 96 px, "
        f"queue {size}, bfloat16, {device}",
        seconds,
    )
    peak = matmul_peak(device)
    work = batch * cost.step_flops(shape, config, train_encoder=True)
    print(
        f"\n{work / 1e12:.2f} TFLOP a step by formula; "
        f"a bfloat16 matrix product reaches {peak / 1e12:.2f} TFLOP/s\n"
    )
    photos = [(Image.effect_noise((256, 256), 80).convert("RGB"), 0) for _ in range(batch)]
    print(
        "| way | images/s | FLOP utilisation | peak MiB | share waiting for data |\n"
        "|---|---|---|---|---|"
    )
    for name, value in seconds.items():
        with plain_attention(refiner, torch.device(device)):
            waited = data_wait_share(
                ways[name], photos, config.views, device, steps=1 if small else 5
            )
        print(
            f"| {name} | {batch / value:.2f} | {work / value / peak:.0%} | {held[name]:,.0f} "
            f"| {waited:.0%} |"
        )
    if LIGHTLY not in ways:
        print(f"| {LIGHTLY} | not measured: the package lightly is not installed | | | |")
    print(
        "\nwaiting for data: images of 256 px in memory, the same loader for all ways, "
        "no loader process"
    )


def peak_of(name: str, device: str, vit: str, small: bool) -> float:
    """Peak memory in MiB of one step of one way, in a process of its own."""
    call = [
        sys.executable,
        "-m",
        "tests.benchmarks.training",
        "refine",
        "--device",
        device,
        "--vit",
        vit,
        "--only",
        name,
        *["--small"] * small,
    ]
    return float(
        subprocess.run(call, capture_output=True, text=True, check=True).stdout.split()[-1]
    )


def data_wait_share(way, photos: list, views, device: str, steps: int) -> float:
    """The share of the time that ``way`` waits for its views, as ``--watch`` records it."""
    options = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "device": device}
    meter, order = Meter(len(photos), device), Order(len(photos), steps, seed=0)
    for images, *_ in meter.waiting(view_batches(photos, views, order, **options)):
        way(images)
    return meter.read()["data_wait_share"]


def matmul_peak(device: str) -> float:
    """Operations per second of large bfloat16 matrix products; on a GPU larger ones, several of
    them between two waits.
    """
    size, times = (8192, 10) if device == "cuda" else (2048, 1)
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)

    def products():
        for _ in range(times):
            a @ a

    return 2 * times * size**3 / compare({"": products}, device, 5)[""]


def ours_stage_3(refiner, index):
    groups = [
        *layer_decay_groups(refiner.encoder, 0.05, 0.65),
        {"params": list(refiner.heads.parameters())},
    ]
    optimizer = adamw(groups)

    def run(views):
        optimizer.zero_grad()
        forward_backward(refiner, (views, index, None), top_k=1)
        optimizer.step()

    return run


def block_features(refiner, views, device: str) -> list[list]:
    """cls features [view][head], one view at a time, by timm's own means."""
    with torch.autocast(device, torch.bfloat16):
        outputs = [
            refiner.encoder.forward_intermediates(
                x,
                indices=list(refiner.blocks),
                return_prefix_tokens=True,
                output_fmt="NLC",
                intermediates_only=True,
            )
            for x in views
        ]
    return [[prefix[:, 0] for _, prefix in view] for view in outputs]


def plain_stage_3(refiner, index, device: str):
    """One view and one head at a time, one backward pass."""
    heads = separate_heads(refiner, device)
    optimizer = adamw(
        [*refiner.encoder.parameters(), *(x for head in heads for x in head.parameters())]
    )

    def run(views):
        features = block_features(refiner, views, device)
        z, p = [], []
        with torch.autocast(device, torch.bfloat16):
            for h, head in enumerate(heads):
                both = head(torch.cat([view[h] for view in features])[:, None])
                z.append(
                    both[0][:, 0].unflatten(0, (len(views), -1)).transpose(0, 1)[:, :2].float()
                )
                p.append(both[1][:, 0].unflatten(0, (len(views), -1)).transpose(0, 1).float())
        z, p = torch.stack(z).detach(), torch.stack(p)
        optimizer.zero_grad()
        looped_loss(z, p, index, refiner.queue.z, refiner.queue.index, 0.2).sum().backward()
        optimizer.step()
        refiner.queue.enqueue(z[:, :, 0], index)

    return run


def lightly_stage_3(refiner, device: str):
    """Projection and prediction heads, memory bank and loss of lightly, for the same heads and
    pairs of views. (Its loss takes negatives from both sides.)
    """
    from lightly.loss import NTXentLoss
    from lightly.models.modules import NNCLRPredictionHead, NNCLRProjectionHead, NNMemoryBankModule

    dim, criterion = refiner.encoder.embed_dim, NTXentLoss(temperature=0.2)
    parts = [
        torch.nn.ModuleList(
            [
                NNCLRProjectionHead(dim, 2048, 256),
                NNCLRPredictionHead(256, 4096, 256),
                NNMemoryBankModule((refiner.queue.size, 256)),
            ]
        ).to(device)
        for _ in refiner.blocks
    ]
    optimizer = adamw(
        [*refiner.encoder.parameters(), *(x for part in parts for x in part.parameters())]
    )

    def run(views):
        features, losses = block_features(refiner, views, device), []
        for h, (project, predict, bank) in enumerate(parts):
            with torch.autocast(device, torch.bfloat16):
                z = project(torch.cat([view[h] for view in features]))
                p = predict(z).float().chunk(len(views))
            z = z.detach().float().chunk(len(views))
            neighbours = [bank(z[a], update=a == 0) for a in range(2)]
            losses += [
                criterion(neighbours[a], p[b])
                for a in range(2)
                for b in range(len(views))
                if a != b
            ]
        optimizer.zero_grad()
        (sum(losses) / (2 * len(views) - 2)).backward()
        optimizer.step()

    return run


def attention(device: str, small: bool, repeats: int) -> None:
    """Pre-training steps with plain and with fused attention: ViT-Tiny/8 at 64 px, batch 128,
    bfloat16.
    """
    images = torch.randn(128, 3, 64, 64, device=device)
    for method, ratio in (("mae", 0.75), ("simmim", 0.6)):
        vit = mr.build_vit(
            mr.ViTConfig(image_size=64, patch_size=8, dim=192, depth=12, num_heads=3)
        )
        config = mr.PretrainConfig(method=method, mask_ratio=ratio, decoder_dim=96)
        model, mask = (
            build_masked_model(vit, config).to(device).train(),
            random_mask(128, 64, ratio).to(device),
        )

        def run(context, model=model, mask=mask):
            with context:
                with torch.autocast(device, torch.bfloat16):
                    loss = model(images, mask)
                model.zero_grad()
                loss.backward()

        ways = {
            "plain": lambda run=run, model=model: run(plain_attention(model, torch.device(device))),
            "fused": lambda run=run: run(nullcontext()),
        }
        table(f"attention in a {method} step, {device}", compare(ways, device, repeats))


def compiled(device: str, small: bool, repeats: int) -> None:
    """Forward and backward of ViT-S/16 (``small``: two blocks) over both crop sizes, as it is and
    by ``torch.compile``.
    """
    depth = 2 if small else 12
    vit = (
        mr.build_vit(mr.ViTConfig(image_size=224, patch_size=16, dim=384, depth=depth, num_heads=6))
        .to(device)
        .train()
    )
    views = [torch.randn(n, 3, size, size, device=device) for n, size in ((4, 224), (20, 96))]

    def run(forward):
        with torch.autocast(device, torch.bfloat16):
            loss = sum(forward(x)[:, 0].float().square().mean() for x in views)
        loss.backward()

    with plain_attention(vit, torch.device(device)):
        fast, began = torch.compile(vit.forward_features), time.perf_counter()
        run(fast)
        print(f"compiling took {time.perf_counter() - began:.0f} s")
        ways = {"as it is": lambda: run(vit.forward_features), "compiled": lambda: run(fast)}
        table(f"{depth} blocks of ViT-S/16, {device}", compare(ways, device, repeats))


def augment(device: str, small: bool, repeats: int) -> None:
    """(d) Views per second of the batched photometric part, against torchvision's transforms image
    by image; and of whole views of images in memory, whose crops are cut for the batch on the
    device or image by image by Pillow.
    """
    from torchvision.transforms import v2

    batch, crop = (32 if small else 256), paper_views().global_crops[0]
    x, u = torch.rand(batch, 3, crop.size, crop.size), torch.rand(batch, DRAWS)
    single = v2.Compose(
        [
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
            v2.RandomGrayscale(0.2),
            v2.GaussianBlur(13, (0.1, 2.0)),
        ]
    )
    on_device = x.to(device)
    ways = {
        f"batched, {device}": lambda: photometric(on_device[None], [crop], u[:, None]),
        "torchvision, one by one, cpu": lambda: [single(i) for i in x],
    }
    seconds = compare(ways, device, repeats)
    table(f"(d) photometric part of {batch} global views of {crop.size} px", seconds)
    print(
        "\n"
        + "; ".join(
            f"{name}: {batch / value:.0f} views per second" for name, value in seconds.items()
        )
    )

    views, batch = small_views(64, 8), 128
    photos = mr.load_dataset("fruit64", split="train").in_memory()
    keys = [[(0, i) for i in range(batch)]]

    def finish(batches) -> None:
        for crops, draws, *_ in batches:
            for cut, group in zip(crops, size_groups(views), strict=True):
                photometric(cut, views.crops[group], draws[:, group])

    where = torch.device(device)
    ways = {
        f"crops for the whole batch, {device}": lambda: finish(
            resident_crops(photos.pixels, photos.labels, views, iter(keys), 0, where)
        ),
        "crops by Pillow, cpu": lambda: finish(
            loaded_crops(photos, views, iter(keys), 0, where, 0)
        ),
    }
    seconds = compare(ways, device, repeats)
    table(
        f"(d) {len(views.crops)} views of {batch} images of 64 px in memory, "
        f"photometric part on {device}",
        seconds,
    )
    print(
        "\n"
        + "; ".join(
            f"{name}: {batch * len(views.crops) / value:.0f} views per second"
            for name, value in seconds.items()
        )
    )


def memory(device: str, small: bool, repeats: int) -> None:
    """(e) Bytes of the queue, and bytes that the graph holds with and without the options that save
    memory.
    """

    def resident() -> float:
        if device == "cuda":
            return torch.cuda.memory_allocated() / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    before = resident()
    queue = NNQueue(8, 16384 if small else 65536, 256).to(device)
    held = resident() - before
    formula = 2 * queue.z.nbytes / 2**20
    print(
        f"\n(e) queue {tuple(queue.z.shape)}: resident {held:.0f} MiB; "
        f"two copies (stored and normalised) {formula:.0f} MiB\n"
    )
    refiner, views, _ = refiner_and_views(device, small)
    print("| options | MiB held for the backward pass | formula |\n|---|---|---|")
    vit = refiner.encoder
    side, patch = views[0].shape[-1], vit.patch_embed.patch_size[0]
    shape = ViTShape(side, patch, vit.embed_dim, refiner.depth, 1, 4 * vit.embed_dim)
    for frozen, recompute in ((0, False), (6, False), (0, True), (6, True)):
        for i, block in enumerate(refiner.encoder.blocks):
            block.requires_grad_(i >= frozen)
        refiner.encoder.patch_embed.requires_grad_(frozen == 0)
        refiner.encoder.cls_token.requires_grad_(frozen == 0)
        refiner.encoder.pos_embed.requires_grad_(frozen == 0)
        storages: dict[int, int] = {}
        parameters = {x.untyped_storage().data_ptr() for x in refiner.parameters()}

        def pack(x, storages=storages, parameters=parameters):
            if x.untyped_storage().data_ptr() not in parameters:
                storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
        with hooks, torch.autocast(device, torch.bfloat16):
            if recompute:
                with recomputed(refiner.encoder):
                    features = refiner.features(views)
            else:
                features = refiner.features(views)
        kept = sum(cost.kept_bytes(shape, x.shape[-1], recompute=recompute) for x in views)
        formula = len(views[0]) * kept * (1 - frozen / refiner.depth) / 2**20
        print(
            f"| frozen blocks {frozen}, recompute {recompute} "
            f"| {sum(storages.values()) / 2**20:.0f} | {formula:.0f} |"
        )
        del features


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "what",
        choices=(
            "loss",
            "step",
            "processes",
            "refine",
            "augment",
            "memory",
            "attention",
            "compiled",
        ),
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--vit", choices=VITS, default="s16", help="of refine")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # one way of "refine", for its memory
    args = parser.parse_args()
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads")
    options = {"vit": args.vit, "only": args.only} if args.what == "refine" else {}
    globals()[args.what](args.device, args.small, args.repeats, **options)
