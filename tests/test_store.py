import os
import subprocess
import sys

import pandas as pd
import pytest

import mimrefiner as mr
from mimrefiner import files
from mimrefiner.models.weights import sha256_of
from mimrefiner.study import store
from mimrefiner.training import run


@pytest.fixture
def preset(tmp_path, monkeypatch):
    monkeypatch.setenv("MIMREFINER_CACHE", str(tmp_path / "cache"))
    return mr.load_preset("smoke")


def test_what_was_trained_is_loaded_and_equal(preset, monkeypatch):
    pretrained, refined, longer = (
        store.pretrained(preset),
        store.refined(preset),
        store.pretrained_longer(preset),
    )

    def refuse(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr(store, "pretrain", refuse)
    monkeypatch.setattr(store, "refine", refuse)
    assert sha256_of(store.pretrained(preset).model) == sha256_of(pretrained.model)
    again = store.refined(preset)
    assert sha256_of(again.ema_encoder) == sha256_of(refined.ema_encoder)
    pd.testing.assert_frame_equal(again.history, refined.history, check_dtype=False)
    assert again.flops == refined.flops
    assert (
        sha256_of(store.pretrained_longer(preset).encoder)
        == sha256_of(longer.encoder)
        != sha256_of(pretrained.encoder)
    )
    with pytest.raises(AssertionError, match="trained again"):
        store.pretrained(preset.with_seed(1))


def test_a_cache_that_cannot_be_used_is_named_by_its_variable(preset, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MIMREFINER_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(mr.InputError, match=r"cannot write to .*another folder with MIMREFINER_CA"):
        store.pretrained(preset)


def test_loader_processes_change_no_weight(preset, monkeypatch):
    alone = sha256_of(store.finetuned(preset, 2e-3).encoder)
    monkeypatch.setenv("MIMREFINER_CACHE", os.environ["MIMREFINER_CACHE"] + "-more")
    monkeypatch.setattr(store, "loader_workers", lambda: 1)
    # Behind pre-training and refinement
    assert sha256_of(store.finetuned(preset, 2e-3).encoder) == alone


def test_the_control_spends_the_computation_of_refinement(preset):
    longer = store.pretrained_longer(preset)  # counts what refinement would take
    refined = store.refined(preset)
    assert longer.flops == pytest.approx(refined.flops, rel=0.05)
    # The count was exact: with refinement's own number it is the same entry
    assert store.is_stored("pretrained_longer", preset)


def test_a_damaged_entry_is_announced_and_trained_again(preset, caplog):
    before = sha256_of(store.pretrained(preset).encoder)
    (file,) = files.cache_folder().glob("pretrain-*/model.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    assert sha256_of(store.pretrained(preset).encoder) == before
    assert "model.safetensors is missing or changed" in caplog.text


def test_a_stopped_training_leaves_nothing(preset, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "pretrain", stop)
    with pytest.raises(KeyboardInterrupt):
        store.pretrained(preset)
    assert [entry.name for entry in files.cache_folder().iterdir()] == ["locks"]


def test_asking_what_is_stored_trains_nothing(preset, monkeypatch):
    assert not store.is_stored("pretrained", preset)
    store.pretrained(preset)
    assert store.is_stored("pretrained", preset)
    assert not store.is_stored("refined", preset)
    assert not store.is_stored("pretrained_longer", preset)
    monkeypatch.setattr(store, "pretrain", lambda *args, **kwargs: pytest.fail("trained"))
    assert not store.is_stored("pretrained", preset.with_seed(1))


TRAIN_AND_SAY = """
import sys
import mimrefiner as mr
from mimrefiner.study import store
real = store.pretrain
store.pretrain = lambda *args, **kwargs: (print("trained", flush=True), real(*args, **kwargs))[1]
print("ready", flush=True)
sys.stdin.readline()
store.pretrained(mr.load_preset("smoke"))
"""


def test_of_two_processes_one_trains(preset):
    start = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([sys.executable, "-c", TRAIN_AND_SAY], **start) for _ in range(2)]
    for process in both:
        assert process.stdout.readline() == "ready\n"  # imports are done: now both start at once
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    assert sorted(process.communicate()[0] for process in both) == ["", "trained\n"]
    assert [process.returncode for process in both] == [0, 0]


def test_training_that_was_cut_off_goes_on(preset, monkeypatch):
    whole = store.pretrained(preset)
    monkeypatch.setenv("MIMREFINER_CACHE", str(files.cache_folder().parent / "other"))
    saving = store.Saving
    monkeypatch.setattr(store, "Saving", lambda *args, **how: saving(*args, **how | {"every": 2}))
    set_lr, steps = run.set_lr, []

    def cut(*args):
        steps.append(len(steps))
        if len(steps) == 6:
            raise KeyboardInterrupt
        return set_lr(*args)

    monkeypatch.setattr(run, "set_lr", cut)
    with pytest.raises(KeyboardInterrupt):
        store.pretrained(preset)
    resumed = store.pretrained(preset)
    assert len(steps) == 6 + whole.history["step"].max() + 1 - 4  # four steps were saved
    assert sha256_of(resumed.model) == sha256_of(whole.model)
    assert sorted(entry.name.partition("-")[0] for entry in files.cache_folder().iterdir()) == [
        "locks",
        "pretrain",
        "unfinished",
    ]
    assert not list((files.cache_folder() / "unfinished").iterdir())
