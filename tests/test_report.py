import json
import signal
import subprocess
import sys
import time
from contextlib import suppress

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import mimrefiner as mr
from mimrefiner.__main__ import main
from mimrefiner.commands.options import numbers
from mimrefiner.study import explorer, report


@pytest.fixture
def data(digits):
    return digits["train"].take(120), digits["test"].take(60)


def test_one_call_writes_rows_table_and_figure(vit, data, tmp_path):
    table = mr.probe(vit, data, probes=("knn", "low_shot", "cluster", "rank"), out=tmp_path)
    assert {p.name for p in tmp_path.glob("report.*")} == {
        "report.csv",
        "report.md",
        "report.png",
        "report.pdf",
    }
    assert set(table["model"]) == {"model", "random weights", "raw pixels"}
    assert set(table.loc[table["model"] == "model", "block"]) == {0, 1, 2}
    knn = table[(table["probe"] == "knn") & (table["model"] == "model") & (table["pool"] == "cls")][
        "value"
    ].tolist()
    hits = mr.knn_hits(*(mr.extract_features(vit, part) for part in data))["cls"]
    assert knn == pytest.approx(hits.float().mean(1).tolist())
    text = (tmp_path / "report.md").read_text()
    assert "| knn_k10_t0.07_standardized | cls |" in text
    pd.testing.assert_frame_equal(
        pd.read_csv(tmp_path / "report.csv", keep_default_na=False), table, check_dtype=False
    )


def test_resume_keeps_what_is_finished(vit, data, tmp_path, monkeypatch):
    first = mr.probe(vit, data, probes=("knn",), out=tmp_path)
    ran = []
    rows = report.Task.rows
    monkeypatch.setattr(
        report.Task, "rows", lambda task, name, *a: ran.append(name) or rows(task, name, *a)
    )
    both = mr.probe(vit, data, probes=("knn", "rank"), out=tmp_path, resume=True)
    assert ran == ["rank"] * 3
    assert both[both["probe"] == "knn"]["value"].tolist() == first["value"].tolist()
    with pytest.raises(mr.InputError, match="holds a report of other weights_sha256"):
        mr.probe(
            mr.build_vit(mr.ViTConfig(dim=32, depth=3, num_heads=2), seed=5),
            data,
            out=tmp_path,
            resume=True,
        )
    mr.probe(vit, data, probes=("knn",), out=tmp_path, baselines=False)
    # Without resume old rows are gone
    assert [p.name for p in tmp_path.glob("rows_*.csv")] == ["rows_knn_model.csv"]
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    for probes in (("low_shot",), ("rank", "low_shot")):
        with pytest.raises(mr.InputError, match="fewer than 1000 shots"):
            mr.probe(vit, data, probes=probes, shots=(1000,), out=tmp_path, baselines=False)
        assert {
            file.name: file.read_bytes() for file in tmp_path.iterdir()
        } == before  # bad input changes nothing
    assert "weights_sha256" in json.loads((tmp_path / "settings.json").read_text())["settings"]


