"""What several commands ask for, and how they read it."""

from dataclasses import replace
from pathlib import Path

from mimrefiner.errors import InputError
from mimrefiner.files import check_writable

PRESETS = (
    "smoke, tiny, fashion, natural, natural-simmim, natural-gpu, gpu, "
    "or paper-MODEL as listed in REPRODUCING.md"
)
MODEL = "timm name, packaged name, file, folder or NAME@FILE (docs/models.md)"
NUM_HEADS = "attention heads, where a file of weights does not tell"
LIKE = "prepare images as this timm model does, where a file of weights does not tell"


def new_command(commands, name: str, do, what: str, example: str):
    """Add a command and return what adds its arguments."""
    parser = commands.add_parser(
        name, help=what, description=what[0].upper() + what[1:] + ".", epilog=f"example: {example}"
    )
    parser.set_defaults(do=do)
    return parser.add_argument


def encoder_arguments(add, no_pretrained: str = "random weights") -> None:
    """What :func:`load_encoder` is told beside the model."""
    add("--no-pretrained", action="store_true", help=no_pretrained)
    add("--num-heads", type=int, metavar="N", help=NUM_HEADS)
    add("--like", metavar="TIMM_NAME", help=LIKE)


def plainly(args) -> bool:
    """Whether the name of the model says all about it."""
    return args.num_heads is None and args.like is None and not args.no_pretrained


def given_encoder(args, source: str | None = None, **options):
    """The encoder that a command was given, or the one that ``source`` names."""
    from mimrefiner import load_encoder

    options |= {"num_heads": args.num_heads, "like": args.like}
    return load_encoder(source or args.model, pretrained=not args.no_pretrained, **options)


def memory_arguments(add) -> None:
    micro_batch = "images of a process that pass the encoder at a time"
    add("--micro-batch", type=int, metavar="N", help=micro_batch)
    recompute = "keep no activations inside of blocks: less memory, more time"
    add("--recompute", action="store_true", help=recompute)
    shard = "share the encoder among processes: less memory each, more messages"
    add("--shard", action="store_true", help=shard)


def running_arguments(add) -> None:
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=0, help="loader processes (default: 0)")
    add("--resume", action="store_true", help="go on with what --out holds")
    add("--out", type=Path, required=True, help="folder for rows and weights")


def shared_arguments(add) -> None:
    """Of commands whose runs any number of processes may share through ``--out``."""
    gpus = "numbers of GPUs with commas between, which share the runs"
    add("--gpus", help=gpus)
    add("--processes", type=int, default=1, help="that share the runs (default: 1)")
    add("--workers", type=int, default=0, help="loader processes of each (default: 0)")
    out = "folder for all runs; what it holds is not done again"
    add("--out", type=Path, required=True, help=out)


def share_runs(args) -> None:
    """Where several GPUs or processes are asked for, let copies of this command do the runs."""
    gpus = () if args.gpus is None else integers("--gpus", args.gpus)
    if gpus or args.processes != 1:
        from mimrefiner.batch.shared import share

        share([*without(args.arguments, "--gpus", "--processes")], args.out, gpus, args.processes)


def without(arguments: list[str], *options: str) -> list[str]:
    """``arguments`` without ``options`` and their values.

    >>> without(["vtab", "--gpus", "0,1", "--out=a", "--processes=2"], "--gpus", "--processes")
    ['vtab', '--out=a']
    """
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument.partition("=")[0] not in options:
            kept.append(argument)
        skip = argument in options
    return kept


def training_arguments(add) -> None:
    add("--data", help="data set by name or path (default: the preset's)")
    add("--preset", default="tiny", help=f"{PRESETS} (default: tiny)")
    add("--seed", type=int, default=0)
    clip_norm = "limit of the norm of all gradients (default: none)"
    add("--clip-norm", type=float, metavar="NORM", help=clip_norm)
    add("--workers", type=int, default=0, help="loader processes (default: 0)")
    in_memory = "decode every image once and keep it, 3 bytes a pixel"
    add("--in-memory", action="store_true", help=in_memory)
    checkpoint_arguments(add, "weights and history")


def checkpoint_arguments(add, written: str) -> None:
    resume = "go on from the newest valid checkpoint in --out"
    add("--resume", action="store_true", help=resume)
    save_every = "between checkpoints (default: 500)"
    add("--save-every", type=int, default=500, metavar="STEPS", help=save_every)
    add("--out", type=Path, required=True, help=f"folder for {written}")


def preset_and_data(args):
    from mimrefiner.study.presets import load_preset, load_split

    preset = load_preset(args.preset, args.seed)
    if args.data:
        preset = replace(preset, dataset=args.data)
    # The paper trains on all images
    dataset = load_split(preset, "trainval" if args.preset.startswith("paper-") else "train")
    dataset = dataset.in_memory() if args.in_memory else dataset
    check_writable(args.out)
    return preset, dataset


def assigned(option: str, pairs: list[str]) -> dict:
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


def parts_of(text: str) -> list[str]:
    """The parts of a list with commas, and perhaps spaces, between them."""
    return [part.strip() for part in text.split(",")]


def integers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in parts_of(text))
    except ValueError:
        raise InputError(
            f"{option} must be whole numbers with commas between, got {text!r}"
        ) from None


def numbers(option: str, text: str) -> tuple[int | float, ...]:
    try:
        return tuple(int(part) if part.isdigit() else float(part) for part in parts_of(text))
    except ValueError:
        raise InputError(f"{option} must be numbers with commas between, got {text!r}") from None


def number(option: str, text: str) -> int | float:
    """The one number that an option takes."""
    found = numbers(option, text)
    if len(found) != 1:
        raise InputError(f"{option} takes one number here, got {text!r}: run the command for each")
    return found[0]


def check_seed(args) -> None:
    if args.seed < 0:
        raise InputError(f"--seed must be >= 0, got {args.seed}")


def print_once(text: str) -> None:
    """Print a result; of several processes the first one does."""
    from mimrefiner.distributed import rank

    if rank() == 0:
        print(text)
