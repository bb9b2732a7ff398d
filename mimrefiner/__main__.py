"""The command line: ``mimrefiner COMMAND --help`` shows an example of each."""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from mimrefiner.errors import InputError


def add_run(commands) -> None:
    parser = _command(commands, "run", do_run, "execute notebooks in batch", "mimrefiner run 01 04 --preset tiny --seeds 0,1,2")
    parser.add_argument("notebooks", nargs="*", metavar="NAME", help="notebooks by name or number; none means all")
    parser.add_argument("--preset", default="tiny", help="smoke, tiny, natural or gpu (default: tiny)")
    parser.add_argument("--seeds", default="0", help="seeds with commas between (default: 0)")
    parser.add_argument("--out", type=Path, help="folder for all results (default: runs/PRESET)")
    parser.add_argument("-p", action="append", default=[], metavar="NAME=VALUE", dest="parameters", help="a notebook parameter")
    parser.add_argument("--resume", action="store_true", help="skip notebooks that are done and whose inputs have not changed")
    parser.add_argument("--keep-going", action="store_true", help="after a failure, go on with the other notebooks")
    parser.add_argument("--gpus", help="numbers of GPUs with commas between: one job at a time on each")
    parser.add_argument("--workers", type=int, default=1, help="jobs at once where no --gpus are given (default: 1)")
    parser.add_argument("--timeout", type=float, metavar="MINUTES", help="limit for each notebook (default: none)")
    parser.add_argument("--executor", default="local", help="local or slurm (default: local)")
    parser.add_argument("--slurm", action="append", default=[], metavar="NAME=VALUE", help="for submitit: slurm_partition=gpu")


def do_run(args) -> None:
    from mimrefiner.runner import Batch, run_notebooks

    batch = Batch(
        gpus=_integers("--gpus", args.gpus) if args.gpus else (), workers=args.workers, resume=args.resume,
        keep_going=args.keep_going, timeout=args.timeout and 60 * args.timeout, executor=args.executor,
        slurm=_assigned("--slurm", args.slurm),
    )  # fmt: skip
    out, parameters = args.out or Path("runs") / args.preset, _assigned("-p", args.parameters)
    run_notebooks(args.notebooks, preset=args.preset, seeds=args.seeds, out=out, parameters=parameters, batch=batch)


def add_students(commands) -> None:
    parser = _command(
        commands, "students", do_students, "copy notebooks without their solutions", "mimrefiner students --out course"
    )
    parser.add_argument("notebooks", nargs="*", metavar="NAME", help="notebooks by name or number; none means all")
    parser.add_argument("--out", type=Path, required=True, help="folder for the copies")


def do_students(args) -> None:
    from mimrefiner.students import write_student_copies

    print(f"{len(write_student_copies(args.notebooks, args.out))} notebooks are in {args.out}")


def add_publish(commands) -> None:
    example = "mimrefiner publish runs/figures"
    parser = _command(commands, "publish", do_publish, "replace the executed notebooks of the project by those of a run", example)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--to", type=Path, default=Path("notebooks/executed"), help="(default: notebooks/executed)")


def do_publish(args) -> None:
    from mimrefiner.students import publish

    print(f"{len(publish(args.run, args.to))} executed notebooks are in {args.to}")


def add_pretrain(commands) -> None:
    example = "mimrefiner pretrain --data digits --preset tiny --seed 0 --out runs/mim"
    parser = _command(commands, "pretrain", do_pretrain, "masked-image pre-training of a small ViT (stage 1)", example)
    _training_arguments(parser)


def do_pretrain(args) -> None:
    from mimrefiner import build_vit, pretrain
    from mimrefiner.checkpoint import save_encoder

    preset, dataset = _preset_and_data(args)
    result = pretrain(build_vit(preset.encoder, seed=args.seed), dataset, preset.pretrain, num_workers=args.workers)
    save_encoder(result.encoder, args.out / "encoder.safetensors")
    _write_history(result.history, args.out)
    print(f"{result.seconds:.0f} s; encoder.safetensors and history.csv are in {args.out}")


def add_refine(commands) -> None:
    example = "mimrefiner refine --model runs/mim/encoder.safetensors --data digits --preset tiny --out runs/refined"
    parser = _command(commands, "refine", do_refine, "train heads, then encoder and heads (stages 2 and 3)", example)
    parser.add_argument("--model", help="timm name or .safetensors file (default: the preset's own, pre-trained first)")
    parser.add_argument("--no-pretrained", action="store_true", help="random weights for a timm name")
    parser.add_argument("--blocks", help="0-based blocks that get a head, such as 8,9,10,11 (default: the last third)")
    parser.add_argument("--heads", type=int, help="a head on each of this many last blocks")
    parser.add_argument("--top-k", type=int, help="neighbours to draw from in stage 3")
    parser.add_argument("--temperature", type=float, help="softmax temperature of the loss")
    _training_arguments(parser)


def do_refine(args) -> None:
    from mimrefiner import load_encoder, refine
    from mimrefiner.checkpoint import save_encoder
    from mimrefiner.store import pretrained

    preset, dataset = _preset_and_data(args)
    encoder = load_encoder(args.model, pretrained=not args.no_pretrained) if args.model else pretrained(preset).encoder
    depth = len(encoder.blocks)
    config = preset.refine
    if args.blocks and args.heads:
        raise InputError("give either --blocks or --heads")
    if args.blocks:
        config = replace(config, blocks=_integers("--blocks", args.blocks))
    if args.heads is not None:
        if not 1 <= args.heads <= depth:
            raise InputError(f"--heads must be between 1 and the number of blocks {depth}, got {args.heads}")
        config = replace(config, blocks=tuple(range(depth - args.heads, depth)))
    if args.top_k is not None:
        config = replace(config, refine_top_k=args.top_k)
    if args.temperature is not None:
        config = replace(config, temperature=args.temperature)
    result = refine(encoder, dataset, config, num_workers=args.workers)
    save_encoder(result.encoder, args.out / "encoder.safetensors")
    save_encoder(result.ema_encoder, args.out / "ema_encoder.safetensors")
    _write_history(result.history, args.out)
    print(f"{result.seconds:.0f} s; encoder.safetensors, ema_encoder.safetensors and history.csv are in {args.out}")


