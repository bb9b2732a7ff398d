"""``datasets``, ``models`` and ``export``: what there is, and encoders for others."""

import shutil
from pathlib import Path

from mimrefiner.commands.options import LIKE, NUM_HEADS, new_command
from mimrefiner.files import check_writable


def add_datasets(commands) -> None:
    what = "list the data sets that can be named"
    new_command(commands, "datasets", do_datasets, what, "mimrefiner datasets")


def do_datasets(args) -> None:
    from mimrefiner.data.catalogue import table

    print(table())


def add_models(commands) -> None:
    what = "list the models that can be named, with licences and what was verified"
    new_command(commands, "models", do_models, what, "mimrefiner models")


def do_models(args) -> None:
    from mimrefiner.models.catalogue import table

    print(table(min(100, shutil.get_terminal_size().columns)))


def add_export(commands) -> None:
    what = "write an encoder for timm, in the official layout, or smaller"
    example = "mimrefiner export runs/refined/ema_encoder.safetensors --to refined.safetensors"
    add = new_command(commands, "export", do_export, what, example)
    add("model", help="anything that load_encoder takes")
    add("--to", type=Path, required=True, help="file to write")
    form = "timm (safetensors and a json), hub or mimrefiner (default: timm)"
    add("--format", default="timm", help=form)
    dtype = "of the weights in the file: float32, bfloat16 or float16 (default: as they are)"
    add("--dtype", help=dtype)
    add("--num-heads", "--heads", type=int, help=NUM_HEADS)
    add("--like", metavar="TIMM_NAME", help=LIKE)


def do_export(args) -> None:
    from mimrefiner import load_encoder
    from mimrefiner.models.export import export

    check_writable(args.to.parent, "--to")
    encoder = load_encoder(args.model, num_heads=args.num_heads, like=args.like)
    print(export(encoder, args.to, args.format, args.dtype))
