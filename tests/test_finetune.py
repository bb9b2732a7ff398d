from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import mimrefiner as mr
from mimrefiner.data.datasets import ImageDataset
from mimrefiner.data.labelled import labelled_batches
from mimrefiner.data.views import Order
from mimrefiner.models.classifier import Head, ImageClassifier, load_classifier
from mimrefiner.models.weights import sha256_of
from mimrefiner.probes.checks import COLUMNS
from mimrefiner.study import store
from mimrefiner.training import testing
from mimrefiner.training.checkpoints import Saving
from mimrefiner.training.finetune import (
    augmentation_of,
    finetune,
    finetune_into,
    finetune_recipe,
    recipe_groups,
)
from mimrefiner.training.memory import Memory
from mimrefiner.training.recipes import L16, P1_2B14_VPT, P1_L16
from mimrefiner.training.run import TrainingRun
from mimrefiner.training.testing import accuracy, logit_batches

SMALL = replace(L16, epochs=4, warmup_epochs=1, batch_size=16, base_lr=0.05)
PLAIN = replace(P1_L16, epochs=4, warmup_epochs=1, batch_size=16, base_lr=0.05, layer_decay=1.0)


def colours(labels):
    """Noisy images whose class is their colour."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 60, (64, 32, 32, 3), dtype=np.uint8)
    pixels[np.arange(64), :, :, np.arange(64) % 3] += 150
    return ImageDataset(
        "colours", "train", lambda row: Image.fromarray(pixels[row]), labels, length=64
    )


def test_labels_are_learnt_with_what_computation_there_is(monkeypatch):
    preset = mr.load_preset("smoke")
    config = replace(preset.refine, batch_size=32, frozen_blocks=1, refine_base_lr=2e-2)
    # Classes need not start at 0
    encoder, data = (mr.build_vit(preset.encoder), colours(np.arange(64) % 3 + 5))
    losses, cross_entropy = [], F.cross_entropy
    monkeypatch.setattr(
        F, "cross_entropy", lambda *given: losses.append(cross_entropy(*given)) or losses[-1]
    )
    before = sha256_of(encoder)
    result = finetune(encoder, data, config, flops=4e9)
    tuned, steps = result.encoder, len(losses)
    assert result.history["step"].iloc[-1] == steps - 1 and result.history["loss"].iloc[
        0
    ] == pytest.approx(losses[0].item())
    assert (
        result.epochs == steps * 32 / 64
        and result.flops == pytest.approx(4e9, rel=0.5 / steps)
        and result.seconds > 0
    )
    # From nothing
    assert losses[0].item() == pytest.approx(np.log(3), rel=1e-3) and losses[-1] < 0.5 * losses[0]
    assert sha256_of(encoder) == before != sha256_of(tuned)
    assert torch.equal(tuned.blocks[0].attn.qkv.weight, encoder.blocks[0].attn.qkv.weight)
    assert not torch.equal(tuned.blocks[1].attn.qkv.weight, encoder.blocks[1].attn.qkv.weight)
    finetune(encoder, data, config, flops=2e9)
    assert len(losses) - steps == pytest.approx(steps / 2, abs=1)
    with pytest.raises(mr.InputError, match="a label for every image"):
        finetune(encoder, colours(None), config, flops=1e9)


def test_a_fine_tuned_encoder_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("MIMREFINER_CACHE", str(tmp_path))
    tuned = store.finetuned(mr.load_preset("smoke"), 2e-3)
    monkeypatch.setattr(store, "finetune", None)
    again = store.finetuned(mr.load_preset("smoke"), 2e-3)
    assert sha256_of(again.encoder) == sha256_of(tuned.encoder)
    assert len(again.history) == len(tuned.history) > 0
    assert (again.epochs, again.flops, again.seconds) == (tuned.epochs, tuned.flops, tuned.seconds)


@pytest.fixture(scope="module")
def thirds():
    """Colours, split into training, validation and test images."""
    data = colours(np.arange(64) % 3)
    return data.subset(range(32)), data.subset(range(32, 48)), data.subset(range(48, 64))


def tuned(vit, thirds, recipe=SMALL, **how):
    return finetune_recipe(vit, thirds[0], thirds[2], recipe, **how)


def test_a_step_is_the_published_one(vit, thirds):
    """Crops, smoothed cross-entropy, rates and decays: two steps by plain PyTorch."""
    recipe = replace(PLAIN, epochs=1, warmup_epochs=0, layer_decay=0.5, min_lr=1e-3)
    result = tuned(vit, thirds, recipe)
    model = ImageClassifier(vit, Head(3), seed=0).train()
    decayed = {n for n, x in model.named_parameters() if x.ndim > 1}
    decayed -= {"encoder.cls_token", "encoder.pos_embed"}
    scales = {"encoder.blocks.0": 0.125, "encoder.blocks.1": 0.25, "encoder.blocks.2": 0.5}
    scales |= {"encoder.norm": 1, "linear": 1}
    groups = [
        {
            "params": [x],
            "scale": next((s for n, s in scales.items() if name.startswith(n)), 0.0625),
            "weight_decay": 0.05 if name in decayed else 0,
        }
        for name, x in model.named_parameters()
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.999))
    peak = 0.05 * 16 / 256
    how = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    images = labelled_batches(thirds[0], augmentation_of(recipe, 32), Order(16, 2, 0), **how)
    for (x, y), lr in zip(images, (peak, 1e-3 + (peak - 1e-3) * 0.5), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        target = torch.full((16, 3), 0.1 / 3)
        target[range(16), y] += 0.9
        loss = -(target * model(x).log_softmax(-1)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for (name, ours), (_, theirs) in zip(
        result.model.named_parameters(), model.named_parameters(), strict=True
    ):
        assert torch.allclose(ours, theirs, atol=2e-6), name


def test_labels_are_learnt_and_each_choice_of_the_epoch_has_its_row(vit, thirds):
    before = sha256_of(vit)
    result = tuned(vit, thirds, replace(PLAIN, epochs=8), val=thirds[1], best_on_test=True)
    rows = result.rows
    assert rows["value"].iloc[0] > 0.9
    assert sha256_of(vit) == before != sha256_of(result.model.encoder)
    assert list(rows) == [*COLUMNS, "images"]
    assert rows["protocol"].unique().tolist() == ["finetune_1p_l16"]
    assert rows[["n_train", "n_test", "block", "pool"]].iloc[0].tolist() == [32, 16, 2, "cls"]
    assert rows["images"].unique().tolist() == ["all"]
    epochs = result.epochs
    assert epochs["epoch"].tolist() == list(range(1, 9))
    best_val, best_test = epochs["val"].idxmax(), epochs["test"].idxmax()
    assert rows["setting"].tolist() == [
        "last epoch",
        f"best on validation: epoch {best_val + 1}",
        f"best on test, as in the paper: epoch {best_test + 1}",
    ]
    expected = epochs["test"].loc[[7, best_val, best_test]].tolist()
    assert rows["value"].tolist() == expected and expected[0] <= expected[2]
    assert rows["value"].iloc[0] == accuracy(result.model, thirds[2])


def test_the_best_on_test_is_never_reported_unasked(vit, thirds):
    alone = tuned(vit, thirds, PLAIN)
    assert alone.rows["setting"].tolist() == ["last epoch"]
    assert alone.epochs["test"].notna().tolist() == [False, False, False, True]
    chosen = tuned(vit, thirds, PLAIN, val=thirds[1]).epochs
    better = chosen["val"] > chosen["val"].cummax().shift(fill_value=-1)
    assert chosen["test"].notna().tolist() == [*better[:3], True]


class Killed(Exception):
    pass


@pytest.mark.parametrize("recipe", [SMALL, replace(SMALL, micro_batch=8, frozen_share=0.4)])
def test_a_run_goes_on_bit_for_bit(vit, thirds, recipe, tmp_path, monkeypatch):
    """Mixing, erasing, RandAugment and drop path with it; killed in the middle of an epoch."""
    how = {"val": thirds[1]}
    whole = tuned(vit, thirds, recipe, **how)
    end_step = TrainingRun.end_step

    def killed(run, step, *given):
        end_step(run, step, *given)
        if step == 4:
            raise Killed

    monkeypatch.setattr(TrainingRun, "end_step", killed)
    with pytest.raises(Killed):
        tuned(vit, thirds, recipe, saving=Saving(tmp_path, every=3), **how)
    monkeypatch.undo()
    torch.rand(3)
    again = tuned(vit, thirds, recipe, saving=Saving(tmp_path, every=3, resume=True), **how)
    assert sha256_of(again.model) == sha256_of(whole.model)
    assert again.rows.equals(whole.rows) and again.flops == whole.flops
    assert again.epochs[["val", "test"]].equals(whole.epochs[["val", "test"]])
    other = replace(recipe, base_lr=1.0)
    with pytest.raises(mr.InputError, match=r"other settings \(base_lr\)"):
        tuned(vit, thirds, other, saving=Saving(tmp_path, every=3, resume=True), **how)


def test_frozen_blocks_and_all_before_them_stay(vit, thirds):
    model = tuned(vit, thirds, replace(PLAIN, frozen_share=0.5)).model  # 1 of 3 blocks
    before, after = vit.state_dict(), model.encoder.state_dict()
    same = {name for name in before if torch.equal(before[name], after[name])}
    first = {name for name in before if not name.startswith(("blocks.1", "blocks.2", "norm"))}
    assert same == first and "pos_embed" in first


def test_passing_fewer_images_at_a_time_changes_nothing(vit, thirds):
    """Images mix, and paths drop, within the whole batch all the same."""
    recipe = replace(SMALL, epochs=1)
    whole, parts = (
        tuned(vit, thirds, recipe, memory=memory).model.state_dict()
        for memory in (Memory(), Memory(micro_batch=5, recompute=True))
    )
    for name, x in whole.items():
        assert torch.allclose(x, parts[name], atol=1e-5), name
    micro = tuned(vit, thirds, replace(recipe, micro_batch=8)).model.state_dict()
    assert not all(torch.allclose(x, micro[name], atol=1e-4) for name, x in whole.items())


def test_bad_input_is_one_clear_line(vit, thirds):
    train, _, test = thirds
    cases = [
        ({"test": test.subset([])}, "needs test images, and there are none"),
        ({"test": colours(None)}, "a label for every image, and not every test image has"),
        (
            {"train": colours([*range(63), -1])},
            "a label for every image, and not every train image has one",
        ),
        ({"test": colours([3] * 64)}, "test images have label 3, and there are 3 classes, 0 to 2"),
        ({"classes": 2}, "the train images have label 2, and there are 2 classes, 0 to 1"),
        ({"train": colours([0] * 64)}, "at least two classes, the data set has 1"),
        ({"recipe": replace(SMALL, batch_size=64)}, "a batch of 64 needs at least that many"),
        ({"recipe": P1_2B14_VPT}, "recipe 1p_2b14_vpt trains visual prompts, whose model class"),
        ({"recipe": replace(SMALL, batch_size=5)}, "mixing takes images in pairs, got 5"),
    ]
    for change, message in cases:
        given = {"train": train, "test": test, "recipe": SMALL, **change}
        with pytest.raises(mr.InputError, match=message):
            finetune_recipe(vit, **given)
    without = mr.load_encoder("vit_tiny_patch16_224", image_size=32, pretrained=False)
    without.cls_token = None
    with pytest.raises(mr.InputError, match="needs a cls token, which this model does not have"):
        finetune_recipe(without, train, test, SMALL)


def test_a_folder_holds_rows_and_the_classifier(vit, thirds, tmp_path):
    train = partial(finetune_recipe, vit, thirds[0], thirds[2], PLAIN, val=thirds[1])
    finetune_into(tmp_path / "run", train)
    names = {"encoder.safetensors", "classifier.safetensors", "rows.csv", "epochs.csv"}
    names |= {"history.csv", "settings.json"}
    assert {file.name for file in (tmp_path / "run").iterdir()} == names
    rows = pd.read_csv(tmp_path / "run" / "rows.csv")
    model = load_classifier(tmp_path / "run")
    assert accuracy(model, thirds[2]) == rows["value"].iloc[0]
    with pytest.raises(mr.InputError, match="holds a finished run: use an empty folder"):
        finetune_into(tmp_path / "run", train)
    monkey = partial(finetune_recipe, *train.args)  # other settings: no validation images
    with pytest.raises(mr.InputError, match=r"with other settings \(tested on\)"):
        finetune_into(tmp_path / "run", monkey, resume=True)
    finetune_into(tmp_path / "run", train, resume=True)


def test_test_images_are_prepared_as_asked(vit, thirds):
    """Squeezed into a square, or resized and cropped; answers are counted over all of them."""
    model = ImageClassifier(vit, Head(3)).eval()
    torch.nn.init.normal_(model.linear.weight)
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 80, 3), np.uint8))
    data = ImageDataset("wide", "test", lambda row: wide, [0, 1, 2])
    squeezed = wide.resize((32, 32), Image.Resampling.BICUBIC)
    cropped = wide.resize((64, 32), Image.Resampling.BICUBIC).crop((16, 0, 48, 32))
    for image, how in ((squeezed, testing.Testing(True)), (cropped, testing.Testing(batch_size=2))):
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1
        logits = torch.cat([part for part, _ in logit_batches(model, data, how)])
        assert torch.allclose(logits, model(x[None]).expand(3, -1), atol=1e-3)
        assert accuracy(model, data, how) == pytest.approx(1 / 3)


def test_all_parameters_are_in_groups(vit):
    model = ImageClassifier(vit, Head(3))
    grouped = [x for group in recipe_groups(model, SMALL) for x in group["params"]]
    assert {id(x) for x in grouped} == {id(x) for x in model.parameters()}
    assert len(grouped) == len(list(model.parameters()))
