import os

import numpy as np
import pytest
import torch
from PIL import Image

import mimrefiner as mr
from mimrefiner.data.subsets import few_labels, inat18_shots, read_list
from mimrefiner.study.labelled import labelled_sets

COUNTS = {"0": 4, "1": 1, "2": 7, "10": 12, "11": 3}  # images of each class


@pytest.fixture
def tree(tmp_path):
    """As iNaturalist 2018 lies there: folders by number, names that say nothing."""
    rng = np.random.default_rng(0)
    for part, share in (("train", 1), ("val", 0)):
        for name, n in COUNTS.items():
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for number in rng.choice(10**6, n if share else 2, replace=False):
                Image.new("RGB", (8, 8)).save(folder / f"{number:06x}.jpg")
    return tmp_path


def published_rule(folder, shots, seed):
    """The rule as it is published, from the folder alone."""
    generator, found = torch.Generator().manual_seed(seed), []
    for name in sorted(int(name) for name in os.listdir(folder)):
        files = sorted(os.listdir(folder / str(name)))
        order = torch.randperm(len(files), generator=generator)[:shots]
        found += [f"{name}/{files[i]}" for i in order]
    return found


def names(part):
    return [f"{part.classes[part.labels[i]]}/{part.file_name(i)}" for i in range(len(part))]


@pytest.mark.parametrize("split", [1, 2, 3])
@pytest.mark.parametrize("shots", [1, 5, 10])
def test_inaturalists_splits_are_the_published_ones(tree, shots, split):
    images = mr.load_dataset(f"imagefolder:{tree}", split="trainval")
    part = inat18_shots(images, shots, split)
    assert names(part) == published_rule(tree / "train", shots, split)
    assert len(part) == sum(min(shots, n) for n in COUNTS.values())
    assert part.drawn == f"{shots} per class, iNaturalist's rule, split {split}"
    via_command = labelled_sets(f"imagefolder:{tree}", labels=shots, listed=f"inat18:{split}")
    assert names(via_command["train"]) == names(part) and "val" not in via_command


def test_folders_go_by_number_and_splits_differ(tree):
    images = mr.load_dataset(f"imagefolder:{tree}", split="trainval")
    assert images.classes == ["0", "1", "10", "11", "2"]  # as folders are sorted
    one, two = (inat18_shots(images, 1, split) for split in (1, 2))
    assert [one.classes[label] for label in one.labels] == ["0", "1", "2", "10", "11"]
    assert names(one) != names(two)
    five = inat18_shots(images, 5, 1)
    assert set(names(one)) < set(names(five))


@pytest.mark.parametrize(
    "written",
    ["{}\n", "n01/{}\n", '    "{}",\n', "train/n01/{} 5\n"],
    ids=["MSN and SimCLR", "with folders", "a Python list", "with labels"],
)
def test_published_lists_are_read_in_any_form(tree, tmp_path, written):
    images = mr.load_dataset(f"imagefolder:{tree}", split="trainval")
    chosen = [images.file_name(i) for i in (20, 3, 11)]
    file = tmp_path / "1percent.txt"
    file.write_text("INFO = 'https://example.org/1percent.txt'\n")
    with file.open("a") as stream:
        stream.writelines(written.format(name) for name in chosen)
    part = read_list(images, file)
    assert [part.file_name(i) for i in range(3)] == chosen
    assert part.labels.tolist() == images.labels[[20, 3, 11]].tolist()
    assert part.drawn == "1percent.txt, 3 images"
    assert len(images) == 27 and images.drawn == ""


