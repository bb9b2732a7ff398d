"""The commands of segmentation, VTAB and robustness, from end to end at smoke size."""

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import mimrefiner as mr
from mimrefiner.__main__ import main
from mimrefiner.batch.shared import share
from mimrefiner.data.vtab import SIX, Gathered
from mimrefiner.models.classifier import Head, ImageClassifier, save_classifier
from mimrefiner.models.weights import save_encoder
from mimrefiner.probes import vtab
from mimrefiner.probes.robustness import RobustnessProtocol
from mimrefiner.study import paper
from mimrefiner.study.plan import shape_of
from mimrefiner.training.finetune_cost import finetune_flops


@pytest.fixture
def encoder(tmp_path):
    encoder = mr.build_vit(mr.ViTConfig(dim=16, depth=4, num_heads=2))
    save_encoder(encoder, tmp_path / "encoder.safetensors")
    return encoder


def image(rng, *shape):
    return Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8))


@pytest.fixture
def scenes(tmp_path):
    """As ADE20K's zip: 0 is no class, 1 and 2 are halves."""
    rng = np.random.default_rng(0)
    for part, n in (("training", 10), ("validation", 3)):
        for kind in ("images", "annotations"):
            (tmp_path / "scenes" / kind / part).mkdir(parents=True)
        for i in range(n):
            image(rng, 40, 52, 3).save(tmp_path / "scenes" / "images" / part / f"{i}.jpg")
            mask = np.repeat([[0] * 4 + [1] * 20 + [2] * 28], 40, 0).astype(np.uint8)
            Image.fromarray(mask).save(tmp_path / "scenes" / "annotations" / part / f"{i}.png")
    return tmp_path / "scenes"


def segment(tmp_path, scenes, *options):
    encoder = str(tmp_path / "encoder.safetensors")
    common = ["--classes", "2", "--out", str(tmp_path / "out")]
    return main(["segment", encoder, str(scenes), *common, *options])


def test_segment_fine_tunes_and_is_read_again(encoder, scenes, tmp_path, capsys, monkeypatch):
    options = ["--size", "32", "--steps", "2", "--batch-size", "4"]
    assert segment(tmp_path, scenes, *options) == 0
    rows = pd.read_csv(tmp_path / "out" / "rows.csv")
    assert rows["protocol"].tolist() == ["upernet"] * 3 and rows["value"].between(0, 1).all()
    assert (tmp_path / "out" / "upernet.safetensors").is_file()
    assert not (tmp_path / "out" / "checkpoints").exists()
    assert "sliding, last" in capsys.readouterr().out
    assert segment(tmp_path, scenes, *options) == 2
    assert "holds a finished run: use an empty folder, or --resume" in capsys.readouterr().err
    assert segment(tmp_path, scenes, *options, "--resume") == 0
    assert capsys.readouterr().out.count("sliding, last") == 1
    assert segment(tmp_path, scenes, *options, "--resume", "--seed", "1") == 2
    assert "other settings (seed)" in capsys.readouterr().err
    monkeypatch.setattr("mimrefiner.distributed.rank", lambda: 1)  # as the second of two
    assert segment(tmp_path, scenes, *options, "--resume") == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("probe", "rows"), [("linear", 2), ("blocks", 4)])
def test_segment_probes(encoder, scenes, tmp_path, probe, rows, capsys):
    options = ["--probe", probe, "--epochs", "1", "--batch-size", "4"]
    assert segment(tmp_path, scenes, *options) == 0
    found = pd.read_csv(tmp_path / "out" / "rows.csv")
    assert len(found) == rows and set(found["n_train"]) == {9 if probe == "linear" else 10}
    assert segment(tmp_path, scenes, *options) == 0
    assert segment(tmp_path, scenes, *options, "--best-on-test") == 2
    assert "holds a run with other settings (best on test)" in capsys.readouterr().err


def test_segment_refuses_in_one_line(encoder, scenes, tmp_path, capsys):
    for options, said in (
        (("--probe", "mask2former"), "unknown --probe 'mask2former': choose one of upernet"),
        (("--probe", "linear", "--steps", "3"), "--steps is no option of --probe linear"),
        (("--best-on-test",), "--best-on-test is no option of --probe upernet"),
        (("--size", "36"), "image size 36 is not divisible by the patch size 8"),
        (("--size", "32", "--classes", "1"), "expected 2 to 255 classes, got 1"),
        (("--size", "32", "--count-zero"), "a mask holds class 2, expected classes 0 to 1"),
    ):
        assert segment(tmp_path, scenes, *options) == 2
        said_here = capsys.readouterr().err
        assert said in said_here and said_here.count("\n") == 1
    assert not (tmp_path / "out" / "rows.csv").exists()


