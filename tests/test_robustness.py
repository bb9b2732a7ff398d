"""Robustness on small synthetic sets, against counting by hand."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image

import mimrefiner as mr
from mimrefiner.models.classifier import Head, ImageClassifier
from mimrefiner.models.encoders import eval_transform
from mimrefiner.probes import robustness
from mimrefiner.probes.robustness import RobustnessProtocol, TestFolders

CLASSES = ["n01", "n02", "n03", "n04"]
SMALL = RobustnessProtocol(("fog", "snow"), ("spatter",), (1, 2), (0.5, 0.8), subset=2)
# protocols.md, section 6, written down from there: corruption, AlexNet's mean error
ALEXNET = """
gaussian_noise 0.886428, shot_noise 0.894468, impulse_noise 0.922640, defocus_blur 0.819880,
glass_blur 0.826268, motion_blur 0.785948, zoom_blur 0.798360, snow 0.866816, frost 0.826572,
fog 0.819324, brightness 0.564592, contrast 0.853204, elastic_transform 0.646056,
pixelate 0.717840, jpeg_compression 0.606500
"""


def test_every_field_of_the_protocol_is_the_published_one():
    pairs = [entry.split() for entry in ALEXNET.replace("\n", " ").split(",")]
    assert asdict(RobustnessProtocol()) == {
        "standard": tuple(name for name, _ in pairs),
        "extra": ("gaussian_blur", "saturate", "spatter", "speckle_noise"),
        "severities": (1, 2, 3, 4, 5),
        "alexnet": tuple(float(error) for _, error in pairs),
        "subset": 200,
        "batch_size": 256,
    }
    assert len(RobustnessProtocol().corruptions) * 5 == 95


def test_alexnet_itself_has_an_mce_of_100():
    protocol = RobustnessProtocol()
    its = dict(zip(protocol.standard, protocol.alexnet, strict=True))
    accuracies = {f"{name} {s}": 1 - error for name, error in its.items() for s in range(1, 6)}
    assert robustness.mean_corruption_error(accuracies, protocol) == pytest.approx(100)


def write(folder, classes, n, rng):
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(n):
            pixels = rng.integers(0, 255, (36, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")


@pytest.fixture
def folders(tmp_path):
    rng = np.random.default_rng(0)
    for corruption in SMALL.corruptions:
        for severity in SMALL.severities:
            write(tmp_path / "c" / corruption / str(severity), CLASSES, 3, rng)
    write(tmp_path / "a", CLASSES[1:3], 6, rng)
    write(tmp_path / "r", ["n01", "n04"], 5, rng)
    write(tmp_path / "sketch", CLASSES, 4, rng)
    write(tmp_path / "val", CLASSES, 7, rng)
    names = ("val", "c", "a", "r", "sketch")
    return TestFolders(**{name: tmp_path / name for name in names})


@pytest.fixture
def model(vit):
    model = ImageClassifier(vit, Head(len(CLASSES))).eval()
    with torch.no_grad():
        model.linear.weight.normal_()  # else all images have the same answer
        model.linear.weight[0] *= 3  # n01 is often the answer, right or wrong
    return model


def naive(model, folder, allowed=None):
    """Right answers and images, one image after another."""
    transform, right = eval_transform(model.encoder), []
    for name in sorted(f.name for f in folder.iterdir()):
        for file in sorted((folder / name).iterdir()):
            with torch.no_grad():
                logits = model(transform(Image.open(file).convert("RGB"))[None])[0].tolist()
            of = {CLASSES[i]: value for i, value in enumerate(logits)}
            if allowed:
                of = {name: of[name] for name in allowed}
            right.append(max(of, key=of.get) == name)
    return sum(right) / len(right), len(right)


def test_all_sets_equal_a_naive_computation(model, folders, tmp_path):
    rows = robustness.robustness(model, folders, tmp_path / "runs", protocol=SMALL)
    found = rows.set_index(["dataset", "setting", "metric"])["value"]
    errors, values = {}, []
    for corruption in ("fog", "snow", "spatter"):
        for severity in (1, 2):
            value, n = naive(model, folders.c / corruption / str(severity))
            assert n == 12
            assert found["imagenet_c", f"{corruption} {severity}", "accuracy"] == value
            errors.setdefault(corruption, []).append(1 - value)
            values.append(value)
    assert found["imagenet_c", "mean of 6", "accuracy"] == pytest.approx(np.mean(values))
    mce = 50 * (np.mean(errors["fog"]) / 0.5 + np.mean(errors["snow"]) / 0.8)
    assert found["imagenet_c", "2 standard corruptions", "mCE"] == pytest.approx(mce)
    gained = 0
    for name, allowed in (("a", CLASSES[1:3]), ("r", ["n01", "n04"])):
        value, _ = naive(model, getattr(folders, name), allowed)
        assert found[f"imagenet_{name}", "", "accuracy"] == value
        gained += value - naive(model, getattr(folders, name))[0]
    assert gained > 0  # what is no class of the set does not count
    assert found["imagenet_sketch", "", "accuracy"] == naive(model, folders.sketch)[0]
    assert found["imagenet", "", "accuracy"] == naive(model, folders.val)[0]
    assert found["imagenet", "", "top5"] == 1  # of four classes


def test_what_is_finished_is_not_measured_again(model, folders, tmp_path, monkeypatch):
    runs, protocol = tmp_path / "runs", SMALL
    calls = []
    real = robustness.measured

    def interrupted(model, part, *rest):
        calls.append(part.name)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(model, part, *rest)

    monkeypatch.setattr(robustness, "measured", interrupted)
    with pytest.raises(KeyboardInterrupt):
        robustness.robustness(model, folders, runs, protocol=protocol)
    rows = robustness.robustness(model, folders, runs, protocol=protocol)
    assert len(calls) == 10 + 1 and calls[3] == calls[4]  # ten parts, one of them twice
    again = robustness.robustness(model, folders, runs, protocol=protocol)
    assert again.equals(rows) and len(calls) == 11
    facts = json.loads((runs / "imagenet_a" / "manifest.json").read_text())["facts"]
    assert facts["images"] == 12
    torch.nn.init.normal_(model.linear.weight)
    with pytest.raises(mr.InputError, match=r"holds a run with other settings \(weights\)"):
        robustness.robustness(model, folders, runs, protocol=protocol)


def test_bad_input_is_one_line(model, folders, tmp_path):
    def measure(folders, **changes):
        options = {"protocol": SMALL, **changes}
        return robustness.robustness(model, folders, tmp_path / "none", **options)

    with pytest.raises(mr.InputError, match="give one or more test sets"):
        measure(TestFolders())
    with pytest.raises(mr.InputError, match="expected the folder of imagenet_r"):
        measure(TestFolders(r=tmp_path / "nowhere"))
    with pytest.raises(mr.InputError, match="give a folder with one folder for each class"):
        measure(TestFolders(a=folders.a))
    with pytest.raises(mr.InputError, match="has 4 classes, and 3 names were given"):
        measure(folders, classes=CLASSES[:3])
    with pytest.raises(mr.InputError, match="folder n04, which is none of the model's 4 classes"):
        measure(folders, classes=[*CLASSES[:3], "n05"])
    (folders.sketch / "n02").rename(tmp_path / "away")
    with pytest.raises(mr.InputError, match="3 folders of classes, expected 4; n02 is missing"):
        measure(folders, classes=CLASSES)
    (folders.c / "spatter" / "2").rename(tmp_path / "gone")
    with pytest.raises(mr.InputError, match=r"spatter/2 does not exist: ImageNet-C needs all 3"):
        measure(replace(folders, sketch=None))
    assert not (tmp_path / "none").exists()


def test_classes_of_imagenet_are_sorted_folder_names():
    names = robustness.class_names([], 1000)
    assert names == sorted(names) and len(set(names)) == 1000 and names[999] == "n15075141"
