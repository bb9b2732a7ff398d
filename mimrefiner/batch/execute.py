"""The process of a job: ``python -m mimrefiner.batch.execute JSON`` executes one notebook through
papermill and records how that went.

It imports neither torch nor timm, so that it starts with papermill in two seconds; the kernel, a
process of its own, imports them once.
"""

import json
import os
import re
import stat
import sys
import threading
import time
from pathlib import Path

import nbformat
import papermill
from jupyter_client.kernelspec import NATIVE_KERNEL_NAME as NATIVE_KERNEL
from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

from mimrefiner.files import Entry, atomic_file, write_json


def main(call: str) -> None:
    """Execute one notebook; the exit status is 1 where a cell fails.

    Args:
        call: JSON with ``notebook`` and ``out`` (paths), the ``parameters`` of the notebook, the
            ``settings`` of its :func:`entry`, and the ``facts`` that its record keeps.
    """
    end_with_parent()
    os.environ["MIMREFINER_PROGRESS"] = "log"  # for the kernel: papermill cannot show a bar
    job = json.loads(call)
    notebook, out = Path(job["notebook"]), Path(job["out"])
    began, started = time.monotonic(), time.strftime("%Y-%m-%dT%H:%M:%S%z")
    try:
        execute(notebook, out, job["parameters"])
    except papermill.PapermillExecutionError as error:
        print(re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback)), flush=True)
        failure = {"cell": error.exec_count, "error": f"{error.ename}: {error.evalue}"}
        write_json(failure, failure_file(out, notebook.stem))
        sys.exit(1)
    seconds = {"started": started, "seconds": round(time.monotonic() - began, 1)}
    record = entry(out, notebook.stem, job["settings"])
    record.finish(out, job["facts"] | seconds, written(out, notebook.stem))


def end_with_parent() -> None:
    """End this process as soon as the one that started it has ended: its standard input is a pipe
    that then closes.
    """
    if stat.S_ISFIFO(os.fstat(0).st_mode):
        threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()


def execute(notebook: Path, out: Path, parameters: dict) -> None:
    """Write the executed notebook to ``out``/notebooks once it is done; its metadata then holds no
    path.
    """
    (out / "notebooks").mkdir(parents=True, exist_ok=True)
    unfinished = out / "notebooks" / f"{notebook.stem}.unfinished.ipynb"
    kernel, missing = kernel_of(notebook)
    executed = papermill.execute_notebook(
        notebook,
        unfinished,
        parameters,
        kernel_name=kernel,
        cwd=str(notebook.parent),
        progress_bar=False,
        stdout_file=sys.stdout,
        stderr_file=sys.stderr,
        extra_arguments=["--log-level=ERROR"],
    )
    for key in ("input_path", "output_path"):
        executed.metadata.papermill.pop(key, None)
    executed.metadata.papermill.parameters.pop("out", None)
    with atomic_file(out / "notebooks" / notebook.name) as temporary:
        nbformat.write(executed, temporary)
    unfinished.unlink()
    if missing:
        print(f"there is no kernel {missing!r} here: {notebook.name} ran in {sys.executable}")


def kernel_of(notebook: Path) -> tuple[str, str]:
    """The kernel that executes ``notebook``, and the one that it names, if that does not exist.

    Then this interpreter executes it, which Jupyter calls ``python3`` unless told otherwise.
    """
    metadata = nbformat.read(notebook, as_version=4).metadata
    named = metadata.get("kernelspec", {}).get("name", NATIVE_KERNEL)
    try:
        KernelSpecManager().get_kernel_spec(named)
    except NoSuchKernel:
        return NATIVE_KERNEL, named
    return named, ""


def entry(out: Path, name: str, settings: dict) -> Entry:
    """The record of the notebook ``name`` in the folder of a run: what made its files, and their
    hashes.
    """
    return Entry(out, settings, manifest=f"jobs/{name}.json")


def failure_file(out: Path, name: str) -> Path:
    """The file that says in which cell the notebook ``name`` failed."""
    return out / "jobs" / "failed" / f"{name}.json"


def written(out: Path, name: str) -> list[Path]:
    """The files of a notebook that is done: itself, its rows and claims, its figures and tables."""
    number = name.split("_")[0]
    return [
        out / "notebooks" / f"{name}.ipynb",
        out / "results" / f"{name}.csv",
        out / "claims" / f"{name}.csv",
        *(file for kind in ("figures", "tables") for file in (out / kind).glob(f"{number}_*")),
    ]


if __name__ == "__main__":
    main(sys.argv[1])
