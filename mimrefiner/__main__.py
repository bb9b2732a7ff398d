"""The command line: ``mimrefiner COMMAND --help`` shows an example of each."""

import argparse
import contextlib
import os
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from mimrefiner.errors import InputError, Stopped

PRESETS = "smoke, tiny, fashion, natural, natural-simmim, natural-gpu, gpu, or paper-MODEL as listed in REPRODUCING.md"
MONITORED = 10_000  # images on either side of the k-NN that --watch does


def add_run(commands) -> None:
    parser = _command(
        commands,
        "run",
        do_run,
        "execute notebooks in batch",
        "mimrefiner run 01 04 --preset tiny --seeds 0,1,2",
    )
    parser.add_argument(
        "notebooks", nargs="*", metavar="NAME", help="notebooks by name or number; none means all"
    )
    parser.add_argument("--preset", default="tiny", help=f"{PRESETS} (default: tiny)")
    parser.add_argument("--seeds", default="0", help="seeds with commas between (default: 0)")
    parser.add_argument("--out", type=Path, help="folder for all results (default: runs/PRESET)")
    parser.add_argument(
        "-p",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        dest="parameters",
        help="a notebook parameter",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="skip notebooks that are done and whose inputs have not changed",
    )
    parser.add_argument(
        "--keep-going", action="store_true", help="after a failure, go on with the other notebooks"
    )
    parser.add_argument(
        "--gpus", help="numbers of GPUs with commas between: one job at a time on each"
    )
    parser.add_argument(
        "--workers", type=int, default=1, help="jobs at once where no --gpus are given (default: 1)"
    )
    parser.add_argument(
        "--timeout", type=float, metavar="MINUTES", help="limit for each notebook (default: none)"
    )
    parser.add_argument("--executor", default="local", help="local or slurm (default: local)")
    parser.add_argument(
        "--slurm",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="for submitit: slurm_partition=gpu",
    )


def do_run(args) -> None:
    from mimrefiner.batch.runner import Batch, run_notebooks

    batch = Batch(
        gpus=() if args.gpus is None else _integers("--gpus", args.gpus),
        workers=args.workers,
        resume=args.resume,
        keep_going=args.keep_going,
        timeout=args.timeout and 60 * args.timeout,
        executor=args.executor,
        slurm=_assigned("--slurm", args.slurm),
    )
    out, parameters = args.out or Path("runs") / args.preset, _assigned("-p", args.parameters)
    run_notebooks(
        args.notebooks,
        preset=args.preset,
        seeds=args.seeds,
        out=out,
        parameters=parameters,
        batch=batch,
    )


