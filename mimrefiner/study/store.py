"""Trained models by content: what was trained once with the same settings, data and code is loaded,
not trained again.

Every entry is a folder named by the hash of all that determines it. It is written aside, renamed
when whole, and carries the hashes of its files; a damaged entry is announced and built anew. A lock
per entry lets one process train while others that need the same model wait for it. Training that
was cut off goes on where its last checkpoint was written. The folder is ``$MIMREFINER_CACHE``,
default ``~/.cache/mimrefiner``.

With a ``paper-*`` preset nothing is trained: the released weights stand for the stages, and the
data are ImageNet-1K in the folder ``$MIMREFINER_IMAGENET`` (and those of ``natural`` presets
Tiny-ImageNet in ``$MIMREFINER_TINY_IMAGENET``).
"""

import copy
import dataclasses
import hashlib
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
import safetensors.torch
import torch
from filelock import FileLock, Timeout
from torch import nn

from mimrefiner import distributed
from mimrefiner.config import PretrainConfig
from mimrefiner.data.datasets import ImageDataset, data_hash
from mimrefiner.device import default_device, loader_workers
from mimrefiner.errors import InputError
from mimrefiner.files import cache_folder
from mimrefiner.models.catalogue import BY_NAME
from mimrefiner.models.encoders import build_vit, load_encoder
from mimrefiner.models.masked import build_masked_model
from mimrefiner.models.weights import save_encoder
from mimrefiner.study.presets import PAPER_MODELS, Preset, load_split
from mimrefiner.training.checkpoints import Saving
from mimrefiner.training.finetune import FinetuneResult, finetune
from mimrefiner.training.pretrain import PretrainResult, pretrain
from mimrefiner.training.refine import RefineResult, refine, refinement_flops
from mimrefiner.training.run import NUMERICS

# preset -> names, in the table of models, of the released weights before and after refinement
PUBLISHED = {
    f"paper-{model}": (model.replace("-", "_"), model.replace("-", "_refined_"))
    for model in PAPER_MODELS
}
_may_train = ContextVar("may_train", default=True)


class _NotStoredError(Exception):
    pass


def is_published(preset: Preset) -> bool:
    """Whether released weights stand for the preset's stages, so that nothing is trained."""
    return preset.name in PUBLISHED


def pretrained(preset: Preset) -> PretrainResult:
    """The preset's encoder after stage 1. Released weights come without decoder (``model`` None),
    history and cost (nan).
    """
    if is_published(preset):
        return PretrainResult(None, _released(preset, 0), pd.DataFrame(), math.nan, math.nan)
    train_set = load_split(preset, "train")
    settings = {"encoder": preset.encoder, "pretrain": preset.pretrain}
    encoder = build_vit(preset.encoder, seed=preset.pretrain.seed)

    def train(saving: Saving) -> PretrainResult:
        return pretrain(
            encoder,
            _at_hand(train_set),
            preset.pretrain,
            num_workers=loader_workers(),
            saving=saving,
        )

    return _cached_pretrain("pretrain", settings, train_set, encoder, preset, train)


def refined(preset: Preset) -> RefineResult:
    """The preset's encoder after stages 2 and 3. Released weights are one set, given as raw and as
    EMA, without history.
    """
    if is_published(preset):
        encoder = _released(preset, 1)
        return RefineResult(encoder, encoder, pd.DataFrame(), math.nan, math.nan)
    train_set = load_split(preset, "train")
    settings = {"encoder": preset.encoder, "pretrain": preset.pretrain, "refine": preset.refine}

    def train(folder: Path, saving: Saving) -> dict:
        result = refine(
            pretrained(preset).encoder,
            _at_hand(train_set),
            preset.refine,
            num_workers=loader_workers(),
            saving=saving,
        )
        save_encoder(result.encoder, folder / "encoder.safetensors")
        save_encoder(result.ema_encoder, folder / "ema_encoder.safetensors")
        result.history.to_csv(folder / "history.csv", index=False)
        return {"flops": result.flops, "seconds": result.seconds}

    folder, facts = _entry("refine", settings, train_set, train)
    encoders = [load_encoder(folder / f"{name}.safetensors") for name in ("encoder", "ema_encoder")]
    return RefineResult(*encoders, _read_history(folder), facts["flops"], facts["seconds"])


