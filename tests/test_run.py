import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import mimrefiner as mr
from mimrefiner.__main__ import main
from mimrefiner.errors import Stopped
from mimrefiner.models.weights import sha256_of
from mimrefiner.training import checkpoints, refine
from mimrefiner.training.checkpoints import Checkpoints, Saving
from mimrefiner.training.optim import Stage
from mimrefiner.training.run import TrainingRun

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
import kill_and_resume

STATE = {"stage": 2, "x": torch.arange(1000)}


@pytest.fixture
def smoke():
    return mr.load_preset("smoke")


@pytest.fixture
def some(digits):
    return digits["train"].take(128)


def save_steps(folder, *steps):
    store = Checkpoints(folder)
    for step in steps:
        store.save({**STATE, "step": step})
    return store


def stop_at(monkeypatch, stage, step):
    """Have SIGTERM arrive in this process during a step."""
    watch = TrainingRun.watch

    def spy(self, now, losses):
        if (self.stage.number, now) == (stage, step):
            term()
        watch(self, now, losses)

    monkeypatch.setattr(TrainingRun, "watch", spy)


def term() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_and_resumed_runs_equal_those_left_alone():
    """Two kills; tests/benchmarks/kill_and_resume.py does twenty and more."""
    assert sum(kill_and_resume.main(2, seed=1).values()) >= 2


