"""Trained models by content: what was trained once is loaded, and not trained again.

Every model is an :class:`~mimrefiner.files.Entry` of the folder ``$MIMREFINER_CACHE`` (default
``~/.cache/mimrefiner``), named by the hash of all that decides its weights: settings, data, the
number of the training code's arithmetic, torch and the kind of device. One process trains while
others that need the same model wait for it. A training that was cut off goes on where its last
checkpoint was written.

With a ``paper-*`` preset nothing is trained: the released weights stand for the stages, and the
data are ImageNet-1K in the folder ``$MIMREFINER_IMAGENET`` (and those of ``natural`` presets
Tiny-ImageNet in ``$MIMREFINER_TINY_IMAGENET``).
"""

import math
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path

import pandas as pd
import safetensors.torch
import torch
from torch import nn

from mimrefiner import distributed
from mimrefiner.config import PretrainConfig
from mimrefiner.data.datasets import ImageDataset, data_hash
from mimrefiner.device import default_device, loader_workers
from mimrefiner.errors import InputError
from mimrefiner.files import Entry, cache_folder, check_writable, write_csv
from mimrefiner.models.catalogue import BY_NAME
from mimrefiner.models.encoders import build_vit, load_encoder, random_twin
from mimrefiner.models.masked import SimMIM, build_masked_model
from mimrefiner.models.weights import save_encoder
from mimrefiner.study.presets import PAPER_MODELS, Preset, load_split
from mimrefiner.training.checkpoints import Saving
from mimrefiner.training.finetune import FinetuneResult, finetune
from mimrefiner.training.pretrain import PretrainResult, pretrain
from mimrefiner.training.refine import RefineResult, refine, refinement_flops
from mimrefiner.training.run import HISTORY_FILE, NUMERICS

MINUTES = 5  # between checkpoints
# preset -> names, in the catalogue, of the released weights before and after refinement
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
    """The preset's encoder after stage 1.

    Released weights come without decoder (``model`` None), history and cost (nan).
    """
    if is_published(preset):
        return PretrainResult(None, _released(preset, 0), pd.DataFrame(), math.nan, math.nan)
    settings = {"encoder": preset.encoder, "pretrain": preset.pretrain}
    encoder = build_vit(preset.encoder, seed=preset.pretrain.seed)
    return _pretrained("pretrain", preset, settings, encoder, preset.pretrain)


def refined(preset: Preset) -> RefineResult:
    """The preset's encoder after stages 2 and 3.

    Released weights are one set, given as raw and as EMA, without history and cost.
    """
    if is_published(preset):
        encoder = _released(preset, 1)
        return RefineResult(encoder, encoder, pd.DataFrame(), math.nan, math.nan)
    settings = {"encoder": preset.encoder, "pretrain": preset.pretrain, "refine": preset.refine}
    names = ("encoder", "ema_encoder")

    def train(folder: Path, how: dict) -> dict:
        result = refine(pretrained(preset).encoder, config=preset.refine, **how)
        return _write(result, folder, names)

    folder, facts = _stored("refine", preset, settings, train)
    encoders = [load_encoder(folder / f"{name}.safetensors") for name in names]
    return RefineResult(*encoders, _read_history(folder), facts["flops"], facts["seconds"])


def untrained(preset: Preset) -> nn.Module:
    """An encoder like the preset's with random weights, drawn from the preset's seed."""
    if is_published(preset):
        return random_twin(pretrained(preset).encoder, preset.pretrain.seed)
    return build_vit(preset.encoder, seed=preset.pretrain.seed)


def pretrained_longer(preset: Preset) -> PretrainResult:
    """The control: the FLOPs of refinement, spent on another cycle of masked pre-training.

    Raises:
        InputError: a preset of released weights, which have no such control.
    """
    if is_published(preset):
        raise InputError(
            f"preset {preset.name} has no longer pre-trained control: nobody has released one"
        )
    first = pretrained(preset)
    if is_stored("refined", preset):
        flops = refined(preset).flops
    else:  # counted, so that both can be trained side by side
        flops = refinement_flops(first.encoder, load_split(preset, "train"), preset.refine)
    config = longer(preset.pretrain, flops / first.flops)
    settings = {"encoder": preset.encoder, "pretrain": preset.pretrain, "longer": config}
    return _pretrained("longer", preset, settings, first.encoder, config, first.model)