def untrained(preset: Preset) -> nn.Module:
    """An encoder like the preset's with random weights, drawn from the preset's seed."""
    if not is_published(preset):
        return build_vit(preset.encoder, seed=preset.pretrain.seed)
    encoder = copy.deepcopy(pretrained(preset).encoder)
    generator = torch.Generator().manual_seed(preset.pretrain.seed)
    for name, x in encoder.named_parameters():
        if x.ndim > 1:
            nn.init.trunc_normal_(x, std=0.02, generator=generator)
        else:
            nn.init.constant_(x, float(name.endswith("weight")))  # of norms; biases are 0
    return encoder


def pretrained_longer(preset: Preset) -> PretrainResult:
    """The control: the FLOPs of refinement spent on more masked pre-training instead, in a new
    learning-rate cycle.

    Raises:
        InputError: a preset of released weights, which have no such control.
    """
    if is_published(preset):
        raise InputError(
            f"preset {preset.name} has no longer pre-trained control: nobody has released one"
        )
    first, train_set = pretrained(preset), load_split(preset, "train")
    known = is_stored("refined", preset)  # else counted, so that both can be trained side by side
    flops = (
        refined(preset).flops
        if known
        else refinement_flops(first.encoder, train_set, preset.refine)
    )
    config = longer(preset.pretrain, flops / first.flops)
    settings = {"encoder": preset.encoder, "pretrain": preset.pretrain, "longer": config}

    def train(saving: Saving) -> PretrainResult:
        return pretrain(
            first.encoder,
            _at_hand(train_set),
            config,
            start_from=first.model,
            num_workers=loader_workers(),
            saving=saving,
        )

    return _cached_pretrain("longer", settings, train_set, first.encoder, preset, train)


def longer(config: PretrainConfig, share: float) -> PretrainConfig:
    """``share`` of a pre-training again, with other views and masks."""
    return replace(config, epochs=share * config.epochs, seed=config.seed + 1000)


def finetuned(preset: Preset, base_lr: float) -> FinetuneResult:
    """The control with labels: the FLOPs of refinement spent on fine-tuning the encoder after stage
    1 by cross-entropy, with the settings of refinement but for the learning rate.
    """
    first, flops, config = (
        pretrained(preset),
        refined(preset).flops,
        replace(preset.refine, refine_base_lr=base_lr),
    )
    train_set = load_split(preset, "train")
    settings = {
        "encoder": preset.encoder,
        "pretrain": preset.pretrain,
        "finetune": config,
        "flops": flops,
    }

    def train(folder: Path, saving: Saving) -> dict:
        result = finetune(
            first.encoder,
            _at_hand(train_set),
            config,
            flops=flops,
            num_workers=loader_workers(),
            saving=saving,
        )
        save_encoder(result.encoder, folder / "encoder.safetensors")
        result.history.to_csv(folder / "history.csv", index=False)
        return {"epochs": result.epochs, "flops": result.flops, "seconds": result.seconds}

    folder, facts = _entry("finetune", settings, train_set, train)
    numbers = (facts[name] for name in ("epochs", "flops", "seconds"))
    return FinetuneResult(
        load_encoder(folder / "encoder.safetensors"), _read_history(folder), *numbers
    )


def _at_hand(train_set: ImageDataset) -> ImageDataset:
    """In memory where a GPU trains, which cuts its own crops then; what presets train on here are
    small images.
    """
    return train_set.in_memory() if default_device().type == "cuda" else train_set


MODELS = {"pretrained": pretrained, "refined": refined, "pretrained_longer": pretrained_longer}


def is_stored(model: str, preset: Preset) -> bool:
    """Whether ``MODELS[model](preset)`` would load and not train."""
    if is_published(preset):
        return True
    token = _may_train.set(False)
    try:
        MODELS[model](preset)
    except _NotStoredError:
        return False
    finally:
        _may_train.reset(token)
    return True


