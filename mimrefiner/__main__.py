"""The command line: ``mimrefiner COMMAND --help`` shows an example of each.

Commands import what they need when they are called, so that help and lists come at once.
"""

import argparse
import contextlib
import io
import os
import re
import sys
from pathlib import Path

from mimrefiner.commands import benchmarks, labelled, models, notebooks, probing, training
from mimrefiner.errors import InputError, Stopped
from mimrefiner.files import cache_folder, data_folder, variable_folder
from mimrefiner.notices import show_notices

COMMANDS = (
    probing.add_demo,
    notebooks.add_run,
    training.add_pretrain,
    training.add_refine,
    probing.add_probe,
    labelled.add_finetune,
    labelled.add_linear,
    labelled.add_low_shot,
    probing.add_explore,
    benchmarks.add_segment,
    benchmarks.add_vtab,
    benchmarks.add_robustness,
    models.add_datasets,
    models.add_models,
    training.add_plan,
    models.add_export,
    notebooks.add_students,
    notebooks.add_publish,
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
        if sys.stdout is not None:
            sys.stdout.flush()  # a pipe may have closed, as head does: now, not when Python ends
    except InputError as error:
        return _ended(2, f"error: {error}")
    except BrokenPipeError:
        # Nobody reads any more: silent, with the status of a shell for SIGPIPE. What is left in the
        # buffer must go somewhere, or Python complains at its end
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
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


if __name__ == "__main__":
    sys.exit(main())
