"""The command line: ``mimrefiner COMMAND --help`` shows an example of each.

Commands import what they need when they are called, so that help and lists come at once.
"""

import argparse
import contextlib
import io
import os
import re
import shutil
import sys
import webbrowser
from dataclasses import replace
from functools import partial
from pathlib import Path

from mimrefiner.config import AUTO
from mimrefiner.errors import InputError, Stopped
from mimrefiner.files import cache_folder, check_writable, data_folder, variable_folder
from mimrefiner.notices import show_notices

PRESETS = (
    "smoke, tiny, fashion, natural, natural-simmim, natural-gpu, gpu, "
    "or paper-MODEL as listed in REPRODUCING.md"
)
MODEL = "timm name, packaged name, file, folder or NAME@FILE (docs/models.md)"
NUM_HEADS = "attention heads, where a file of weights does not tell"
LIKE = "prepare images as this timm model does, where a file of weights does not tell"
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
    model = "timm name, file, folder or NAME@FILE (default: the preset's own, pre-trained first)"
    add("--model", help=model)
    _encoder_arguments(add, "random weights for a timm name")
    blocks = (
        "0-based blocks that get a head, such as 8,9,10,11, or auto: the one at which nearest "
        "neighbours agree most and all behind it (default: the last third)"
    )
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
    from mimrefiner import refine
    from mimrefiner.study.store import pretrained
    from mimrefiner.training.memory import Memory
    from mimrefiner.training.placement import placed
    from mimrefiner.training.run import train_into

    if args.tensorboard and not args.watch:
        raise InputError("--tensorboard writes what --watch measures: give --watch too")
    preset, dataset = _preset_and_data(args)
    monitor = _monitor(args, preset, dataset) if args.watch else None
    if args.model:
        encoder = _encoder(args)
    elif args.preset.startswith("paper-"):
        raise InputError(f"{args.preset} refines published weights: give them by --model")
    else:
        encoder = pretrained(preset).encoder
    config = placed(_changed(preset.refine, args, encoder), encoder, dataset, args.out)
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
        changes["blocks"] = AUTO if args.blocks == AUTO else _integers("--blocks", args.blocks)
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
    _encoder_arguments(add)
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
    named = args.num_heads is None and args.like is None
    table = probe(
        args.model if named else _encoder(args),
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
    add("data", metavar="DATA", help="data set by name or path, see mimrefiner datasets")
    _encoder_arguments(add)
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
    before, after = (x if _plainly(args) or x is None else _encoder(args, x) for x in given)
    print(write(args.out, args.data, before, after, settings, num_workers=args.workers))


def add_finetune(commands) -> None:
    what = "fine-tune a model with labels by one of the paper's recipes, and test it"
    example = "mimrefiner finetune mae_refined_l16 imagefolder:IMAGENET --recipe 1p_l16 --out DIR"
    add = _command(commands, "finetune", do_finetune, what, example)
    _labelled_arguments(add)
    recipe = "in1k or inat18 (by the model's width), or a recipe's own name (default: in1k)"
    add("--recipe", default="in1k", help=recipe)
    add("--base-lr", type=float, metavar="LR", help="learning rate for 256 images")
    add("--pool", help="cls or mean (default: the recipe's)")
    _memory_arguments(add)


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
    add = _command(commands, "linear", do_linear, what, example)
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
    add = _command(commands, "low-shot", do_low_shot, what, example)
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
    check_writable(args.out)
    (labels,) = _numbers("--labels", args.labels)[:1]
    rows = low_shot_rows(
        args.model,
        args.data,
        labels,
        lists=_parts(args.lists) if args.lists else [],
        solver=args.solver,
        pool=args.pool,
        pretrained=not args.no_pretrained,
        seed=args.seed,
        num_workers=args.workers,
    )
    write_csv(rows, args.out / "rows.csv")
    _print_rows(args.out)
    _print_once(f"mean of {len(rows)} splits: {100 * rows['value'].mean():.1f} %")


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
    _encoder_arguments(add)
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=0, help="loader processes (default: 0)")
    resume = "go on from the newest valid checkpoint in --out"
    add("--resume", action="store_true", help=resume)
    save_every = "between checkpoints (default: 500)"
    add("--save-every", type=int, default=500, metavar="STEPS", help=save_every)
    add("--out", type=Path, required=True, help="folder for rows and weights")