def _released(preset: Preset, stage: int) -> nn.Module:
    name = PUBLISHED[preset.name][stage]
    try:
        return load_encoder(name)
    except InputError as error:
        file = f"$MIMREFINER_CACHE/weights/{name}{Path(BY_NAME[name].url).suffix}"
        raise InputError(
            f"preset {preset.name} needs the released weights {name} ({error}), or put them at {file}"
        ) from error


def _cached_pretrain(
    kind: str,
    settings: dict,
    train_set: ImageDataset,
    encoder: nn.Module,
    preset: Preset,
    run: Callable[[Saving], PretrainResult],
) -> PretrainResult:
    def train(folder: Path, saving: Saving) -> dict:
        result = run(saving)
        safetensors.torch.save_file(result.model.state_dict(), folder / "model.safetensors")
        result.history.to_csv(folder / "history.csv", index=False)
        return {"flops": result.flops, "seconds": result.seconds}

    folder, facts = _entry(kind, settings, train_set, train)
    model = build_masked_model(encoder, preset.pretrain)
    model.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
    return PretrainResult(
        model.eval(), model.encoder, _read_history(folder), facts["flops"], facts["seconds"]
    )


def _entry(
    kind: str, settings: dict, data: ImageDataset, train: Callable[[Path, Saving], dict]
) -> tuple[Path, dict]:
    """The folder of an entry and the facts in its manifest; trained now if it is not there."""
    described = {
        "kind": kind,
        "settings": {
            name: asdict(x) if dataclasses.is_dataclass(x) else x for name, x in settings.items()
        },
        "data": data_hash(data),
        "numerics": NUMERICS,
        "torch": torch.__version__,
        "device": default_device().type,
    }
    key = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_folder() / f"{kind}-{key}"
    if _is_stored(folder):
        return folder, _stored_facts(folder)
    if not _may_train.get():
        raise _NotStoredError(folder.name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock(folder) if distributed.rank() == 0 else nullcontext():
        if not _is_stored(folder):  # else trained by another process while this one waited
            _train_entry(folder, described, train)
    return folder, _stored_facts(folder)


def _is_stored(folder: Path) -> bool:
    """Of a group of processes that train together the first one looks, so that all agree."""
    return distributed.any_process(distributed.rank() == 0 and _stored_facts(folder) is not None)


def _train_entry(folder: Path, described: dict, train: Callable[[Path, Saving], dict]) -> None:
    unfinished = folder.parent / "unfinished" / folder.name
    if distributed.rank() > 0:
        with tempfile.TemporaryDirectory() as temporary:
            train(Path(temporary), Saving(unfinished, resume=True))
        distributed.any_process(False)  # until the first one has written the entry
        return
    # Of a process that was killed: the lock says nobody trains this now
    for left_over in folder.parent.glob(f".{folder.name}-*"):
        shutil.rmtree(left_over)
    if folder.exists():
        print(f"{folder} is damaged ({_damage(folder)}): training again", file=sys.stderr)
        shutil.rmtree(folder)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        part = Path(temporary) / "entry"
        part.mkdir()
        facts = train(part, Saving(unfinished, resume=True))
        files = {file.name: _file_hash(file) for file in sorted(part.iterdir())}
        (part / "manifest.json").write_text(
            json.dumps({**described, **facts, "files": files}, indent=2)
        )
        part.rename(folder)
    shutil.rmtree(unfinished)
    distributed.any_process(False)


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """One process trains an entry at a time; the operating system frees the lock of a process that
    dies.
    """
    lock = FileLock(folder.parent / "locks" / f"{folder.name}.lock")
    Path(lock.lock_file).parent.mkdir(exist_ok=True)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"another process trains {folder.name}: waiting for it", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _stored_facts(folder: Path) -> dict | None:
    """The manifest of a whole entry, None where there is none or a damaged one."""
    if not folder.exists() or _damage(folder):
        return None
    return json.loads((folder / "manifest.json").read_text())


def _damage(folder: Path) -> str | None:
    try:
        files = json.loads((folder / "manifest.json").read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"no readable manifest: {error}"
    for name, expected in files.items():
        if not (folder / name).is_file() or _file_hash(folder / name) != expected:
            return f"{name} is missing or changed"
    return None


def _file_hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_history(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "history.csv")
