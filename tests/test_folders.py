"""Folders of images as people have them: names of splits, links, endings, hidden entries."""

import logging
import os
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from PIL import Image

import mimrefiner as mr
from mimrefiner.data import datasets

SPLITS = ("train", "val", "test", "trainval")


@pytest.fixture
def said(caplog):
    """What is announced of data sets, as lines."""
    caplog.set_level(logging.INFO, "mimrefiner")
    datasets._tell.cache_clear()
    return caplog


def put(folder, n, value=0, ending="png", name=""):
    """``n`` grey images in ``folder``, of ``value``, ``value`` + 1 and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        image = Image.new("L", (8, 8), value + i).convert("RGB")
        if ending in ("xbm", "msp", "pbm"):
            image = image.convert("1")
        image.save(folder / f"{name}{i}.{ending}")


def loaded(path, split="trainval"):
    return mr.load_dataset(f"imagefolder:{path}", split=split)


def greys(data):
    """The images as they were put, with their labels, in order."""
    return sorted((image.getpixel((0, 0))[0], label) for image, label in data)


def sizes(path):
    return {split: len(loaded(path, split)) for split in SPLITS}


@pytest.mark.parametrize(
    ("train", "held"),
    [
        ("train", "valid"),
        ("train", "validation"),
        ("Train", "Val"),
        ("TRAIN", "VALIDATION"),
        ("Training", "Testing"),
        ("training", "test"),
        ("train", "dev"),
        ("seg_train", "seg_test"),
        ("training_set", "test_set"),
        ("train_images", "val_images"),
    ],
)
def test_names_of_splits(train, held, tmp_path, said):
    for i, name in enumerate(("ant", "bee")):
        put(tmp_path / train / name, 10, 100 * i)
        put(tmp_path / held / name, 3, 100 * i + 50)
    assert sizes(tmp_path) == {"train": 18, "val": 2, "test": 6, "trainval": 20}
    test = loaded(tmp_path, "test")
    assert test.classes == ["ant", "bee"]
    assert greys(test) == [(50, 0), (51, 0), (52, 0), (150, 1), (151, 1), (152, 1)]
    origin = "" if held == "test" else f" (its {held})"
    (line,) = said.messages
    assert line == (
        f"imagefolder:{tmp_path}: 18 train, 2 val (drawn from train), 6 test{origin} images; "
        "2 classes: ant, bee"
    )


def test_three_splits_of_other_names(tmp_path):
    for split, n in (("Training", 10), ("Valid", 2), ("Testing", 3)):
        put(tmp_path / split / "ant", n, 0)
        put(tmp_path / split / "bee", n, 100)
    assert sizes(tmp_path) == {"train": 20, "val": 4, "test": 6, "trainval": 24}


def test_an_archive_unpacked_twice(tmp_path, said):
    for split, n in (("seg_train", 10), ("seg_test", 3)):
        put(tmp_path / split / split / "ant", n)
        put(tmp_path / split / split / "bee", n, 100)
    put(tmp_path / "seg_pred", 4)
    assert sizes(tmp_path)["test"] == 6 and loaded(tmp_path).classes == ["ant", "bee"]
    assert said.messages[0].endswith(
        "2 classes: ant, bee; folders beside the splits are left out: seg_pred"
    )


def test_a_class_may_be_called_as_a_split(tmp_path):
    for i, name in enumerate(("bus", "car", "train")):
        put(tmp_path / name, 10, 50 * i)
    assert loaded(tmp_path).classes == ["bus", "car", "train"]
    put(tmp_path / "stations" / "train_station" / "north", 10)
    put(tmp_path / "stations" / "bus_station" / "south", 10)
    assert loaded(tmp_path / "stations").classes == ["bus_station", "train_station"]


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (
            ("train/ant", "val/ant", "valid/ant"),
            "holds val and valid, which both name the split val",
        ),
        (("val/ant", "test/ant"), "holds test, val and no train/CLASS/IMAGE: expected SPLIT/CLASS"),
        (("val/ant", "photos/ant"), "holds photos, val and no train/CLASS/IMAGE"),
        (("train", "test"), "holds test, train and no train/CLASS/IMAGE"),
        (("train",), "holds train and no train/CLASS/IMAGE"),
        (
            ("kaggle/train/ant", "kaggle/test/ant"),
            "holds one class, kaggle, .* give imagefolder:.*/kaggle$",
        ),
        (("Data/CLS-LOC/train/ant", "Data/CLS-LOC/val"), "give imagefolder:.*/Data/CLS-LOC$"),
        (
            ("cat/train", "cat/test", "dog/train", "dog/test", "dog/val"),
            "each of cat, dog in .* holds folders of splits: give one of them, such as "
            "imagefolder:.*/cat, or, if they are classes, put the splits outside, as SPLIT/CLASS",
        ),
        (
            ("images/001.Albatross", "images/002.Ani"),
            "holds one class, images, and .*/images holds folders of images, such as 001.Albatross:"
            " give imagefolder:.*/images, if these are the classes",
        ),
        (("a/b/c/ant", "a/b/c/bee"), "holds one class, a, and .* give imagefolder:.*/a/b/c, if"),
        ((".",), "holds no images: .* found 4 images outside of folders, which have no class"),
        (("train/ant", "val"), r"val holds no images: .* found 4 images outside of folders"),
    ],
)
def test_layouts_that_would_be_read_wrongly_are_refused(folders, message, tmp_path):
    for folder in folders:
        put(tmp_path / folder, 4)
    with pytest.raises(mr.InputError, match=message) as found:
        loaded(tmp_path)
    assert "\n" not in str(found.value)


def test_two_classes_that_are_one_folder_are_refused(tmp_path):
    put(tmp_path / "ant", 4)
    put(tmp_path / "cat", 4)
    (tmp_path / "bee").symlink_to(tmp_path / "ant")
    with pytest.raises(mr.InputError, match="holds ant twice, by links, as two classes"):
        loaded(tmp_path)


def test_a_file_in_two_classes_by_links_is_refused(tmp_path):
    put(tmp_path / "ant", 4)
    put(tmp_path / "bee", 4)
    (tmp_path / "bee" / "x.png").symlink_to(tmp_path / "ant" / "2.png")
    message = r"ant/2\.png and .*/bee/x\.png are one file, by links, in two classes"
    with pytest.raises(mr.InputError, match=message):
        loaded(tmp_path)


@pytest.mark.parametrize("whole", [False, True])
def test_test_images_that_link_to_training_images_are_refused(whole, tmp_path):
    for name in ("ant", "bee"):
        put(tmp_path / "train" / name, 6)
        put(tmp_path / "test" / "bee", 2)
    if whole:
        (tmp_path / "test" / "ant").symlink_to(tmp_path / "train" / "ant")
    else:
        (tmp_path / "test" / "ant").mkdir()
        for i in range(6):
            link = tmp_path / "test" / "ant" / f"linked{i}.png"
            link.symlink_to(tmp_path / "train" / "ant" / f"{i}.png")
    message = r"^6 images are both train and test, by links, such as .*/train/ant/0\.png and "
    with pytest.raises(mr.InputError, match=message):
        loaded(tmp_path)


def test_linked_files_of_other_places_are_images(tmp_path):
    """A subset that is made of links, as people do with ImageNet."""
    put(tmp_path / "store", 12)
    for split, rows in (("train", range(8)), ("test", range(8, 12))):
        for i in rows:
            file = tmp_path / "data" / split / "ab"[i % 2] / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.symlink_to(tmp_path / "store" / f"{i}.png")
    assert greys(loaded(tmp_path / "data")) == [(i, i % 2) for i in range(8)]
    assert greys(loaded(tmp_path / "data", "test")) == [(i, i % 2) for i in range(8, 12)]


def test_results_below_the_images_are_no_class(vit, tmp_path, said):
    for i, name in enumerate(("ant", "bee")):
        put(tmp_path / name, 10, 100 * i)
    first = mr.probe(
        vit, f"imagefolder:{tmp_path}", baselines=False, out=tmp_path / "runs" / "report"
    )
    put(tmp_path / "bee" / "runs", 1, 7)  # not ours: an image of the class
    assert (tmp_path / "runs" / "report" / "report.png").is_file() and len(first)
    again = loaded(tmp_path)
    assert again.classes == ["ant", "bee"] and len(again) + len(loaded(tmp_path, "test")) == 21
    put(tmp_path / "runs" / "cat", 3)  # a folder that holds other things too is a class
    assert loaded(tmp_path).classes == ["ant", "bee", "runs"]
    assert len(loaded(tmp_path)) + len(loaded(tmp_path, "test")) == 24


def test_class_names_with_accents_may_be_written_in_two_ways(tmp_path):
    one, other = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    put(tmp_path / "train" / one, 4, 10)
    put(tmp_path / "train" / "bar", 4)
    put(tmp_path / "val" / other, 2, 20)
    test = loaded(tmp_path, "test")
    assert test.classes == ["bar", one] and greys(test) == [(20, 1), (21, 1)]
    put(tmp_path / "train" / other, 4, 30)
    with pytest.raises(mr.InputError, match=f"holds {one} twice, with accents written in two ways"):
        loaded(tmp_path)


def test_an_archive_is_to_be_unpacked(tmp_path):
    (tmp_path / "photos.zip").write_bytes(b"PK")
    message = r"photos\.zip is an archive: unpack it first, and give a folder of images"
    with pytest.raises(mr.InputError, match=message):
        loaded(tmp_path / "photos.zip")


def test_two_splits_that_are_one_folder_are_refused(tmp_path):
    put(tmp_path / "train" / "ant", 4)
    (tmp_path / "val").symlink_to(tmp_path / "train")
    with pytest.raises(mr.InputError, match=r"val and .*train are the same folder"):
        loaded(tmp_path)


def test_hidden_entries_are_left_out_at_every_level(tmp_path, said):
    for name in ("ant", "bee"):
        put(tmp_path / name, 5)
        put(tmp_path / name / ".ipynb_checkpoints", 5)
        put(tmp_path / name / "deep" / "__MACOSX", 5)
        put(tmp_path / name, 1, ending="jpg", name="._")
        put(tmp_path / name / "@eaDir", 2)
    for name in (".ipynb_checkpoints", "__MACOSX", ".git"):
        put(tmp_path / name / "ant", 5)
    data = loaded(tmp_path)
    assert data.classes == ["ant", "bee"] and len(data) + len(loaded(tmp_path, "test")) == 10
    assert said.messages[0].endswith("images; 2 classes: ant, bee")  # and nothing was left out


def test_links_are_followed_and_circles_end(tmp_path, said):
    put(tmp_path / "store" / "more", 3, 20)
    put(tmp_path / "cats" / "deep", 3, 30)
    put(tmp_path / "data" / "ant", 4)
    put(tmp_path / "data" / "bee", 4, 100)
    (tmp_path / "data" / "ant" / "linked").symlink_to(tmp_path / "store" / "more")
    (tmp_path / "data" / "ant" / "again").symlink_to(tmp_path / "store" / "more")
    (tmp_path / "data" / "ant" / "up").symlink_to(tmp_path / "data" / "ant")
    (tmp_path / "data" / "ant" / "self").symlink_to(tmp_path / "data" / "ant" / "self")
    (tmp_path / "data" / "ant" / "same.png").symlink_to(tmp_path / "data" / "ant" / "0.png")
    (tmp_path / "data" / "ant" / "gone.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "data" / "cat").symlink_to(tmp_path / "cats")
    found = greys(loaded(tmp_path / "data")) + greys(loaded(tmp_path / "data", "test"))
    expected = [(i, 0) for i in (0, 1, 2, 3, 20, 21, 22)]
    expected += [(100 + i, 1) for i in range(4)] + [(30 + i, 2) for i in range(3)]
    assert sorted(found) == sorted(expected)
    assert said.messages[0].endswith("3 classes: ant, bee, cat; left out: broken links (2)")


ENDINGS = ("jpg", "jpeg", "jfif", "JPG", "png", "gif", "pgm", "ppm", "pbm", "bmp", "webp", "tif")
ENDINGS += ("tiff", "tga", "jp2", "ico", "avif", "dib", "pcx", "qoi")


def test_every_ending_counts_and_what_is_left_out_is_said(tmp_path, said):
    for ending in ENDINGS:
        put(tmp_path / "ant", 1, 255, ending, name=ending)
    put(tmp_path / "bee", 3)
    for name in ("a.txt", "b.TXT", "c.npy", "README"):
        (tmp_path / "bee" / name).write_text("x")
    (tmp_path / "labels.csv").write_text("x")
    os.mkfifo(tmp_path / "bee" / "pipe.png")
    (tmp_path / "empty").mkdir()
    parts = [loaded(tmp_path), loaded(tmp_path, "test")]
    labels = np.concatenate([part.labels for part in parts])
    assert np.bincount(labels).tolist() == [len(ENDINGS), 3]
    assert all(grey > 250 for part in parts for grey, label in greys(part) if label == 0)
    assert said.messages[0].endswith(
        "2 classes: ant, bee; left out: .txt (2), .csv beside the folders of classes (1), "
        ".npy (1), folders without images such as empty (1), pipes and sockets (1), without "
        "ending (1)"
    ), said.messages[0]


def test_sixteen_bit_folders_keep_their_values(tmp_path):
    for name, value in (("dark", 2_000), ("light", 50_000)):
        (tmp_path / name).mkdir()
        for i in range(4):
            pixels = np.full((8, 8), value + i, dtype=np.uint16)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    assert {(grey, label) for grey, label in greys(loaded(tmp_path))} == {(8, 0), (195, 1)}


def test_a_float_image_outside_of_its_range_is_named(tmp_path):
    put(tmp_path / "ant", 4)
    Image.new("F", (8, 8), 300).save(tmp_path / "ant" / "x.tiff")
    everything = [loaded(tmp_path, split) for split in ("trainval", "test")]
    message = r"^\S*ant/x\.tiff: expected an image of floats \(mode F"
    with pytest.raises(mr.InputError, match=message):
        [greys(part) for part in everything]


def tiny_imagenet(path):
    for i, name in enumerate(("n01", "n02")):
        put(path / "train" / name / "images", 10, 100 * i)
        (path / "train" / name / f"{name}_boxes.txt").write_text("0.png\t0\t0\t8\t8\n")
    put(path / "val" / "images", 6, 50, "JPEG", name="val_")
    lines = [f"val_{i}.JPEG\tn0{1 + i % 2}\t0\t0\t8\t8" for i in range(6)]
    (path / "val" / "val_annotations.txt").write_text("\r\n".join(lines) + "\r\n")
    put(path / "test" / "images", 5, 80, "JPEG", name="test_")
    (path / "wnids.txt").write_text("n02\nn01\n")


def test_tiny_imagenet_as_its_zip_has_it(tmp_path, said):
    tiny_imagenet(tmp_path)
    assert sizes(tmp_path) == {"train": 18, "val": 2, "test": 6, "trainval": 20}
    assert greys(loaded(tmp_path, "test")) == [(50 + i, i % 2) for i in range(6)]
    assert said.messages[0].endswith(
        "6 test (its val) images; 2 classes: n01, n02; test has no labels and is left out; "
        "left out: .txt (2)"
    )


def test_annotations_that_do_not_fit_are_said(tmp_path, said):
    tiny_imagenet(tmp_path)
    put(tmp_path / "val" / "images", 1, 9, name="unlisted")
    (tmp_path / "val" / "images" / "val_0.JPEG").unlink()
    assert greys(loaded(tmp_path, "test")) == [(50 + i, i % 2) for i in range(1, 6)]
    assert "images that val_annotations.txt does not list (1)" in said.messages[0]
    assert "lines of val_annotations.txt without image (1)" in said.messages[0]
    (tmp_path / "val" / "val_annotations.txt").write_text("val_1.JPEG\tn09\t0\t0\t8\t8\n")
    with pytest.raises(mr.InputError, match="names classes that train has not: n09"):
        loaded(tmp_path)


def test_the_command_says_once_what_it_read(tmp_path):
    for name in ("ant", "bee"):
        put(tmp_path / "data" / "train" / name, 12, 50)
        put(tmp_path / "data" / "valid" / name, 4, 60)
    arguments = ["probe", "simmim_digits", f"imagefolder:{tmp_path}/data", "--blocks", "0"]
    done = subprocess.run(
        [sys.executable, "-m", "mimrefiner", *arguments, "--no-baselines", "--out", tmp_path / "o"],
        capture_output=True,
        text=True,
        env={**os.environ, "MIMREFINER_CACHE": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == [
        f"imagefolder:{tmp_path}/data: 22 train, 2 val (drawn from train), 8 test (its valid) "
        "images; 2 classes: ant, bee"
    ]