def add_students(commands) -> None:
    parser = _command(
        commands,
        "students",
        do_students,
        "copy notebooks without their solutions",
        "mimrefiner students --out course",
    )
    parser.add_argument(
        "notebooks", nargs="*", metavar="NAME", help="notebooks by name or number; none means all"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the copies")


def do_students(args) -> None:
    from mimrefiner.batch.copies import write_student_copies

    print(f"{len(write_student_copies(args.notebooks, args.out))} notebooks are in {args.out}")


def add_publish(commands) -> None:
    example = "mimrefiner publish runs/figures"
    parser = _command(
        commands,
        "publish",
        do_publish,
        "replace the executed notebooks of the project by those of a run",
        example,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--to", type=Path, default=Path("notebooks/executed"), help="(default: notebooks/executed)"
    )


def do_publish(args) -> None:
    from mimrefiner.batch.copies import publish

    print(f"{len(publish(args.run, args.to))} executed notebooks are in {args.to}")


def add_pretrain(commands) -> None:
    example = "mimrefiner pretrain --data digits --preset tiny --seed 0 --out runs/mim"
    parser = _command(
        commands,
        "pretrain",
        do_pretrain,
        "masked-image pre-training of a small ViT (stage 1)",
        example,
    )
    _training_arguments(parser)
    parser.add_argument(
        "--shard",
        action="store_true",
        help="share the model among processes: less memory each, more messages",
    )


def do_pretrain(args) -> None:
    from mimrefiner import build_vit, pretrain
    from mimrefiner.training.run import train_into

    preset, dataset = _preset_and_data(args)
    encoder = build_vit(preset.encoder, seed=args.seed)
    config = (
        preset.pretrain
        if args.clip_norm is None
        else replace(preset.pretrain, clip_norm=args.clip_norm)
    )
    train = partial(pretrain, encoder, dataset, config, num_workers=args.workers, shard=args.shard)
    train_into(args.out, train, ("encoder",), save_every=args.save_every, resume=args.resume)


def add_refine(commands) -> None:
    example = "mimrefiner refine --model runs/mim/encoder.safetensors --data digits --preset tiny --out runs/refined"
    parser = _command(
        commands,
        "refine",
        do_refine,
        "train heads, then encoder and heads (stages 2 and 3)",
        example,
    )
    parser.add_argument(
        "--model",
        help="timm name or .safetensors file (default: the preset's own, pre-trained first)",
    )
    parser.add_argument(
        "--no-pretrained", action="store_true", help="random weights for a timm name"
    )
    parser.add_argument(
        "--blocks",
        help="0-based blocks that get a head, such as 8,9,10,11 (default: the last third)",
    )
    parser.add_argument("--heads", type=int, help="a head on each of this many last blocks")
    parser.add_argument(
        "--local-crops",
        type=int,
        metavar="N",
        help="local crops of every image (default: the preset's, 4 or 10)",
    )
    parser.add_argument("--top-k", type=int, help="neighbours to draw from in stage 3")
    parser.add_argument("--temperature", type=float, help="softmax temperature of the loss")
    parser.add_argument(
        "--freeze-first",
        type=int,
        metavar="N",
        help="keep what is before the blocks and the first N as they are",
    )
    _memory_arguments(parser)
    parser.add_argument(
        "--watch",
        action="store_true",
        help="k-NN on the validation split after every epoch, in epochs.csv (paper-* presets train on these images too)",
    )
    parser.add_argument(
        "--tensorboard", action="store_true", help="with --watch: write TensorBoard events too"
    )
    _training_arguments(parser)


def do_refine(args) -> None:
    from mimrefiner import load_encoder, refine
    from mimrefiner.models.blocks import block_modules
    from mimrefiner.probes.monitor import Monitor
    from mimrefiner.study.presets import load_split
    from mimrefiner.study.store import pretrained
    from mimrefiner.training.memory import Memory
    from mimrefiner.training.run import train_into

    if args.tensorboard and not args.watch:
        raise InputError("--tensorboard writes what --watch measures: give --watch too")
    preset, dataset = _preset_and_data(args)
    monitor = None
    if args.watch:  # what it lacks is said before anything is trained
        held_out = load_split(preset, "val")
        monitor = Monitor(
            dataset.take(MONITORED),
            held_out.take(MONITORED),
            args.out,
            args.tensorboard,
            num_workers=args.workers,
        )
    if args.preset.startswith("paper-") and not args.model:
        raise InputError(f"{args.preset} refines published weights: give them by --model")
    encoder = (
        load_encoder(args.model, pretrained=not args.no_pretrained)
        if args.model
        else pretrained(preset).encoder
    )
    depth = len(block_modules(encoder))
    config = preset.refine
    if args.blocks is not None and args.heads is not None:
        raise InputError("give either --blocks or --heads")
    if args.blocks is not None:
        config = replace(config, blocks=_integers("--blocks", args.blocks))
    if args.heads is not None:
        if not 1 <= args.heads <= depth:
            raise InputError(
                f"--heads must be between 1 and the number of blocks {depth}, got {args.heads}"
            )
        config = replace(config, blocks=tuple(range(depth - args.heads, depth)))
    if args.local_crops is not None:
        if args.local_crops < 0:
            raise InputError(f"--local-crops must be >= 0, got {args.local_crops}")
        config = replace(config, views=replace(config.views, n_local=args.local_crops))
    if args.top_k is not None:
        config = replace(config, refine_top_k=args.top_k)
    if args.temperature is not None:
        config = replace(config, temperature=args.temperature)
    if args.freeze_first is not None:
        config = replace(config, frozen_blocks=args.freeze_first)
    if args.clip_norm is not None:
        config = replace(config, clip_norm=args.clip_norm)
    memory = Memory(args.micro_batch, args.recompute, args.shard)
    train = partial(
        refine, encoder, dataset, config, num_workers=args.workers, memory=memory, monitor=monitor
    )
    train_into(
        args.out, train, ("encoder", "ema_encoder"), save_every=args.save_every, resume=args.resume
    )


def add_probe(commands) -> None:
    example = "mimrefiner probe vit_base_patch16_224.mae imagefolder:PATH --probes knn,linear --out runs/report"
    parser = _command(
        commands, "probe", do_probe, "report how good every block of a model is", example
    )
    parser.add_argument(
        "model", metavar="MODEL", help="timm name, packaged name or .safetensors file"
    )
    parser.add_argument("data", metavar="DATA", help="data set by name or path")
    parser.add_argument(
        "--blocks", default="all", help="all, or 0-based blocks with commas between (default: all)"
    )
    parser.add_argument(
        "--pools",
        help="such as cls,mean,cls+mean,cls_last4,cls+mean_last4 (default: cls,mean where there are)",
    )
    parser.add_argument(
        "--probes",
        default="knn",
        help="of knn,linear,low_shot,cluster,rank with commas between (default: knn)",
    )
    parser.add_argument(
        "--shots",
        default="1,2,5",
        help="low_shot: images per class, or shares such as 0.01 (default: 1,2,5)",
    )
    parser.add_argument(
        "--clusters", type=int, help="cluster: how many (default: as many as classes)"
    )
    parser.add_argument("--no-pretrained", action="store_true", help="random weights")
    parser.add_argument(
        "--no-baselines", action="store_true", help="leave out raw pixels and random weights"
    )
    parser.add_argument(
        "--resume", action="store_true", help="keep the probes that are finished in --out"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        help="folder that keeps the features, to go on after a kill (default: memory)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--precision",
        default="float32",
        help="of the forward pass: float32, bfloat16, float16 (default: float32)",
    )
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--workers", type=int, default=0, help="loader processes (default: 0)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/report"),
        help="folder for the report (default: runs/report)",
    )


