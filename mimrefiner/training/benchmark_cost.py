"""What the benchmarks of segmentation and VTAB cost, by formula."""

from mimrefiner.errors import InputError
from mimrefiner.models.layouts import ViTShape
from mimrefiner.models.upernet import SCALES, UperNetConfig
from mimrefiner.training.cost import SPARE, activation_bytes, forward_flops, parameters
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


def segmentation_bytes(s: ViTShape, recipe: SegmentationRecipe, gpus: int = 1) -> float:
    """Bytes that fine-tuning with UperNet needs on each of ``gpus``, which share a batch.

    Raises:
        InputError: GPUs that do not divide the batch.
    """
    if gpus < 1 or recipe.batch_size % gpus:
        raise InputError(
            f"expected gpus >= 1 that divide the batch of {recipe.batch_size}, got {gpus}"
        )
    c, d, grid = recipe.model, s.dim, recipe.model.size // s.patch_size
    fine, *others = (d * int(scale * grid) ** 2 for scale in SCALES[s.patch_size])
    finer, coarse, patches = fine + sum(others[:2]), others[2], d * grid**2
    tokens = grid**2 + s.cls_token
    # In bfloat16: inputs of convolutions; their outputs before and after the norm
    decoder = 2 * (finer * (1 + 2) + finer * (1 + 2) + coarse * (1 + len(c.pool_scales) + 2))
    decoder += 2 * fine * (4 + 2 + 1) + 8 * coarse + 2 * patches * (4 + 3 * 4)
    pixels = c.size**2
    # Logits of both heads and their logarithms; image, mask and what counts
    loss = 4 * 4 * c.classes * pixels + (4 * 3 + 8 + 1) * pixels
    # Layer scales keep the output of every branch
    encoder = activation_bytes(s, c.size) + s.depth * 2 * 2 * tokens * d
    always = (16 + 2) * upernet_parameters(s, c)
    if c.relative_positions:  # bias of every block in both precisions, and its index
        always += s.depth * tokens**2 * (s.num_heads * (4 + 2) + 8)
    return SPARE * (always + recipe.batch_size / gpus * (encoder + decoder + loss))


def _transposed(scale: float) -> int:
    """How many transposed convolutions make a map so much finer."""
    return {4: 2, 2: 1}.get(scale, 0)
