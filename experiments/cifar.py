"""Our own masked model on CIFAR-10: an MAE, kept at several epochs, refined and continued. ::

python -m experiments.cifar mae --out FOLDER
python -m experiments.cifar choose refined --out FOLDER
python -m experiments.cifar trial refined --seed 0 --out FOLDER
python -m experiments.cifar trial masked --start epoch15 --brief --out FOLDER
"""

import argparse
import re
import sys
from dataclasses import replace
from pathlib import Path

import safetensors.torch
from torch import Tensor

from experiments.trials import Study, add_commands, add_places, measure_trial, plainly
from mimrefiner.config import PretrainConfig, RefineConfig, ViTConfig
from mimrefiner.data.augment import small_views
from mimrefiner.data.datasets import ImageDataset, load_dataset
from mimrefiner.errors import InputError
from mimrefiner.files import Entry, write_csv
from mimrefiner.models.encoders import build_vit
from mimrefiner.models.masked import build_masked_model
from mimrefiner.models.tensors import write_safetensors
from mimrefiner.models.weights import save_encoder
from mimrefiner.notices import show_notices
from mimrefiner.study.presets import Preset
from mimrefiner.study.tables import git_sha
from mimrefiner.training.checkpoints import Checkpoints, Saving, load_checkpoint, step_of
from mimrefiner.training.pretrain import pretrain
from mimrefiner.training.run import NUMERICS, run_settings

ENCODER = ViTConfig(image_size=32, patch_size=4, dim=192, depth=12, num_heads=3)
MAE = PretrainConfig(
    method="mae",
    mask_ratio=0.75,
    decoder_depth=1,
    decoder_dim=96,
    epochs=60,
    batch_size=128,
    base_lr=2e-3,
)
REFINE = RefineConfig(
    views=small_views(32, 4, n_local=4),
    hidden_dim=512,
    out_dim=128,
    predictor_dim=1024,
    queue_size=8192,
    batch_size=128,
    heads_epochs=1,
    refine_epochs=4,
    warmup_epochs=0.25,
    heads_base_lr=4e-3,
    refine_base_lr=4e-3,
    layer_decay=0.75,
    frozen_blocks=6,
)
BRIEF = {"heads_epochs": 0.15, "refine_epochs": 0.5, "warmup_epochs": 0.05}
RATES = {"refined": (4e-3, 2e-3, 8e-3), "masked": (2e-3, 1e-3), "labels": (2e-3, 4e-3)}
# Epochs at which the MAE is kept on its way: its learning rate is still high there, so these are
# not what runs of that length would give
KEPT = (6, 15, 30)


def mae(data: str, out: Path) -> None:
    """Pre-train the MAE unless ``out`` has it, going on where it was cut off.

    A checkpoint is written once an epoch, and those of the epochs KEPT stay beside the result.
    """
    dataset = load_dataset(data, split="train").in_memory()
    encoder, per_epoch = build_vit(ENCODER, seed=MAE.seed), len(dataset) // MAE.batch_size
    entry = Entry(
        out / "mae", {**run_settings(MAE, dataset, encoder), "numerics": NUMERICS}, "settings.json"
    )
    with entry.locked():
        if entry.facts() is not None:
            return
        keep = tuple(epoch * per_epoch for epoch in KEPT)
        saving = Saving(entry.folder / "checkpoints", per_epoch, resume=True, keep=keep)
        result = pretrain(encoder, dataset, MAE, saving=saving)
        files = [entry.folder / f"{name}.safetensors" for name in ("model", "encoder")]
        write_safetensors(result.model.state_dict(), files[0], {})
        save_encoder(result.encoder.half(), files[1])
        write_csv(result.history, entry.folder / "history.csv")
        facts = {"flops": result.flops, "seconds": round(result.seconds), "git_sha": git_sha()}
        entry.finish(entry.folder, facts, [*files, entry.folder / "history.csv"])


def weights_at(out: Path, start: str, dataset: ImageDataset) -> dict[str, Tensor]:
    """The MAE's weights at the end of its training, or after so many epochs.

    Args:
        out: the folder that :func:`mae` has filled.
        start: "end", or "epoch06" and so on for those kept on the way.
        dataset: its training images.

    Raises:
        InputError: another name, or a state that is not there.
    """
    file, found = out / "mae" / "model.safetensors", re.fullmatch(r"epoch(\d+)", start)
    if start == "end" and file.is_file():
        return safetensors.torch.load_file(file)
    if found is not None:
        step = int(found[1]) * (len(dataset) // MAE.batch_size)
        for file in Checkpoints(out / "mae" / "checkpoints").files():
            if step_of(file) == step:
                return load_checkpoint(file)["parts"]["model"]
    kept = ", ".join(f"epoch{epoch:02d}" for epoch in KEPT)
    raise InputError(
        f"{out / 'mae'} holds no state {start!r}: the command mae makes {kept} and, when it is "
        "finished, end"
    )


def study(data: str, out: Path, start: str = "end", *, brief: bool = False) -> Study:
    """The study of the MAE at ``start``, see :func:`weights_at`.

    ``brief`` refines for half an epoch, and gives the controls as much computation.
    """
    model = build_masked_model(build_vit(ENCODER, seed=MAE.seed), MAE)
    model.load_state_dict(weights_at(out, start, load_dataset(data, split="train")))
    model.half().float().eval()  # encoders are kept in half precision
    refine = replace(REFINE, **BRIEF) if brief else REFINE
    preset = Preset("cifar", data, None, None, ENCODER, MAE, refine)
    return Study(preset, model.encoder, out / (start + "-brief" * brief), plainly, RATES, model)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m experiments.cifar", description=__doc__.splitlines()[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add_places(commands.add_parser("mae", help="pre-train"))
    start = "where trainings start: end, or epoch06 and so on (default: %(default)s)"
    for part in add_commands(commands):
        part.add_argument("--start", default="end", help=start)
        part.add_argument("--brief", action="store_true", help="refinement of half an epoch")
    return parser


def main() -> None:
    args = _parser().parse_args()
    show_notices()
    try:
        if args.command == "mae":
            mae(args.data, args.out)
            return
        of_mae = study(args.data, args.out, args.start, brief=args.brief)
        if args.command == "choose":
            of_mae.choose_rate(args.trial)
        else:
            measure_trial(of_mae, args)
    except InputError as error:
        sys.exit(f"cifar: error: {error}")


if __name__ == "__main__":
    main()
