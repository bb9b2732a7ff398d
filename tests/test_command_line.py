import json
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import mimrefiner as mr
from mimrefiner import notices
from mimrefiner.__main__ import main
from mimrefiner.errors import Stopped


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


@pytest.mark.parametrize("arguments", [["--help"], ["models"], ["datasets"], ["modles"]])
def test_help_and_lists_import_nothing_heavy(arguments):
    code = f"""
import sys
from mimrefiner.__main__ import main
try:
    main({arguments})
except SystemExit:
    pass
heavy = {{name.split(".")[0] for name in sys.modules}} & {{"torch", "timm", "pandas", "seaborn"}}
sys.exit(f"imported {{heavy}}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("error", "can_be_mended"),
    [
        (PermissionError(13, "Permission denied", "{given}/encoder.safetensors"), True),
        (FileNotFoundError(2, "No such file or directory", "{cache}/weights/mae.pth"), True),
        (OSError(28, "No space left on device"), True),
        (OSError("no network"), True),
        (FileNotFoundError(2, "No such file or directory", "{package}/table.csv"), False),
    ],
)
def test_only_errors_about_files_of_a_person_are_one_line(
    error, can_be_mended, tmp_path, monkeypatch, capsys
):
    folders = {"given": tmp_path / "out", "cache": tmp_path / "cache", "package": mr.__path__[0]}
    if error.filename:
        error.filename = error.filename.format(**folders)

    def fail(args):
        raise error

    monkeypatch.setattr("mimrefiner.commands.models.do_export", fail)
    arguments = ["export", "simmim_digits", "--to", str(tmp_path / "out")]
    if can_be_mended:
        assert main(arguments) == 2
        assert capsys.readouterr().err == f"mimrefiner: error: {error}\n"
    else:
        with pytest.raises(FileNotFoundError):
            main(arguments)


def test_lists_may_have_spaces(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["probe", "simmim_digits", "digits", "--no-baselines", "--out", str(tmp_path)]
    lists = {"--blocks": "0, 11", "--pools": "cls, mean", "--probes": "knn, low_shot"}
    for option, text in lists.items():
        arguments += [option, text]
    assert main([*arguments, "--shots", "1, 2"]) == 0
    found = pd.read_csv(tmp_path / "report.csv")
    assert set(found["block"]) == {0, 11} and set(found["pool"]) == {"cls", "mean"}
    assert {"logistic_1shot", "logistic_2shot"} <= set(found["protocol"])


def test_notices_go_to_the_standard_error_of_the_moment_once(capsys):
    notices.show_notices()
    notices.show_notices()
    logging.getLogger("mimrefiner.study.store").info("trained %s", "anew")
    assert capsys.readouterr().err == "trained anew\n"


def test_pretrain_then_refine(tmp_path, capsys):
    assert main(["pretrain", "--preset", "smoke", "--out", str(tmp_path / "mim")]) == 0
    model = tmp_path / "mim" / "encoder.safetensors"
    assert (
        main(
            [
                "refine",
                "--preset",
                "smoke",
                "--model",
                str(model),
                "--heads",
                "1",
                "--out",
                str(tmp_path / "ref"),
            ]
        )
        == 0
    )
    assert sorted(f.name for f in (tmp_path / "ref").iterdir()) == [
        "ema_encoder.safetensors",
        "encoder.safetensors",
        "history.csv",
        "settings.json",
    ]
    assert set(pd.read_csv(tmp_path / "ref" / "history.csv")["block"]) == {3}
    assert len(mr.load_encoder(tmp_path / "ref" / "ema_encoder.safetensors").blocks) == 4


def test_refine_trains_the_presets_own_model_first(tmp_path):
    """Without ``--model``; fewer local crops too."""
    arguments = [
        "refine",
        "--preset",
        "smoke",
        "--heads",
        "1",
        "--local-crops",
        "1",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(arguments) == 0
    assert len(list((tmp_path / "cache").glob("pretrain-*"))) == 1
    told = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert told["settings"]["views"]["n_local"] == 1


def fabric_run(*options):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    folder = Path(sys.executable).parent
    return [
        folder / "fabric",
        "run",
        "--accelerator",
        "cpu",
        "--devices",
        "2",
        f"--main-port={port}",
        *options,
        folder / "mimrefiner",
    ]


@pytest.mark.parametrize("launcher", ["torchrun", "fabric"])
def test_two_processes_under(launcher, tmp_path):
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "mimrefiner",
    ]
    run = torchrun if launcher == "torchrun" else fabric_run()
    run += [
        "refine",
        "--model",
        "simmim_digits",
        "--preset",
        "smoke",
        "--heads",
        "1",
        "--local-crops",
        "1",
    ]
    run += ["--shard"]  # which one process alone refuses
    done = subprocess.run([*run, "--out", str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("history.csv are in") == 1  # the first process alone says so
    assert "Warning" not in done.stderr and "All distributed processes" not in done.stderr
    files = ["ema_encoder.safetensors", "encoder.safetensors", "history.csv", "settings.json"]
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == files


@pytest.mark.parametrize(("option", "value"), [("strategy", "fsdp"), ("precision", "bf16-true")])
def test_what_training_chooses_itself_is_no_option_of_fabric(tmp_path, option, value):
    run = [
        *fabric_run(f"--{option}", value),
        "pretrain",
        "--preset",
        "smoke",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("mimrefiner: error: ")]
    assert len(said) == 2 and all(
        f"conflicts with the value `--{option}={value}`" in line for line in said
    )


def test_a_paper_preset_takes_all_of_imagenet_from_where_it_lies(
    image_folder, tmp_path, monkeypatch
):
    seen = []

    def stub(encoder, dataset, config, *, monitor, **_):
        seen.append((dataset, monitor.held_out))
        raise Stopped("seen")

    monkeypatch.setattr(mr, "refine", stub)
    monkeypatch.setenv("MIMREFINER_IMAGENET", str(image_folder))
    arguments = [
        "refine",
        "--preset",
        "paper-mae-l16",
        "--model",
        "simmim_digits",
        "--watch",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(arguments) == 143
    ((trained, held_out),) = seen
    # 10 images of 2 classes below train/, a tenth of which is the validation split
    assert (len(trained), len(held_out)) == (20, 2)


def test_gradients_are_clipped_where_asked(tmp_path, monkeypatch):
    """``--clip-norm`` reaches every step of all three stages; without it nothing is clipped."""
    limits = []
    monkeypatch.setattr(
        "mimrefiner.training.engine.clip_gradients", lambda parameters, limit: limits.append(limit)
    )
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
    (["refine", "--model", "simmim_digits", "--blocks", ""], "--blocks must be whole numbers"),
    (
        ["refine", "--model", "simmim_digits", "--heads", "13"],
        "--heads must be between 1 and the number of blocks 12",
    ),
    (["refine", "--model", "simmim_digits", "--local-crops", "-1"], "--local-crops must be >= 0"),
    (["refine", "--model", "simmim_digits", "--tensorboard"], "give --watch too"),
    (
        ["refine", "--model", "simmim_digits", "--top-k", "5000"],
        "top_k must be between 1 and the queue size",
    ),
    (["refine", "--model", "simmim_digits", "--temperature", "0"], "temperature must be > 0"),
    (
        ["refine", "--model", "simmim_digits", "--clip-norm", "0"],
        "clip_norm must be > 0 or None, got 0",
    ),
    (
        ["pretrain", "--preset", "smoke", "--workers", "-1"],
        "loader processes (workers) must be >= 0, got -1",
    ),
    (["run", "00", "--gpus", ""], "--gpus must be whole numbers with commas between, got ''"),
    (["pretrain", "--clip-norm", "-1"], "clip_norm must be > 0 or None, got -1"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_is_one_line_and_nothing_is_written(
    arguments, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    assert main([*arguments, "--out", str(out)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("mimrefiner: error: ")
    assert message in error
    assert not out.exists() or list(out.iterdir()) == []


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_corrupt_image_is_named(workers, tmp_path, capsys):
    for i in range(120):
        for part in ("ant", "bee"):
            (tmp_path / "photos" / "train" / part).mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((32, 32, 3), i, dtype=np.uint8)).save(
                tmp_path / "photos" / "train" / part / f"{i:03d}.png"
            )
    data = f"imagefolder:{tmp_path}/photos"
    train = mr.load_dataset(data, split="train")
    # data_hash looks at the others before training
    unseen = next(i for i in range(len(train)) if i % (len(train) // 64))
    file = train._load.args[0][train.rows[unseen]]
    file.write_bytes(b"x")
    arguments = [
        "pretrain",
        "--preset",
        "smoke",
        "--data",
        data,
        "--workers",
        workers,
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(arguments) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert error.startswith(f"mimrefiner: error: {file} cannot be decoded as an image")


def test_status_and_message_reach_the_shell(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mimrefiner",
            "run",
            "01",
            "--preset",
            "huge",
            "--out",
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(
        "mimrefiner: error: unknown preset 'huge': choose one of smoke, tiny, fashion, natural, "
    )


@pytest.mark.parametrize("buffered", [True, False])
def test_a_reader_that_leaves_ends_a_command_silently(buffered):
    """``mimrefiner datasets | head -1``: the reader is gone before the first line is written."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, *(() if buffered else ("-u",)), "-m", "mimrefiner", "datasets"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_finished_run_is_not_trained_over(tmp_path, capsys):
    arguments = ["pretrain", "--preset", "smoke", "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    weights = (tmp_path / "out" / "encoder.safetensors").read_bytes()
    assert main([*arguments, "--seed", "1"]) == 2
    assert "holds a finished run: use an empty folder, or --resume" in capsys.readouterr().err
    assert (tmp_path / "out" / "encoder.safetensors").read_bytes() == weights