def test_other_data_under_the_same_name_or_size_are_not_resumed(vit, tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (24, 32, 32, 3), dtype=np.uint8)
    rows = [(x, i % 2) for i, x in enumerate(pixels)]
    swapped = [(x, 1 - label) for x, label in rows]
    options = {"baselines": False, "blocks": (2,), "out": tmp_path / "own"}
    first = mr.probe(vit, (rows, rows), **options)["value"].tolist()
    assert mr.probe(vit, (rows, list(rows)), resume=True, **options)["value"].tolist() == first
    for train, test in ((rows, swapped), (swapped, rows), (rows, [(255 - x, y) for x, y in rows])):
        with pytest.raises(mr.InputError, match="holds a report of other data_sha256: choose an"):
            mr.probe(vit, (train, test), resume=True, **options)
    # A folder whose images moved between its classes
    for i, x in enumerate(pixels):
        file = tmp_path / "photos" / "ab"[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(x).save(file)
    name, options["out"] = f"imagefolder:{tmp_path / 'photos'}", tmp_path / "named"
    mr.probe(vit, name, **options)
    for old, new in (("a/0.png", "b/0.png"), ("b/1.png", "a/1.png")):
        (tmp_path / "photos" / old).rename(tmp_path / "photos" / new)
    with pytest.raises(mr.InputError, match="holds a report of other data_sha256"):
        mr.probe(vit, name, resume=True, **options)


def test_what_is_no_pair_of_data_sets_is_one_line(vit, digits, tmp_path):
    rows = [digits["train"][i] for i in range(12)]
    for data, message in [
        (digits["train"], r"got ImageDataset of length \d+$"),
        (rows, "got list of length 12$"),
        ((rows, rows, rows), "got tuple of length 3$"),
        (tmp_path, "got the path .*: write imagefolder:.* or parquet:.*, as text$"),
        ({"train": rows, "val": rows}, "got dict with train, val$"),
        (7, "got int$"),
        ((rows, "digits"), "expected a map-style data set, .* got str"),
    ]:
        with pytest.raises(mr.InputError, match=message) as found:
            mr.probe(vit, data)
        assert "\n" not in str(found.value)
        with pytest.raises(mr.InputError, match=message):
            explorer.write(tmp_path / "page.html", data, vit)
    options = {"blocks": (2,), "baselines": False}
    named = mr.probe(vit, {"train": rows, "test": rows[:6]}, **options)
    assert named.equals(mr.probe(vit, (rows, rows[:6]), **options))


def test_test_labels_that_training_lacks_are_refused(vit, digits, tmp_path):
    train = [(digits["train"][i][0], i % 3) for i in range(12)]
    later = [(image, label + 1) for image, label in train]
    message = (
        r"the test set: 4 of 12 images have labels that no training image has \(3; training has "
        r"0, 1, 2\): number the classes in the same way"
    )
    options = {"blocks": (2,), "baselines": False}
    for probe in ("knn", "linear", "low_shot"):
        with pytest.raises(mr.InputError, match=message):
            mr.probe(vit, (train, later), probes=(probe,), shots=(1,), **options)
    with pytest.raises(mr.InputError, match=message):
        explorer.write(tmp_path / "page.html", (train, later), vit)
    some = [row for row in train if row[1] != 1]  # a class may be missing
    assert len(mr.probe(vit, (train, some), **options)) == 2
    assert len(mr.probe(vit, (train, later), probes=("rank",), **options)) == 2  # no labels asked
    # Parts of one source are numbered together, even where a rare class went to the test set
    rare = digits["train"].subset(np.flatnonzero(digits["train"].labels < 9)).take(40)
    assert 9 in digits["test"].labels
    assert len(mr.probe(vit, (rare, digits["test"].take(40)), **options)) == 2


def test_rows_that_were_changed_are_probed_again_and_said(vit, data, tmp_path, caplog):
    options = {"probes": ("knn", "rank"), "baselines": False, "out": tmp_path}
    whole = mr.probe(vit, data, **options)
    file, other = tmp_path / "rows_knn_model.csv", tmp_path / "rows_rank_model.csv"
    before, kept = file.read_bytes(), other.stat().st_mtime_ns
    file.write_bytes(before + b"damage")
    again = mr.probe(vit, data, resume=True, **options)
    assert "rows_knn_model.csv is missing or changed, and is probed again" in caplog.text
    assert file.read_bytes() == before and other.stat().st_mtime_ns == kept
    pd.testing.assert_frame_equal(again, whole, check_dtype=False)


def test_rows_that_no_manifest_names_are_not_taken_for_finished(vit, data, tmp_path):
    """A kill between the rows of a probe and their entry in settings.json."""
    options = {"probes": ("knn",), "baselines": False, "out": tmp_path}
    mr.probe(vit, data, **options)
    (tmp_path / "rows_rank_model.csv").write_text("half")
    table = mr.probe(vit, data, resume=True, **options | {"probes": ("knn", "rank")})
    assert set(table["probe"]) == {"knn", "rank"}
    assert "half" not in (tmp_path / "rows_rank_model.csv").read_text()


@pytest.mark.parametrize(
    "foreign", ["report.csv", "rows_knn_model.csv", "manifest.json", "settings.json"]
)
def test_files_of_others_are_left_alone(vit, data, tmp_path, foreign):
    (tmp_path / foreign).write_text('{"preset": "tiny"}')
    (tmp_path / "rows_of_mine.csv").write_text("a")
    with pytest.raises(
        mr.InputError,
        match=rf"holds {foreign}, which no report wrote: choose another folder with --out",
    ):
        mr.probe(vit, data, out=tmp_path, baselines=False)
    (tmp_path / foreign).unlink()
    (tmp_path / "report.docx").write_text("b")
    mr.probe(vit, data, out=tmp_path, baselines=False)
    # Notebooks were run into the same folder
    (tmp_path / "manifest.json").write_text('{"preset": "tiny"}')
    with pytest.raises(mr.InputError, match=r"holds manifest\.json, which no report wrote"):
        mr.probe(vit, data, out=tmp_path, baselines=False)
    assert (tmp_path / "rows_of_mine.csv").read_text() + (
        tmp_path / "report.docx"
    ).read_text() == "ab"


def test_command_line(tmp_path, capsys):
    options = ["--probes", "knn", "--blocks", "3,11", "--no-baselines", "--out", str(tmp_path)]
    assert main(["probe", "simmim_digits", "digits", *options]) == 0
    out = capsys.readouterr().out
    assert "# Block report: simmim_digits on digits" in out
    assert "| knn_k10_t0.07_standardized | cls |" in out
    assert set(pd.read_csv(tmp_path / "report.csv")["block"]) == {3, 11}
    assert (
        main(["probe", "simmim_digits", "digits", "--probes", "magic", "--out", str(tmp_path)]) == 2
    )
    assert "unknown probe 'magic': choose from knn, linear" in capsys.readouterr().err


def test_data_without_labels_still_has_a_rank(vit, data, tmp_path):
    unlabelled = [
        [(image, -1) for image, _ in (part[i] for i in range(len(part)))] for part in data
    ]
    rows = mr.probe(vit, tuple(unlabelled), probes=("rank",), baselines=False)
    assert len(rows) == 6
    with pytest.raises(mr.InputError, match="needs labels"):
        mr.probe(vit, tuple(unlabelled), probes=("knn",))


def test_test_images_without_labels_are_named(vit, data):
    train, test = data
    some = [
        (image, label if i else -1)
        for i, (image, label) in enumerate(test[i] for i in range(len(test)))
    ]
    for name, what in report.LABELLED.items():
        with pytest.raises(
            mr.InputError,
            match=f"1 of 60 test images have no label, and {what} counts right answers",
        ):
            mr.probe(vit, (train, some), probes=(name,), baselines=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"blocks": (2,), "pools": ("cls_last2",)},
            "pooling 'cls_last2' of block 2 needs block 1, which was not extracted",
        ),
        ({"pools": ()}, "one or more poolings of cls, mean, got none"),
        ({"pools": ("",)}, "unknown pooling ''"),
        ({"probes": ("cluster",), "clusters": 1}, "between 2 and the number of images 60, got 1"),
        ({"probes": ("low_shot",), "shots": (0,)}, "shots must be whole numbers"),
        ({"probes": ("low_shot",), "shots": (100,)}, "fewer than 100 shots"),
        ({"probes": ("knn", "knn")}, "one or more different probes, got knn, knn"),
        ({"probes": ()}, "one or more different probes, got none"),
        ({"seed": -1}, "seed must be a whole number >= 0, got -1"),
        (
            {"unlabelled": True, "probes": ("linear",)},
            "a linear probe needs labels, and this data set has none",
        ),
    ],
)
def test_what_does_not_fit_is_said_before_the_extraction(vit, data, settings, message, monkeypatch):
    monkeypatch.setattr(report, "_features", None)
    data = tuple(part.subset(range(len(part))) for part in data)
    if settings.pop("unlabelled", False):
        for part in data:
            part.labels = None
    with pytest.raises(mr.InputError, match=message):
        mr.probe(vit, data, baselines=False, **settings)


