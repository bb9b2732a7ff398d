"""One command for whoever has a GPU: is it right there, how fast is it, what does training give. ::

python -m experiments.gpu --minutes 9 --out FOLDER
python -m experiments.gpu --minutes 9 --out FOLDER --data parquet:CIFAR
python -m experiments.gpu --minutes 3 --out FOLDER --preset smoke --data digits

The last one is a rehearsal without a GPU. Every part is a process with a time limit of its own that
writes ``FOLDER/NAME.json`` as it goes on, so that one that fails or is cut off still tells. A table
of everything comes last, also as ``FOLDER/table.md``.
"""

import argparse
import os
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from experiments import gpu_parts
from experiments.gpu_table import table
from mimrefiner.errors import InputError, Stopped
from mimrefiner.files import write_json
from mimrefiner.notices import show_notices

RESERVE = 12  # seconds kept for ending what is late, and for the table
GRACE = 8  # seconds between the wish and the order to end: time for a checkpoint
LEAST = 4  # seconds: a part that has less left is not begun
# Parts that run at once, and the share of the time that they may take; the last ones have what is
# left. Unused time goes to the trainings, whose length follows from it
SCHEDULE: tuple[tuple[tuple[str, ...], float], ...] = (
    (("card",), 0.06),
    (("tests",), 0.16),
    (("data",), 0.08),
    (("ratios",), 0.2),
    (("pace-alone",), 0.08),
    (gpu_parts.PACES, 0.08),
    (("mae",), 0.3),
    (tuple(gpu_parts.TRIALS), 1.0),
)


@dataclass
class Part:
    """A running part.

    Attributes:
        name: one of the schedule.
        pid: its process, the first of a group.
        log: where its output goes.
        began: when, by the monotonic clock.
        code: its exit status, None while it runs.
        sent: the last signal that it was sent.
    """

    name: str
    pid: int
    log: Path
    began: float
    code: int | None = None
    sent: signal.Signals | None = None

    @property
    def has_ended(self) -> bool:
        """Whether it has; asked for once more than that, it says the same.

        One that was asked to end has ended with all that it has started, which may save first.
        """
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is not None and not (self.sent is signal.SIGTERM and self._left_others())

    def _left_others(self) -> bool:
        try:
            os.killpg(self.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def end(self, sign: signal.Signals) -> None:
        """Send a signal to it and to all that it has started."""
        self.sent = sign
        with suppress(ProcessLookupError):
            os.killpg(self.pid, sign)

    def facts(self, limit: float) -> dict:
        """What is known of it when it has ended."""
        seconds = time.monotonic() - self.began
        ended = "finished" if self.code == 0 else f"failed: {last_line(self.log)}"
        if self.code and seconds >= limit:
            ended = f"cut off after {limit:.0f} s"
        return {"part": self.name, "ended": ended, "seconds": round(seconds, 1)}


def last_line(log: Path) -> str:
    """The last line of a log that is not empty, shortened; "" where there is none."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""


def run_kit(kit: gpu_parts.Kit, minutes: float) -> str:
    """All parts, one after another or side by side, and the table."""
    began, total, known = time.monotonic(), 60 * minutes - RESERVE, []
    for names, share in SCHEDULE:
        left = total - (time.monotonic() - began)
        limit = left if share == 1 else min(left, share * total)
        if limit < LEAST:
            known += [{"part": name, "ended": "left out: no time", "seconds": 0} for name in names]
        else:
            print(f"{', '.join(names)}: at most {limit:.0f} s", flush=True)
            known += side_by_side(kit, names, limit, left)
        write_json(known, kit.out / "parts.json")
    text = table(kit.out)
    (kit.out / "table.md").write_text(text)
    if all(part["ended"] == "finished" for part in known):
        shutil.rmtree(kit.scratch, ignore_errors=True)
    return text


def side_by_side(kit: gpu_parts.Kit, names: Sequence[str], limit: float, left: float) -> list[dict]:
    """Start parts at once, wait for all, end those that are late; what is known of each.

    ``left`` seconds remain for everything: the length of a training follows from it.
    """
    parts, known = [begin(kit, name, limit, left) for name in names], {}
    orders = [(limit, signal.SIGTERM), (limit + GRACE, signal.SIGKILL)]
    while len(known) < len(parts):
        running = [part for part in parts if part.name not in known]
        for part in running:
            if part.has_ended:
                known[part.name] = part.facts(limit)
                print(f"  {part.name}: {known[part.name]['ended']}", flush=True)
        if orders and time.monotonic() - parts[0].began >= orders[0][0]:
            sign = orders.pop(0)[1]
            for part in running:
                part.end(sign)
        time.sleep(0.05)
    return [known[name] for name in names]


def begin(kit: gpu_parts.Kit, name: str, limit: float, left: float) -> Part:
    """Start one part in a group of its own.

    It is a fork of this process, which has imported everything and never asks a GPU anything: an
    import of torch for every part would take a good share of the time.
    """
    log = kit.out / "logs" / f"{name}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.touch()  # it is read even if the part is ended before it has begun
    sys.stdout.flush()
    with warnings.catch_warnings():
        # Python fears threads, of which none has begun to compute here
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid:
        return Part(name, pid, log, time.monotonic())
    code = 1
    try:
        os.setsid()
        sys.stdout = sys.stderr = log.open("w", buffering=1)
        for stream in (1, 2):
            os.dup2(sys.stdout.fileno(), stream)
        gpu_parts.run_part(kit, name, limit, left)
        code = 0
    except (InputError, Stopped) as error:
        print(error)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m experiments.gpu",
        description=__doc__.split(" ::")[0].strip(),
        epilog="example: python -m experiments.gpu --minutes 9 --out runs/gpu",
    )
    parser.add_argument("--minutes", type=float, default=9, help="of everything (default: 9)")
    parser.add_argument("--out", type=Path, required=True, help="a folder that is new or empty")
    parser.add_argument("--preset", default="gpu", help="of the training (default: gpu)")
    data = "cifar10 (its own folder in $MIMREFINER_DATA), parquet:FOLDER, ... (default: preset's)"
    parser.add_argument("--data", help=data)
    return parser


def main() -> None:
    args = _parser().parse_args()
    show_notices()
    try:
        if not args.minutes >= 1:
            raise InputError(f"--minutes must be at least 1, got {args.minutes:g}")
        if args.out.exists() and any(args.out.iterdir()):
            raise InputError(f"{args.out} is not empty: choose a new folder with --out")
        kit = gpu_parts.Kit.opened(args.out.absolute(), args.preset, args.data)
        print(run_kit(kit, args.minutes))
    except InputError as error:
        sys.exit(f"gpu: error: {error}")


if __name__ == "__main__":
    main()
