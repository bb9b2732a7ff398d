"""Masked-image pre-training of timm ViTs: SimMIM and MAE.

Both share masks, targets and the patch layout; they differ in what the encoder sees. Positions that are added to the patch
embeddings are supported (``VisionTransformer``), rotary ones are not.
"""

import timm.layers
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mimrefiner.config import PretrainConfig
from mimrefiner.errors import InputError


def patchify(images: Tensor, patch: int) -> Tensor:
    """(batch, 3, height, width) -> (batch, patches, patch * patch * 3), rows first."""
    b, c, h, w = images.shape
    x = images.view(b, c, h // patch, patch, w // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, (h // patch) * (w // patch), patch * patch * c)


def unpatchify(patches: Tensor, patch: int) -> Tensor:
    """The inverse of :func:`patchify` for square images."""
    b, n, _ = patches.shape
    side = int(n**0.5)
    x = patches.view(b, side, side, patch, patch, 3)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, 3, side * patch, side * patch)


def random_mask(batch: int, patches: int, ratio: float, generator: torch.Generator | None = None) -> Tensor:
    """(batch, patches) bool on the CPU, True where masked; every row has ``round(ratio * patches)`` of them, at least one."""
    masked = min(patches - 1, max(1, round(ratio * patches)))
    noise = torch.rand(batch, patches, generator=generator)
    return noise.argsort(1).argsort(1) < masked


def normalise_patches(patches: Tensor) -> Tensor:
    """Every patch to mean 0 and variance 1 (MAE's target; unbiased variance, eps 1e-6)."""
    mean, var = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
    return (patches - mean) / (var + 1e-6).sqrt()


class SimMIM(nn.Module):
    """SimMIM (arXiv 2111.09886): mask tokens pass the encoder, a linear head predicts the pixels of masked patches, L1 loss."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        _check_encoder(encoder)
        self.encoder = encoder
        self.patch = encoder.patch_embed.patch_size[0]
        self.mask_token = nn.Parameter(torch.zeros(encoder.embed_dim))
        self.head = nn.Linear(encoder.embed_dim, self.patch**2 * 3)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def predict(self, images: Tensor, mask: Tensor) -> Tensor:
        """Predicted pixels of every patch, (batch, patches, patch * patch * 3)."""
        x = self.encoder.patch_embed(images)  # (batch, rows, columns, dim) with dynamic sizes, else (batch, patches, dim)
        x = torch.where(mask.view(*x.shape[:-1], 1), self.mask_token.to(x.dtype), x)
        x = self.encoder.norm_pre(self.encoder._pos_embed(x))
        x = self.encoder.norm(self.encoder.blocks(x))
        return self.head(x[:, self.encoder.num_prefix_tokens :])

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """Mean absolute error over the pixels of masked patches; ``mask`` as from :func:`random_mask`."""
        error = (self.predict(images, mask).float() - patchify(images, self.patch)).abs().mean(-1)
        return (error * mask).sum() / mask.sum()


class MAE(nn.Module):
    """MAE (arXiv 2111.06377): the encoder sees visible patches, a decoder rebuilds the masked ones, MSE on normalised patches."""

    def __init__(self, encoder: nn.Module, decoder_depth: int, decoder_dim: int, decoder_heads: int):
        super().__init__()
        _check_encoder(encoder)
        self.encoder = encoder
        self.patch = encoder.patch_embed.patch_size[0]
        self.embed = nn.Linear(encoder.embed_dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(decoder_dim))
        self.register_buffer("positions", _sincos_positions(encoder.patch_embed.grid_size, decoder_dim), persistent=False)
        self.decoder = nn.Sequential(*(Block(decoder_dim, decoder_heads, qkv_bias=True) for _ in range(decoder_depth)))
        self.norm = nn.LayerNorm(decoder_dim)
        self.head = nn.Linear(decoder_dim, self.patch**2 * 3)
        nn.init.normal_(self.mask_token, std=0.02)
        timm.models.vision_transformer.init_weights_vit_timm(self.head)

    def predict(self, images: Tensor, mask: Tensor) -> Tensor:
        """Predicted normalised pixels of every patch, (batch, patches, patch * patch * 3)."""
        prefix = self.encoder.num_prefix_tokens
        x = self.encoder._pos_embed(self.encoder.patch_embed(images))  # (batch, prefix + patches, dim)
        order = mask.int().argsort(dim=1, stable=True)  # visible patches first
        visible = order[:, : int((~mask[0]).sum()), None]
        patches = x[:, prefix:].gather(1, visible.expand(-1, -1, x.shape[-1]))
        x = self.encoder.norm_pre(torch.cat([x[:, :prefix], patches], 1))
        x = self.embed(self.encoder.norm(self.encoder.blocks(x)))

        tokens = self.mask_token.to(x.dtype).expand(*mask.shape, -1)
        tokens = tokens.scatter(1, visible.expand(-1, -1, x.shape[-1]), x[:, prefix:]) + self.positions.to(x.dtype)
        x = self.norm(self.decoder(torch.cat([x[:, :prefix], tokens], 1)))
        return self.head(x[:, prefix:])

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """Mean squared error over the normalised pixels of masked patches."""
        error = (self.predict(images, mask).float() - normalise_patches(patchify(images, self.patch))).square().mean(-1)
        return (error * mask).sum() / mask.sum()


def build_masked_model(encoder: nn.Module, config: PretrainConfig) -> SimMIM | MAE:
    """The pre-training model around ``encoder``; new weights are drawn from ``config.seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if config.method == "simmim":
            return SimMIM(encoder)
        return MAE(encoder, config.decoder_depth, config.decoder_dim, config.decoder_heads)


def _check_encoder(encoder: nn.Module) -> None:
    if not hasattr(encoder, "_pos_embed") or getattr(encoder, "rope", None) is not None:
        raise InputError(f"masked pre-training needs a timm VisionTransformer with added positions, got {type(encoder).__name__}")


def _sincos_positions(grid: tuple[int, int], dim: int) -> Tensor:
    """Two-dimensional sine-cosine positions (MAE, ``util/pos_embed.py``), (patches, dim)."""
    if dim % 4:
        raise InputError(f"the decoder's width must be divisible by 4, got {dim}")
    omega = 1.0 / 10000 ** (torch.arange(dim // 4) / (dim // 4))
    y, x = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    angles = torch.stack([x.flatten(), y.flatten()], 1)[..., None] * omega  # (patches, 2, dim / 4)
    return torch.cat([angles.sin(), angles.cos()], -1).flatten(1)
