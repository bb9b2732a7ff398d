"""The parts of :mod:`experiments.gpu`, each a process of its own."""

import json
import os
import runpy
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from experiments import trials
from mimrefiner.config import PretrainConfig, RefineConfig
from mimrefiner.data.datasets import ImageDataset, load_dataset
from mimrefiner.device import default_device, has_bfloat16
from mimrefiner.errors import InputError
from mimrefiner.files import CHECKOUT, atomic_file, write_json
from mimrefiner.models.encoders import build_vit
from mimrefiner.models.layouts import ViTShape
from mimrefiner.models.masked import build_masked_model
from mimrefiner.models.tensors import write_safetensors
from mimrefiner.models.weights import save_encoder
from mimrefiner.notices import show_notices
from mimrefiner.probes.features import Features, extract_features
from mimrefiner.probes.knn import hits_to_rows, knn_hits
from mimrefiner.probes.linear import linear_probe
from mimrefiner.probes.logistic import low_shot
from mimrefiner.study.presets import Preset, load_preset
from mimrefiner.study.tables import git_sha
from mimrefiner.training import cost
from mimrefiner.training.checkpoints import Saving
from mimrefiner.training.pretrain import pretrain
from mimrefiner.training.refine import refine

TRIALS = {  # part -> what is trained, seed
    "refined-0": ("refined", 0),
    "refined-1": ("refined", 1),
    "refined-2": ("refined", 2),
    "masked": ("masked", 0),
    "labels": ("labels", 0),
}
PACES = tuple(f"pace-{i}" for i in range(len(TRIALS)))  # as many at once as there are trials
LADDER = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)  # of the preset's epochs
SPARE = 0.8  # share of the time that the trainings plan with
WARM, TIMED = 8, 24  # steps before and while the clock runs
SIDE = {"cuda": 8192, "cpu": 512}  # of the square matrices that tell a device's rate
COPIED = 2**28  # bytes whose copy tells the bandwidth
BANK = 20_000  # training images that vote and that the linear probe sees
PACKAGES = ("torch", "timm", "safetensors", "pandas", "scikit-learn", "numpy", "torchvision")


@dataclass(frozen=True)
class Kit:
    """One run: where it writes, what it trains.

    Attributes:
        out: folder of everything that stays.
        preset: the preset's name.
        data: the data set's name.
        gpu: whether there is one.
    """

    out: Path
    preset: str
    data: str
    gpu: bool

    @classmethod
    def opened(cls, out: Path, preset: str, data: str | None) -> "Kit":
        """A kit on the device at hand; InputError where it cannot run."""
        known, gpu = load_preset(preset), has_gpu()
        if not gpu and preset not in ("smoke", "tiny"):
            raise InputError(
                f"there is no GPU here (preset {preset}): a rehearsal takes --preset smoke"
            )
        kind, _, folder = (data or known.dataset).partition(":")
        if folder and kind != "hf":  # parts run in the checkout
            folder = str(Path(folder).absolute())
        out.mkdir(parents=True, exist_ok=True)
        return cls(out, preset, f"{kind}:{folder}" if folder else kind, gpu)

    @property
    def scratch(self) -> Path:
        """Folder of what is not kept."""
        return self.out / "scratch"

    def file(self, name: str) -> str:
        """Where the part ``name`` writes what it knows."""
        return str(self.out / f"{name}.json")

    def write(self, name: str, value) -> None:
        """Keep what a part knows so far."""
        write_json(value, Path(self.file(name)))

    def read(self, name: str):
        """What a part knows.

        Raises:
            InputError: it wrote nothing.
        """
        file = Path(self.file(name))
        if not file.is_file():
            raise InputError(f"{file.name} is missing: see logs/{name}.txt")
        return json.loads(file.read_text())

    def training(self, share: float = 1.0, seed: int = 0) -> Preset:
        """The preset at a share of its epochs."""
        preset = load_preset(self.preset, seed)
        first, then = preset.pretrain, preset.refine
        epochs = {name: share * getattr(then, name) for name in EPOCHS}
        return replace(
            preset,
            dataset=self.data,
            pretrain=replace(first, epochs=share * first.epochs),
            refine=replace(then, **epochs),
        )

    def images(self, split: str) -> ImageDataset:
        """A split that the part ``data`` has decoded, in memory."""
        file = self.scratch / f"{split}.npz"
        if not file.is_file():
            raise InputError(f"{file.name} is missing: see logs/data.txt")
        with np.load(file) as arrays:
            pixels, labels = arrays["pixels"], arrays["labels"]
        load = partial(_picture, pixels)
        return ImageDataset(self.data, split, load, labels).in_memory()