def add_probe(commands) -> None:
    example = "mimrefiner probe vit_base_patch16_224.mae imagefolder:PATH --probes knn,linear --out runs/report"
    parser = _command(commands, "probe", do_probe, "report how good every block of a model is", example)
    parser.add_argument("model", metavar="MODEL", help="timm name, packaged name or .safetensors file")
    parser.add_argument("data", metavar="DATA", help="data set by name or path")
    parser.add_argument("--blocks", default="all", help="all, or 0-based blocks with commas between (default: all)")
    parser.add_argument("--probes", default="knn", help="of knn,linear,low_shot,cluster,rank with commas between (default: knn)")
    parser.add_argument("--no-pretrained", action="store_true", help="random weights")
    parser.add_argument("--no-baselines", action="store_true", help="leave out raw pixels and random weights")
    parser.add_argument("--resume", action="store_true", help="keep the probes that are finished in --out")
    parser.add_argument("--cache", type=Path, help="folder that keeps the features, to go on after a kill (default: memory)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--workers", type=int, default=0, help="loader processes (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("runs/report"), help="folder for the report (default: runs/report)")


def do_probe(args) -> None:
    import torch
    import torch.distributed as dist

    from mimrefiner.models import default_device
    from mimrefiner.report import markdown, probe
    from mimrefiner.runner import check_writable

    check_writable(args.out)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # started by torchrun
        if default_device().type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if default_device().type == "cuda" else "gloo")
    table = probe(
        args.model, args.data, blocks=args.blocks if args.blocks == "all" else _integers("--blocks", args.blocks),
        probes=args.probes.split(","), out=args.out, resume=args.resume, cache=args.cache, pretrained=not args.no_pretrained,
        baselines=not args.no_baselines, seed=args.seed, batch_size=args.batch_size, num_workers=args.workers,
    )  # fmt: skip
    if dist.is_initialized():
        dist.destroy_process_group()
    if len(table):
        print(markdown(table, args.data))
        print(f"report.csv, report.md, report.png and report.pdf are in {args.out}")


def add_datasets(commands) -> None:
    _command(commands, "datasets", do_datasets, "list the data sets that can be named", "mimrefiner datasets")


def do_datasets(args) -> None:
    from mimrefiner.data import DOWNLOADED

    print("digits             scikit-learn's digits, 1,797 images, 10 classes; embedded, no download")
    print("fruit64            photos of fruit at 64 px, 1,393 images, 14 classes; embedded, no download")
    for name in DOWNLOADED:
        print(f"{name:18s} downloaded by torchvision when asked for")
    print("imagefolder:PATH   PATH/train/CLASS/IMAGE and PATH/val/CLASS/IMAGE (ImageNet's layout), or PATH/CLASS/IMAGE")
    print("parquet:PATH       train-*.parquet and val-*.parquet with columns image{bytes, path} and label")


def main(arguments: list[str] | None = None) -> int:
    """Run one command; errors a person can mend are one line on standard error and exit status 2."""
    parser = argparse.ArgumentParser("mimrefiner", description="See and repair masked-image models, block by block.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (add_run, add_pretrain, add_refine, add_probe, add_datasets, add_students, add_publish):
        add(commands)
    args = parser.parse_args(arguments)
    if not sys.stderr.isatty():
        os.environ.setdefault("MIMREFINER_PROGRESS", "log")
    try:
        args.do(args)
    except (InputError, OSError) as error:
        print(f"mimrefiner: error: {' '.join(str(error).split())}", file=sys.stderr)  # one line, whatever a library said
        return 2
    except KeyboardInterrupt:
        print("mimrefiner: stopped", file=sys.stderr)
        return 130
    return 0


def _command(commands, name: str, do, what: str, example: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".", epilog=f"example: {example}")
    parser.set_defaults(do=do)
    return parser


def _training_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", help="data set by name or path (default: the preset's)")
    parser.add_argument("--preset", default="tiny", help="smoke, tiny, natural or gpu (default: tiny)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0, help="loader processes (default: 0)")
    parser.add_argument("--out", type=Path, required=True, help="folder for weights and history")


def _preset_and_data(args):
    from mimrefiner import load_preset
    from mimrefiner.runner import check_writable
    from mimrefiner.store import load_split

    preset = load_preset(args.preset, args.seed)
    if args.data:
        preset = replace(preset, dataset=args.data)
    dataset = load_split(preset, "train")
    check_writable(args.out)
    return preset, dataset


def _assigned(option: str, pairs: list[str]) -> dict:
    """NAME=VALUE pairs; a value is read as a Python literal where it is one, else as text."""
    from mimrefiner.runner import assignments

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
        raise InputError(f"{option} must be whole numbers with commas between, got {text!r}") from None


def _write_history(history, out: Path) -> None:
    from mimrefiner.results import write_csv

    write_csv(history, out / "history.csv")


if __name__ == "__main__":
    sys.exit(main())