def test_what_no_group_can_do_is_refused_by_each_process(encoder, scenes, tmp_path, capsys):
    """One process would take the run and wait in it for the others, which wait for its end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mimrefiner.distributed.world", lambda: 2)
        assert segment(tmp_path, scenes, "--probe", "linear", "--epochs", "1") == 2
        assert "start the command without torchrun" in capsys.readouterr().err
        arguments = ["vtab", str(tmp_path / "encoder.safetensors"), "--six"]
        assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
        assert "the runs of VTAB-6 are independent: share them" in capsys.readouterr().err
    assert not (tmp_path / "out" / "rows.csv").exists()


def test_vtab_1k(encoder, tmp_path, capsys):
    rng, path = np.random.default_rng(0), tmp_path / "vtab-1k" / "dtd"
    path.mkdir(parents=True)
    for i in range(12):
        image(rng, 20, 20, 3).save(path / f"{i}.png")
    lines = [f"{i}.png {i % 2}" for i in range(12)]
    parts = {"train800": lines[:6], "val200": lines[6:8], "test": lines[8:]}
    for name, listed in (parts | {"train800val200": lines[:8]}).items():
        (path / f"{name}.txt").write_text("\n".join(listed))
    arguments = ["vtab", str(tmp_path / "encoder.safetensors"), "--data", str(path.parent)]
    arguments += ["--epochs", "1", "--batch-size", "4", "--rates", "0.01,0.001", "--seeds", "0"]
    arguments += ["--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "caltech101 does not exist: expected the folder" in capsys.readouterr().err
    arguments += ["--datasets", "dtd"]
    assert main(arguments) == 0
    table = capsys.readouterr().out
    assert "| dtd |" in table and "| mean of 19 |  |  |" in table
    rows = pd.read_csv(tmp_path / "out" / "rows.csv")
    assert rows["phase"].tolist() == ["search", "search", "final"]
    assert (tmp_path / "out" / "table.md").read_text() == table[: table.index("rows.csv")]
    assert main(["vtab", "simmim_digits", "--out", str(tmp_path)]) == 2
    assert "give either --data FOLDER for VTAB-1K or --six" in capsys.readouterr().err


def test_vtab_6(encoder, tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)

    def whole(name):
        labels = np.arange(40) % 2
        pictures = [(image(rng, 20, 20, 3), None) for _ in labels]
        return tuple(Gathered(name, [pictures], labels) for _ in range(2))

    monkeypatch.setattr("mimrefiner.probes.vtab.whole", whole)
    arguments = ["vtab", str(tmp_path / "encoder.safetensors"), "--six", "--epochs", "1"]
    arguments += ["--batch-size", "16", "--out", str(tmp_path / "out")]
    assert main([*arguments, "--datasets", "dtdd"]) == 2
    assert "unknown data set of VTAB-6 'dtdd'" in capsys.readouterr().err
    assert main([*arguments, "--datasets", "dtd,pets"]) == 0
    rows = pd.read_csv(tmp_path / "out" / "rows.csv")
    chosen = rows[rows["pool"] == "chosen"]
    assert chosen["dataset"].tolist() == ["dtd", "pets"] and set(rows["n_train"]) == {36}
    assert "| mean of 6 |  |" in capsys.readouterr().out
    assert len(SIX) == 6


def test_robustness(encoder, tmp_path, monkeypatch, capsys):
    rng, classes = np.random.default_rng(0), ["n1", "n2", "n3"]
    model = ImageClassifier(encoder, Head(3))
    torch.nn.init.normal_(model.linear.weight)
    save_classifier(model, tmp_path / "tuned")
    for part, names in (("a", classes[:2]), ("sketch", classes)):
        for name in names:
            (tmp_path / part / name).mkdir(parents=True)
            image(rng, 40, 40, 3).save(tmp_path / part / name / "a.png")
    for corruption in RobustnessProtocol().corruptions:
        for severity in range(1, 6):
            for name in classes:
                place = tmp_path / "c" / corruption / str(severity) / name
                place.mkdir(parents=True)
                image(rng, 32, 32, 3).save(place / "a.png")
    arguments = ["robustness", str(tmp_path / "tuned"), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--imagenet-a", str(tmp_path / "a")]) == 2
    assert "give a folder with one folder for each class of training" in capsys.readouterr().err
    arguments += ["--sketch", str(tmp_path / "sketch"), "--imagenet-c", str(tmp_path / "c")]
    assert main([*arguments, "--imagenet-a", str(tmp_path / "a")]) == 0
    printed = capsys.readouterr().out
    assert "| imagenet_c | mean of 95 | accuracy |" in printed and "| mCE |" in printed
    assert "gaussian_noise" not in printed
    rows = pd.read_csv(tmp_path / "out" / "rows.csv")
    assert len(rows) == 95 + 2 + 1 + 1
    assert main(["robustness", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "expected a folder that mimrefiner finetune wrote" in capsys.readouterr().err


def test_several_processes_share_a_command(tmp_path, monkeypatch, capsys):
    share(["models"], tmp_path, (), processes=2)
    texts = [(tmp_path / f"process-{i}.log").read_text() for i in (1, 2)]
    assert "mae_l16" in texts[0] and texts[0] == texts[1]
    with pytest.raises(mr.InputError, match=r"process 1 failed: .*invalid choice: 'modles'"):
        share(["modles"], tmp_path, ())
    with pytest.raises(mr.InputError, match="one or more processes, got 0"):
        share(["models"], tmp_path, (), 0)
    asked = []
    monkeypatch.setattr("mimrefiner.batch.shared.share", lambda *given: asked.append(given))
    monkeypatch.setattr("mimrefiner.study.benchmarks.six_into", lambda *a, **b: pd.DataFrame())
    arguments = ["vtab", "simmim_digits", "--six", "--gpus", "0,1", "--out", str(tmp_path)]
    assert main(arguments) == 0
    assert asked == [
        (["vtab", "simmim_digits", "--six", "--out", str(tmp_path)], tmp_path, (0, 1), 1)
    ]
    capsys.readouterr()


@pytest.mark.parametrize(
    ("dataset", "protocol", "said"),
    [
        ("ADE20K", "linear probe (frozen)", "segment mae_l16 ADE20K --probe linear"),
        ("ADE20K", "UperNet full fine-tune", "segment mae_l16 ADE20K"),
        ("VTAB-1K mean", "fine-tune", "vtab mae_l16 --data vtab-1k"),
        ("OxfordPets", "linear probe", "vtab mae_l16 --six --best-on-test --datasets pets"),
        ("IN-C", "robustness of fine-tuned model", "mimrefiner robustness"),
    ],
)
def test_published_numbers_name_their_command(dataset, protocol, said):
    number = {"model": "MAE", "dataset": dataset, "protocol": protocol, "backbone": "L/16"}
    text = paper.needs({**number, "metric": "mIoU"})
    assert text.startswith("possible (tried at small size)") and text.endswith(said)
    assert paper.needs({**number, "model": "BEiT", "metric": "mIoU"}).startswith("not possible")
    numbers = paper.paper_values()
    assert len(numbers[(numbers["dataset"] == dataset) & (numbers["protocol"] == protocol)])


def test_the_plan_foresees_both(capsys):
    assert main(["plan", "mae_l16", "imagenet", "--recipe", "vtab1k", "--tflops", "100"]) == 0
    said = capsys.readouterr().out
    shape = shape_of("mae_l16")
    images = 64 * 50 * (475 * 12 + 95 * 15)  # 12 steps of 64 an epoch in the search, then 15
    hours = images * finetune_flops(shape, vtab.RECIPE, 1000) / (0.4 * 100e12) / 3600
    assert "570 runs" in said and f"{hours:,.1f} GPU-hours in all" in said
    assert main(["plan", "mae_l16", "imagenet", "--recipe", "upernet"]) == 0
    assert "441.5 M parameters, 2,497.6 GFLOPs per 512 px image" in capsys.readouterr().out
    assert main(["plan", "mae_l16", "imagenet", "--recipe", "upernet", "--gpus", "3"]) == 2
    assert "expected gpus >= 1 that divide the batch of 16, got 3" in capsys.readouterr().err
    assert main(["plan", "mae_l16", "imagenet", "--recipe", "upernet", "--tflops", "-1"]) == 2
    assert "expected tflops > 0" in capsys.readouterr().err