def do_probe(args) -> None:
    import torch

    from mimrefiner.files import check_writable
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
        pools=None if args.pools is None else args.pools.split(","),
        probes=args.probes.split(","),
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
        print(markdown(table, report_title(args.model, args.data)))
        print(f"report.csv, report.md, report.png and report.pdf are in {args.out}")


def add_datasets(commands) -> None:
    _command(
        commands,
        "datasets",
        do_datasets,
        "list the data sets that can be named",
        "mimrefiner datasets",
    )


def do_datasets(args) -> None:
    from mimrefiner.data.datasets import DOWNLOADED

    print(
        "digits             scikit-learn's digits, 1,797 images, 10 classes; embedded, no download"
    )
    print(
        "fruit64            photos of fruit at 64 px, 1,393 images, 14 classes; embedded, no download"
    )
    for name in DOWNLOADED:
        print(f"{name:18s} downloaded by torchvision when asked for")
    print(
        "imagefolder:PATH   PATH/train/CLASS/IMAGE and PATH/val/CLASS/IMAGE (ImageNet's layout), or PATH/CLASS/IMAGE"
    )
    print(
        "parquet:PATH       train-*.parquet and val-*.parquet with columns image{bytes, path} and label"
    )


def add_models(commands) -> None:
    _command(
        commands,
        "models",
        do_models,
        "list the models that can be named, with licences and what was verified",
        "mimrefiner models",
    )


def do_models(args) -> None:
    from mimrefiner.models.catalogue import table

    print(table(min(100, shutil.get_terminal_size().columns)))


def add_plan(commands) -> None:
    example = "mimrefiner plan d2v2_refined_h14 imagenet --gpus 8"
    parser = _command(
        commands, "plan", do_plan, "foresee memory and GPU-hours of a model, from formulas", example
    )
    parser.add_argument("model", help="a plain ViT of the table of models")
    parser.add_argument(
        "data", help="imagenet, another data set by name or path, or a number of training images"
    )
    parser.add_argument(
        "--preset", default="paper", help=f"paper (by the model's size), {PRESETS} (default: paper)"
    )
    parser.add_argument(
        "--gpus", type=int, default=1, help="GPUs that share the batch (default: 1)"
    )
    parser.add_argument(
        "--tflops",
        type=float,
        default=312,
        help="peak of one GPU in bfloat16, TFLOP/s (default: 312, A100)",
    )
    _memory_arguments(parser)


def do_plan(args) -> None:
    from mimrefiner.study.plan import report
    from mimrefiner.training.memory import Memory

    memory = Memory(args.micro_batch, args.recompute, args.shard)
    print(report(args.model, args.data, args.preset, args.gpus, args.tflops, memory))