def _encoder_and_labelled(args):
    """The model, and the images that it is trained and tested on."""
    from mimrefiner.study.labelled import labelled_sets

    check_writable(args.out)
    encoder = _encoder(args, image_size=args.size)
    labels = _numbers("--labels", args.labels)[0] if args.labels else None
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


def _print_once(text: str) -> None:
    """Print a result; of several processes the first one does."""
    from mimrefiner.distributed import rank

    if rank() == 0:
        print(text)


def add_segment(commands) -> None:
    what = "segment scenes: fine-tune UperNet, or probe frozen features (ADE20K)"
    example = "mimrefiner segment mae_refined_l16 ADEChallengeData2016 --out runs/ade20k"
    add = _command(commands, "segment", do_segment, what, example)
    add("model", metavar="MODEL", help="anything that load_encoder takes")
    data = "folder with images/training, annotations/training and so on, or images/ and masks/"
    add("data", metavar="DATA", type=Path, help=data)
    probe = (
        "upernet fine-tunes everything; linear probes four blocks joined, with the paper's nine "
        "learning rates; blocks probes every block (default: upernet)"
    )
    add("--probe", default="upernet", help=probe)
    add("--classes", type=int, default=150, help="how many (default: 150, ADE20K's)")
    zero = "label 0 is a class; in ADE20K it means none"
    add("--count-zero", action="store_true", help=zero)
    size = "side of the squares in pixels (default: upernet 512, probes the encoder's own)"
    add("--size", type=int, help=size)
    add("--steps", type=int, help="of upernet (default: 160000)")
    add("--epochs", type=float, help="of probes (default: 50)")
    add("--batch-size", type=int, help="images of a step (default: 16)")
    best = "report the best rate and evaluation on the test images, as the paper does"
    add("--best-on-test", action="store_true", help=f"linear, blocks: {best}")
    _encoder_arguments(add, "random weights for a timm name")
    _running_arguments(add)
    save_every = "between checkpoints of upernet (default: 5000)"
    add("--save-every", type=int, default=5000, metavar="STEPS", help=save_every)


def do_segment(args) -> None:
    from mimrefiner.data.scenes import SegmentationFolder
    from mimrefiner.errors import one_of

    one_of("--probe", args.probe, ("upernet", "linear", "blocks"))
    wrong = {"upernet": ("epochs", "best_on_test")}.get(args.probe, ("steps",))
    for option in wrong:
        if getattr(args, option):
            raise InputError(f"--{option.replace('_', '-')} is no option of --probe {args.probe}")
    train, val = (SegmentationFolder(args.data, split) for split in ("train", "val"))
    check_writable(args.out)
    rows = (_upernet if args.probe == "upernet" else _dense)(args, train, val)
    shown = rows[["block", "pool", "metric", "value", "n_test", "setting"]]
    _print_once(f"{shown.to_string(index=False)}\nrows.csv is in {args.out}")


def _upernet(args, train, val):
    from mimrefiner.study.benchmarks import upernet_into
    from mimrefiner.training.segment import SegmentationRecipe

    recipe = SegmentationRecipe(ignore_zero=not args.count_zero, seed=args.seed)
    changes = {"steps": args.steps, "batch_size": args.batch_size}
    recipe = replace(recipe, **{name: x for name, x in changes.items() if x is not None})
    recipe = replace(recipe, model=replace(recipe.model, classes=args.classes))
    if args.size is not None:
        recipe = recipe.at(args.size)
    encoder = _encoder(args)
    how = {"save_every": args.save_every, "resume": args.resume, "num_workers": args.workers}
    return upernet_into(args.out, encoder, train, val, recipe, **how)


def _dense(args, train, val):
    from mimrefiner.data.scenes import Labels
    from mimrefiner.device import default_device
    from mimrefiner.models.blocks import depth_of
    from mimrefiner.models.tokens import input_size
    from mimrefiner.probes.dense import ade20k, ade20k_transfer
    from mimrefiner.study.benchmarks import dense_into

    encoder = _encoder(args, image_size=args.size)
    config = ade20k() if args.probe == "blocks" else ade20k_transfer(depth_of(encoder))
    config = config.at(input_size(encoder)[-1])
    changes = {"epochs": args.epochs, "batch_size": args.batch_size}
    changes = {name: x for name, x in changes.items() if x is not None}
    labels = Labels(args.classes, ignore_zero=not args.count_zero)
    config = replace(config, labels=labels, seed=args.seed, **changes)
    how = {"best_on_test": args.best_on_test, "num_workers": args.workers}
    return dense_into(args.out, encoder, train, val, config, device=default_device(), **how)


