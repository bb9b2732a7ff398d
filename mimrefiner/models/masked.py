"""Masked-image pre-training of timm ViTs: SimMIM and MAE.

Both share masks and the layout of patches; they differ in what the encoder sees. They need
positions that are added to the patch embeddings (``VisionTransformer``); rotary ones do not work.
"""

import timm.layers
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mimrefiner.config import PretrainConfig
from mimrefiner.device import seeded, to_device
from mimrefiner.errors import InputError


def patchify(images: Tensor, patch: int) -> Tensor:
    """(batch, 3, height, width) -> (batch, patches, patch * patch * 3), rows first.

    >>> images = torch.rand(1, 3, 4, 4)
    >>> torch.equal(unpatchify(patchify(images, 2), 2), images)
    True
    """
    b, c, h, w = images.shape
    x = images.view(b, c, h // patch, patch, w // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, (h // patch) * (w // patch), patch * patch * c)


def unpatchify(patches: Tensor, patch: int) -> Tensor:
    """The inverse of :func:`patchify` for square images."""
    b, n, _ = patches.shape
    side = int(n**0.5)
    x = patches.view(b, side, side, patch, patch, 3)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, 3, side * patch, side * patch)


def random_mask(
    batch: int, patches: int, ratio: float, generator: torch.Generator | None = None
) -> Tensor:
    """A random mask, (batch, patches) bool on the CPU, True where a patch is masked.

    In every row ``round(ratio * patches)`` patches are masked, at least one and not all.

    >>> random_mask(batch=2, patches=16, ratio=0.75).sum(1)
    tensor([12, 12])
    """
    masked = min(patches - 1, max(1, round(ratio * patches)))
    noise = torch.rand(batch, patches, generator=generator)
    return noise.argsort(1).argsort(1) < masked


def normalise_patches(patches: Tensor) -> Tensor:
    """Bring every patch to mean 0 and (unbiased) variance 1, with eps 1e-6: MAE's target."""
    mean, var = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
    return (patches - mean) / (var + 1e-6).sqrt()


class SimMIM(nn.Module):
    """SimMIM (arXiv 2111.09886): mask tokens pass the encoder, and a linear head predicts pixels.

    The loss is the mean absolute error over masked patches.
    """

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
        # (batch, rows, columns, dim) with dynamic sizes, else (batch, patches, dim)
        x = self.encoder.patch_embed(images)
        x = torch.where(mask.view(*x.shape[:-1], 1), self.mask_token.to(x.dtype), x)
        x = self.encoder.norm_pre(self.encoder._pos_embed(x))
        x = self.encoder.norm(self.encoder.blocks(x))
        return self.head(x[:, self.encoder.num_prefix_tokens :])

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """Mean absolute error over the pixels of masked patches, a scalar.

        Args:
            images: normalised images, (batch, 3, height, width).
            mask: see :func:`random_mask`; on the CPU nothing waits for the GPU.
        """
        mask = to_device(mask, images.device)
        error = (self.predict(images, mask).float() - patchify(images, self.patch)).abs().mean(-1)
        return (error * mask).sum() / mask.sum()


