"""``finetune``, ``linear`` and ``low-shot``: the paper's protocols that train on labels."""

from functools import partial
from pathlib import Path

from mimrefiner.commands.options import (
    MODEL,
    check_seed,
    checkpoint_arguments,
    encoder_arguments,
    given_encoder,
    memory_arguments,
    new_command,
    number,
    parts_of,
    print_once,
)
from mimrefiner.files import check_writable


def add_finetune(commands) -> None:
    what = "fine-tune a model with labels by one of the paper's recipes, and test it"
    example = "mimrefiner finetune mae_refined_l16 imagefolder:IMAGENET --recipe 1p_l16 --out DIR"
    add = new_command(commands, "finetune", do_finetune, what, example)
    _labelled_arguments(add)
    recipe = "in1k or inat18 (by the model's width), or a recipe's own name (default: in1k)"
    add("--recipe", default="in1k", help=recipe)
    add("--base-lr", type=float, metavar="LR", help="learning rate for 256 images")
    add("--pool", help="cls or mean (default: the recipe's)")
    memory_arguments(add)


def do_finetune(args) -> None:
    from mimrefiner.study.labelled import changed
    from mimrefiner.training.finetune import finetune_into, finetune_recipe
    from mimrefiner.training.memory import Memory
    from mimrefiner.training.recipes import recipe_named

    encoder, sets = _encoder_and_labelled(args)
    options = {name: getattr(args, name) for name in ("epochs", "batch_size", "base_lr", "pool")}
    recipe = changed(recipe_named(args.recipe, encoder.embed_dim), options, args.seed)
    how = {"val": sets.get("val"), "best_on_test": args.best_on_test, "num_workers": args.workers}
    how["memory"] = Memory(args.micro_batch, args.recompute, args.shard)
    train = partial(finetune_recipe, encoder, sets["train"], sets["test"], recipe, **how)
    finetune_into(args.out, train, save_every=args.save_every, resume=args.resume)
    _print_rows(args.out)


def add_linear(commands) -> None:
    what = "train the paper's grid of linear probes on a frozen model, with augmentation"
    example = "mimrefiner linear mae_refined_l16 imagefolder:IMAGENET --out DIR"
    add = new_command(commands, "linear", do_linear, what, example)
    _labelled_arguments(add)
    recipe = "in1k (52 probes), patches (no cls), inat18 or inat18_1shot (default: in1k)"
    add("--recipe", default="in1k", help=recipe)


def do_linear(args) -> None:
    from mimrefiner.errors import one_of
    from mimrefiner.probes.linear_grid import RECIPES, linear_grid, linear_grid_into
    from mimrefiner.study.labelled import changed

    one_of("recipe", args.recipe, tuple(RECIPES))
    encoder, sets = _encoder_and_labelled(args)
    options = {name: getattr(args, name) for name in ("epochs", "batch_size")}
    recipe = changed(RECIPES[args.recipe], options, args.seed)
    how = {"val": sets.get("val"), "best_on_test": args.best_on_test, "num_workers": args.workers}
    train = partial(linear_grid, encoder, sets["train"], sets["test"], recipe, **how)
    linear_grid_into(args.out, train, save_every=args.save_every, resume=args.resume)
    _print_rows(args.out)


def add_low_shot(commands) -> None:
    what = "logistic regression on a few images per class, by lists or drawn, as the paper does"
    example = (
        "mimrefiner low-shot mae_refined_l16 imagefolder:IMAGENET --labels 1 "
        "--lists subsets1/1imgs_class.txt,subsets2/1imgs_class.txt --out DIR"
    )
    add = new_command(commands, "low-shot", do_low_shot, what, example)
    add("model", metavar="MODEL", help=MODEL)
    add("data", metavar="DATA", help="data set by name or path, see mimrefiner datasets")
    add("--labels", required=True, help="images per class, such as 1, or a share such as 0.01")
    lists = "published lists with commas between, or inat18:1,inat18:2 (default: draw three)"
    add("--lists", default="", help=lists)
    solver = "converged, or cyanure, the paper's (default: converged)"
    add("--solver", default="converged", help=solver)
    add("--pool", help="cls or mean (default: cls where there is one)")
    add("--no-pretrained", action="store_true", help="random weights")
    add("--seed", type=int, default=0, help="of the first draw (default: 0)")
    add("--workers", type=int, default=0, help="loader processes (default: 0)")
    add("--out", type=Path, required=True, help="folder for rows.csv")


def do_low_shot(args) -> None:
    from mimrefiner.errors import one_of
    from mimrefiner.files import write_csv
    from mimrefiner.probes.shots import SOLVERS
    from mimrefiner.study.labelled import low_shot_rows

    one_of("solver", args.solver, SOLVERS)
    check_seed(args)
    check_writable(args.out)
    labels = number("--labels", args.labels)
    rows = low_shot_rows(
        args.model,
        args.data,
        labels,
        lists=parts_of(args.lists) if args.lists else [],
        solver=args.solver,
        pool=args.pool,
        pretrained=not args.no_pretrained,
        seed=args.seed,
        num_workers=args.workers,
    )
    write_csv(rows, args.out / "rows.csv")
    _print_rows(args.out)
    print_once(f"mean of {len(rows)} splits: {100 * rows['value'].mean():.1f} %")


def _labelled_arguments(add) -> None:
    add("model", metavar="MODEL", help=MODEL)
    add("data", metavar="DATA", help="data set by name or path, see mimrefiner datasets")
    labels = "images per class, such as 1, or a share such as 0.01 (default: all)"
    add("--labels", metavar="N", help=labels)
    listed = "file with the names of the images, or inat18:SPLIT (default: drawn by --seed)"
    add("--list", default="", metavar="FILE", dest="listed", help=listed)
    add("--epochs", type=float, help="in place of the recipe's")
    add("--batch-size", type=int, metavar="N", help="in place of the recipe's")
    whole = "train on training and validation images together, as the paper does"
    add("--all-images", action="store_true", help=whole)
    best = "report the best on the test images, as the paper does (implies --all-images)"
    add("--best-on-test", action="store_true", help=best)
    add("--size", type=int, metavar="PX", help="side of the images (default: the model's own)")
    encoder_arguments(add)
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=0, help="loader processes (default: 0)")
    checkpoint_arguments(add, "rows and weights")


def _encoder_and_labelled(args):
    """The model, and the images that it is trained and tested on."""
    from mimrefiner.study.labelled import labelled_sets

    check_seed(args)
    check_writable(args.out)
    labels = number("--labels", args.labels) if args.labels else None
    encoder = given_encoder(args, image_size=args.size)
    whole = args.all_images or args.best_on_test
    return encoder, labelled_sets(
        args.data, labels=labels, listed=args.listed, whole=whole, seed=args.seed
    )


def _print_rows(out: Path) -> None:
    """The results in ``rows.csv``, one line each; by the first of several processes."""
    import pandas as pd

    from mimrefiner.distributed import rank

    if rank():
        return
    for row in pd.read_csv(out / "rows.csv").itertuples():
        images = f" ({row.images})" if hasattr(row, "images") else ""
        print(f"{100 * row.value:5.1f} %  {row.protocol}, {row.pool}, {row.setting}{images}")
