"""What the benchmarks of segmentation and VTAB cost, by formula."""

from mimrefiner.models.layouts import ViTShape
from mimrefiner.models.upernet import SCALES, UperNetConfig
from mimrefiner.training.cost import forward_flops, parameters
from mimrefiner.training.segment import SegmentationRecipe


def upernet_parameters(s: ViTShape, config: UperNetConfig) -> int:
    """Weights of a plain ViT at ``config.size`` with UperNet on it."""
    d, grid, pools = s.dim, config.size // s.patch_size, len(config.pool_scales)
    grown = (grid**2 - (s.image_size // s.patch_size) ** 2) * d  # positions
    encoder = parameters(s) + grown - 2 * d * s.final_norm + 2 * d * s.depth
    if config.relative_positions:
        encoder += s.depth * s.num_heads * ((2 * grid - 1) ** 2 + 3 * s.cls_token)
    transposed = sum(_transposed(scale) for scale in SCALES[s.patch_size])
    pyramid = transposed * (4 * d**2 + d) + 2 * d * (4 in SCALES[s.patch_size])
    kernels = pools + 3 + 9 * (1 + pools) + 9 * 3 + 9 * 4  # 1x1 and 3x3, in d^2
    decoder = kernels * d**2 + 2 * d * (pools + 3 + 1 + 3 + 1) + (d + 1) * config.classes
    aux = config.auxiliary_dim
    return encoder + pyramid + decoder + 9 * d * aux + 2 * aux + (aux + 1) * config.classes


def upernet_flops(s: ViTShape, config: UperNetConfig) -> int:
    """Operations of one image forward, auxiliary head included; twice as many go back."""
    d, grid = s.dim, config.size // s.patch_size
    scales = SCALES[s.patch_size]
    sides = [int(scale * grid) for scale in scales]
    areas = [side**2 for side in sides]
    # A transposed convolution counts its input; of two in a row the second has four times as many
    pyramid = sum(4 * grid**2 * {4: 5, 2: 1}.get(scale, 0) for scale in scales)
    finer, coarse = sum(areas[:3]), areas[3]
    pooled = sum(side**2 for side in config.pool_scales)
    products = pyramid + finer + pooled + 9 * (1 + len(config.pool_scales)) * coarse
    products += 9 * finer + 9 * 4 * areas[0]
    aux, at = config.auxiliary_dim, areas[config.auxiliary_map]
    heads = d * config.classes * areas[0] + (9 * d + config.classes) * aux * at
    return forward_flops(s, config.size) + 2 * (products * d**2 + heads)


def segmentation_total(s: ViTShape, recipe: SegmentationRecipe) -> int:
    """Operations of the whole training; evaluations are left out."""
    return 3 * upernet_flops(s, recipe.model) * recipe.batch_size * recipe.steps


def _transposed(scale: float) -> int:
    """How many transposed convolutions make a map so much finer."""
    return {4: 2, 2: 1}.get(scale, 0)
