"""How fast training is, as ratios measured side by side in one run, and what bounds it.

    python tests/benchmarks/training.py loss|step|augment|memory [--device cuda] [--small]

Each comparison alternates between the two ways and prints medians. ``--small`` is for machines with little memory or time; the
sizes in use are printed. Results are kept in docs/scaling.md.
"""

import argparse
import resource
import statistics
import time

import torch
import torch.nn.functional as F

import mimrefiner as mr
from mimrefiner.augment import DRAWS, paper_views, photometric
from mimrefiner.heads import Heads
from mimrefiner.losses import multi_view_nna_loss
from mimrefiner.nn_queue import NNQueue
from mimrefiner.train import forward_backward, recomputed


def compare(ways: dict, device: str, repeats: int) -> dict[str, float]:
    """Median seconds of every function in ``ways``, called in turns after one warm-up each."""
    seconds = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def table(title: str, seconds: dict[str, float]) -> None:
    first = next(iter(seconds.values()))
    print(f"\n{title}\n")
    print("| way | seconds | relative to the first |\n|---|---|---|")
    for name, value in seconds.items():
        print(f"| {name} | {value:.3f} | {value / first:.2f} |")


def looped_loss(z, p, index, queue_z, queue_index, temperature):
    """One head and one pair of views at a time, the queue normalised on every call: (heads,) losses."""
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
                    terms.append(F.cross_entropy(logits, torch.arange(len(logits), device=logits.device)))
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

    values = [multi_view_nna_loss(z, queue.lookup(z, index), p), looped_loss(z, p, index, queue.z, queue.index, 0.2)]
    assert torch.allclose(*values, rtol=1e-4)
    ways = {"batched": batched, "one head and pair at a time": looped, "batched, lookup alone": lambda: queue.lookup(z, index)}
    title = f"(a) loss and queue, {heads} heads, batch {batch}, {views} views, dim {dim}, queue {size}, {device}"
    table(title, compare(ways, device, repeats))


def refiner_and_views(device: str, small: bool):
    """ViT and batch for (b) and (e)."""
    size, local, batch = (64, 32, 16) if small else (224, 96, 64)
    dim, depth, heads = (192, 12, 3) if small else (384, 12, 6)
    vit = mr.build_vit(mr.ViTConfig(image_size=size, patch_size=16, dim=dim, depth=depth, num_heads=heads))
    config = mr.RefineConfig(
        views=paper_views(size, local), blocks=tuple(range(depth - 8, depth)), batch_size=batch, queue_size=8192 if small else 65536
    )
    refiner = mr.MIMRefiner(vit, config).to(device).train()
    views = [torch.randn(batch, 3, crop.size, crop.size, device=device) for crop in config.views.crops]
    return refiner, views, torch.arange(batch, device=device)


def step(device: str, small: bool, repeats: int) -> None:
    """(b) Whole stage-2 and stage-3 steps."""
    refiner, views, index = refiner_and_views(device, small)
    single = [Heads(1, refiner.encoder.embed_dim).to(device) for _ in refiner.blocks]  # separate modules for the loop
    for head, one in enumerate(single):
        one.load_state_dict(
            {
                name: x[head : head + 1] if x.ndim == 3 else x.unflatten(0, (len(single), -1))[head] if x.ndim else x
                for name, x in refiner.heads.state_dict().items()
            }
        )

    def ours():
        refiner.zero_grad()
        forward_backward(refiner, views, index, top_k=1)

    def looped():
        refiner.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            features = refiner.features(views)
            outputs = [one(features[:, :, head : head + 1].flatten(0, 1)) for head, one in enumerate(single)]
            z, p = (
                torch.cat([o[i].transpose(0, 1) for o in outputs]).unflatten(1, (len(views), -1)).transpose(1, 2).float()
                for i in range(2)
            )
            total = looped_loss(z[:, :, :2].detach(), p, index, refiner.queue.z, refiner.queue.index, 0.2).sum()
        total.backward()

    for stage in (2, 3):
        refiner.encoder.requires_grad_(stage == 3)
        encoder = refiner.encoder
        title = (
            f"(b) stage-{stage} step, ViT dim {encoder.embed_dim}, depth {len(encoder.blocks)}, {views[0].shape[-1]} px, "
            f"{len(refiner.blocks)} heads, batch {len(index)}, 12 views, queue {refiner.queue.size}, {device}"
        )
        table(title, compare({"mimrefiner": ours, "one head and pair at a time": looped}, device, repeats))


def augment(device: str, small: bool, repeats: int) -> None:
    """(d) Views per second of the batched photometric part; against torchvision's transforms, image by image."""
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
        f"batched, {device}": lambda: photometric(on_device, crop, u),
        "torchvision, one by one, cpu": lambda: [single(i) for i in x],
    }
    seconds = compare(ways, device, repeats)
    table(f"(d) photometric part of {batch} global views of {crop.size} px", seconds)
    print("\n" + "; ".join(f"{name}: {batch / value:.0f} views per second" for name, value in seconds.items()))


def memory(device: str, small: bool, repeats: int) -> None:
    """(e) Bytes of the queue, and bytes that the graph holds with and without the options that save memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    queue = NNQueue(8, 16384 if small else 65536, 256)
    held = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    formula = 2 * queue.z.nbytes / 2**20
    print(f"\n(e) queue {tuple(queue.z.shape)}: resident {held:.0f} MiB; two copies (stored and normalised) {formula:.0f} MiB\n")
    refiner, views, _ = refiner_and_views(device, small)
    print("| options | MiB held for the backward pass |\n|---|---|")
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
        print(f"| frozen blocks {frozen}, recompute {recompute} | {sum(storages.values()) / 2**20:.0f} |")
        del features


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("loss", "step", "augment", "memory"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads")
    globals()[args.what](args.device, args.small, args.repeats)
