"""An encoder with a linear classifier on its pooled tokens, as the paper fine-tunes it."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from mimrefiner.device import seeded
from mimrefiner.errors import InputError
from mimrefiner.models.blocks import depth_of, pooled_blocks
from mimrefiner.models.encoders import load_encoder
from mimrefiner.models.layouts import PostNormBlock, ReleasedViT
from mimrefiner.models.pools import check_pools
from mimrefiner.models.tensors import read_metadata, write_safetensors
from mimrefiner.models.weights import save_encoder

ENCODER_FILE, HEAD_FILE = "encoder.safetensors", "classifier.safetensors"
HEAD_STD = 2e-5  # of the classifier's first weights, as MAE's


@dataclass(frozen=True)
class Head:
    """What stands on the encoder.

    Attributes:
        classes: how many there are.
        pool: ``"cls"``, or ``"mean"`` of the patch tokens.
        head_norm: whether a post-norm encoder without final LayerNorm gets a new one.
        drop_path: probability that the last block's branches are left out; linear from 0.
        learn_positions: whether positions are trained.
    """

    classes: int
    pool: str = "cls"
    head_norm: bool = True
    drop_path: float = 0.0
    learn_positions: bool = True


class ImageClassifier(nn.Module):
    """Blocks, pooling, norm and a linear layer, in this order (``src/models/vit/vit.py``).

    The norm is the encoder's final LayerNorm, applied to the pooled vector. A post-norm encoder
    (data2vec 2.0) gets a new one; a pre-norm encoder whose checkpoint has none (CrossMAE) has none.

    Args:
        encoder: a timm VisionTransformer; it is copied.
        head: what stands on it.
        seed: draws the linear layer's weights (truncated normal, 2e-5); its biases start at 0.

    Raises:
        InputError: cls pooling of a model without cls token, fewer than two classes, or drop path
            for blocks that have none.

    >>> import mimrefiner as mr
    >>> encoder = mr.build_vit(mr.ViTConfig(dim=32, depth=2, num_heads=2))
    >>> model = ImageClassifier(encoder, Head(classes=10, pool="mean"))
    >>> model(torch.zeros(4, 3, 32, 32)).shape
    torch.Size([4, 10])
    """

    def __init__(self, encoder: nn.Module, head: Head, *, seed: int = 0):
        super().__init__()
        check_pools(encoder, (head.pool,))
        if head.classes < 2:
            raise InputError(f"a classifier needs at least two classes, got {head.classes}")
        self.head = head
        self.encoder = copy.deepcopy(encoder).requires_grad_(True)
        self.head_norm = nn.Identity()
        if _final_norm(encoder) is None and head.head_norm and _is_post_norm(encoder):
            self.head_norm = nn.LayerNorm(encoder.embed_dim, eps=1e-6)
        self.linear = nn.Linear(encoder.embed_dim, head.classes)
        with seeded(seed):
            nn.init.trunc_normal_(self.linear.weight, std=HEAD_STD)
        nn.init.zeros_(self.linear.bias)
        _train_positions(self.encoder, head.learn_positions)
        self.paths = _with_drop_path(self.encoder, head.drop_path)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, (batch, classes), of normalised images (batch, 3, height, width)."""
        last = depth_of(self.encoder) - 1
        pooled = pooled_blocks(self.encoder, images, (last,), (self.head.pool,))
        norm = _final_norm(self.encoder) or self.head_norm
        return self.linear(norm(pooled[self.head.pool][0]))

    def draw_paths(self, batch: int, generator: torch.Generator) -> Tensor:
        """Which images pass each branch, and by what its output is multiplied: (paths, batch).

        On the CPU; (0, batch) without drop path. :meth:`use_paths` applies it.
        """
        drawn = [kept_rows(path.rate, batch, generator) for path in self.paths]
        return torch.stack(drawn) if drawn else torch.empty(0, batch)

    def use_paths(self, factors: Tensor | list[None]) -> None:
        """Let the next forward passes in training use ``factors``, (paths, batch); None for all."""
        for path, factor in zip(self.paths, factors, strict=True):
            path.factor = factor


class DropPath(nn.Module):
    """Multiplies a branch's output by one factor for each image, while it is trained.

    The factors come from :func:`kept_rows` and are drawn outside, all at once, so that they depend
    on no global generator and a GPU waits for none of them.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate
        self.factor: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, dim) -> (batch, tokens, dim)."""
        return x if not self.training or self.factor is None else x * self.factor[:, None, None]

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3g}"


