"""One way to show progress: a bar in a terminal or a live notebook, a quiet line every ten seconds in a log or a batch run.

Of several processes the first one shows it.
"""

import os
import sys
import time
from collections.abc import Iterable, Iterator

from tqdm.auto import tqdm

LOG_SECONDS = 10


def progress(items: Iterable, title: str, total: int | None = None, unit: str = "step") -> Iterator:
    """Yield from ``items`` and show how far it is. ``MIMREFINER_PROGRESS=log`` asks for lines instead of a bar."""
    if os.environ.get("RANK", "0") != "0":
        yield from items
        return
    total = len(items) if total is None and hasattr(items, "__len__") else total
    if os.environ.get("MIMREFINER_PROGRESS") != "log" and (sys.stderr.isatty() or "ipykernel" in sys.modules):
        yield from tqdm(items, title, total, unit=unit, leave=False, dynamic_ncols=True)
        return
    start = last = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - last >= LOG_SECONDS:
            last = now
            left = f" of {total} ({done / total:.0%})" if total else ""
            if total and done:  # the first item alone may take longer than this
                left += f", about {(now - start) / done * (total - done):.0f} s left"
            print(f"{title}: {done}{left}", file=sys.stderr, flush=True)
        yield item
