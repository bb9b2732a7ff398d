import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import mimrefiner as mr
from mimrefiner.__main__ import main


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MIMREFINER_CACHE", str(tmp_path / "cache"))


def test_help_has_an_example_of_every_command(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    listed = capsys.readouterr().out
    for command in ("run", "pretrain", "refine", "datasets"):
        assert command in listed
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert f"example: mimrefiner {command}" in " ".join(capsys.readouterr().out.split())


def test_pretrain_then_refine(tmp_path, capsys):
    assert main(["pretrain", "--preset", "smoke", "--out", str(tmp_path / "mim")]) == 0
    model = tmp_path / "mim" / "encoder.safetensors"
    assert main(["refine", "--preset", "smoke", "--model", str(model), "--heads", "1", "--out", str(tmp_path / "ref")]) == 0
    assert sorted(f.name for f in (tmp_path / "ref").iterdir()) == [
        "ema_encoder.safetensors", "encoder.safetensors", "history.csv",
    ]  # fmt: skip
    assert set(pd.read_csv(tmp_path / "ref" / "history.csv")["block"]) == {3}
    assert len(mr.load_encoder(tmp_path / "ref" / "ema_encoder.safetensors").blocks) == 4


def test_gradients_are_clipped_where_asked(tmp_path, monkeypatch):
    """``--clip-norm`` reaches every step of all three stages; without it nothing is clipped."""
    limits = []
    monkeypatch.setattr("mimrefiner.distributed.clip_gradients", lambda parameters, limit: limits.append(limit))
    model = str(tmp_path / "clipped" / "encoder.safetensors")
    for name, clip in (("clipped", ["--clip-norm", "0.5"]), ("plain", [])):
        assert main(["pretrain", "--preset", "smoke", *clip, "--out", str(tmp_path / name)]) == 0
        arguments = ["refine", "--preset", "smoke", "--model", model, "--heads", "1", *clip]
        assert main([*arguments, "--out", str(tmp_path / name / "refined")]) == 0
        steps = 24  # 256 images, batch 64: 4 epochs of stage 1, one each of stages 2 and 3
        assert limits == [0.5] * steps * bool(clip)
        limits.clear()


def test_datasets_lists_names(capsys):
    assert main(["datasets"]) == 0
    assert "fashion_mnist" in capsys.readouterr().out


BAD = [
    (["pretrain", "--data", "mnits"], "unknown data set 'mnits'"),
    (["pretrain", "--preset", "tinny"], "unknown preset 'tinny'"),
    (["pretrain", "--seed", "-1"], "seed must be >= 0"),
    (["pretrain", "--data", "imagefolder:nowhere"], "nowhere does not exist"),
    (["refine", "--model", "vit_gigantic"], "unknown model 'vit_gigantic'"),
    (["refine", "--model", "nowhere.safetensors"], "does not exist"),
    (["refine", "--model", "simmim_digits", "--blocks", "11,12"], "block 12 is out of range"),
    (["refine", "--model", "simmim_digits", "--blocks", "last"], "--blocks must be whole numbers"),
    (["refine", "--model", "simmim_digits", "--heads", "13"], "--heads must be between 1 and the number of blocks 12"),
    (["refine", "--model", "simmim_digits", "--top-k", "5000"], "top_k must be between 1 and the queue size"),
    (["refine", "--model", "simmim_digits", "--temperature", "0"], "temperature must be > 0"),
    (["refine", "--model", "simmim_digits", "--clip-norm", "0"], "clip_norm must be > 0 or None, got 0"),
    (["pretrain", "--preset", "smoke", "--workers", "-1"], "loader processes (workers) must be >= 0, got -1"),
    (["run", "00", "--gpus", ""], "--gpus must be whole numbers with commas between, got ''"),
    (["pretrain", "--clip-norm", "-1"], "clip_norm must be > 0 or None, got -1"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_is_one_line_and_nothing_is_written(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    assert main([*arguments, "--out", str(out)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("mimrefiner: error: ")
    assert message in error
    assert not out.exists() or list(out.iterdir()) == []


def test_a_corrupt_image_is_named(tmp_path, capsys):
    for i in range(80):
        for part in ("ant", "bee"):
            (tmp_path / "photos" / "train" / part).mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((32, 32, 3), i, dtype=np.uint8)).save(tmp_path / "photos" / "train" / part / f"{i:02d}.png")
    for i in range(80):
        (tmp_path / "photos" / "train" / "ant" / f"{i:02d}.png").write_bytes(b"x")
    data = f"imagefolder:{tmp_path}/photos"
    assert main(["pretrain", "--preset", "smoke", "--data", data, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "cannot be decoded as an image" in error
    assert "Traceback" not in error


def test_status_and_message_reach_the_shell(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mimrefiner", "run", "01", "--preset", "huge", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("mimrefiner: error: unknown preset 'huge': choose one of smoke, tiny, fashion, natural, ")
