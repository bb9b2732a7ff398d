"""Times side by side: every contender in turn, several rounds, ratios of medians. Nothing here is
asserted.
"""

import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


def compare(
    title: str,
    contenders: dict[str, Callable[[], object]],
    *,
    rounds: int = 5,
    clock=time.perf_counter,
) -> str:
    """A Markdown table: median seconds and the ratio to the first contender.

    ``clock``: time.process_time counts the work of this process alone, which other programs on the
    machine disturb less.

    They take turns; in its turn each runs twice and the second time counts, so that none pays for
    the threads and the memory of the one before.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            run()
            began = clock()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(clock() - began)
    first = statistics.median(next(iter(seconds.values())))
    lines = [
        f"**{title}** ({rounds} rounds)",
        "",
        "| | median s | min to max | ratio to the first |",
        "|---|---|---|---|",
    ]
    for name, values in seconds.items():
        median = statistics.median(values)
        span = f"{min(values):.3f} to {max(values):.3f}"
        lines.append(f"| {name} | {median:.3f} | {span} | {median / first:.2f} |")
    return "\n".join(lines) + "\n"


def own_peak() -> float:
    """Peak resident memory of this process in MiB (Linux: ru_maxrss would count the process that
    started it, too).
    """
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024


def resident() -> float:
    """Resident memory of this process now, in MiB (Linux)."""
    return int(re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def machine() -> str:
    """What the numbers were measured on, without naming it."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"