def add_export(commands) -> None:
    example = "mimrefiner export runs/refined/ema_encoder.safetensors --to refined.safetensors"
    parser = _command(
        commands,
        "export",
        do_export,
        "write an encoder for timm, in the official layout, or smaller",
        example,
    )
    parser.add_argument("model", help="anything that load_encoder takes")
    parser.add_argument("--to", type=Path, required=True, help="file to write")
    parser.add_argument(
        "--format",
        default="timm",
        help="timm (safetensors and a json), hub or mimrefiner (default: timm)",
    )
    parser.add_argument(
        "--dtype",
        help="of the weights in the file: float32, bfloat16 or float16 (default: as they are)",
    )
    parser.add_argument(
        "--heads", type=int, help="attention heads, where a published file does not tell"
    )


def do_export(args) -> None:
    from mimrefiner import load_encoder
    from mimrefiner.models.export import export

    print(export(load_encoder(args.model, num_heads=args.heads), args.to, args.format, args.dtype))


def main(arguments: list[str] | None = None) -> int:
    """Run one command; errors a person can mend are one line on standard error and exit status 2."""
    parser = argparse.ArgumentParser(
        "mimrefiner", description="See and repair masked-image models, block by block."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (
        add_run,
        add_pretrain,
        add_refine,
        add_probe,
        add_datasets,
        add_models,
        add_plan,
        add_export,
        add_students,
        add_publish,
    ):
        add(commands)
    args = parser.parse_args(arguments)
    if not sys.stderr.isatty():
        os.environ.setdefault("MIMREFINER_PROGRESS", "log")
    try:
        with _processes():
            args.do(args)
    except (InputError, OSError) as error:
        # One line, whatever a library said
        print(f"mimrefiner: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"mimrefiner: error: {error}", file=sys.stderr)
        return 1
    except Stopped as stopped:
        print(f"mimrefiner: {stopped}", file=sys.stderr)
        return 143  # as a shell reports SIGTERM
    except KeyboardInterrupt:
        print("mimrefiner: stopped", file=sys.stderr)
        return 130
    return 0


def _processes():
    """The process group where ``torchrun`` started this; nothing else needs it (or its slow
    import).
    """
    if "WORLD_SIZE" not in os.environ:
        return contextlib.nullcontext()
    from mimrefiner.training.engine import processes

    return processes()


def _command(commands, name: str, do, what: str, example: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, help=what, description=what[0].upper() + what[1:] + ".", epilog=f"example: {example}"
    )
    parser.set_defaults(do=do)
    return parser


def _memory_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--micro-batch",
        type=int,
        metavar="N",
        help="images of a process that pass the encoder at a time",
    )
    parser.add_argument(
        "--recompute",
        action="store_true",
        help="keep no activations inside of blocks: less memory, more time",
    )
    parser.add_argument(
        "--shard",
        action="store_true",
        help="share the encoder among processes: less memory each, more messages",
    )


def _training_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", help="data set by name or path (default: the preset's)")
    parser.add_argument("--preset", default="tiny", help=f"{PRESETS} (default: tiny)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--clip-norm",
        type=float,
        metavar="NORM",
        help="limit of the norm of all gradients (default: none)",
    )
    parser.add_argument("--workers", type=int, default=0, help="loader processes (default: 0)")
    parser.add_argument(
        "--in-memory",
        action="store_true",
        help="decode every image once and keep it, 3 bytes a pixel",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the newest valid checkpoint in --out"
    )
    parser.add_argument(
        "--save-every",
        type=int,
        default=500,
        metavar="STEPS",
        help="between checkpoints (default: 500)",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for weights and history")


def _preset_and_data(args):
    from mimrefiner import load_preset
    from mimrefiner.files import check_writable
    from mimrefiner.study.presets import load_split

    preset = load_preset(args.preset, args.seed)
    if args.data:
        preset = replace(preset, dataset=args.data)
    # The paper's: all images
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


def _integers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(
            f"{option} must be whole numbers with commas between, got {text!r}"
        ) from None


def _numbers(option: str, text: str) -> tuple[int | float, ...]:
    try:
        return tuple(
            int(part) if part.strip().isdigit() else float(part) for part in text.split(",")
        )
    except ValueError:
        raise InputError(f"{option} must be numbers with commas between, got {text!r}") from None


if __name__ == "__main__":
    sys.exit(main())
