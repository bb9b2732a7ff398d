"""One image: every mode, type and shape becomes the right 8-bit RGB value, or one line."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

import mimrefiner as mr
from mimrefiner.data.images import image_endings, to_pil


def values(image):
    """The colour of an even image, as one number where it is grey."""
    colours = np.unique(np.asarray(to_pil(image)).reshape(-1, 3), axis=0)
    assert len(colours) == 1
    return int(colours[0, 0]) if len(set(colours[0].tolist())) == 1 else tuple(colours[0].tolist())


SIXTEEN = [(0, 0), (128, 0), (129, 1), (2_000, 8), (32_768, 128), (50_000, 195), (65_535, 255)]


@pytest.mark.parametrize(("value", "expected"), SIXTEEN)
@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_sixteen_bits_are_scaled_by_their_range(value, expected, ending, tmp_path):
    pixels, file = np.full((4, 6), value, dtype=np.uint16), tmp_path / f"x.{ending}"
    if ending == "pgm":  # two bytes of a number, the higher first
        file.write_bytes(b"P5 6 4 65535\n" + pixels.astype(">u2").tobytes())
    else:
        Image.fromarray(pixels).save(file)
    assert values(file) == values(file.read_bytes()) == expected
    with Image.open(file) as image:
        assert values(image) == expected
    assert values(pixels) == values(torch.from_numpy(pixels)) == expected


def test_big_and_little_ends_are_the_same(tmp_path):
    pixels = np.full((4, 6), 50_000, dtype=np.uint16)
    for order in "<>":
        header = (b"II*\0", b"MM\0*")[order == ">"]
        entries = [
            (256, 6),
            (257, 4),
            (258, 16),
            (259, 1),
            (262, 1),
            (273, 200),
            (278, 4),
            (279, 48),
        ]
        short = np.dtype(f"{order}u2")
        table = b"".join(
            np.array([tag, 3], short).tobytes()
            + np.array([1], f"{order}u4").tobytes()
            + np.array([value, 0], short).tobytes()
            for tag, value in entries
        )
        start = np.array([8], f"{order}u4").tobytes() + np.array([len(entries)], short).tobytes()
        body = (header + start + table + bytes(4)).ljust(200, b"\0")
        (tmp_path / "x.tif").write_bytes(body + pixels.astype(short).tobytes())
        assert values(tmp_path / "x.tif") == 195


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (np.full((4, 6), 7, np.uint8), 7),
        (np.full((4, 6, 1), 7, np.uint8), 7),
        (np.full((1, 4, 6), 7, np.uint8), 7),
        (np.full((4, 6), True), 255),
        (np.full((4, 6), 0.5), 128),
        (np.full((4, 6, 3), 1.0, np.float16), 255),
        (torch.full((4, 6), 7, dtype=torch.uint8), 7),
        (torch.full((1, 4, 6), 0.2), 51),
        (torch.full((3, 4, 6), 0.2, dtype=torch.bfloat16), 51),
        (torch.full((3, 4, 6), 0.2, requires_grad=True), 51),
        (Image.new("1", (6, 4), 1), 255),
        (Image.new("F", (6, 4), 0.5), 128),
        (Image.new("L", (6, 4), 7), 7),
        (Image.new("LA", (6, 4), (7, 0)), 7),
        (Image.new("RGBA", (6, 4), (1, 2, 3, 0)), (1, 2, 3)),
        (Image.new("CMYK", (6, 4), (0, 255, 255, 0)), (255, 0, 0)),
    ],
)
def test_every_kind_of_number_is_the_same_grey(image, expected):
    assert values(image) == expected and to_pil(image).size == (6, 4)


def test_the_dimension_of_the_channels_is_found():
    colours = np.zeros((5, 6, 3), np.uint8)
    colours[..., 0], colours[0, 0] = 200, (1, 2, 3)
    for pixels in (colours, colours.transpose(2, 0, 1)):
        for image in (pixels, torch.from_numpy(pixels.copy())):
            assert np.array_equal(np.asarray(to_pil(image)), colours)
    # Where both ends may be channels, each kind has its custom
    both = np.arange(3 * 8 * 3, dtype=np.uint8).reshape(3, 8, 3)
    assert np.array_equal(np.asarray(to_pil(both)), both)
    assert np.array_equal(np.asarray(to_pil(torch.from_numpy(both))), both.transpose(1, 2, 0))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.full((3, 8, 8), 1.1), r"an image tensor in 0\.\.1 or of uint8, got 1\.1 to 1\.1"),
        (torch.full((3, 8, 8), -0.1), "expected an image tensor in 0..1"),
        (torch.full((3, 8, 8), torch.nan), "got nan to nan"),
        (np.full((8, 8, 3), 200.0), "expected an image array in 0..1 .* 200 to 200: scale it"),
        (np.full((8, 8, 3), 200), "expected an image array of uint8, uint16, .* got int64"),
        (np.zeros((8, 8, 2), np.uint8), r"1, 3 or 4 channels .* got shape \(8, 8, 2\)"),
        (np.zeros((2, 3, 8, 8), np.uint8), r"got shape \(2, 3, 8, 8\)"),
        (np.zeros((0, 8, 3), np.uint8), r"got shape \(0, 8, 3\)"),
        (np.zeros(8, np.uint8), r"got shape \(8,\)"),
        (Image.new("I", (8, 8), 70_000), r"32-bit whole numbers \(mode I\) from 70000 to 70000"),
        (Image.new("F", (8, 8), 300), r"floats \(mode F\) in 0\.\.1 or of uint8, got 300 to 300"),
        (7, "expected a PIL image, .* or a path, got int"),
        (None, "^7 is missing: leave out rows without an image$"),
        (Image.new("RGB", (0, 0)), r"^7: expected an image with pixels, got size \(0, 0\)$"),
        (b"", "^7 cannot be decoded as an image: it is empty$"),
        (b"x" * 40, "^7 cannot be decoded as an image: Pillow knows no format that begins like it"),
        ({"bytes": None, "path": None}, "^7 is missing: "),
    ],
)
def test_what_no_rule_covers_is_one_line(image, message):
    with pytest.raises(mr.InputError, match=message) as found:
        to_pil(image, "7")
    assert "\n" not in str(found.value)


def test_the_orientation_of_cameras_is_applied_once(tmp_path):
    """Orientation 6: the first row is the right side."""
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, :8] = 255  # the left half is white: turned by 90 degrees clockwise, the upper half
    exif = Image.Exif()
    exif[0x0112] = 6
    for ending in ("jpg", "png", "webp", "tif"):
        file = tmp_path / f"x.{ending}"
        Image.fromarray(pixels).save(file, exif=exif)
        for image in (to_pil(file), to_pil(to_pil(file))):
            assert image.size == (8, 16)
            assert image.getpixel((4, 2))[0] > 250 and image.getpixel((4, 13))[0] < 5


def test_broken_exif_counts_as_none(tmp_path):
    Image.new("RGB", (6, 4), (9, 9, 9)).save(
        tmp_path / "x.png", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x09"
    )
    assert to_pil(tmp_path / "x.png").size == (6, 4)


def test_a_palette_with_transparency_needs_no_warning(tmp_path):
    image = Image.new("P", (6, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(tmp_path / "x.png", transparency=b"\x80\x00")
    assert values(tmp_path / "x.png") == (10, 20, 30)


def test_the_first_of_several_frames_counts(tmp_path):
    frames = [Image.new("RGB", (6, 4), (value, 0, 0)) for value in (200, 100)]
    frames[0].save(tmp_path / "x.tif", save_all=True, append_images=frames[1:])
    assert values(tmp_path / "x.tif") == (200, 0, 0)


def test_a_huge_image_is_named_in_one_line(tmp_path, monkeypatch):
    Image.new("L", (400, 30)).save(tmp_path / "map.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5_000)
    with pytest.raises(mr.InputError, match=r"^\S*map\.png has more than 10,000 pixels"):
        to_pil(tmp_path / "map.png")


def test_a_large_image_needs_no_warning(tmp_path, monkeypatch, recwarn):
    Image.new("L", (400, 30), 7).save(tmp_path / "map.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    assert to_pil(tmp_path / "map.png").getpixel((0, 0)) == (7, 7, 7)
    assert not recwarn.list


def test_a_file_that_cannot_be_read_is_not_called_damaged(tmp_path):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(mr.InputError, match=r"folder\.png cannot be read: Is a directory$"):
        to_pil(tmp_path / "folder.png")


@pytest.mark.parametrize("cut", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "gif", "tif", "bmp"])
def test_half_a_file_is_named(ending, cut, tmp_path):
    rng, whole = np.random.default_rng(0), io.BytesIO()
    kind = Image.registered_extensions()[f".{ending}"]
    Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(whole, kind)
    file = tmp_path / f"half.{ending}"
    file.write_bytes(whole.getvalue()[: int(cut * len(whole.getvalue()))])
    with pytest.raises(mr.InputError, match=rf"^\S*half\.{ending} cannot be decoded as an image"):
        to_pil(file)


def test_every_ending_that_pillow_shows_pixels_of():
    assert {".jfif", ".pgm", ".gif", ".jp2", ".tga", ".ico", ".avif", ".pbm"} <= image_endings()
    assert not {".pdf", ".txt", ".mpg", ".h5", ".eps", ".npy", ""} & image_endings()