def test_options_of_the_command_line_are_checked(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    for option, message in (
        (["--pools", ""], "unknown pooling ''"),
        (["--workers", "-1"], "loader processes (workers) >= 0, got 256 and -1"),
        (["--cache", str(tmp_path / "file")], "file is a file: features are kept in a folder"),
        (["--probes", "low_shot", "--shots", "1e-2,x"], "--shots must be numbers"),
    ):
        assert (
            main(
                [
                    "probe",
                    "simmim_digits",
                    "digits",
                    "--no-baselines",
                    *option,
                    "--out",
                    str(tmp_path / "out"),
                ]
            )
            == 2
        )
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert numbers("--shots", "1,1e-2,0.1") == (1, 0.01, 0.1)


def test_cached_features_give_the_same_report(vit, data, tmp_path):
    probes = {"probes": ("knn", "low_shot"), "baselines": False}
    kept = mr.probe(vit, data, cache=tmp_path / "cache", **probes)
    pd.testing.assert_frame_equal(kept, mr.probe(vit, data, **probes))
    assert len(list((tmp_path / "cache" / "model" / "test").glob("*/cls_block02.bin"))) == 1


def test_torchrun_gives_the_report_of_one_process(tmp_path):
    command = [
        "-m",
        "mimrefiner",
        "probe",
        "simmim_digits",
        "digits",
        "--blocks",
        "0,11",
        "--no-baselines",
        "--out",
    ]
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    cache = ["--cache", str(tmp_path / "cache")]
    done = subprocess.run(
        [*launcher, *command, str(tmp_path / "two"), *cache], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "cache" / "model" / "train").glob("*/images_*.json"))) == 1
    assert done.stdout.count("# Block report") == 1
    assert main([*command[2:], str(tmp_path / "one")]) == 0
    one, two = (
        pd.read_csv(tmp_path / name / "report.csv", keep_default_na=False)
        for name in ("one", "two")
    )
    pd.testing.assert_frame_equal(one, two, atol=2 / 539)