def add_vtab(commands) -> None:
    what = "fine-tune on the data sets of VTAB-1K: search for the learning rate, then five runs"
    example = "mimrefiner vtab mae_refined_l16 --data vtab-1k --gpus 0,1,2,3 --out runs/vtab"
    add = _command(commands, "vtab", do_vtab, what, example)
    add("model", metavar="MODEL", help="anything that load_encoder takes")
    data = "folder that vtab-1k.zip makes, or torchvision: ten data sets, 1,000 images drawn"
    add("--data", metavar="FOLDER", help=data)
    six = "instead: linear probes on the six whole data sets of VTAB-6, by torchvision"
    add("--six", action="store_true", help=six)
    best = "with --six: report the best probe and epoch on the test images, as the paper does"
    add("--best-on-test", action="store_true", help=best)
    add("--datasets", help="names with commas between (default: all 19, or torchvision's ten)")
    add("--rates", help="learning rates of the search (default: the paper's five)")
    add("--seeds", help="seeds of every run with commas between (default: 0,1,2,3,4)")
    add("--epochs", type=float, help="of every run (default: 50)")
    add("--batch-size", type=int, help="images of a step (default: 64)")
    micro_batch = "images that pass the encoder at a time (default: 8 for 2B/14, else all)"
    add("--micro-batch", type=int, metavar="N", help=micro_batch)
    _encoder_arguments(add, "random weights for a timm name")
    _shared_arguments(add)


def do_vtab(args) -> None:
    (_vtab6 if args.six or args.data is None else _vtab1k)(args)


def _vtab1k(args) -> None:
    from mimrefiner.data import vtab as data
    from mimrefiner.probes import vtab
    from mimrefiner.study.benchmarks import vtab_into
    from mimrefiner.study.tables import markdown_table
    from mimrefiner.training.memory import Memory

    drawn = args.data == "torchvision"
    names = None if args.datasets is None else _parts(args.datasets)
    names = list(data.IN_TORCHVISION) if drawn and names is None else names
    tasks = data.tasks_named(names)
    read = data.draw_task if drawn else partial(data.read_task, Path(args.data))
    encoder = _encoder(args)
    large = encoder.embed_dim > vtab.WIDEST
    given = {"epochs": args.epochs, "batch_size": args.batch_size}
    given = {name: value for name, value in given.items() if value is not None}
    recipe = replace(vtab.RECIPE_2B14 if large else vtab.RECIPE, **given)
    recipe = replace(recipe, warmup_epochs=recipe.epochs / 10)
    protocol = vtab.VTABProtocol(recipe)
    if args.rates is not None:
        protocol = replace(protocol, learning_rates=_numbers("--rates", args.rates))
    if args.seeds is not None:
        protocol = replace(protocol, seeds=_integers("--seeds", args.seeds))
    sets = {task: read(task) for task in tasks}
    check_writable(args.out)
    _share(args)
    memory = vtab.MEMORY_2B14 if large and args.micro_batch is None else Memory(args.micro_batch)
    computing = vtab.Computing(num_workers=args.workers, memory=memory)
    print(markdown_table(vtab_into(args.out, encoder, sets, protocol, computing)), end="")
    print(f"rows.csv and table.md are in {args.out}")


def _vtab6(args) -> None:
    from mimrefiner.data.vtab import SIX
    from mimrefiner.probes.vtab import LINEAR_6, Computing
    from mimrefiner.study.benchmarks import six_into
    from mimrefiner.study.tables import markdown_table

    if not args.six or args.data is not None:
        raise InputError("give either --data FOLDER for VTAB-1K or --six for VTAB-6")
    names = tuple(SIX) if args.datasets is None else _parts(args.datasets)
    given = {"epochs": args.epochs, "batch_size": args.batch_size}
    recipe = replace(LINEAR_6, **{name: x for name, x in given.items() if x is not None})
    encoder = _encoder(args)
    check_writable(args.out)
    _share(args)
    how = {"best_on_test": args.best_on_test, "computing": Computing(num_workers=args.workers)}
    print(markdown_table(six_into(args.out, encoder, names, recipe, **how)), end="")
    print(f"rows.csv and table.md are in {args.out}")


