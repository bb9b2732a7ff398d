"""How well every block's tokens can be turned back into pixels, by a light decoder on each block.

This is the paper's second curve (Figure 3; ``mae_decoder_per_block.py`` of the released code):
decoders of two transformer blocks, one per block of the frozen encoder, are trained together with
MAE's loss on masked patches.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from mimrefiner.data.augment import plain_views
from mimrefiner.data.views import Order, view_batches
from mimrefiner.device import frozen, seeded, to_device
from mimrefiner.models.encoders import eval_transform, normalisation
from mimrefiner.models.masked import Decoder, masked_pixel_loss, random_mask, visible_tokens
from mimrefiner.probes.checks import tidy
from mimrefiner.probes.features import Transformed
from mimrefiner.probes.protocols import DECODER
from mimrefiner.progress import progress
from mimrefiner.training.optim import cosine_lr


@dataclass(frozen=True)
class DecoderConfig:
    """The decoders and how they are trained; the defaults are the paper's.

    Attributes:
        depth, dim, heads: blocks, width and attention heads of each decoder.
        epochs, batch_size, base_lr: AdamW (0.9, 0.95), weight decay 0.05; the rate rises for a
            quarter of the epochs to ``base_lr * batch_size / 256`` and falls by a cosine to 1e-6.
        mask_ratio: share of masked patches.
        flip: whether training images are mirrored at random; False where that changes what they
            are, as with digits.
        seed: draws weights, order, crops and masks.
    """

    depth: int = 2
    dim: int = 512
    heads: int = 16
    epochs: float = 20
    batch_size: int = 256
    base_lr: float = 1.5e-4
    mask_ratio: float = 0.75
    flip: bool = True
    seed: int = 0


class DecoderPerBlock(nn.Module):
    """A frozen encoder, fed with visible patches, and one decoder per block.

    Args:
        encoder: a timm VisionTransformer; its weights are not changed.
        config: the decoders' size and the seed that draws their weights.
    """

    def __init__(self, encoder: nn.Module, config: DecoderConfig):
        super().__init__()
        self.encoder = encoder
        self.patch, grid = encoder.patch_embed.patch_size[0], encoder.patch_embed.grid_size
        size = config.depth, config.dim, config.heads
        with seeded(config.seed):
            decoders = [
                Decoder(encoder.embed_dim, *size, grid, self.patch, first_norm=True)
                for _ in encoder.blocks
            ]
        self.decoders = nn.ModuleList(decoders)

    def predict(self, images: Tensor, mask: Tensor) -> list[Tensor]:
        """Normalised pixels of every patch, (batch, patches, patch * patch * 3) per block."""
        with torch.no_grad():
            x, visible = visible_tokens(self.encoder, images, mask)
            tokens = [x := block(x) for block in self.encoder.blocks]
        prefix = self.encoder.num_prefix_tokens
        return [
            decoder(x, visible, mask.shape[1], prefix)
            for decoder, x in zip(self.decoders, tokens, strict=True)
        ]

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """MAE's loss per block, (blocks,); with ``mask`` on the CPU nothing waits for the GPU."""
        predicted = self.predict(images, mask)
        mask = to_device(mask, images.device)
        return torch.stack([masked_pixel_loss(p, images, mask, self.patch) for p in predicted])


def reconstruction(
    encoder: nn.Module,
    train: Dataset,
    test: Dataset,
    config: DecoderConfig | None = None,
    *,
    device: torch.device | str = "cpu",
    num_workers: int = 0,
) -> tuple[pd.DataFrame, DecoderPerBlock]:
    """Train a decoder on every block and measure its loss on ``test`` (lower is better).

    Args:
        encoder: frozen; a timm VisionTransformer.
        train, test: map-style, (image, label); labels are not used. Test images are resized and cut
            at the centre, and every one is masked once, by the seed.
        config: None takes the paper's.
        device: where the encoder runs and the decoders are trained.
        num_workers: processes that load and crop training images.

    Returns:
        One row per block (metric "masked_mse", columns as
        :data:`mimrefiner.probes.checks.COLUMNS`), and the trained decoders, beside the encoder.
    """
    config, device = config or DecoderConfig(), torch.device(device)
    with frozen(encoder, device):
        model = DecoderPerBlock(encoder, config).to(device)
        _train(model, train, config, device, num_workers)
        model.eval()
        losses = held_out_loss(model, test, config, device)
    model.to(next(encoder.parameters()).device)  # the encoder has returned to where it was
    common = {"pool": "tokens", "protocol": DECODER.name, "metric": "masked_mse"}
    common |= {"seed": config.seed, "n_train": len(train), "n_test": len(test)}
    common |= {"setting": f"mask={config.mask_ratio:g}"}
    rows = [{**common, "block": block, "value": x} for block, x in enumerate(losses.tolist())]
    return tidy(rows), model


def _train(
    model: DecoderPerBlock,
    train: Dataset,
    config: DecoderConfig,
    device: torch.device,
    num_workers: int,
) -> None:
    size = model.encoder.patch_embed.img_size[0]
    batch_size = min(config.batch_size, len(train))
    steps = max(1, round(config.epochs * (len(train) // batch_size)))
    mean, std = normalisation(model.encoder)
    batches = view_batches(
        train,
        plain_views(size, (0.2, 1.0), config.flip),
        Order(batch_size, steps, config.seed),
        mean=mean,
        std=std,
        device=device,
        num_workers=num_workers,
    )
    optimizer = torch.optim.AdamW(
        model.decoders.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.05, fused=True
    )
    peak = config.base_lr * batch_size / 256
    patches, generator = (size // model.patch) ** 2, torch.Generator().manual_seed(config.seed)
    for step, (views, _, _) in enumerate(progress(batches, "decoder per block", steps)):
        for group in optimizer.param_groups:
            group["lr"] = cosine_lr(step, steps, steps / 4, peak, 1e-6)
        mask = random_mask(len(views[0]), patches, config.mask_ratio, generator)
        loss = model(views[0], mask)
        optimizer.zero_grad()
        loss.sum().backward()  # every decoder sees its own gradient only
        optimizer.step()


@torch.no_grad()
def held_out_loss(
    model: DecoderPerBlock, dataset: Dataset, config: DecoderConfig, device: torch.device
) -> Tensor:
    """Mean loss per block over a data set, (blocks,)."""
    generator = torch.Generator().manual_seed(config.seed)
    total, n = torch.zeros(len(model.decoders)), 0
    for images, _ in DataLoader(Transformed(dataset, eval_transform(model.encoder)), 256):
        patches = (images.shape[-1] // model.patch) ** 2
        mask = random_mask(len(images), patches, config.mask_ratio, generator)
        total += len(images) * model(images.to(device), mask).cpu()
        n += len(images)
    return total / n


def relative_improvement(values) -> np.ndarray:
    """Change from block to block as a share of the whole range, (blocks - 1,).

    (v_b - v_{b-1}) / (max - min) is our reading of the paper's Figure 3(d), whose text does not
    define "relative"; give losses with their sign turned.

    >>> relative_improvement([0.0, 3.0, 4.0]).tolist()
    [0.75, 0.25]
    """
    values = np.asarray(values, float)
    spread = values.max() - values.min()
    return np.diff(values) / spread if spread > 0 else np.zeros(len(values) - 1)
