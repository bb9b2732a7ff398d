"""The body of a job's process that executes one notebook through papermill and records how that
went.

It is run as a file and imports nothing of the package: papermill alone starts in two seconds, and
torch, timm and the rest, which take several, are imported once, by the kernel.
"""

import hashlib
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


def main(call: str) -> None:
    """Exit status 1 where a cell fails.

    Args:
        call: JSON with ``notebook`` and ``out`` (paths), ``parameters`` of the notebook, and
            ``facts`` that the record keeps.
    """
    end_with_parent()
    os.environ["MIMREFINER_PROGRESS"] = (
        "log"  # kernels inherit it: a bar cannot be drawn through papermill
    )
    job = json.loads(call)
    notebook, out = Path(job["notebook"]), Path(job["out"])
    began, started = time.monotonic(), time.strftime("%Y-%m-%dT%H:%M:%S%z")
    try:
        execute(notebook, out, job["parameters"])
        record = {
            "state": "done",
            "files": {
                str(file.relative_to(out)): sha256(file) for file in written(out, notebook.stem)
            },
        }
    except papermill.PapermillExecutionError as error:
        print(re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback)), flush=True)
        record = {
            "state": "failed",
            "cell": error.exec_count,
            "error": f"{error.ename}: {error.evalue}",
        }
    record |= {**job["facts"], "started": started, "seconds": round(time.monotonic() - began, 1)}
    write_aside(record_file(out, notebook.stem), json.dumps(record, indent=2))
    sys.exit(0 if record["state"] == "done" else 1)


def end_with_parent() -> None:
    """End this process as soon as the one that started it has ended: its standard input is a pipe
    that then closes.
    """
    if stat.S_ISFIFO(os.fstat(0).st_mode):
        threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()


def execute(notebook: Path, out: Path, parameters: dict) -> None:
    """Write the executed notebook to ``out``/notebooks, when it is done, without paths of this
    machine in its metadata.
    """
    (out / "notebooks").mkdir(parents=True, exist_ok=True)
    unfinished = out / "notebooks" / f"{notebook.stem}.unfinished.ipynb"
    executed = papermill.execute_notebook(
        notebook,
        unfinished,
        parameters,
        cwd=str(notebook.parent),
        progress_bar=False,
        stdout_file=sys.stdout,
        stderr_file=sys.stderr,
        extra_arguments=["--log-level=ERROR"],
    )
    for key in ("input_path", "output_path"):
        executed.metadata.papermill.pop(key, None)
    executed.metadata.papermill.parameters.pop("out", None)
    write_aside(out / "notebooks" / notebook.name, nbformat.writes(executed) + "\n")
    unfinished.unlink()


def record_file(out: Path, name: str) -> Path:
    """Where the record of the notebook ``name`` lies."""
    return out / "jobs" / f"{name}.json"


def written(out: Path, name: str) -> list[Path]:
    """The files of a notebook that is done: itself, its rows and claims, its figures and tables."""
    own = [
        out / "notebooks" / f"{name}.ipynb",
        out / "results" / f"{name}.csv",
        out / "claims" / f"{name}.csv",
    ]
    number = name.split("_")[0]
    return own + [
        file
        for folder in ("figures", "tables")
        for file in sorted((out / folder).glob(f"{number}_*"))
    ]


def sha256(file: Path) -> str:
    """Of a file's bytes; "" where there is none."""
    if not file.is_file():
        return ""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_aside(file: Path, text: str) -> None:
    """Whole or not at all, as :func:`mimrefiner.files.atomic_file`, which lies behind an import of
    torch.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    main(sys.argv[1])