def longer(config: PretrainConfig, share: float) -> PretrainConfig:
    """A pre-training that is ``share`` as long as ``config``, with other views and masks."""
    return replace(config, epochs=share * config.epochs, seed=config.seed + 1000)


def finetuned(preset: Preset, base_lr: float) -> FinetuneResult:
    """The control with labels: the FLOPs of refinement, spent on fine-tuning by cross-entropy.

    Args:
        preset: gives the encoder after stage 1 and the settings of refinement, which are those of
            fine-tuning but for the learning rate.
        base_lr: the highest learning rate, for 256 images.
    """
    first, flops = pretrained(preset), refined(preset).flops
    config = replace(preset.refine, refine_base_lr=base_lr)
    settings = {"encoder": preset.encoder, "pretrain": preset.pretrain}
    settings |= {"finetune": config, "flops": flops}

    def train(folder: Path, how: dict) -> dict:
        result = finetune(first.encoder, config=config, flops=flops, **how)
        return {"epochs": result.epochs, **_write(result, folder, ("encoder",))}

    folder, facts = _stored("finetune", preset, settings, train)
    encoder, history = load_encoder(folder / "encoder.safetensors"), _read_history(folder)
    return FinetuneResult(encoder, history, facts["epochs"], facts["flops"], facts["seconds"])


TRAINED = {"pretrained": pretrained, "refined": refined, "pretrained_longer": pretrained_longer}


STAGES = {  # name in figures -> (what is trained for it, which encoder of the result)
    "before": ("pretrained", "encoder"),
    "pre-trained": ("pretrained", "encoder"),
    "refined": ("refined", "ema_encoder"),
    "refined, raw weights": ("refined", "encoder"),
    "same compute": ("pretrained_longer", "encoder"),
}


def encoders(presets: Iterable[tuple[int, Preset]], names: Sequence[str]) -> dict:
    """Encoders by (name, seed), for the names of STAGES and "random weights".

    With a preset of released weights, which come without raw weights and without a longer
    pre-trained control, these two are left out.

    >>> import mimrefiner as mr
    >>> list(encoders([(3, mr.load_preset("smoke", 3))], ["random weights"]))
    [('random weights', 3)]
    """
    found = {}
    for seed, preset in presets:
        for name in names:
            if name == "random weights":
                found[name, seed] = untrained(preset)
                continue
            model, encoder = STAGES[name]
            if not is_published(preset) or name not in ("refined, raw weights", "same compute"):
                found[name, seed] = getattr(TRAINED[model](preset), encoder)
    return found


def costs(presets: Iterable[tuple[int, Preset]], names: Sequence[str]) -> pd.DataFrame:
    """What the trainings behind ``names`` cost, a row each: TFLOP and seconds, mean over seeds.

    Released weights have no row.
    """
    trained = {STAGES[name][0]: name for name in reversed(names)}
    rows = [
        {"model": name, "TFLOP": result.flops / 1e12, "seconds": result.seconds}
        for _, preset in presets
        if not is_published(preset)
        for model, name in trained.items()
        for result in [TRAINED[model](preset)]
    ]
    table = pd.DataFrame(rows, columns=["model", "TFLOP", "seconds"])
    return table.groupby("model").mean().reindex([n for n in names if n in set(table["model"])])


def histories(presets: Iterable[tuple[int, Preset]]) -> pd.DataFrame:
    """The training curves of refinement, with a column seed; none of released weights."""
    parts = [refined(preset).history.assign(seed=seed) for seed, preset in presets]
    parts = [part for part in parts if len(part)]
    columns = ["stage", "step", "block", "loss", "nn_accuracy", "seed"]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)


def labelled_split(preset: Preset) -> str:
    """The split whose labels a probe may use where nothing is chosen on validation images.

    Released weights take all training images; a preset's own models leave its validation images
    out, as they were left out of their training.
    """
    return "trainval" if is_published(preset) else "train"


