"""UperNet on a plain ViT, as the paper fine-tunes it on ADE20K (Xiao et al., arXiv 1807.10221).

The encoder is prepared as BEiT's is (arXiv 2106.08254): a layer scale and a table of relative
positions in every block. Decoder and auxiliary head are the usual ones; the tests compare them with
those of transformers, which would be a heavy dependency for 60 lines, and has neither the pyramid
that makes four scales of a ViT's one nor the tables.
"""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers import LayerScale, RelPosBias
from timm.models import VisionTransformer
from torch import Tensor, nn

from mimrefiner.device import seeded
from mimrefiner.errors import InputError
from mimrefiner.models.blocks import hooked
from mimrefiner.models.classifier import DropPath, kept_rows
from mimrefiner.models.encoders import with_size
from mimrefiner.models.layouts import ReleasedViT

TAPS = {12: (3, 5, 7, 11), 24: (7, 11, 15, 23), 32: (7, 15, 23, 31)}  # depth -> 0-based blocks
# Patch size -> how much finer (or coarser) than the patches the four maps are
SCALES = {16: (4, 2, 1, 0.5), 14: (4, 2, 1, 0.5), 8: (2, 1, 0.5, 0.25)}


@dataclass(frozen=True)
class UperNetConfig:
    """The network; the defaults are the paper's for ADE20K.

    BenediktAlkin/KappaSegmentation, ``yamls/mimrefiner/*_l16_u160k_uper.yaml``, and
    ``kseg/models`` for what the files leave to the code. All widths are the encoder's.

    Attributes:
        classes: number of classes.
        size: side of the images in pixels, in training and of every window in a test.
        taps: 0-based blocks whose outputs become the four maps; None takes :data:`TAPS`, and
            quarters of other depths.
        drop_path: rate of the last block; it grows evenly from 0 at the first.
        layer_scale: start of the factors that every branch of a block is multiplied by.
        relative_positions: give every block a table of relative positions, which starts at 0.
        pool_scales: sides of the decoder's pooled maps.
        dropout: rate of whole channels before either classifier.
        auxiliary_map, auxiliary_dim: which of the four maps the second head reads, and its width.
    """

    classes: int = 150
    size: int = 512
    taps: tuple[int, ...] | None = None
    drop_path: float = 0.2
    layer_scale: float = 1.0
    relative_positions: bool = True
    pool_scales: tuple[int, ...] = (1, 2, 3, 6)
    dropout: float = 0.1
    auxiliary_map: int = 2
    auxiliary_dim: int = 256


class UperNet(nn.Module):
    """A copy of an encoder with UperNet's decoder and an auxiliary head on it.

    Args:
        encoder: a plain timm ViT of patch size 8, 14 or 16, of any input size.
        config: the sizes.
        seed: draws the weights of what is new (Xavier, biases 0).

    Raises:
        InputError: another kind of encoder or patch size, or a size that it does not divide.

    >>> from mimrefiner.config import ViTConfig
    >>> from mimrefiner.models.encoders import build_vit
    >>> encoder = build_vit(ViTConfig(dim=16, depth=4, num_heads=2))
    >>> model = UperNet(encoder, UperNetConfig(classes=3, size=64, auxiliary_dim=8)).eval()
    >>> logits, auxiliary = model(torch.zeros(2, 3, 64, 64))
    >>> logits.shape, auxiliary.shape, model.taps
    (torch.Size([2, 3, 64, 64]), torch.Size([2, 3, 64, 64]), (0, 1, 2, 3))
    """

    def __init__(self, encoder: nn.Module, config: UperNetConfig, *, seed: int = 0):
        super().__init__()
        self.config = config
        with seeded(seed):
            self.encoder = prepared(encoder, config)
            patch, dim = encoder.patch_embed.patch_size[0], encoder.embed_dim
            self.taps = config.taps or taps_of(len(self.encoder.blocks))
            self.pyramid = nn.ModuleList(rescale(dim, scale) for scale in SCALES[patch])
            self.decoder = Decoder(dim, config)
            self.auxiliary = nn.Sequential(
                conv_norm(dim, config.auxiliary_dim, 3),
                nn.Dropout2d(config.dropout),
                nn.Conv2d(config.auxiliary_dim, config.classes, 1),
            )
            for part in (self.pyramid, self.decoder, self.auxiliary):
                part.apply(_xavier)

    def draw_paths(self, batch: int, generator: torch.Generator) -> None:
        """Draw which images pass each branch of the blocks in the next forward passes."""
        for path in (x for x in self.encoder.modules() if isinstance(x, DropPath)):
            path.factor = kept_rows(path.rate, batch, generator).to(self.device)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.decoder.classify.weight.device

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits per pixel of decoder and auxiliary head, (batch, classes, size, size) each."""
        maps = self.maps(images)
        second = self.auxiliary(maps[self.config.auxiliary_map])
        return tuple(enlarged(x, images.shape[-2:]) for x in (self.decoder(maps), second))

    def segment(self, images: Tensor) -> Tensor:
        """The decoder's logits per pixel, (batch, classes, size, size)."""
        return enlarged(self.decoder(self.maps(images)), images.shape[-2:])

    def maps(self, images: Tensor) -> list[Tensor]:
        """The pyramid of a batch of images: four maps, (batch, dim, rows, columns), fine to coarse.

        They are the raw outputs of four blocks, without the tokens before the patches.
        """
        encoder, found = self.encoder, []

        def keep(position: int, module: nn.Module, inputs, tokens: Tensor) -> None:
            patches = tokens[:, encoder.num_prefix_tokens :]
            found.append(patches.mT.unflatten(2, encoder.patch_embed.grid_size))

        with hooked([encoder.blocks[block] for block in self.taps], keep):
            encoder.forward_features(images)
        return [scale(x) for scale, x in zip(self.pyramid, found, strict=True)]