@pytest.fixture
def alike(tmp_path):
    """Two classes whose files have the same names, with a space in some."""
    for part, n in (("train", 4), ("test", 2)):
        for name in ("ant", "bee"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(n):
                Image.new("RGB", (8, 8)).save(tmp_path / part / name / f"no {i}.png")
                Image.new("RGB", (8, 8)).save(tmp_path / part / name / f"{i}.png")
    return mr.load_dataset(f"imagefolder:{tmp_path}", split="trainval")


@pytest.mark.parametrize(
    "text",
    [
        "bee/1.png\nant/1.png\nbee/no 2.png\n",
        "/data/train/bee/1.png 1\nelsewhere\\ant\\1.png 0\r\n'train/bee/no 2.png',\n",
        '\ufeff"bee/1.png", "ant/1.png",\r\nbee/no 2.png\r\n',
    ],
)
def test_folders_tell_files_of_one_name_apart(alike, tmp_path, text):
    (tmp_path / "list.txt").write_text(text, encoding="utf-8")
    part = read_list(alike, tmp_path / "list.txt")
    assert names(part) == ["bee/1.png", "ant/1.png", "bee/no 2.png"]
    assert part.labels.tolist() == [1, 0, 1]


def test_a_name_that_may_be_two_files_is_refused(alike, tmp_path):
    file = tmp_path / "list.txt"
    for name in ("1.png", "train/1.png"):
        file.write_text(name)
        message = rf"names {name}, and .* has 2 files of that name, such as .*: write CLASS/NAME"
        with pytest.raises(mr.InputError, match=message):
            read_list(alike, file)
    (tmp_path / "train" / "bee" / "3.png").unlink()
    rest = mr.load_dataset(f"imagefolder:{tmp_path}", split="trainval")
    file.write_text("bee/3.png")  # ant's is another image
    with pytest.raises(mr.InputError, match=r"names 1 of 1 images that .* does not have"):
        read_list(rest, file)


def test_images_that_are_named_twice_are_taken_once(alike, tmp_path, caplog):
    (tmp_path / "list.txt").write_text("bee/1.png\nant/0.png\nbee/1.png\n")
    part = read_list(alike, tmp_path / "list.txt")
    assert names(part) == ["bee/1.png", "ant/0.png"] and part.drawn == "list.txt, 2 images"
    assert "list.txt names 1 images twice: each is taken once" in caplog.text


def test_what_does_not_fit_a_list_is_said_in_one_line(tree, tmp_path):
    images = mr.load_dataset(f"imagefolder:{tree}", split="trainval")
    with pytest.raises(mr.InputError, match=r"no\.txt does not exist: expected a published list"):
        read_list(images, tmp_path / "no.txt")
    file = tmp_path / "list.txt"
    file.write_text("nothing here\n")
    with pytest.raises(mr.InputError, match="names no images: expected names such as"):
        read_list(images, file)
    file.write_text(f"{images.file_name(0)}\nn01440764_5698.JPEG\n")
    message = r"names 1 of 2 images that .* \(trainval\) does not have, such as n01440764_5698"
    with pytest.raises(mr.InputError, match=message):
        read_list(images, file)
    file.write_text("".join(f"{images.file_name(i)}\n" for i in range(27)))
    with pytest.raises(mr.InputError, match="names 27 images, and 1 per class would be about 5"):
        few_labels(images, 1, file=file)
    with pytest.raises(mr.InputError, match="needs images in files of their own"):
        read_list(mr.load_dataset("digits", split="train"), file)
    digits = mr.load_dataset("digits", split="train")
    digits.classes, digits.file_name = ["0", "one"], lambda i: "name"
    with pytest.raises(mr.InputError, match="folders that are named by numbers, 0 to 8141, got 0"):
        inat18_shots(digits, 1, 1)
    with pytest.raises(mr.InputError, match="expected inat18:1, inat18:2 or inat18:3"):
        labelled_sets(f"imagefolder:{tree}", labels=1, listed="inat18:x")
    with pytest.raises(mr.InputError, match="a list of images goes with --labels"):
        labelled_sets(f"imagefolder:{tree}", listed="list.txt")


def test_draws_say_how_they_were_drawn():
    digits = mr.load_dataset("digits", split="train")
    ten = few_labels(digits, 0.1, seed=2)
    assert len(ten) == round(0.1 * len(digits)) and ten.drawn == "10 %, drawn with seed 2"
    counts = np.bincount(ten.labels)
    assert counts.max() - counts.min() <= 2  # the same share of every class
    five = few_labels(digits, 5, seed=2)
    assert np.bincount(five.labels).tolist() == [5] * 10
    assert five.rows.tolist() == few_labels(digits, 5, seed=2).rows.tolist()
    assert five.rows.tolist() != few_labels(digits, 5, seed=3).rows.tolist()
    with pytest.raises(mr.InputError, match="fewer than 1000 shots"):
        few_labels(digits, 1000)


def test_a_benchmark_trains_on_all_images_only_where_nothing_is_chosen():
    parts = labelled_sets("digits")
    assert set(parts) == {"train", "val", "test"}
    whole = labelled_sets("digits", whole=True)
    assert len(whole["train"]) == len(parts["train"]) + len(parts["val"])
    assert set(whole) == {"train", "test"}
