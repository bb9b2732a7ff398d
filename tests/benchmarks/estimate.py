"""What a user of a GPU would see, estimated: ``python -m tests.benchmarks.estimate``.

Nothing is measured: a step takes the longer of what the host needs for its launches and what the
card needs for operations and memory traffic.
"""

from dataclasses import dataclass

import mimrefiner as mr
from mimrefiner.models.layouts import ViTShape
from mimrefiner.study.plan import TRAINING_IMAGES
from mimrefiner.study.presets import Preset
from mimrefiner.training import cost
from mimrefiner.training.optim import stage_steps

LAUNCH = 6e-6  # seconds of host time a launch, Python and torch included
LAUNCHES = {"MAE": 812, "stage 2": 1264, "stage 3": 1926}  # tests/test_on_pretend_gpu.py: BOUNDS
# Bytes that training moves per token, block and channel under autocast, forward and back: each
# intermediate result is written once and read once or twice
TRAFFIC = 350
REACHED = 0.4  # share of a card's peaks, of operations as of bandwidth: an assumption


@dataclass(frozen=True)
class Card:
    """A GPU: operations and bytes per second at its peak, by its data sheet.

    Without bfloat16 (``half``) training is in float32, which moves twice the bytes.
    """

    flops: float
    bytes: float
    half: bool = True


CARDS = {
    "H200": Card(990e12, 4.8e12),
    "A100 80 GB": Card(312e12, 2.0e12),
    "T4": Card(8.1e12, 0.32e12, half=False),
}


def stages(preset: Preset) -> dict[str, tuple[float, float, int, int]]:
    """stage -> operations and bytes of a step, its images, steps."""
    e, first, then = preset.encoder, preset.pretrain, preset.refine
    s = ViTShape(e.image_size, e.patch_size, e.dim, e.depth, e.num_heads, 4 * e.dim)
    images = TRAINING_IMAGES[preset.dataset.removeprefix("parquet:")]
    patches, found = (e.image_size // e.patch_size) ** 2, {}
    visible = round((1 - first.mask_ratio) * patches) + 1
    moved = visible * s.depth * s.dim + (patches + 1) * first.decoder_depth * first.decoder_dim
    flops = cost.pretrain_flops(s, first)
    found["MAE"] = _stage(flops, moved, first.batch_size, images, first.epochs)
    tokens = sum((crop.size // e.patch_size) ** 2 + 1 for crop in then.views.crops)
    shares = {"stage 2": 1 / 3, "stage 3": (s.depth - then.frozen_blocks * 2 / 3) / s.depth}
    for (name, share), epochs in zip(
        shares.items(), (then.heads_epochs, then.refine_epochs), strict=True
    ):
        flops = cost.step_flops(s, then, train_encoder=name == "stage 3")
        moved = share * tokens * s.depth * s.dim
        found[name] = _stage(flops, moved, then.batch_size, images, epochs)
    return found


def _stage(flops: float, moved: float, batch: int, images: int, epochs: float):
    return flops * batch, TRAFFIC * moved * batch, batch, stage_steps(images, batch, epochs)


def seconds(card: Card, name: str, flops: float, moved: float) -> float:
    """Of one step."""
    moved *= 1 if card.half else 2
    on_card = flops / (REACHED * card.flops) + moved / (REACHED * card.bytes)
    return max(LAUNCH * LAUNCHES[name], on_card)


def main() -> None:
    lines = ["| preset | stage | batch | steps | TFLOP a step | GB a step | launches, ms |"]
    lines[0] += "".join(f" {name}, ms |" for name in CARDS)
    lines.append("|" + "---|" * lines[0].count(" | ") + "---|")
    totals = []
    for preset in map(mr.load_preset, ("gpu", "natural-gpu")):
        spent = dict.fromkeys(CARDS, 0.0)
        for name, (flops, moved, batch, steps) in stages(preset).items():
            ms = [1e3 * seconds(card, name, flops, moved) for card in CARDS.values()]
            for key, value in zip(CARDS, ms, strict=True):
                # Two controls at the computation of the refinement
                spent[key] += value * steps / 6e4 * (1 if name == "MAE" else 3)
            cells = [preset.name, name, batch, f"{steps:,}", f"{flops / 1e12:.2f}"]
            cells += [f"{moved / 1e9:.0f}", f"{1e3 * LAUNCH * LAUNCHES[name]:.1f}"]
            cells += [f"{value:,.0f}" for value in ms]
            lines.append(f"| {' | '.join(map(str, cells))} |")
        totals.append(
            f"{preset.name}: "
            + ", ".join(f"{value:,.0f} minutes on {key}" for key, value in spent.items())
        )
    print("\n".join([*lines, "", "One seed with two controls: " + "; ".join(totals)]))


if __name__ == "__main__":
    main()
