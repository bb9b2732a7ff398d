"""The command line: ``mimrefiner COMMAND --help`` shows an example of each.

Commands import what they need when they are called, so that help and lists come at once.
"""

import argparse
import contextlib
import os
import re
import shutil
import sys
import webbrowser
from dataclasses import replace
from functools import partial
from pathlib import Path

from mimrefiner.errors import InputError, Stopped
from mimrefiner.files import cache_folder, check_writable, data_folder
from mimrefiner.notices import show_notices

PRESETS = (
    "smoke, tiny, fashion, natural, natural-simmim, natural-gpu, gpu, "
    "or paper-MODEL as listed in REPRODUCING.md"
)
MONITORED = 10_000  # images on either side of the k-NN that --watch does
CHANGES = {  # option of refine -> the field of RefineConfig that it replaces
    "top_k": "refine_top_k",
    "temperature": "temperature",
    "freeze_first": "frozen_blocks",
    "clip_norm": "clip_norm",
}


def add_demo(commands) -> None:
    what = "probe the packaged model on digits: half a minute, nothing to download"
    add = _command(commands, "demo", do_demo, what, "mimrefiner demo")
    folder = Path("runs/demo")
    add("--out", type=Path, default=folder, help=f"folder for the report (default: {folder})")
    add("--open", action="store_true", help="show the picture")


def do_demo(args) -> None:
    from mimrefiner.study.demo import demo

    check_writable(args.out)
    print(demo(args.out))
    print(
        "\nNext: mimrefiner probe MODEL DATA makes this report of your own encoder and images;"
        "\n      mimrefiner explore simmim_digits digits lets you walk through the blocks."
    )
    if args.open:
        webbrowser.open((args.out / "report.png").resolve().as_uri())


def add_run(commands) -> None:
    example = "mimrefiner run 01 04 --preset tiny --seeds 0,1,2"
    add = _command(commands, "run", do_run, "execute notebooks in batch", example)
    add("notebooks", nargs="*", metavar="NAME", help="by name or number; none means all")
    add("--preset", default="tiny", help=f"{PRESETS} (default: tiny)")
    add("--seeds", default="0", help="seeds with commas between (default: 0)")
    add("--out", type=Path, help="folder for all results (default: runs/PRESET)")
    pairs = {"action": "append", "default": [], "metavar": "NAME=VALUE"}
    add("-p", dest="parameters", **pairs, help="a notebook parameter")
    resume = "skip notebooks that are done and whose inputs have not changed"
    add("--resume", action="store_true", help=resume)
    keep_going = "after a failure, go on with the other notebooks"
    add("--keep-going", action="store_true", help=keep_going)
    add("--gpus", help="numbers of GPUs with commas between: one job at a time on each")
    workers = "jobs at once where no --gpus are given (default: 1)"
    add("--workers", type=int, default=1, help=workers)
    timeout = "limit for each notebook (default: none)"
    add("--timeout", type=float, metavar="MINUTES", help=timeout)
    add("--executor", default="local", help="local or slurm (default: local)")
    add("--slurm", **pairs, help="for submitit: slurm_partition=gpu")


def do_run(args) -> None:
    from mimrefiner.batch.runner import Batch, run_notebooks

    args.out = args.out or Path("runs") / args.preset
    batch = Batch(
        gpus=() if args.gpus is None else _integers("--gpus", args.gpus),
        workers=args.workers,
        resume=args.resume,
        keep_going=args.keep_going,
        timeout=args.timeout and 60 * args.timeout,
        executor=args.executor,
        slurm=_assigned("--slurm", args.slurm),
    )
    run_notebooks(
        args.notebooks,
        preset=args.preset,
        seeds=args.seeds,
        out=args.out,
        parameters=_assigned("-p", args.parameters),
        batch=batch,
    )


def add_students(commands) -> None:
    what = "copy notebooks without their solutions"
    add = _command(commands, "students", do_students, what, "mimrefiner students --out course")
    add("notebooks", nargs="*", metavar="NAME", help="by name or number; none means all")
    add("--out", type=Path, required=True, help="folder for the copies")


def do_students(args) -> None:
    from mimrefiner.batch.copies import write_student_copies

    print(f"{len(write_student_copies(args.notebooks, args.out))} notebooks are in {args.out}")


