"""``demo``, ``probe`` and ``explore``: how good each block is, as rows, figures and a page."""

import webbrowser
from pathlib import Path

from mimrefiner.commands.options import (
    MODEL,
    encoder_arguments,
    given_encoder,
    integers,
    new_command,
    numbers,
    parts_of,
    plainly,
)
from mimrefiner.errors import InputError
from mimrefiner.files import check_writable


def add_demo(commands) -> None:
    what = "probe the packaged model on digits: half a minute, nothing to download"
    add = new_command(commands, "demo", do_demo, what, "mimrefiner demo")
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


def add_probe(commands) -> None:
    example = (
        "mimrefiner probe vit_base_patch16_224.mae imagefolder:PATH --probes knn,linear "
        "--out runs/report"
    )
    add = new_command(
        commands, "probe", do_probe, "report how good every block of a model is", example
    )
    add("model", metavar="MODEL", help=MODEL)
    add("data", metavar="DATA", help="data set by name or path, see mimrefiner datasets")
    blocks = "all, or 0-based blocks with commas between (default: all)"
    add("--blocks", default="all", help=blocks)
    pools = "such as cls,mean,cls+mean,cls_last4,cls+mean_last4 (default: cls,mean where there are)"
    add("--pools", help=pools)
    probes = "of knn,linear,low_shot,cluster,rank with commas between (default: knn)"
    add("--probes", default="knn", help=probes)
    shots = "low_shot: images per class, or shares such as 0.01 (default: 1,2,5)"
    add("--shots", default="1,2,5", help=shots)
    add("--clusters", type=int, help="cluster: how many (default: as many as classes)")
    encoder_arguments(add)
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
    shots = numbers("--shots", args.shots)
    check_writable(args.out)
    named = args.num_heads is None and args.like is None
    table = probe(
        args.model if named else given_encoder(args),
        args.data,
        blocks=args.blocks if args.blocks == "all" else integers("--blocks", args.blocks),
        pools=None if args.pools is None else parts_of(args.pools),
        probes=parts_of(args.probes),
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
    add = new_command(commands, "explore", do_explore, what, example)
    add("before", metavar="BEFORE", help="anything that load_encoder takes")
    add("after", metavar="AFTER", nargs="?", help="another encoder, shown beside the first")
    add("data", metavar="DATA", help="data set by name or path, see mimrefiner datasets")
    encoder_arguments(add)
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
    given = (args.before, args.after)
    before, after = (x if plainly(args) or x is None else given_encoder(args, x) for x in given)
    print(write(args.out, args.data, before, after, settings, num_workers=args.workers))
