"""Labelled images by their files: folders of classes as they are, and lists in text files."""

import unicodedata

import numpy as np
import pytest
from PIL import Image

import mimrefiner as mr
from mimrefiner.data.listed import class_folders, read_classes, read_list
from mimrefiner.data.vtab import FileImages, Gathered


def put(file, value=0):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (value, 0, 0)).save(file)


def test_hidden_entries_are_no_classes_and_no_images(tmp_path):
    for i, name in enumerate(("ant", "bee")):
        put(tmp_path / name / "0.png", i)
        (tmp_path / name / "._0.png").write_bytes(b"\0\5\x16\7")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    assert class_folders(tmp_path) == ["ant", "bee"]
    images = read_classes(tmp_path, ["bee", "cat", "ant"])
    assert [(image.getpixel((0, 0))[0], label) for image, label in images] == [(0, 2), (1, 0)]
    put(tmp_path / "dog" / "0.png")
    with pytest.raises(mr.InputError, match="a folder dog, which is none of the model's 2 classes"):
        read_classes(tmp_path, ["ant", "bee"])


def test_accents_may_be_written_in_two_ways(tmp_path):
    put(tmp_path / unicodedata.normalize("NFD", "café") / "0.png", 7)
    images = read_classes(tmp_path, ["bar", unicodedata.normalize("NFC", "café")])
    assert images.labels.tolist() == [1] and images[0][0].getpixel((0, 0))[0] == 7


def test_lists_of_windows_and_names_with_spaces(tmp_path):
    for i, name in enumerate(("a b.png", "c.png")):
        put(tmp_path / "images" / name, i)
    file = tmp_path / "train.txt"
    file.write_bytes("\ufeffimages/a b.png 3\r\nimages/c.png 1\r\n".encode())
    images = read_list(file, tmp_path, "own")
    assert [(image.getpixel((0, 0))[0], label) for image, label in images] == [(0, 3), (1, 1)]


def test_sixteen_bits_of_gathered_images_are_scaled(tmp_path):
    for i, value in enumerate((0, 32_896, 65_535)):  # 128 * 257 in the middle
        Image.fromarray(np.full((4, 4), value, np.uint16)).save(tmp_path / f"{i}.png")
    files = [tmp_path / f"{i}.png" for i in range(3)]
    opened = [(Image.open(file), None) for file in files]
    for source in (FileImages(files), opened):
        images = Gathered("own", [source], [0, 1, 2])
        assert [image.getpixel((0, 0))[0] for image, _ in images] == [0, 128, 255]