def add_publish(commands) -> None:
    what = "replace the executed notebooks of the project by those of a run"
    add = _command(commands, "publish", do_publish, what, "mimrefiner publish runs/figures")
    add("run", type=Path, metavar="RUN", help="folder of a run")
    folder = Path("notebooks/executed")
    add("--to", type=Path, default=folder, help=f"folder to fill (default: {folder})")


def do_publish(args) -> None:
    from mimrefiner.batch.copies import publish

    print(f"{len(publish(args.run, args.to))} executed notebooks are in {args.to}")


def add_pretrain(commands) -> None:
    what = "masked-image pre-training of a small ViT (stage 1)"
    example = "mimrefiner pretrain --data digits --preset tiny --seed 0 --out runs/mim"
    add = _command(commands, "pretrain", do_pretrain, what, example)
    _training_arguments(add)
    shard = "share the model among processes: less memory each, more messages"
    add("--shard", action="store_true", help=shard)


def do_pretrain(args) -> None:
    from mimrefiner import build_vit, pretrain
    from mimrefiner.training.run import train_into

    preset, dataset = _preset_and_data(args)
    encoder, config = build_vit(preset.encoder, seed=args.seed), preset.pretrain
    if args.clip_norm is not None:
        config = replace(config, clip_norm=args.clip_norm)
    train = partial(pretrain, encoder, dataset, config, num_workers=args.workers, shard=args.shard)
    train_into(args.out, train, ("encoder",), save_every=args.save_every, resume=args.resume)


def add_refine(commands) -> None:
    example = (
        "mimrefiner refine --model runs/mim/encoder.safetensors --data digits --preset tiny "
        "--out runs/refined"
    )
    what = "train heads, then encoder and heads (stages 2 and 3)"
    add = _command(commands, "refine", do_refine, what, example)
    model = "timm name or .safetensors file (default: the preset's own, pre-trained first)"
    add("--model", help=model)
    add("--no-pretrained", action="store_true", help="random weights for a timm name")
    blocks = "0-based blocks that get a head, such as 8,9,10,11 (default: the last third)"
    add("--blocks", help=blocks)
    add("--heads", type=int, help="a head on each of this many last blocks")
    local = "local crops of every image (default: the preset's, 4 or 10)"
    add("--local-crops", type=int, metavar="N", help=local)
    add("--top-k", type=int, help="neighbours to draw from in stage 3")
    add("--temperature", type=float, help="softmax temperature of the loss")
    freeze = "keep what is before the blocks and the first N as they are"
    add("--freeze-first", type=int, metavar="N", help=freeze)
    _memory_arguments(add)
    watch = (
        "k-NN on the validation split after every epoch, in epochs.csv "
        "(paper-* presets train on these images too)"
    )
    add("--watch", action="store_true", help=watch)
    tensorboard = "with --watch: write TensorBoard events too"
    add("--tensorboard", action="store_true", help=tensorboard)
    _training_arguments(add)


def do_refine(args) -> None:
    from mimrefiner import load_encoder, refine
    from mimrefiner.study.store import pretrained
    from mimrefiner.training.memory import Memory
    from mimrefiner.training.run import train_into

    if args.tensorboard and not args.watch:
        raise InputError("--tensorboard writes what --watch measures: give --watch too")
    preset, dataset = _preset_and_data(args)
    monitor = _monitor(args, preset, dataset) if args.watch else None
    if args.model:
        encoder = load_encoder(args.model, pretrained=not args.no_pretrained)
    elif args.preset.startswith("paper-"):
        raise InputError(f"{args.preset} refines published weights: give them by --model")
    else:
        encoder = pretrained(preset).encoder
    config = _changed(preset.refine, args, encoder)
    memory = Memory(args.micro_batch, args.recompute, args.shard)
    train = partial(
        refine, encoder, dataset, config, num_workers=args.workers, memory=memory, monitor=monitor
    )
    weights = ("encoder", "ema_encoder")
    train_into(args.out, train, weights, save_every=args.save_every, resume=args.resume)


def _monitor(args, preset, dataset):
    """What ``--watch`` measures; where something lacks, it raises before anything is trained."""
    from mimrefiner.probes.monitor import Monitor
    from mimrefiner.study.presets import load_split

    held_out = load_split(preset, "val").take(MONITORED)
    bank = dataset.take(MONITORED)
    return Monitor(bank, held_out, args.out, args.tensorboard, num_workers=args.workers)