def add_robustness(commands) -> None:
    what = "test a fine-tuned classifier on ImageNet-C, -A, -R and -Sketch"
    example = (
        "mimrefiner robustness runs/finetuned --imagenet-c PATH --imagenet-a PATH "
        "--imagenet-r PATH --sketch PATH --out runs/robustness"
    )
    add = _command(commands, "robustness", do_robustness, what, example)
    add("model", metavar="FOLDER", type=Path, help="folder that mimrefiner finetune wrote")
    corrupted = "ImageNet-C: CORRUPTION/SEVERITY/CLASS/IMAGE, all 19 corruptions"
    add("--imagenet-c", type=Path, metavar="PATH", help=corrupted)
    add("--imagenet-a", type=Path, metavar="PATH", help="ImageNet-A: CLASS/IMAGE")
    add("--imagenet-r", type=Path, metavar="PATH", help="ImageNet-R: CLASS/IMAGE")
    add("--sketch", type=Path, metavar="PATH", help="ImageNet-Sketch: CLASS/IMAGE")
    add("--val", type=Path, metavar="PATH", help="ImageNet's validation images: CLASS/IMAGE")
    classes = "folder with one folder for each class of training (default: found out)"
    add("--classes", type=Path, metavar="PATH", help=classes)
    add("--batch-size", type=int, default=256, help="images at a time (default: 256)")
    _shared_arguments(add)


def do_robustness(args) -> None:
    from mimrefiner.data.listed import class_folders
    from mimrefiner.models.classifier import load_classifier
    from mimrefiner.probes.robustness import RobustnessProtocol, TestFolders
    from mimrefiner.study.benchmarks import robustness_into
    from mimrefiner.study.tables import markdown_table

    model = load_classifier(args.model)
    sets = args.val, args.imagenet_c, args.imagenet_a, args.imagenet_r, args.sketch
    folders = TestFolders(*sets)
    classes = None if args.classes is None else class_folders(args.classes)
    protocol = RobustnessProtocol(batch_size=args.batch_size)
    check_writable(args.out)
    _share(args)
    how = {"classes": classes, "protocol": protocol, "num_workers": args.workers}
    table = markdown_table(robustness_into(args.out, model, folders, **how))
    _print_once(f"{table}rows.csv and table.md are in {args.out}")


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
    add("model", help="a plain ViT of the table of models, or what load_encoder takes")
    add("--num-heads", type=int, help=NUM_HEADS)
    data = "imagenet, another data set by name or path, or a number of training images"
    add("data", help=data)
    preset = f"paper (by the model's size), {PRESETS} (default: paper)"
    add("--preset", default="paper", help=preset)
    add("--gpus", type=int, default=1, help="GPUs that share the batch (default: 1)")
    tflops = "peak of one GPU in bfloat16, TFLOP/s (default: 312, A100)"
    add("--tflops", type=float, default=312, help=tflops)
    recipe = (
        "foresee fine-tuning by this recipe, or by all, on as many images as the paper's; or "
        "upernet, or vtab1k"
    )
    add("--recipe", help=recipe)
    _memory_arguments(add)


def do_plan(args) -> None:
    from mimrefiner.study.plan import finetune_plan, plan_text
    from mimrefiner.training.memory import Memory

    memory = Memory(args.micro_batch, args.recompute, args.shard)
    if args.recipe in ("upernet", "vtab1k"):
        from mimrefiner.study.benchmarks import cost_text

        given = None if memory == Memory() else memory
        print(cost_text(args.model, args.recipe, args.gpus, args.tflops, given))
        return
    if args.recipe:
        print(finetune_plan(args.model, args.recipe, args.gpus, args.tflops, memory))
        return
    how = (args.preset, args.gpus, args.tflops, memory)
    print(plan_text(args.model, args.data, *how, num_heads=args.num_heads))


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
    add("--num-heads", "--heads", type=int, help=NUM_HEADS)
    add("--like", metavar="TIMM_NAME", help=LIKE)


