"""How well every block's tokens can be turned back into pixels: a light decoder on each block of a
frozen encoder.

The paper's second curve (Figure 3; ``mae_decoder_per_block.py`` of the released code): decoders of
two transformer blocks, one per encoder block, trained together with MAE's loss on masked patches.
"""

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from mimrefiner.config import Crop, Views
from mimrefiner.data.views import view_batches
from mimrefiner.device import frozen
from mimrefiner.models.encoders import eval_transform, normalisation
from mimrefiner.models.masked import Decoder, masked_pixel_loss, random_mask, visible_tokens
from mimrefiner.probes.checks import tidy
from mimrefiner.probes.features import Transformed
from mimrefiner.progress import progress
from mimrefiner.training.refine import cosine_lr


class DecoderPerBlock(nn.Module):
    """A frozen encoder, fed with visible patches, and one decoder per block.

    Args:
        encoder: a timm VisionTransformer; its weights are not changed.
        depth, dim, heads: of each decoder (paper: 2, 512, 16).
        seed: of the decoders' weights.
    """

    def __init__(
        self, encoder: nn.Module, *, depth: int = 2, dim: int = 512, heads: int = 16, seed: int = 0
    ):
        super().__init__()
        self.encoder = encoder
        self.patch, grid = encoder.patch_embed.patch_size[0], encoder.patch_embed.grid_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            decoders = [
                Decoder(encoder.embed_dim, depth, dim, heads, grid, self.patch, first_norm=True)
                for _ in range(len(encoder.blocks))
            ]
        self.decoders = nn.ModuleList(decoders)

    def predict(self, images: Tensor, mask: Tensor) -> list[Tensor]:
        """Normalised pixels of every patch from every block, (batch, patches, patch * patch * 3)
        each.
        """
        with torch.no_grad():
            x, visible = visible_tokens(self.encoder, images, mask)
            tokens = [x := block(x) for block in self.encoder.blocks]
        prefix = self.encoder.num_prefix_tokens
        return [
            decoder(x, visible, mask.shape[1], prefix)
            for decoder, x in zip(self.decoders, tokens, strict=True)
        ]

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """MAE's loss per block, (blocks,)."""
        predicted = self.predict(images, mask)
        return torch.stack([masked_pixel_loss(p, images, mask, self.patch) for p in predicted])


def reconstruction(
    encoder: nn.Module,
    train: Dataset,
    test: Dataset,
    *,
    epochs: float = 20,
    batch_size: int = 256,
    base_lr: float = 1.5e-4,
    mask_ratio: float = 0.75,
    depth: int = 2,
    dim: int = 512,
    heads: int = 16,
    flip: bool = True,
    seed: int = 0,
    device: torch.device | str = "cpu",
    num_workers: int = 0,
) -> tuple[pd.DataFrame, DecoderPerBlock]:
    """Train a decoder on every block and measure its loss on ``test`` (lower is better).

    Args:
        encoder: frozen; a timm VisionTransformer.
        train, test: map-style, (image, label); labels are not used. Test images are resized and cut
            at the centre, and every one is masked once, by ``seed``.
        epochs, batch_size, base_lr: AdamW (0.9, 0.95), weight decay 0.05, a quarter of the epochs
            up, then cosine to 1e-6; the rate is ``base_lr * batch_size / 256``.
        mask_ratio: share of masked patches.
        depth, dim, heads: of each decoder; the defaults are the paper's.
        flip: whether training images are mirrored at random; False where that changes what they
            are, as with digits.

    Returns:
        One row per block (metric "masked_mse", columns as
        :data:`mimrefiner.probes.checks.COLUMNS`), and the trained decoders.
    """
    device = torch.device(device)
    with frozen(encoder, device):
        model = DecoderPerBlock(encoder, depth=depth, dim=dim, heads=heads, seed=seed).to(device)
        size = encoder.patch_embed.img_size[0]
        patches = (size // model.patch) ** 2
        mean, std = normalisation(encoder)
        crop = Crop(size, (0.2, 1.0), flip_p=0.5 * flip, jitter_p=0.0, grey_p=0.0)
        batch_size = min(batch_size, len(train))
        steps = max(1, round(epochs * (len(train) // batch_size)))
        optimizer = torch.optim.AdamW(
            model.decoders.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.05, fused=True
        )
        batches = view_batches(
            train,
            Views((crop,), crop, 0),
            batch_size=batch_size,
            steps=steps,
            seed=seed,
            mean=mean,
            std=std,
            device=device,
            num_workers=num_workers,
        )
        generator = torch.Generator().manual_seed(seed)
        for step, (views, _, _) in enumerate(progress(batches, "decoder per block", steps)):
            for group in optimizer.param_groups:
                group["lr"] = cosine_lr(step, steps, steps / 4, base_lr * batch_size / 256, 1e-6)
            loss = model(
                views[0], random_mask(len(views[0]), patches, mask_ratio, generator).to(device)
            )
            optimizer.zero_grad()
            loss.sum().backward()  # every decoder sees its own gradient only
            optimizer.step()
        model.eval()
        value = held_out_loss(model, test, mask_ratio=mask_ratio, seed=seed, device=device)
    rows = [
        {
            "block": block,
            "pool": "tokens",
            "protocol": "decoder_per_block",
            "metric": "masked_mse",
            "seed": seed,
            "value": x,
            "n_train": len(train),
            "n_test": len(test),
            "setting": f"mask={mask_ratio:g}",
        }
        for block, x in enumerate(value.tolist())
    ]
    return tidy(rows), model


@torch.no_grad()
def held_out_loss(
    model: DecoderPerBlock, dataset: Dataset, *, mask_ratio: float, seed: int, device: torch.device
) -> Tensor:
    """Mean loss per block over a data set, (blocks,)."""
    generator = torch.Generator().manual_seed(seed)
    total, n = torch.zeros(len(model.decoders)), 0
    for images, _ in DataLoader(Transformed(dataset, eval_transform(model.encoder)), 256):
        patches = (images.shape[-1] // model.patch) ** 2
        mask = random_mask(len(images), patches, mask_ratio, generator).to(device)
        total += len(images) * model(images.to(device), mask).cpu()
        n += len(images)
    return total / n


def relative_improvement(values) -> np.ndarray:
    """Change from block to block as a share of the whole range, (blocks - 1,): (v_b - v_{b-1}) /
    (max - min).

    Our reading of the paper's Figure 3(d), whose text does not define "relative"; give losses with
    their sign turned.
    """
    values = np.asarray(values, float)
    spread = values.max() - values.min()
    return np.diff(values) / spread if spread > 0 else np.zeros(len(values) - 1)
