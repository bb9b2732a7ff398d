"""``run``, ``students`` and ``publish``: the notebooks, executed and copied."""

from pathlib import Path

from mimrefiner.commands.options import PRESETS, assigned, integers, new_command


def add_run(commands) -> None:
    example = "mimrefiner run 01 04 --preset tiny --seeds 0,1,2"
    add = new_command(commands, "run", do_run, "execute notebooks in batch", example)
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
        gpus=() if args.gpus is None else integers("--gpus", args.gpus),
        workers=args.workers,
        resume=args.resume,
        keep_going=args.keep_going,
        timeout=args.timeout and 60 * args.timeout,
        executor=args.executor,
        slurm=assigned("--slurm", args.slurm),
    )
    run_notebooks(
        args.notebooks,
        preset=args.preset,
        seeds=args.seeds,
        out=args.out,
        parameters=assigned("-p", args.parameters),
        batch=batch,
    )


def add_students(commands) -> None:
    what = "copy notebooks without their solutions"
    add = new_command(commands, "students", do_students, what, "mimrefiner students --out course")
    add("notebooks", nargs="*", metavar="NAME", help="by name or number; none means all")
    add("--out", type=Path, required=True, help="folder for the copies")


def do_students(args) -> None:
    from mimrefiner.batch.copies import write_student_copies

    print(f"{len(write_student_copies(args.notebooks, args.out))} notebooks are in {args.out}")


def add_publish(commands) -> None:
    what = "replace the executed notebooks of the project by those of a run"
    add = new_command(commands, "publish", do_publish, what, "mimrefiner publish runs/figures")
    add("run", type=Path, metavar="RUN", help="folder of a run")
    folder = Path("notebooks/executed")
    add("--to", type=Path, default=folder, help=f"folder to fill (default: {folder})")


def do_publish(args) -> None:
    from mimrefiner.batch.copies import publish

    print(f"{len(publish(args.run, args.to))} executed notebooks are in {args.to}")
