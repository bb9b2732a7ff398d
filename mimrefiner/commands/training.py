"""``pretrain`` and ``refine``, and ``plan``, which says before what they need."""

from dataclasses import replace
from functools import partial

from mimrefiner.commands.options import (
    NUM_HEADS,
    PRESETS,
    encoder_arguments,
    given_encoder,
    integers,
    memory_arguments,
    new_command,
    preset_and_data,
    training_arguments,
)
from mimrefiner.config import AUTO
from mimrefiner.errors import InputError

MONITORED = 10_000  # images on either side of the k-NN that --watch does
CHANGES = {  # option of refine -> the field of RefineConfig that it replaces
    "top_k": "refine_top_k",
    "temperature": "temperature",
    "freeze_first": "frozen_blocks",
    "clip_norm": "clip_norm",
}


def add_pretrain(commands) -> None:
    what = "masked-image pre-training of a small ViT (stage 1)"
    example = "mimrefiner pretrain --data digits --preset tiny --seed 0 --out runs/mim"
    add = new_command(commands, "pretrain", do_pretrain, what, example)
    training_arguments(add)
    shard = "share the model among processes: less memory each, more messages"
    add("--shard", action="store_true", help=shard)


def do_pretrain(args) -> None:
    from mimrefiner import build_vit, pretrain
    from mimrefiner.training.run import train_into

    preset, dataset = preset_and_data(args)
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
    add = new_command(commands, "refine", do_refine, what, example)
    model = "timm name, file, folder or NAME@FILE (default: the preset's own, pre-trained first)"
    add("--model", help=model)
    encoder_arguments(add, "random weights for a timm name")
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
    memory_arguments(add)
    watch = (
        "k-NN on the validation split after every epoch, in epochs.csv "
        "(paper-* presets train on these images too)"
    )
    add("--watch", action="store_true", help=watch)
    tensorboard = "with --watch: write TensorBoard events too"
    add("--tensorboard", action="store_true", help=tensorboard)
    training_arguments(add)


def do_refine(args) -> None:
    from mimrefiner import refine
    from mimrefiner.study.store import pretrained
    from mimrefiner.training.memory import Memory
    from mimrefiner.training.placement import placed
    from mimrefiner.training.run import train_into

    if args.tensorboard and not args.watch:
        raise InputError("--tensorboard writes what --watch measures: give --watch too")
    preset, dataset = preset_and_data(args)
    monitor = _monitor(args, preset, dataset) if args.watch else None
    if args.model:
        encoder = given_encoder(args)
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
        changes["blocks"] = AUTO if args.blocks == AUTO else integers("--blocks", args.blocks)
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


def add_plan(commands) -> None:
    what = "foresee memory and GPU-hours of a model, from formulas"
    example = "mimrefiner plan d2v2_refined_h14 imagenet --gpus 8"
    add = new_command(commands, "plan", do_plan, what, example)
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
    memory_arguments(add)


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