def die_on_the_third(call, before=lambda *_: None):
    """``call``, but behind the third one, and behind ``before`` of its arguments, comes SIGKILL."""
    calls = []

    def deadly(*args):
        result = call(*args)
        calls.append(1)
        if len(calls) == 3:
            before(*args)
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return deadly


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    "moment", ["half written", "written and not yet named", "named and the oldest not yet removed"]
)
def test_a_kill_inside_of_the_writing_of_a_checkpoint(moment, tmp_path):
    train_model = kill_and_resume.jobs()["refine"]

    def killed(saving):  # in a process of its own
        if moment == "half written":
            torch.save = die_on_the_third(
                torch.save, lambda _, file: os.truncate(file, file.stat().st_size // 2)
            )
        elif moment == "written and not yet named":
            checkpoints.digest_of = die_on_the_third(checkpoints.digest_of)
        else:
            Checkpoints.files = die_on_the_third(Checkpoints.files)
        return train_model(saving)

    assert kill_and_resume.in_child(killed, tmp_path, None) is None
    left = sorted(file.name for file in (tmp_path / "checkpoints").iterdir())
    assert any("writing" in name for name in left) == (
        moment != "named and the oldest not yet removed"
    ), left
    torch.set_num_threads(1)
    assert kill_and_resume.in_child(train_model, tmp_path, None) == train_model(None)


@pytest.mark.parametrize(("stage", "step"), [(2, 0), (2, 1), (3, 0), (3, 2)])
def test_sigterm_saves_and_the_resumed_run_is_the_same(
    smoke, some, tmp_path, monkeypatch, stage, step
):
    encoder, config = (
        mr.build_vit(smoke.encoder),
        replace(smoke.refine, heads_epochs=1, refine_epochs=2),
    )
    alone = mr.refine(encoder, some, config)
    stop_at(monkeypatch, stage, step)
    with pytest.raises(Stopped, match=f"stopped at stage {stage}, step {step + 1}; resume from"):
        mr.refine(encoder, some, config, saving=Saving(tmp_path))
    monkeypatch.undo()
    resumed = mr.refine(encoder, some, config, saving=Saving(tmp_path, resume=True))
    assert sha256_of(resumed.encoder) == sha256_of(alone.encoder)
    assert sha256_of(resumed.ema_encoder) == sha256_of(alone.ema_encoder)
    pd.testing.assert_frame_equal(resumed.history, alone.history)
    assert resumed.flops == alone.flops


@pytest.mark.parametrize(
    "when", ["while stage 2 is saved", "between the stages", "behind the last step"]
)
def test_sigterm_outside_of_a_step_is_not_lost(smoke, some, tmp_path, monkeypatch, when):
    save, freeze, at_once = Checkpoints.save, refine.freeze_first, []

    def saving(self, state):
        save(self, state)
        if when == "while stage 2 is saved" and state["stage"] == 2:
            term()

    def between(*args):
        freeze(*args)
        if when == "between the stages":
            term()

    def behind(self, *args):
        end(self, *args)
        last = (self.stage.number, self._next) == (3, self.stage.steps)
        if when == "behind the last step" and last:
            term()

    end = TrainingRun.end_step
    monkeypatch.setattr(Checkpoints, "save", saving)
    monkeypatch.setattr(refine, "freeze_first", between)
    monkeypatch.setattr(TrainingRun, "end_step", behind)
    before = signal.signal(signal.SIGTERM, lambda *_: at_once.append(1))
    try:
        encoder, how = mr.build_vit(smoke.encoder), {"saving": Saving(tmp_path)}
        if when == "behind the last step":
            mr.refine(encoder, some, smoke.refine, **how)
            assert at_once == [1]  # it then means what it did before
        else:
            stage, step = (2, 2) if when == "while stage 2 is saved" else (3, 1)
            with pytest.raises(
                Stopped, match=f"stopped at stage {stage}, step {step}; resume from"
            ):
                mr.refine(encoder, some, smoke.refine, **how)
            assert at_once == []
    finally:
        signal.signal(signal.SIGTERM, before)


def test_resume_restores_dropout_too(smoke, some, tmp_path, monkeypatch):
    """What the model draws from the global generator goes on where it was."""
    encoder = mr.build_vit(smoke.encoder)
    for block in encoder.blocks:
        block.mlp.drop1.p = 0.5
    torch.manual_seed(3)
    alone = mr.pretrain(encoder, some, smoke.pretrain)
    torch.manual_seed(3)
    stop_at(monkeypatch, 1, 3)
    with pytest.raises(Stopped):
        mr.pretrain(encoder, some, smoke.pretrain, saving=Saving(tmp_path))
    monkeypatch.undo()
    torch.manual_seed(99)
    resumed = mr.pretrain(encoder, some, smoke.pretrain, saving=Saving(tmp_path, resume=True))
    assert sha256_of(resumed.model) == sha256_of(alone.model)


def test_finished_run_resumes_to_its_result(smoke, some, tmp_path):
    encoder = mr.build_vit(smoke.encoder)
    one = mr.pretrain(encoder, some, smoke.pretrain, saving=Saving(tmp_path))
    again = mr.pretrain(encoder, some, smoke.pretrain, saving=Saving(tmp_path, resume=True))
    assert sha256_of(one.model) == sha256_of(again.model)
    pd.testing.assert_frame_equal(one.history, again.history)


def test_the_last_two_are_kept(tmp_path):
    store = save_steps(tmp_path, 9, 10, 100)
    assert [file.name.split("-")[1] for file in store.files()] == ["step00000010", "step00000100"]
    assert store.newest()["step"] == 100
    assert {file.suffix for file in tmp_path.iterdir()} == {".pt"}


@pytest.mark.parametrize("what", ["rename", "digest_of"])
def test_a_full_disk_after_writing_ends_nothing(tmp_path, caplog, monkeypatch, what):
    def full(*_):
        raise OSError(28, "No space left on device")

    store = save_steps(tmp_path, 1)
    monkeypatch.setattr(Path if what == "rename" else checkpoints, what, full)
    store.save({**STATE, "step": 2})
    assert "step 2 not written" in caplog.text
    monkeypatch.undo()
    assert store.newest()["step"] == 1


def test_a_start_by_mistake_leaves_the_file_that_is_being_written(smoke, some, tmp_path):
    save_steps(tmp_path, 1)
    (tmp_path / ".writing-abc.pt").write_bytes(b"half")
    with pytest.raises(mr.InputError, match="holds checkpoints already"):
        mr.pretrain(mr.build_vit(smoke.encoder), some, smoke.pretrain, saving=Saving(tmp_path))
    assert (tmp_path / ".writing-abc.pt").exists()


def test_numpy_numbers_in_a_config_are_saved_as_pythons(smoke, some, tmp_path):
    encoder, config = (
        mr.build_vit(smoke.encoder),
        replace(smoke.pretrain, epochs=1, base_lr=np.float64(1e-3)),
    )
    one = mr.pretrain(encoder, some, config, saving=Saving(tmp_path))
    again = mr.pretrain(
        encoder, some, replace(config, base_lr=1e-3), saving=Saving(tmp_path, resume=True)
    )
    assert sha256_of(one.model) == sha256_of(again.model)


def test_the_history_is_beside_the_checkpoints(smoke, some, tmp_path):
    result = mr.pretrain(mr.build_vit(smoke.encoder), some, smoke.pretrain, saving=Saving(tmp_path))
    pd.testing.assert_frame_equal(
        pd.read_csv(tmp_path / "history.csv"), result.history, check_exact=False
    )


@pytest.mark.parametrize("damage", ["truncated", "bit flipped"])
def test_a_damaged_checkpoint_is_refused_and_said(tmp_path, caplog, damage):
    store = save_steps(tmp_path, 1, 2)
    content = bytearray(store.files()[-1].read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 2] ^= 1
    store.files()[-1].write_bytes(content)
    assert store.newest()["step"] == 1
    assert "stage2-step00000002" in caplog.text and "is damaged" in caplog.text


def test_damaged_checkpoints_do_not_crowd_out_new_ones(tmp_path, caplog):
    """Those of later steps, found damaged, no longer count among the last ones."""
    store = save_steps(tmp_path, 1, 5, 6)
    for file in store.files():
        file.write_bytes(b"half")
    assert store.newest() is None
    assert len(list(tmp_path.glob("*.damaged"))) == caplog.text.count(".damaged") == 2
    save_steps(tmp_path, 2, 3)
    assert store.newest()["step"] == 3


def test_a_full_disk_loses_no_earlier_checkpoint(tmp_path, caplog, monkeypatch):
    store = save_steps(tmp_path, 1, 2)
    before = {file.name: file.read_bytes() for file in store.files()}

    def full(state, path):
        Path(path).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    store.save({**STATE, "step": 3})
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert "step 3 not written" in caplog.text and "No space left" in caplog.text


def test_what_a_kill_left_half_written_is_removed(tmp_path):
    save_steps(tmp_path, 1)
    (tmp_path / ".writing-abc.pt").write_bytes(b"half")
    Checkpoints(tmp_path).clear()
    assert [file.name[:6] for file in tmp_path.iterdir()] == ["stage2"]


def test_other_settings_are_refused_by_name(smoke, some, tmp_path):
    encoder = mr.build_vit(smoke.encoder)
    mr.pretrain(encoder, some, smoke.pretrain, saving=Saving(tmp_path))
    with pytest.raises(mr.InputError, match=r"other settings \(mask_ratio\)"):
        mr.pretrain(
            encoder,
            some,
            replace(smoke.pretrain, mask_ratio=0.5),
            saving=Saving(tmp_path, resume=True),
        )
    with pytest.raises(mr.InputError, match="holds checkpoints already"):
        mr.pretrain(encoder, some, smoke.pretrain, saving=Saving(tmp_path))
    others = some.subset(range(len(some))[::-1])  # as many images of the same name
    with pytest.raises(mr.InputError, match=r"other settings \(data\)"):
        mr.pretrain(encoder, others, smoke.pretrain, saving=Saving(tmp_path, resume=True))


def test_nan_names_head_and_step_and_keeps_the_last_good_checkpoint(
    smoke, some, tmp_path, monkeypatch
):
    step = refine.MIMRefiner.step
    calls = []

    def poisoned(self, *args, **options):
        result = step(self, *args, **options)
        calls.append(1)
        if len(calls) == 2:
            result.loss = result.loss * torch.tensor([1.0, float("nan")])
        return result

    monkeypatch.setattr(refine.MIMRefiner, "step", poisoned)
    with pytest.raises(
        FloatingPointError,
        match=r"at step 1 in the head on block 3 \(0-based\).*last good checkpoint is in",
    ):
        mr.refine(mr.build_vit(smoke.encoder), some, smoke.refine, saving=Saving(tmp_path, every=1))
    state = Checkpoints(tmp_path).newest()
    assert state["step"] == 1
    assert all(
        x.isfinite().all() for x in state["parts"]["refiner"].values() if x.is_floating_point()
    )


def test_nan_names_the_earliest_step_and_advice_that_can_be_followed(smoke):
    run, model = TrainingRun(), torch.nn.Linear(1, 1)
    stage = Stage(2, 9, images=8, batch_size=4, warmup=0, base_lr=1.0, min_lr=0.0, blocks=(5, 7))
    run.begin(stage, model=model, optimizer=None)
    for step, losses in enumerate([[1, 1], [1, float("nan")], [float("inf"), 1]]):
        run.watch(step, torch.tensor(losses))
    with pytest.raises(
        FloatingPointError,
        match=r"at step 1 in the head on block 7 .*: start again .* raise the temperature",
    ) as caught:
        run.check_finite()
    assert "checkpoint" not in str(caught.value)
    run.begin(replace(stage, number=1, blocks=()), model=model, optimizer=None)
    run.watch(0, torch.tensor([float("nan")]))
    with pytest.raises(FloatingPointError, match="at step 0: ") as caught:
        run.check_finite()
    assert "temperature" not in str(caught.value)


def test_damaged_weights_are_not_saved(smoke, some, tmp_path, monkeypatch):
    """The loss before the update is finite, the gradient is not."""
    zero_grad, calls = torch.optim.AdamW.zero_grad, []

    def poisoned(self, *args):
        zero_grad(self, *args)
        calls.append(1)
        if len(calls) == 2:
            self.param_groups[0]["params"][0].register_hook(lambda grad: grad * float("nan"))

    monkeypatch.setattr(torch.optim.AdamW, "zero_grad", poisoned)
    with pytest.raises(
        FloatingPointError,
        match=r"weights became nan or infinite by step 1 \(heads.*good checkpoint is in",
    ):
        mr.refine(mr.build_vit(smoke.encoder), some, smoke.refine, saving=Saving(tmp_path, every=1))
    state = Checkpoints(tmp_path).newest()
    assert state["step"] == 1
    assert all(
        x.isfinite().all() for x in state["parts"]["refiner"].values() if x.is_floating_point()
    )


def test_sigterm_means_what_it_did_after_training(smoke, some):
    before = signal.getsignal(signal.SIGTERM)
    mr.pretrain(mr.build_vit(smoke.encoder), some, replace(smoke.pretrain, epochs=1))
    assert signal.getsignal(signal.SIGTERM) is before


def test_command_line_stops_on_sigterm_and_resumes(tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.setenv("MIMREFINER_CACHE", str(tmp_path / "cache"))
    arguments = [
        "refine",
        "--model",
        "simmim_digits",
        "--preset",
        "smoke",
        "--freeze-first",
        "2",
        "--micro-batch",
        "16",
        "--recompute",
    ]
    arguments += ["--heads", "2", "--watch", "--out", str(tmp_path / "out")]
    stop_at(monkeypatch, 3, 1)
    assert main(arguments) == 143
    assert "stopped at stage 3, step 2; resume from" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setenv("MIMREFINER_CACHE", str(tmp_path / "cache"))
    assert main(arguments) == 2
    assert "holds checkpoints already" in capsys.readouterr().err
    assert main([*arguments, "--resume"]) == 0
    expected = [
        "ema_encoder.safetensors",
        "encoder.safetensors",
        "epochs.csv",
        "history.csv",
        "settings.json",
    ]
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == expected
    (tmp_path / "out" / "checkpoints").mkdir()  # as a kill before their removal leaves them
    assert main([*arguments, "--resume"]) == 0
    assert "is finished" in caplog.text
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == expected
    assert main([*arguments, "--resume", "--seed", "1"]) == 2
    assert "holds a finished run with other settings (seed" in capsys.readouterr().err
    history = tmp_path / "out" / "history.csv"
    history.write_bytes(history.read_bytes()[:-1])
    assert main([*arguments, "--resume"]) == 2
    assert "but history.csv is missing or changed" in capsys.readouterr().err


@pytest.mark.parametrize(("minutes", "saved"), [(1e-9, [1, 2, 3, 4]), (1000, [4])])
def test_checkpoints_by_minutes(smoke, some, tmp_path, monkeypatch, minutes, saved):
    steps, save = [], Checkpoints.save
    monkeypatch.setattr(
        Checkpoints, "save", lambda self, state: steps.append(state["step"]) or save(self, state)
    )
    config = replace(smoke.pretrain, epochs=4 * smoke.pretrain.batch_size / len(some))
    saving = Saving(tmp_path, every=None, minutes=minutes)
    mr.pretrain(mr.build_vit(smoke.encoder), some, config, saving=saving)
    assert steps == saved


def test_minutes_between_checkpoints_are_positive(tmp_path):
    with pytest.raises(mr.InputError, match="minutes between checkpoints must be > 0, got 0"):
        Saving(tmp_path, every=None, minutes=0)