def packaged_or_trained(preset: Preset) -> nn.Module:
    """The packaged model of digits where the preset's data are digits, else the preset's own."""
    packaged = preset.dataset == "digits"
    return load_encoder("simmim_digits") if packaged else pretrained(preset).encoder


def is_stored(model: str, preset: Preset) -> bool:
    """Whether ``TRAINED[model](preset)`` would load and not train."""
    if is_published(preset):
        return True
    token = _may_train.set(False)
    try:
        TRAINED[model](preset)
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
            f"preset {preset.name} needs the released weights {name} ({error}), "
            f"or put them at {file}"
        ) from error


def _pretrained(
    kind: str,
    preset: Preset,
    settings: dict,
    encoder: nn.Module,
    config: PretrainConfig,
    start_from: SimMIM | None = None,
) -> PretrainResult:
    def train(folder: Path, how: dict) -> dict:
        result = pretrain(encoder, config=config, start_from=start_from, **how)
        safetensors.torch.save_file(result.model.state_dict(), folder / "model.safetensors")
        return _write(result, folder, ())

    folder, facts = _stored(kind, preset, settings, train)
    model = build_masked_model(encoder, preset.pretrain)
    model.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
    history = _read_history(folder)
    return PretrainResult(model.eval(), model.encoder, history, facts["flops"], facts["seconds"])


def _write(
    result: PretrainResult | RefineResult | FinetuneResult, folder: Path, encoders: tuple[str, ...]
) -> dict:
    """Write encoders, by attribute, and the history; the facts that go into the manifest."""
    for name in encoders:
        save_encoder(getattr(result, name), folder / f"{name}.safetensors")
    write_csv(result.history, folder / HISTORY_FILE)
    return {"flops": result.flops, "seconds": result.seconds}


def _read_history(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / HISTORY_FILE)


def _stored(
    kind: str, preset: Preset, settings: dict, train: Callable[[Path, dict], dict]
) -> tuple[Path, dict]:
    """An entry's folder and facts; it is trained now if it is not there.

    Args:
        kind: the name of what is trained.
        preset: gives the images that it is trained on.
        settings: all that decides the weights beside data, code and device.
        train: trains with these keyword arguments (``dataset``, ``saving`` and so on), writes into
            the folder and returns the facts.
    """
    dataset = load_split(preset, "train")
    described = {
        "kind": kind,
        "settings": {name: asdict(x) if is_dataclass(x) else x for name, x in settings.items()},
        "data": data_hash(dataset),
        "numerics": NUMERICS,
        "torch": torch.__version__,
        "device": default_device().type,
    }
    entry = Entry.named(cache_folder(), kind, described)
    facts = distributed.from_first(entry.facts)
    if facts is None and not _may_train.get():
        raise _NotStoredError(entry.folder.name)
    if facts is None:
        check_writable(entry.folder.parent, "MIMREFINER_CACHE")
        with entry.locked() if distributed.rank() == 0 else nullcontext():
            facts = distributed.from_first(entry.facts)  # perhaps by now of another process
            if facts is None:
                facts = _train(entry, dataset, train)
    return entry.folder, facts


def _train(entry: Entry, dataset: ImageDataset, train: Callable[[Path, dict], dict]) -> dict:
    """Fill ``entry`` with all processes of a group, of which the first one writes; its facts."""
    unfinished = entry.folder.parent / "unfinished" / entry.folder.name
    if default_device().type == "cuda":  # a GPU cuts its own crops, and presets' images are small
        dataset = dataset.in_memory()
    how = {"dataset": dataset, "num_workers": loader_workers()}
    how["saving"] = Saving(unfinished, every=None, resume=True, minutes=MINUTES)
    facts = None
    if distributed.rank() > 0:
        with tempfile.TemporaryDirectory() as folder:
            train(Path(folder), how)
    else:
        with entry.filled_aside() as folder:
            facts = train(folder, how)
            entry.finish(folder, facts)
        shutil.rmtree(unfinished, ignore_errors=True)
    return distributed.from_first(lambda: facts)  # and the others wait until it is written