EPOCHS = ("heads_epochs", "refine_epochs", "warmup_epochs")


def has_gpu() -> bool:
    """Whether torch sees a GPU: a child asks, since a process that has asked cannot be forked."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        os._exit(0 if torch.cuda.is_available() else 1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def _picture(pixels: np.ndarray, row: int) -> Image.Image:
    return Image.fromarray(pixels[row])


# ---- tests and ratios, which lie beside the package


def tests(kit: Kit, seconds: float) -> None:
    """Those that need a GPU, or their rehearsal.

    A new process runs them: pytest must be the first to import what it watches.
    """
    device = ["--device", "cuda" if kit.gpu else "pretend", "-m", "cuda", "tests/test_cuda.py"]
    how = ["-v", "--tb=line", "-p", "no:cacheprovider", f"--junit-xml={kit.out / 'tests.xml'}"]
    command = [sys.executable, "-m", "pytest", *device, *how, "-o", "junit_family=xunit1"]
    if code := subprocess.run(command, cwd=CHECKOUT).returncode:
        sys.exit(code)


def ratios(kit: Kit, seconds: float) -> None:
    """Plain loops, plain forward passes and the CPU against what the package does."""
    device = ["--device", "cuda"] if kit.gpu else ["--device", "cpu", "--small"]
    how = ["--seconds", f"{0.8 * seconds:.0f}", "--out", kit.file("ratios")]
    os.chdir(CHECKOUT)
    sys.path.insert(0, str(CHECKOUT))
    sys.argv = ["ratios", *device, *how]
    runpy.run_module("tests.benchmarks.ratios", run_name="__main__", alter_sys=True)


# ---- the card


def card(kit: Kit, left: float) -> None:
    """Versions, the card, and what it does in a second."""
    device = default_device()
    facts = {"packages": {name: _version(name) for name in PACKAGES}, "git_sha": git_sha()}
    facts |= {"python": sys.version.split()[0], "device": device.type}
    if device.type == "cuda":
        props = torch.cuda.get_device_properties(0)
        facts |= {"card": props.name, "gib": round(props.total_memory / 2**30, 1)}
        facts |= {"capability": f"{props.major}.{props.minor}", "cuda": torch.version.cuda}
    facts["bfloat16"] = has_bfloat16(device)
    kit.write("card", facts)
    size = SIDE[device.type]
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        x = torch.randn(size, size, device=device, dtype=dtype)
        seconds = timed(lambda x=x: x @ x, device, times=10)
        facts[f"tflops_{name}"] = round(2 * size**3 / seconds / 1e12, 3)
    small = torch.zeros(64, device=device)
    facts["launch_us"] = round(1e6 * timed(lambda: small.add_(1), device, times=1000), 2)
    kit.write("card", facts)
    if device.type == "cuda":
        facts |= _copies(device)
        kit.write("card", facts)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def timed(run: Callable[[], object], device: torch.device, *, times: int) -> float:
    """Seconds of one call, of ``times`` without a wait between them; the least of three."""
    found = []
    for _ in range(4):  # the first warms up
        began = time.perf_counter()
        for _ in range(times):
            run()
        synchronise(device)
        found.append((time.perf_counter() - began) / times)
    return min(found[1:])


def synchronise(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _copies(device: torch.device) -> dict:
    """Bandwidth, and whether small pageable copies wait for a kernel that runs."""
    host = torch.empty(COPIED, dtype=torch.uint8)
    facts = {}
    for name, x in (("pageable", host), ("pinned", host.pin_memory())):
        seconds = timed(lambda x=x: x.to(device, non_blocking=True), device, times=1)
        facts[f"gb_per_second_{name}"] = round(x.nbytes / seconds / 1e9, 2)
    busy = torch.randn(SIDE["cuda"], SIDE["cuda"], device=device)
    for kib in (1, 64, 128, 1024):
        x, found = torch.empty(kib * 1024, dtype=torch.uint8), []
        for _ in range(5):
            for _ in range(4):
                busy @ busy
            began = time.perf_counter()
            x.to(device, non_blocking=True)
            found.append(time.perf_counter() - began)
            synchronise(device)
        facts[f"pageable_{kib}_kib_behind_a_kernel_ms"] = round(1e3 * statistics.median(found), 3)
    return facts


# ---- the data


def data(kit: Kit, left: float) -> None:
    """Decode the images once for all parts."""
    sizes = {}
    for split in ("train", "test"):
        few = load_preset(kit.preset)
        images = load_dataset(kit.data, split=split)
        images = images.take(few.n_train if split == "train" else few.n_test).in_memory()
        if images.pixels is None or images.labels is None:
            raise InputError(f"{kit.data} needs images of one size, with labels")
        with atomic_file(kit.scratch / f"{split}.npz") as temporary:
            np.savez(temporary, pixels=images.pixels, labels=images.labels)
        sizes[split] = len(images)
        kit.write("data", sizes)


# ---- the pace of training


class Clock:
    """Times at the end of chosen optimiser steps, the GPU being waited for there only."""

    def __init__(self, at: Collection[int], device: torch.device):
        self.at, self.device, self.times, self.done = set(at), device, {}, 0

    def __call__(self, *_) -> None:
        self.done += 1
        if self.done in self.at:
            synchronise(self.device)
            self.times[self.done] = time.perf_counter()

    def __enter__(self) -> "Clock":
        self.handle = register_optimizer_step_post_hook(self)
        return self

    def __exit__(self, *_) -> None:
        self.handle.remove()

    def seconds(self, first: int, last: int) -> float:
        """Of a step between two of the chosen ones."""
        return (self.times[last] - self.times[first]) / (last - first)


def pace(name: str, kit: Kit, left: float) -> None:
    """Milliseconds of steps of the three stages, and what goes with them."""
    preset, images, device = kit.training(), kit.images("train"), default_device()
    encoder, rows = build_vit(preset.encoder), []
    first, last = WARM, WARM + TIMED
    config = _steps(preset.pretrain, images, last)
    with Clock((first, last), device) as clock:
        pretrain(encoder, images, config)
    shape = _shape(preset)
    flops = cost.pretrain_flops(shape, config) * config.batch_size
    rows.append(_pace_row(1, clock.seconds(first, last), config, flops))
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    rows[-1] |= _memory(device, cost.pretrain_bytes(shape, config), peak)
    kit.write(name, rows)
    config, epochs = _steps(preset.refine, images, last), []
    with Clock((first, last, last + first, 2 * last), device) as clock:
        refine(encoder, images, config, monitor=lambda _, rows: epochs.append(dict(rows[-1])))
    for stage, ends in ((2, (first, last)), (3, (last + first, 2 * last))):
        flops = cost.step_flops(shape, config, train_encoder=stage == 3) * config.batch_size
        row = _pace_row(stage, clock.seconds(*ends), config, flops)
        seen = [epoch for epoch in epochs if epoch["stage"] == stage][-1]
        row["data_wait_share"] = round(seen["data_wait_share"], 3)
        planned = cost.training_bytes(shape, config, train_encoder=stage == 3)
        rows.append(row | _memory(device, planned, seen["peak_memory_mib"] * 2**20))
    kit.write(name, rows)
    if name == "pace-alone" and device.type == "cuda":
        rows[-1] |= _profiled(encoder, images, config)
        kit.write(name, rows)


def _steps(config, images: ImageDataset, steps: int):
    """A recipe of so many steps of every stage."""
    epochs = steps / (len(images) // config.batch_size)
    if isinstance(config, PretrainConfig):
        return replace(config, epochs=epochs)
    return replace(config, heads_epochs=epochs, refine_epochs=epochs, warmup_epochs=0)


def _shape(preset: Preset) -> ViTShape:
    e = preset.encoder
    return ViTShape(e.image_size, e.patch_size, e.dim, e.depth, e.num_heads, 4 * e.dim)


def _pace_row(stage: int, seconds: float, config, flops: float) -> dict:
    return {
        "stage": stage,
        "batch": config.batch_size,
        "ms": round(1e3 * seconds, 2),
        "images_per_second": round(config.batch_size / seconds, 1),
        "tflop_per_second": round(flops / seconds / 1e12, 4),
    }


def _memory(device: torch.device, planned: float, peak: float) -> dict:
    """Peak memory of a GPU and the plan's share of it; {} for a CPU."""
    if device.type != "cuda":
        return {}
    return {"peak_gib": round(peak / 2**30, 2), "plan / peak": round(planned / peak, 2)}