def kept_rows(rate: float, batch: int, generator: torch.Generator) -> Tensor:
    """The factors of one branch, (batch,): 0 where it is left out.

    Of the batch, max(floor(batch * (1 - rate)), 1) images drawn at random pass, and their output is
    multiplied by batch / passed. Where rounding would lower that share by more than 0.01, each
    image is drawn by itself and multiplied by 1 / (1 - rate) (KappaModules,
    ``layers/drop_path.py``).

    >>> kept_rows(0.25, 8, torch.Generator().manual_seed(0)).unique().tolist()
    [0.0, 1.3333333730697632]
    """
    passed = max(int(batch * (1 - rate) + 1e-9), 1)
    if 1 - rate - passed / batch > 0.01:
        return (torch.rand(batch, generator=generator) >= rate) / (1 - rate)
    factors = torch.zeros(batch)
    factors[torch.randperm(batch, generator=generator)[:passed]] = batch / passed
    return factors


def _final_norm(encoder: nn.Module) -> nn.Module | None:
    """The encoder's last LayerNorm, or None; timm calls it ``fc_norm`` where it follows a mean."""
    norms = (getattr(encoder, name, None) for name in ("norm", "fc_norm"))
    return next((x for x in norms if x is not None and not isinstance(x, nn.Identity)), None)


def _is_post_norm(encoder: nn.Module) -> bool:
    return isinstance(encoder.blocks[0], PostNormBlock)


def _train_positions(encoder: nn.Module, train: bool) -> None:
    if train and isinstance(encoder, ReleasedViT):
        encoder.learn_positions()
    elif not train and isinstance(getattr(encoder, "pos_embed", None), nn.Parameter):
        encoder.pos_embed.requires_grad_(False)


def _with_drop_path(encoder: nn.Module, rate: float) -> list[DropPath]:
    """Put a :class:`DropPath` on both branches of every block that has a rate above 0."""
    depth, paths = depth_of(encoder), []
    for i, block in enumerate(encoder.blocks) if rate else ():
        for name in ("drop_path1", "drop_path2"):
            if not hasattr(block, name):
                raise InputError(
                    f"drop path needs blocks with two branches, and {type(block).__name__} has "
                    f"no {name}: use drop_path 0"
                )
            if share := rate * i / max(1, depth - 1):
                paths.append(DropPath(share))
                setattr(block, name, paths[-1])
    return paths


def save_classifier(model: ImageClassifier, folder: Path | str) -> tuple[Path, Path]:
    """Write ``encoder.safetensors``, which ``load_encoder`` reads, and ``classifier.safetensors``.

    Returns:
        Both files.
    """
    encoder, head = Path(folder) / ENCODER_FILE, Path(folder) / HEAD_FILE
    save_encoder(model.encoder, encoder)
    parts = {"linear": model.linear, "head_norm": model.head_norm}
    tensors = {
        f"{part}.{name}": x.detach().cpu().contiguous()
        for part, module in parts.items()
        for name, x in module.state_dict().items()
    }
    write_safetensors(tensors, head, {"pool": model.head.pool, "classes": str(model.head.classes)})
    return encoder, head


def load_classifier(folder: Path | str) -> ImageClassifier:
    """What :func:`save_classifier` wrote, in eval mode.

    Raises:
        InputError: a file is missing or damaged, or the two do not belong together.
    """
    encoder, head = Path(folder) / ENCODER_FILE, Path(folder) / HEAD_FILE
    for file in (encoder, head):
        if not file.is_file():
            raise InputError(
                f"{file} does not exist: expected a folder that mimrefiner finetune wrote"
            )
    try:
        about = read_metadata(head)
        tensors = safetensors.torch.load_file(head)
        settings = Head(int(about["classes"]), about["pool"], head_norm=len(tensors) > 2)
        model = ImageClassifier(load_encoder(encoder), settings)
        missing, unexpected = model.load_state_dict(tensors, strict=False)
        absent = [name for name in missing if not name.startswith("encoder.")]
    except (KeyError, RuntimeError, ValueError, safetensors.SafetensorError) as error:
        raise InputError(f"{head} is damaged: {str(error).splitlines()[0]}") from error
    if _either(absent, unexpected):
        raise InputError(f"{head} does not belong to {encoder}: {_either(absent, unexpected)}")
    return model.eval()


def _either(missing: Iterable[str], unexpected: Iterable[str]) -> str:
    """Names that are missing or unexpected, in words; "" where there are none."""
    parts = (("missing", list(missing)), ("unexpected", list(unexpected)))
    return ", ".join(f"{what} {', '.join(names)}" for what, names in parts if names)
