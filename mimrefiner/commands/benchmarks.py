"""``segment``, ``vtab`` and ``robustness``: the paper's further benchmarks."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from mimrefiner.commands.options import (
    check_seed,
    encoder_arguments,
    given_encoder,
    integers,
    new_command,
    numbers,
    parts_of,
    print_once,
    running_arguments,
    share_runs,
    shared_arguments,
)
from mimrefiner.errors import InputError
from mimrefiner.files import check_writable


def add_segment(commands) -> None:
    what = "segment scenes: fine-tune UperNet, or probe frozen features (ADE20K)"
    example = "mimrefiner segment mae_refined_l16 ADEChallengeData2016 --out runs/ade20k"
    add = new_command(commands, "segment", do_segment, what, example)
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
    encoder_arguments(add, "random weights for a timm name")
    running_arguments(add)
    save_every = "between checkpoints of upernet (default: 5000)"
    add("--save-every", type=int, default=5000, metavar="STEPS", help=save_every)


def do_segment(args) -> None:
    from mimrefiner.data.scenes import SegmentationFolder
    from mimrefiner.errors import one_of

    check_seed(args)
    one_of("--probe", args.probe, ("upernet", "linear", "blocks"))
    wrong = {"upernet": ("epochs", "best_on_test")}.get(args.probe, ("steps",))
    for option in wrong:
        if getattr(args, option):
            raise InputError(f"--{option.replace('_', '-')} is no option of --probe {args.probe}")
    train, val = (SegmentationFolder(args.data, split) for split in ("train", "val"))
    check_writable(args.out)
    rows = (_upernet if args.probe == "upernet" else _dense)(args, train, val)
    shown = rows[["block", "pool", "metric", "value", "n_test", "setting"]]
    print_once(f"{shown.to_string(index=False)}\nrows.csv is in {args.out}")


def _upernet(args, train, val):
    from mimrefiner.study.benchmarks import upernet_into
    from mimrefiner.training.segment import SegmentationRecipe

    recipe = SegmentationRecipe(ignore_zero=not args.count_zero, seed=args.seed)
    changes = {"steps": args.steps, "batch_size": args.batch_size}
    recipe = replace(recipe, **{name: x for name, x in changes.items() if x is not None})
    recipe = replace(recipe, model=replace(recipe.model, classes=args.classes))
    if args.size is not None:
        recipe = recipe.at(args.size)
    encoder = given_encoder(args)
    how = {"save_every": args.save_every, "resume": args.resume, "num_workers": args.workers}
    return upernet_into(args.out, encoder, train, val, recipe, **how)


def _dense(args, train, val):
    from mimrefiner.data.scenes import Labels
    from mimrefiner.device import default_device
    from mimrefiner.models.blocks import depth_of
    from mimrefiner.models.tokens import input_size
    from mimrefiner.probes.dense import ade20k, ade20k_transfer
    from mimrefiner.study.benchmarks import dense_into

    encoder = given_encoder(args, image_size=args.size)
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
    add = new_command(commands, "vtab", do_vtab, what, example)
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
    encoder_arguments(add, "random weights for a timm name")
    shared_arguments(add)


def do_vtab(args) -> None:
    (_vtab6 if args.six or args.data is None else _vtab1k)(args)


def _vtab1k(args) -> None:
    from mimrefiner.data import vtab as data
    from mimrefiner.probes import vtab
    from mimrefiner.study.benchmarks import vtab_into
    from mimrefiner.study.tables import markdown_table
    from mimrefiner.training.memory import Memory

    drawn = args.data == "torchvision"
    names = None if args.datasets is None else parts_of(args.datasets)
    names = list(data.IN_TORCHVISION) if drawn and names is None else names
    tasks = data.tasks_named(names)
    read = data.draw_task if drawn else partial(data.read_task, Path(args.data))
    encoder = given_encoder(args)
    large = encoder.embed_dim > vtab.WIDEST
    given = {"epochs": args.epochs, "batch_size": args.batch_size}
    given = {name: value for name, value in given.items() if value is not None}
    recipe = replace(vtab.RECIPE_2B14 if large else vtab.RECIPE, **given)
    recipe = replace(recipe, warmup_epochs=recipe.epochs / 10)
    protocol = vtab.VTABProtocol(recipe)
    if args.rates is not None:
        protocol = replace(protocol, learning_rates=numbers("--rates", args.rates))
    if args.seeds is not None:
        protocol = replace(protocol, seeds=integers("--seeds", args.seeds))
    sets = {task: read(task) for task in tasks}
    check_writable(args.out)
    share_runs(args)
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
    names = tuple(SIX) if args.datasets is None else parts_of(args.datasets)
    given = {"epochs": args.epochs, "batch_size": args.batch_size}
    recipe = replace(LINEAR_6, **{name: x for name, x in given.items() if x is not None})
    encoder = given_encoder(args)
    check_writable(args.out)
    share_runs(args)
    how = {"best_on_test": args.best_on_test, "computing": Computing(num_workers=args.workers)}
    print(markdown_table(six_into(args.out, encoder, names, recipe, **how)), end="")
    print(f"rows.csv and table.md are in {args.out}")


def add_robustness(commands) -> None:
    what = "test a fine-tuned classifier on ImageNet-C, -A, -R and -Sketch"
    example = (
        "mimrefiner robustness runs/finetuned --imagenet-c PATH --imagenet-a PATH "
        "--imagenet-r PATH --sketch PATH --out runs/robustness"
    )
    add = new_command(commands, "robustness", do_robustness, what, example)
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
    shared_arguments(add)


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
    share_runs(args)
    how = {"classes": classes, "protocol": protocol, "num_workers": args.workers}
    table = markdown_table(robustness_into(args.out, model, folders, **how))
    print_once(f"{table}rows.csv and table.md are in {args.out}")