class Decoder(nn.Module):
    """UperNet's decoder: pooled context of the coarsest map, added downwards to the finer ones."""

    def __init__(self, dim: int, config: UperNetConfig):
        super().__init__()
        self.pooled = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(side), conv_norm(dim, dim, 1))
            for side in config.pool_scales
        )
        self.context = conv_norm((1 + len(config.pool_scales)) * dim, dim, 3)
        self.lateral = nn.ModuleList(conv_norm(dim, dim, 1) for _ in range(3))
        self.smooth = nn.ModuleList(conv_norm(dim, dim, 3) for _ in range(3))
        self.fuse = conv_norm(4 * dim, dim, 3)
        self.dropout = nn.Dropout2d(config.dropout)
        self.classify = nn.Conv2d(dim, config.classes, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Four maps, fine to coarse -> logits (batch, classes, rows, columns) of the finest."""
        *finer, last = maps
        pooled = [enlarged(pool(last), last.shape[-2:]) for pool in self.pooled]
        levels = [self.context(torch.cat([last, *pooled], 1))]
        for x, lateral in zip(reversed(finer), reversed(self.lateral), strict=True):
            levels.insert(0, lateral(x) + enlarged(levels[0], x.shape[-2:]))
        *finer, last = levels
        smooth = [layer(x) for layer, x in zip(self.smooth, finer, strict=True)]
        whole = [enlarged(x, levels[0].shape[-2:]) for x in (*smooth, last)]
        return self.classify(self.dropout(self.fuse(torch.cat(whole, 1))))


class BiasedAttention(nn.Module):
    """An attention layer of timm with a table of relative positions, which starts at 0.

    BEiT's: for every head a number for each offset of two patches, and three for pairs with the cls
    token.
    """

    def __init__(self, attention: nn.Module, grid: tuple[int, int], prefix_tokens: int):
        super().__init__()
        self.attention = attention
        self.positions = RelPosBias(grid, attention.num_heads, prefix_tokens)
        nn.init.zeros_(self.positions.relative_position_bias_table)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, **options) -> Tensor:
        return self.attention(x, attn_mask=self.positions.get_bias(), **options)


def prepared(encoder: nn.Module, config: UperNetConfig) -> nn.Module:
    """A copy of ``encoder`` for fine-tuning at ``config.size``; its final norm is taken off."""
    if not isinstance(encoder, VisionTransformer) or encoder.num_prefix_tokens > 1:
        raise InputError(
            f"UperNet is built on a plain timm ViT with at most one cls token, "
            f"got {type(encoder).__name__}"
        )
    patch = encoder.patch_embed.patch_size[0]
    if patch not in SCALES:
        raise InputError(f"UperNet needs a patch size of 8, 14 or 16 pixels, got {patch}")
    encoder = with_size(copy.deepcopy(encoder), config.size)
    if isinstance(encoder, ReleasedViT):
        encoder.learn_positions()
    encoder.norm = nn.Identity()
    rates = torch.linspace(0, config.drop_path, len(encoder.blocks)).tolist()
    for block, rate in zip(encoder.blocks, rates, strict=True):
        block.ls1, block.ls2 = (LayerScale(encoder.embed_dim, config.layer_scale) for _ in range(2))
        block.drop_path1, block.drop_path2 = DropPath(rate), DropPath(rate)
        if config.relative_positions:
            grid, prefix = encoder.patch_embed.grid_size, encoder.num_prefix_tokens
            block.attn = BiasedAttention(block.attn, grid, prefix)
    return encoder.requires_grad_(True)


def taps_of(depth: int) -> tuple[int, ...]:
    """The four blocks (0-based) whose outputs are used; depths without a published list: quarters.

    >>> taps_of(24), taps_of(8)
    ((7, 11, 15, 23), (1, 3, 5, 7))
    """
    if depth < 4:
        raise InputError(f"UperNet reads four blocks, this encoder has {depth}")
    return TAPS.get(depth) or tuple(quarter * depth // 4 - 1 for quarter in (1, 2, 3, 4))


def rescale(dim: int, factor: float) -> nn.Module:
    """What makes a map ``factor`` times as fine: transposed convolutions, or pooling."""
    if factor == 4:
        return nn.Sequential(
            nn.ConvTranspose2d(dim, dim, 2, 2),
            nn.BatchNorm2d(dim),
            nn.GELU(),
            nn.ConvTranspose2d(dim, dim, 2, 2),
        )
    if factor == 2:
        return nn.ConvTranspose2d(dim, dim, 2, 2)
    return nn.Identity() if factor == 1 else nn.MaxPool2d(round(1 / factor))


def conv_norm(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    """Convolution without bias, batch norm, ReLU."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


def enlarged(x: Tensor, shape: tuple[int, int]) -> Tensor:
    """``x`` resized bilinearly to (rows, columns), in float32."""
    return F.interpolate(x.float(), size=tuple(shape), mode="bilinear", align_corners=False)


def _xavier(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