def _profiled(encoder: nn.Module, images: ImageDataset, config: RefineConfig) -> dict:
    """Kernels of a step of stage 3 and the share of the time in which the GPU is busy."""
    from torch.profiler import ProfilerActivity, profile

    config = replace(_steps(config, images, 12), heads_epochs=0)  # one step of stage 2
    clock, profiler = (
        Clock((6, 10), torch.device("cuda")),
        profile(activities=[ProfilerActivity.CUDA]),
    )
    with clock, profiler as seen:
        refine(encoder, images, config)
    kernels = [x for x in seen.events() if x.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(x.device_time for x in kernels) / 1e6
    return {
        "kernels_a_step": round(len(kernels) / 13),
        "busy_ms_a_step": round(1e3 * busy / 13, 2),
        "profiled_ms": round(1e3 * clock.seconds(6, 10), 2),
    }


def rung(kit: Kit, seconds: float) -> dict:
    """The largest share of the ladder that fits, by the pace measured alone and at once."""
    preset, images, alone = kit.training(), kit.read("data")["train"], kit.read("pace-alone")
    found = [kit.read(name) for name in PACES if Path(kit.file(name)).is_file()]
    slow = [{**row, "ms": row["ms"] * len(PACES)} for row in alone]  # where none of them tells
    ms = {row["stage"]: row["ms"] for row in alone if row["stage"] == 1}
    for row in (row for rows in found or [slow] for row in rows if row["stage"] > 1):
        ms[row["stage"]] = max(ms.get(row["stage"], 0.0), row["ms"])
    if len(ms) < 3:
        return {"share": LADDER[0], "planned_seconds": None, "seconds_left": seconds}
    epochs = {1: preset.pretrain.epochs, 2: preset.refine.heads_epochs}
    epochs[3] = preset.refine.refine_epochs
    sizes = {1: preset.pretrain.batch_size, 2: preset.refine.batch_size}
    sizes[3] = preset.refine.batch_size
    whole = sum(epochs[i] * (images // sizes[i]) * ms[i] / 1e3 for i in epochs)
    fitting = [share for share in LADDER if share * whole <= SPARE * seconds]
    share = max(fitting, default=LADDER[0])
    return {"share": share, "planned_seconds": round(share * whole, 1), "seconds_left": seconds}


# ---- training


def mae(kit: Kit, left: float) -> None:
    """Stage 1 at the share of the preset's epochs that time allows, then measured."""
    chosen = rung(kit, left)
    kit.write("rung", chosen)
    preset, images = kit.training(chosen["share"]), kit.images("train")
    saving = Saving(kit.scratch / "mae", every=None, minutes=1)
    result = pretrain(build_vit(preset.encoder), images, preset.pretrain, saving=saving)
    write_safetensors(result.model.state_dict(), kit.scratch / "mae.safetensors", {})
    save_encoder(result.encoder.half(), kit.out / "encoders" / "before.safetensors")
    facts = {"model": "before", "epochs": preset.pretrain.epochs, "flops": result.flops}
    facts |= {"train_seconds": round(result.seconds, 1), "loss": _last_loss(result.history)}
    kit.write("mae", facts)
    kit.write("mae", facts | measured(result.encoder.float(), kit))


def trial(name: str, kit: Kit, left: float) -> None:
    """A refinement or a control at its computation, kept in half precision, then measured."""
    what, seed = TRIALS[name]
    preset, images = kit.training(kit.read("rung")["share"], seed), kit.images("train")
    model = build_masked_model(build_vit(preset.encoder), preset.pretrain)
    file = kit.scratch / "mae.safetensors"
    if not file.is_file():
        raise InputError(f"{file.name} is missing: see logs/mae.txt")
    model.load_state_dict(safetensors.torch.load_file(file))
    model.half().float()  # as the encoder that is kept and measured
    start = trials.Start(model.encoder, images, preset.refine, preset.pretrain, model)
    facts = {"model": what, "seed": seed, "epochs": preset.refine.refine_epochs}
    kit.write(name, facts)
    began = time.perf_counter()
    encoder = trials.trained(what, start, kit.scratch / "runs")
    save_encoder(encoder.half(), kit.out / "encoders" / f"{name}.safetensors")
    facts["train_seconds"] = round(time.perf_counter() - began, 1)
    kit.write(name, facts)
    kit.write(name, facts | measured(encoder.float(), kit))


def _last_loss(history) -> float:
    return round(float(history["loss"].iloc[-1]), 4)


def measured(encoder: nn.Module, kit: Kit) -> dict:
    """k-NN after every block, and of the last block a linear probe and five labelled images."""
    device = default_device()
    how = {"autocast": torch.bfloat16 if has_bfloat16(device) else None, "device": device}
    train, test = (
        extract_features(encoder, images, **how)
        for images in (kit.images("train").take(BANK), kit.images("test"))
    )
    facts = {"n_train": len(train.y), "n_test": len(test.y)}
    for pool, right in knn_hits(train, test, device=device).items():
        facts[f"knn_{pool}"] = [round(row["value"], 4) for row in hits_to_rows(right)]
    last = [_last_block(part) for part in (train, test)]
    rows = linear_probe(*last, epochs=10, batch_size=256, device=device)
    facts["linear"] = round(float(rows["value"].iloc[0]), 4)
    rows = low_shot(*last, shots=(5,), splits=3, device=device)
    return facts | {"five_shot": round(float(rows["value"].mean()), 4)}


def _last_block(features: Features) -> Features:
    """The cls token of the last block."""
    x = {"cls": features.x["cls"][-1:]}
    return replace(features, x=x, blocks=features.blocks[-1:])


PARTS: dict[str, Callable[[Kit, float], None]] = {
    "card": card,
    "tests": tests,
    "data": data,
    "ratios": ratios,
    "mae": mae,
    **{name: partial(pace, name) for name in ("pace-alone", *PACES)},
    **{name: partial(trial, name) for name in TRIALS},
}


def run_part(kit: Kit, name: str, limit: float, left: float) -> None:
    """One part in a process of its own.

    It has ``limit`` seconds; what the MAE does not take of the ``left`` ones is the other
    trainings'. Parts that run at once share the cores.
    """
    show_notices()
    os.environ["MIMREFINER_PROGRESS"] = "log"
    at_once = len(TRIALS) if name in TRIALS or name in PACES else 1
    torch.set_num_threads(max(1, torch.get_num_threads() // at_once))
    PARTS[name](kit, left if name == "mae" else limit)
