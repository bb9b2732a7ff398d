"""A training by command: its folder with weights, history and settings; finished once, gone on with after a kill."""

import json
import shutil
from functools import partial
from pathlib import Path

from mimrefiner import distributed
from mimrefiner.checkpoint import atomic_file, save_encoder
from mimrefiner.errors import InputError
from mimrefiner.results import write_csv
from mimrefiner.resume import Saving, different_settings
from mimrefiner.train import run_settings

SETTINGS = "settings.json"  # what a finished run was


def train_into(out: Path, train: partial, encoders: tuple[str, ...], *, save_every: int, resume: bool) -> None:
    """Run ``train`` and write its results to the folder ``out``: nothing is trained that ``resume`` finds finished there.

    Args:
        train: ``pretrain`` or ``refine`` of (encoder, data set, config), to be called with ``saving``.
        encoders: attributes of its result, each written as ``NAME.safetensors``; the last one says that the run is finished.
        save_every: steps between two checkpoints, which lie in ``out`` until the run is finished.

    Raises:
        InputError: a finished run is in ``out``, of other settings or, without ``resume``, of any.
    """
    folder, last = out / "checkpoints", out / f"{encoders[-1]}.safetensors"
    encoder, dataset, config = train.args
    settings = json.loads(json.dumps(run_settings(config, dataset, encoder)))  # as a file gives them back
    if distributed.from_first(last.exists):
        if not resume:
            raise InputError(f"{out} holds a finished run: use an empty folder, or --resume, which leaves it as it is")
        distributed.from_first(lambda: _finish_again(out, folder, settings))
        return
    result = train(saving=Saving(folder, save_every, resume))
    if distributed.rank() == 0:
        write_csv(result.history, out / "history.csv")
        with atomic_file(out / SETTINGS) as temporary:
            temporary.write_text(json.dumps(settings, indent=2))
        for name in encoders:
            save_encoder(getattr(result, name), out / f"{name}.safetensors")
        shutil.rmtree(folder)
        files = ", ".join(f"{name}.safetensors" for name in encoders)
        print(f"{result.seconds:.0f} s; {files} and history.csv are in {out}")


def _finish_again(out: Path, folder: Path, settings: dict) -> None:
    """Remove checkpoints that a run killed at its very end has left.

    Raises:
        InputError: the finished run had other settings.
    """
    if different := different_settings(json.loads((out / SETTINGS).read_text()), settings):
        raise InputError(f"{out} holds a finished run with other settings ({', '.join(different)}): use an empty folder")
    shutil.rmtree(folder, ignore_errors=True)
    print(f"{out} is finished: nothing to do")