class Decoder(nn.Module):
    """MAE's light transformer, which predicts every patch from the tokens of some of them.

    Args:
        dim_in: width of the encoder's tokens.
        depth, dim, heads: blocks, width and attention heads of the decoder.
        grid: patches along height and width.
        patch: side of a patch in pixels.
        first_norm: begin with a LayerNorm, for tokens that have not passed one.
    """

    def __init__(
        self,
        dim_in: int,
        depth: int,
        dim: int,
        heads: int,
        grid: tuple[int, int],
        patch: int,
        *,
        first_norm=False,
    ):
        super().__init__()
        self.first_norm = nn.LayerNorm(dim_in) if first_norm else nn.Identity()
        self.embed = nn.Linear(dim_in, dim)
        self.mask_token = nn.Parameter(torch.zeros(dim))
        self.register_buffer("positions", _sincos_positions(grid, dim), persistent=False)
        self.blocks = nn.Sequential(*(Block(dim, heads, qkv_bias=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, patch**2 * 3)
        nn.init.normal_(self.mask_token, std=0.02)
        timm.models.vision_transformer.init_weights_vit_timm(self.head)

    def forward(self, x: Tensor, visible: Tensor | None, patches: int, prefix: int) -> Tensor:
        """Predicted pixels of every patch, (batch, patches, patch * patch * 3).

        Args:
            x: prefix tokens, then those of the visible patches, (batch, tokens, dim_in).
            visible: which patches these are, (batch, visible); None: all.
            patches: number of all patches; mask tokens stand for those that are not visible.
            prefix: number of prefix tokens.
        """
        x = self.embed(self.first_norm(x))
        tokens = x[:, prefix:]
        if visible is not None:
            where = visible[:, :, None].expand(-1, -1, x.shape[-1])
            tokens = (
                self.mask_token.to(x.dtype).expand(len(x), patches, -1).scatter(1, where, tokens)
            )
        tokens = tokens + self.positions.to(x.dtype)
        x = self.norm(self.blocks(torch.cat([x[:, :prefix], tokens], 1)))
        return self.head(x[:, prefix:])


class MAE(nn.Module):
    """MAE (arXiv 2111.06377): the encoder sees visible patches, a decoder rebuilds the masked ones.

    The loss is the mean squared error over normalised masked patches. For the decoder's arguments
    see :class:`Decoder`.
    """

    def __init__(
        self, encoder: nn.Module, decoder_depth: int, decoder_dim: int, decoder_heads: int
    ):
        super().__init__()
        _check_encoder(encoder)
        self.encoder = encoder
        self.patch = encoder.patch_embed.patch_size[0]
        grid = encoder.patch_embed.grid_size
        self.decoder = Decoder(
            encoder.embed_dim, decoder_depth, decoder_dim, decoder_heads, grid, self.patch
        )

    def predict(self, images: Tensor, mask: Tensor) -> Tensor:
        """Predicted normalised pixels of every patch, (batch, patches, patch * patch * 3)."""
        x, visible = visible_tokens(self.encoder, images, mask)
        x = self.encoder.norm(self.encoder.blocks(x))
        return self.decoder(x, visible, mask.shape[1], self.encoder.num_prefix_tokens)

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """Mean squared error over the normalised pixels of masked patches, a scalar.

        Args:
            images: normalised images, (batch, 3, height, width).
            mask: see :func:`random_mask`; on the CPU nothing waits for the GPU.
        """
        predicted = self.predict(images, mask)
        mask = to_device(mask, images.device)
        return masked_pixel_loss(predicted, images, mask, self.patch)


def visible_tokens(encoder: nn.Module, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """What MAE's first block sees; with ``mask`` on the CPU nothing waits for the GPU.

    Returns:
        Prefix tokens and visible patches, (batch, tokens, dim), and which patches these are,
        (batch, visible).
    """
    prefix = encoder.num_prefix_tokens
    x = encoder._pos_embed(encoder.patch_embed(images))  # (batch, prefix + patches, dim)
    # Visible patches first
    order = to_device(mask, images.device).int().argsort(dim=1, stable=True)
    visible = order[:, : int((~mask[0]).sum())]
    patches = x[:, prefix:].gather(1, visible[:, :, None].expand(-1, -1, x.shape[-1]))
    return encoder.norm_pre(torch.cat([x[:, :prefix], patches], 1)), visible


def masked_pixel_loss(predicted: Tensor, images: Tensor, mask: Tensor, patch: int) -> Tensor:
    """Mean squared error over the normalised pixels of masked patches (MAE's loss)."""
    error = (predicted.float() - normalise_patches(patchify(images, patch))).square().mean(-1)
    return (error * mask).sum() / mask.sum()


def build_masked_model(encoder: nn.Module, config: PretrainConfig) -> SimMIM | MAE:
    """The pre-training model around ``encoder``; ``config.seed`` draws the new weights."""
    with seeded(config.seed):
        if config.method == "simmim":
            return SimMIM(encoder)
        return MAE(encoder, config.decoder_depth, config.decoder_dim, config.decoder_heads)


def _check_encoder(encoder: nn.Module) -> None:
    if not hasattr(encoder, "_pos_embed") or getattr(encoder, "rope", None) is not None:
        raise InputError(
            "masked pre-training needs a timm VisionTransformer with added positions, "
            f"got {type(encoder).__name__}"
        )


def _sincos_positions(grid: tuple[int, int], dim: int) -> Tensor:
    """Two-dimensional sine-cosine positions (MAE, ``util/pos_embed.py``), (patches, dim)."""
    if dim % 4:
        raise InputError(f"the decoder's width must be divisible by 4, got {dim}")
    omega = 1.0 / 10000 ** (torch.arange(dim // 4) / (dim // 4))
    y, x = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    angles = torch.stack([x.flatten(), y.flatten()], 1)[..., None] * omega  # (patches, 2, dim / 4)
    return torch.cat([angles.sin(), angles.cos()], -1).flatten(1)