def _changed(config, args, encoder):
    """``config`` with the options that were given."""
    from mimrefiner.models.blocks import block_modules

    changes = {field: getattr(args, option) for option, field in CHANGES.items()}
    if args.blocks is not None and args.heads is not None:
        raise InputError("give either --blocks or --heads")
    if args.blocks is not None:
        changes["blocks"] = _integers("--blocks", args.blocks)
    if args.heads is not None:
        depth = len(block_modules(encoder))
        if not 1 <= args.heads <= depth:
            raise InputError(
                f"--heads must be between 1 and the number of blocks {depth}, got {args.heads}"
            )
        changes["blocks"] = tuple(range(depth - args.heads, depth))
    if args.local_crops is not None:
        if args.local_crops < 0:
            raise InputError(f"--local-crops must be >= 0, got {args.local_crops}")
        changes["views"] = replace(config.views, n_local=args.local_crops)
    return replace(config, **{name: v for name, v in changes.items() if v is not None})


def add_probe(commands) -> None:
    example = (
        "mimrefiner probe vit_base_patch16_224.mae imagefolder:PATH --probes knn,linear "
        "--out runs/report"
    )
    add = _command(
        commands, "probe", do_probe, "report how good every block of a model is", example
    )
    add("model", metavar="MODEL", help="timm name, packaged name or .safetensors file")
    add("data", metavar="DATA", help="data set by name or path")
    blocks = "all, or 0-based blocks with commas between (default: all)"
    add("--blocks", default="all", help=blocks)
    pools = "such as cls,mean,cls+mean,cls_last4,cls+mean_last4 (default: cls,mean where there are)"
    add("--pools", help=pools)
    probes = "of knn,linear,low_shot,cluster,rank with commas between (default: knn)"
    add("--probes", default="knn", help=probes)
    shots = "low_shot: images per class, or shares such as 0.01 (default: 1,2,5)"
    add("--shots", default="1,2,5", help=shots)
    add("--clusters", type=int, help="cluster: how many (default: as many as classes)")
    add("--no-pretrained", action="store_true", help="random weights")
    add("--no-baselines", action="store_true", help="leave out raw pixels and random weights")
    add("--resume", action="store_true", help="keep the probes that are finished in --out")
    cache = "folder that keeps the features, to go on after a kill (default: memory)"
    add("--cache", type=Path, help=cache)
    add("--seed", type=int, default=0)
    precision = "of the forward pass: float32, bfloat16, float16 (default: float32)"
    add("--precision", default="float32", help=precision)
    add("--batch-size", type=int, default=256)
    add("--workers", type=int, default=0, help="loader processes (default: 0)")
    folder = Path("runs/report")
    add("--out", type=Path, default=folder, help=f"folder for the report (default: {folder})")


def do_probe(args) -> None:
    import torch

    from mimrefiner.study.report import markdown, probe, report_title

    precisions = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if args.precision not in precisions:
        raise InputError(
            f"--precision must be one of {', '.join(precisions)}, got {args.precision!r}"
        )
    if args.batch_size < 1:
        raise InputError(f"--batch-size must be >= 1, got {args.batch_size}")
    shots = _numbers("--shots", args.shots)
    check_writable(args.out)
    table = probe(
        args.model,
        args.data,
        blocks=args.blocks if args.blocks == "all" else _integers("--blocks", args.blocks),
        pools=None if args.pools is None else _parts(args.pools),
        probes=_parts(args.probes),
        shots=shots,
        clusters=args.clusters,
        out=args.out,
        resume=args.resume,
        cache=args.cache,
        pretrained=not args.no_pretrained,
        baselines=not args.no_baselines,
        seed=args.seed,
        batch_size=args.batch_size,
        num_workers=args.workers,
        autocast=precisions[args.precision],
    )
    if len(table):
        title = report_title(args.model, args.data)
        print(markdown(table, title, table.attrs["advice"]))
        print(f"report.csv, report.md, report.png and report.pdf are in {args.out}")


