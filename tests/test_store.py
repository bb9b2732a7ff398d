import pandas as pd
import pytest

import mimrefiner as mr
from mimrefiner import store
from mimrefiner.checkpoint import sha256_of


@pytest.fixture
def preset(tmp_path, monkeypatch):
    monkeypatch.setenv("MIMREFINER_CACHE", str(tmp_path / "cache"))
    return mr.load_preset("smoke")


def test_what_was_trained_is_loaded_and_equal(preset, monkeypatch):
    pretrained, refined, longer = store.pretrained(preset), store.refined(preset), store.pretrained_longer(preset)

    def refuse(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr(store, "pretrain", refuse)
    monkeypatch.setattr(store, "refine", refuse)
    assert sha256_of(store.pretrained(preset).model) == sha256_of(pretrained.model)
    again = store.refined(preset)
    assert sha256_of(again.ema_encoder) == sha256_of(refined.ema_encoder)
    pd.testing.assert_frame_equal(again.history, refined.history, check_dtype=False)
    assert again.flops == refined.flops
    assert sha256_of(store.pretrained_longer(preset).encoder) == sha256_of(longer.encoder) != sha256_of(pretrained.encoder)
    with pytest.raises(AssertionError, match="trained again"):
        store.pretrained(preset.with_seed(1))


def test_the_control_spends_the_computation_of_refinement(preset):
    refined, longer = store.refined(preset), store.pretrained_longer(preset)
    assert longer.flops == pytest.approx(refined.flops, rel=0.05)


def test_a_damaged_entry_is_announced_and_trained_again(preset, capsys):
    before = sha256_of(store.pretrained(preset).encoder)
    (file,) = store.cache_folder().glob("pretrain-*/model.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    assert sha256_of(store.pretrained(preset).encoder) == before
    assert "model.safetensors is missing or changed" in capsys.readouterr().err


def test_a_stopped_training_leaves_nothing(preset, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "pretrain", stop)
    with pytest.raises(KeyboardInterrupt):
        store.pretrained(preset)
    assert list(store.cache_folder().iterdir()) == []