def do_export(args) -> None:
    from mimrefiner import load_encoder
    from mimrefiner.models.export import export

    encoder = load_encoder(args.model, num_heads=args.num_heads, like=args.like)
    print(export(encoder, args.to, args.format, args.dtype))


COMMANDS = (
    add_demo,
    add_run,
    add_pretrain,
    add_refine,
    add_probe,
    add_finetune,
    add_linear,
    add_low_shot,
    add_explore,
    add_segment,
    add_vtab,
    add_robustness,
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
    # Lists of paths that were written on Windows end in \r
    arguments = [x.strip("\r\n") for x in (sys.argv[1:] if arguments is None else arguments)]
    args = parser.parse_args(arguments, argparse.Namespace(arguments=arguments))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal may lack signs such as ±
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
    named = [re.sub("^[a-z0-9_]+:|,(column|label)=.*$", "", str(value)) for value in given]
    with contextlib.suppress(InputError):  # where there is no home, it is not meant
        named += [cache_folder(), data_folder(), variable_folder("MIMREFINER_IMAGENET")]
    file = Path(os.fsdecode(error.filename)).resolve()
    return any(file.is_relative_to(Path(path).resolve()) for path in named if path)


def _processes():
    """The process group where ``torchrun`` started this command; its import is slow."""
    world = os.environ.get("WORLD_SIZE", "").strip() or "1"
    if "RANK" not in os.environ and world != "1":
        raise InputError(
            f"WORLD_SIZE is {world} and RANK is not set: start several processes by torchrun, or "
            "unset WORLD_SIZE"
        )
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        os.environ.pop("WORLD_SIZE", None)
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


def _encoder_arguments(add, no_pretrained: str = "random weights") -> None:
    """What :func:`load_encoder` is told beside the model."""
    add("--no-pretrained", action="store_true", help=no_pretrained)
    add("--num-heads", type=int, metavar="N", help=NUM_HEADS)
    add("--like", metavar="TIMM_NAME", help=LIKE)


def _plainly(args) -> bool:
    """Whether the name of the model says all about it."""
    return args.num_heads is None and args.like is None and not args.no_pretrained


def _encoder(args, source: str | None = None, **options):
    """The encoder that a command was given, or the one that ``source`` names."""
    from mimrefiner import load_encoder

    options |= {"num_heads": args.num_heads, "like": args.like}
    return load_encoder(source or args.model, pretrained=not args.no_pretrained, **options)


def _memory_arguments(add) -> None:
    micro_batch = "images of a process that pass the encoder at a time"
    add("--micro-batch", type=int, metavar="N", help=micro_batch)
    recompute = "keep no activations inside of blocks: less memory, more time"
    add("--recompute", action="store_true", help=recompute)
    shard = "share the encoder among processes: less memory each, more messages"
    add("--shard", action="store_true", help=shard)


def _running_arguments(add) -> None:
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=0, help="loader processes (default: 0)")
    add("--resume", action="store_true", help="go on with what --out holds")
    add("--out", type=Path, required=True, help="folder for rows and weights")


def _shared_arguments(add) -> None:
    """Of commands whose runs any number of processes may share through ``--out``."""
    gpus = "numbers of GPUs with commas between, which share the runs"
    add("--gpus", help=gpus)
    add("--processes", type=int, default=1, help="that share the runs (default: 1)")
    add("--workers", type=int, default=0, help="loader processes of each (default: 0)")
    out = "folder for all runs; what it holds is not done again"
    add("--out", type=Path, required=True, help=out)


def _share(args) -> None:
    """Where several GPUs or processes are asked for, let copies of this command do the runs."""
    gpus = () if args.gpus is None else _integers("--gpus", args.gpus)
    if gpus or args.processes != 1:
        from mimrefiner.batch.shared import share

        share([*_without(args.arguments, "--gpus", "--processes")], args.out, gpus, args.processes)


def _without(arguments: list[str], *options: str) -> list[str]:
    """``arguments`` without ``options`` and their values.

    >>> _without(["vtab", "--gpus", "0,1", "--out=a", "--processes=2"], "--gpus", "--processes")
    ['vtab', '--out=a']
    """
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument.partition("=")[0] not in options:
            kept.append(argument)
        skip = argument in options
    return kept


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