def test_ctrl_c_keeps_what_is_finished(tmp_path):
    """SIGINT once the first probe is on disk: one line, status 130, and --resume ends with the rows
    of an undisturbed run.
    """
    options = [
        "simmim_digits",
        "digits",
        "--probes",
        "knn,rank,cluster",
        "--pools",
        "cls",
        "--blocks",
        "0,3,6,9,11",
        "--out",
    ]
    first = tmp_path / "stopped" / "rows_knn_model.csv"
    manifest = tmp_path / "stopped" / "settings.json"  # tells that these rows are finished
    # A child inherits it where SIGINT is ignored here
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        command = [sys.executable, "-m", "mimrefiner", "probe", *options, str(tmp_path / "stopped")]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            while not manifest.exists() and process.poll() is None:
                time.sleep(0.01)
            # A library's callback may swallow one; a user presses again
            for patience in (20, 20, None):
                process.send_signal(signal.SIGINT)
                with suppress(subprocess.TimeoutExpired):
                    out, err = process.communicate(timeout=patience)
                    break
    finally:
        signal.signal(signal.SIGINT, before)
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "mimrefiner: stopped"
    assert "Traceback" not in out + err
    assert not (tmp_path / "stopped" / "report.csv").exists()
    finished = first.stat().st_mtime_ns
    assert main(["probe", *options, str(tmp_path / "stopped"), "--resume"]) == 0
    assert first.stat().st_mtime_ns == finished  # not probed again
    assert main(["probe", *options, str(tmp_path / "whole")]) == 0
    rows = [(tmp_path / name / "report.csv").read_text() for name in ("stopped", "whole")]
    assert rows[0] == rows[1]