def add_explore(commands) -> None:
    what = "write one HTML file in which a slider moves through the blocks of one encoder or two"
    example = "mimrefiner explore mae_tiny_64 mae_tiny_64_refined fruit64 --out explorer.html"
    add = _command(commands, "explore", do_explore, what, example)
    add("before", metavar="BEFORE", help="anything that load_encoder takes")
    add("after", metavar="AFTER", nargs="?", help="another encoder, shown beside the first")
    add("data", metavar="DATA", help="data set by name or path")
    add("--pool", help="cls, mean or joined ones (default: cls where all have it, else mean)")
    images = "test images shown, at most 1500 (default: 1000)"
    add("--images", type=int, default=1000, metavar="N", help=images)
    limit = "training images that vote, and test images counted, at most (default: 10000)"
    add("--limit", type=int, default=10_000, metavar="N", help=limit)
    add("--map", default="umap", help="umap, which takes seconds a block, or pca (default: umap)")
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=0, help="loader processes (default: 0)")
    out = "file to write (default: explorer.html)"
    add("--out", type=Path, default=Path("explorer.html"), help=out)


def do_explore(args) -> None:
    from mimrefiner.study.explorer import Settings, write

    settings = Settings(args.pool, args.images, args.limit, args.map, args.seed)
    print(write(args.out, args.data, args.before, args.after, settings, num_workers=args.workers))


def add_datasets(commands) -> None:
    what = "list the data sets that can be named"
    _command(commands, "datasets", do_datasets, what, "mimrefiner datasets")


def do_datasets(args) -> None:
    from mimrefiner.data.catalogue import table

    print(table())


def add_models(commands) -> None:
    what = "list the models that can be named, with licences and what was verified"
    _command(commands, "models", do_models, what, "mimrefiner models")


def do_models(args) -> None:
    from mimrefiner.models.catalogue import table

    print(table(min(100, shutil.get_terminal_size().columns)))


def add_plan(commands) -> None:
    what = "foresee memory and GPU-hours of a model, from formulas"
    example = "mimrefiner plan d2v2_refined_h14 imagenet --gpus 8"
    add = _command(commands, "plan", do_plan, what, example)
    add("model", help="a plain ViT of the table of models")
    data = "imagenet, another data set by name or path, or a number of training images"
    add("data", help=data)
    preset = f"paper (by the model's size), {PRESETS} (default: paper)"
    add("--preset", default="paper", help=preset)
    add("--gpus", type=int, default=1, help="GPUs that share the batch (default: 1)")
    tflops = "peak of one GPU in bfloat16, TFLOP/s (default: 312, A100)"
    add("--tflops", type=float, default=312, help=tflops)
    _memory_arguments(add)


def do_plan(args) -> None:
    from mimrefiner.study.plan import plan_text
    from mimrefiner.training.memory import Memory

    memory = Memory(args.micro_batch, args.recompute, args.shard)
    print(plan_text(args.model, args.data, args.preset, args.gpus, args.tflops, memory))


def add_export(commands) -> None:
    what = "write an encoder for timm, in the official layout, or smaller"
    example = "mimrefiner export runs/refined/ema_encoder.safetensors --to refined.safetensors"
    add = _command(commands, "export", do_export, what, example)
    add("model", help="anything that load_encoder takes")
    add("--to", type=Path, required=True, help="file to write")
    form = "timm (safetensors and a json), hub or mimrefiner (default: timm)"
    add("--format", default="timm", help=form)
    dtype = "of the weights in the file: float32, bfloat16 or float16 (default: as they are)"
    add("--dtype", help=dtype)
    add("--heads", type=int, help="attention heads, where a published file does not tell")


def do_export(args) -> None:
    from mimrefiner import load_encoder
    from mimrefiner.models.export import export

    print(export(load_encoder(args.model, num_heads=args.heads), args.to, args.format, args.dtype))


