"""Kill training with SIGKILL at random moments, resume, and compare with a run that was left alone,
bit for bit.

    python tests/benchmarks/kill_and_resume.py [KILLS]

Checkpoints are written after every step, so that many kills fall inside the writing of one; how
many is printed. Needs fork.
"""

import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

import mimrefiner as mr
from mimrefiner.models.weights import sha256_of
from mimrefiner.training.checkpoints import Saving


def jobs():
    """name -> function(saving) that trains and returns the hash of all weights."""
    preset = mr.load_preset("smoke")
    data = mr.load_dataset("digits", split="train").take(128)
    encoder = mr.build_vit(preset.encoder)
    pretraining = replace(preset.pretrain, epochs=10)
    refining = replace(preset.refine, heads_epochs=5, refine_epochs=8)

    def pretrain(saving):
        result = mr.pretrain(encoder, data, pretraining, saving=saving)
        return sha256_of(result.model) + str(result.history["loss"].sum())

    def refine(saving):
        result = mr.refine(encoder, data, refining, saving=saving)
        return (
            sha256_of(result.encoder)
            + sha256_of(result.ema_encoder)
            + str(result.history["loss"].sum())
        )

    return {"pretrain": pretrain, "refine": refine}


def in_child(job, folder: Path, kill_after: float | None) -> str | None:
    """Run ``job`` in a forked process; its hash, or None if it was killed first."""
    answer = folder / "answer"
    answer.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        try:
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115
            answer.write_text(job(Saving(folder / "checkpoints", every=1, resume=True)))
        finally:
            os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return answer.read_text() if answer.exists() else None


def where(folder: Path) -> tuple[str, bool]:
    """The newest checkpoint's stage, and whether another was being written."""
    files = sorted((folder / "checkpoints").glob("stage*.pt"))
    stage = files[-1].name.split("-")[0] if files else "before the first checkpoint"
    writing = (
        any((folder / "checkpoints").glob(".writing-*"))
        or (folder / "checkpoints" / "writing.pt").exists()
    )
    return stage, writing


def main(kills: int, seed: int = 0) -> dict[str, int]:
    """Raises AssertionError if a resumed run differs; returns how many kills fell where."""
    rng = random.Random(seed)
    counts: dict[str, int] = {}
    torch.set_num_threads(1)
    for name, job in jobs().items():
        with tempfile.TemporaryDirectory() as folder:
            expected = job(None)
            began = time.perf_counter()
            assert in_child(job, Path(folder), None) == expected, "saving changed the result"
            seconds = time.perf_counter() - began
        done = 0
        while done < kills // 2:
            with tempfile.TemporaryDirectory() as folder:
                for _ in range(3):  # the same run is killed up to three times
                    if in_child(job, Path(folder), rng.uniform(0.05, 0.5) * seconds) is not None:
                        break
                    stage, writing = where(Path(folder))
                    for key in (f"{name}, {stage}", *(["while writing"] if writing else [])):
                        counts[key] = counts.get(key, 0) + 1
                    done += 1
                assert in_child(job, Path(folder), None) == expected, (
                    f"{name}: the resumed run differs"
                )
    return counts


if __name__ == "__main__":
    os.environ["MIMREFINER_PROGRESS"] = "log"
    for place, count in sorted(main(int(sys.argv[1]) if len(sys.argv) > 1 else 20).items()):
        print(f"{count:3d} kills: {place}")
    print("every resumed run equals the one left alone, bit for bit")
