import numpy as np
import pytest
import torch
from PIL import Image

import mimrefiner as mr
from mimrefiner.probes import dense


@pytest.fixture
def folder(tmp_path):
    """Synthetic scenes: a bright square (class 1) or disc (class 2) on dark noise (class 0)."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:40, :40]
    for split, n in (("train", 24), ("val", 8)):
        for kind in ("images", "masks"):
            (tmp_path / kind / split).mkdir(parents=True)
        for i in range(n):
            cy, cx = rng.integers(10, 30, 2)
            shape = (abs(y - cy) < 9) & (abs(x - cx) < 9) if i % 2 else (y - cy) ** 2 + (x - cx) ** 2 < 100
            colour = (220, 60, 60) if i % 2 else (60, 60, 220)
            pixels = rng.integers(0, 60, (40, 40, 3)).astype(np.uint8)
            pixels[shape] = colour
            Image.fromarray(pixels).save(tmp_path / "images" / split / f"{i}.jpg", quality=95)
            Image.fromarray(np.where(shape, 1 + i % 2, 0).astype(np.uint8)).save(tmp_path / "masks" / split / f"{i}.png")
    return tmp_path


def parts(folder):
    return (dense.SegmentationFolder(folder, split) for split in ("train", "val"))


def test_every_block_learns_colours(vit, folder):
    config = dense.DenseConfig(epochs=20, batch_size=8)
    rows = dense.dense_probe(vit, *parts(folder), classes=3, config=config)
    assert rows["block"].tolist() == [0, 1, 2]
    assert (rows["value"] > 0.5).all()
    again = dense.dense_probe(vit, *parts(folder), classes=3, config=config)
    assert rows.equals(again)
    untrained = dense.dense_probe(vit, *parts(folder), classes=3, config=dense.DenseConfig(epochs=0.1, batch_size=8, lr=1e-9))
    assert (rows["value"] > untrained["value"]).all()


def test_maps_keep_the_places_of_patches(vit):
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = vit.forward_intermediates(images, intermediates_only=True)
    for found, other in zip(dense.patch_maps(vit, images, (0, 1, 2)), expected, strict=True):
        assert torch.allclose(found, other, atol=1e-5)


def test_mean_iou_equals_counting_by_hand(vit):
    model = dense.DenseProbes(vit, (2,), 3, seed=0)
    guess, mask = torch.randint(3, (2, 4, 4)), torch.randint(3, (2, 4, 4))
    mask[0, 0, :2] = dense.IGNORE
    model.forward = lambda images: torch.nn.functional.one_hot(guess, 3).permute(0, 3, 1, 2).float()[None]
    found = dense.mean_iou(model, [(torch.zeros(2, 3, 4, 4), mask)], 3, torch.device("cpu"))
    counted = mask != dense.IGNORE
    by_hand = []
    for c in range(3):
        a, b = (guess == c) & counted, (mask == c) & counted
        by_hand.append(((a & b).sum() / (a | b).sum()).item())
    assert found.item() == pytest.approx(np.mean(by_hand))


def test_ade20k_settings_are_the_papers():
    config = dense.ade20k()
    assert (config.epochs, config.batch_size, config.lr, config.ignore_zero) == (50, 16, 0.1, True)


def test_bad_folders_are_named(vit, folder, tmp_path):
    with pytest.raises(mr.InputError, match="expected PATH/images/SPLIT"):
        dense.SegmentationFolder(folder, "test")
    train, val = parts(folder)
    with pytest.raises(mr.InputError, match="a mask holds class 2, expected classes 0 to 1"):
        dense.dense_probe(vit, train, val, classes=2, config=dense.DenseConfig(epochs=1))
    (folder / "masks" / "val" / "3.png").write_bytes(b"no image")
    with pytest.raises(mr.InputError, match="cannot be decoded"):
        val[3]
    (folder / "masks" / "val" / "3.png").unlink()
    with pytest.raises(mr.InputError, match=r"3\.jpg has no mask"):
        dense.SegmentationFolder(folder, "val")