COMMANDS = (
    add_demo,
    add_run,
    add_pretrain,
    add_refine,
    add_probe,
    add_explore,
    add_datasets,
    add_models,
    add_plan,
    add_export,
    add_students,
    add_publish,
)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; an error that a person can mend is one line on standard error, status 2."""
    parser = argparse.ArgumentParser(
        "mimrefiner", description="See and repair masked-image models, block by block."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in COMMANDS:
        add(commands)
    args = parser.parse_args(arguments)
    show_notices()
    if not sys.stderr.isatty():
        os.environ.setdefault("MIMREFINER_PROGRESS", "log")
    try:
        with _processes():
            args.do(args)
    except InputError as error:
        return _ended(2, f"error: {error}")
    except OSError as error:
        if not _can_be_mended(error, args):
            raise
        return _ended(2, f"error: {error}")
    except FloatingPointError as error:
        return _ended(1, f"error: {error}")
    except Stopped as stopped:
        return _ended(143, str(stopped))  # as a shell reports SIGTERM
    except KeyboardInterrupt:
        return _ended(130, "stopped")
    return 0


def _ended(status: int, text: str) -> int:
    """Say in one line, whatever a library said, why the command ended."""
    print(f"mimrefiner: {' '.join(text.split())}", file=sys.stderr)
    return status


def _can_be_mended(error: OSError, args) -> bool:
    """Whether the error is about a file that was named by a person; a full disk and a missing
    network name no file.
    """
    if not isinstance(error.filename, str | bytes | os.PathLike):
        return True
    given = [value for value in vars(args).values() if isinstance(value, str | Path)]
    named = [re.sub("^(imagefolder|parquet):", "", str(value)) for value in given]
    named += [cache_folder(), data_folder(), os.environ.get("MIMREFINER_IMAGENET")]
    file = Path(os.fsdecode(error.filename)).resolve()
    return any(file.is_relative_to(Path(path).resolve()) for path in named if path)


def _processes():
    """The process group where ``torchrun`` started this command; its import is slow."""
    if "WORLD_SIZE" not in os.environ:
        return contextlib.nullcontext()
    from mimrefiner.training.engine import processes

    return processes()


def _command(commands, name: str, do, what: str, example: str):
    """Add a command and return what adds its arguments."""
    parser = commands.add_parser(
        name, help=what, description=what[0].upper() + what[1:] + ".", epilog=f"example: {example}"
    )
    parser.set_defaults(do=do)
    return parser.add_argument


def _memory_arguments(add) -> None:
    micro_batch = "images of a process that pass the encoder at a time"
    add("--micro-batch", type=int, metavar="N", help=micro_batch)
    recompute = "keep no activations inside of blocks: less memory, more time"
    add("--recompute", action="store_true", help=recompute)
    shard = "share the encoder among processes: less memory each, more messages"
    add("--shard", action="store_true", help=shard)


def _training_arguments(add) -> None:
    add("--data", help="data set by name or path (default: the preset's)")
    add("--preset", default="tiny", help=f"{PRESETS} (default: tiny)")
    add("--seed", type=int, default=0)
    clip_norm = "limit of the norm of all gradients (default: none)"
    add("--clip-norm", type=float, metavar="NORM", help=clip_norm)
    add("--workers", type=int, default=0, help="loader processes (default: 0)")
    in_memory = "decode every image once and keep it, 3 bytes a pixel"
    add("--in-memory", action="store_true", help=in_memory)
    resume = "go on from the newest valid checkpoint in --out"
    add("--resume", action="store_true", help=resume)
    save_every = "between checkpoints (default: 500)"
    add("--save-every", type=int, default=500, metavar="STEPS", help=save_every)
    add("--out", type=Path, required=True, help="folder for weights and history")


def _preset_and_data(args):
    from mimrefiner.study.presets import load_preset, load_split

    preset = load_preset(args.preset, args.seed)
    if args.data:
        preset = replace(preset, dataset=args.data)
    # The paper trains on all images
    dataset = load_split(preset, "trainval" if args.preset.startswith("paper-") else "train")
    dataset = dataset.in_memory() if args.in_memory else dataset
    check_writable(args.out)
    return preset, dataset


def _assigned(option: str, pairs: list[str]) -> dict:
    """NAME=VALUE pairs; a value is read as a Python literal where it is one, else as text."""
    from mimrefiner.batch.parameters import assignments

    found = {}
    for given in pairs:
        name, equals, value = given.partition("=")
        if not equals or not name.isidentifier():
            raise InputError(f"expected {option} NAME=VALUE, got {given!r}")
        try:
            found |= assignments(f"{name} = {value}")
        except (SyntaxError, ValueError):
            found[name] = value
    return found


def _parts(text: str) -> list[str]:
    """The parts of a list with commas, and perhaps spaces, between them."""
    return [part.strip() for part in text.split(",")]


def _integers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in _parts(text))
    except ValueError:
        raise InputError(
            f"{option} must be whole numbers with commas between, got {text!r}"
        ) from None


def _numbers(option: str, text: str) -> tuple[int | float, ...]:
    try:
        return tuple(int(part) if part.isdigit() else float(part) for part in _parts(text))
    except ValueError:
        raise InputError(f"{option} must be numbers with commas between, got {text!r}") from None


if __name__ == "__main__":
    sys.exit(main())
