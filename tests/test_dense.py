from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import mimrefiner as mr
from mimrefiner.models.blocks import pooled_blocks
from mimrefiner.probes import dense
from mimrefiner.probes import segmentation as masks


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
            shape = (
                (abs(y - cy) < 9) & (abs(x - cx) < 9)
                if i % 2
                else (y - cy) ** 2 + (x - cx) ** 2 < 100
            )
            colour = (220, 60, 60) if i % 2 else (60, 60, 220)
            pixels = rng.integers(0, 60, (40, 40, 3)).astype(np.uint8)
            pixels[shape] = colour
            Image.fromarray(pixels).save(tmp_path / "images" / split / f"{i}.jpg", quality=95)
            Image.fromarray(np.where(shape, 1 + i % 2, 0).astype(np.uint8)).save(
                tmp_path / "masks" / split / f"{i}.png"
            )
    return tmp_path


def parts(folder):
    return (masks.SegmentationFolder(folder, split) for split in ("train", "val"))


def test_every_block_learns_colours(vit, folder):
    config = dense.DenseConfig(3, epochs=20, batch_size=8)
    rows = dense.dense_probe(vit, *parts(folder), config)
    assert rows["block"].tolist() == [0, 1, 2]
    assert (rows["value"] > 0.5).all()
    again = dense.dense_probe(vit, *parts(folder), config)
    assert rows.equals(again)
    config = replace(config, epochs=0.1, learning_rates=(1e-9,))
    untrained = dense.dense_probe(vit, *parts(folder), config)
    assert (rows["value"] > untrained["value"]).all()
    with pytest.raises(mr.InputError, match="block 3 is out of range"):
        dense.dense_probe(vit, *parts(folder), replace(config, blocks=(3,)))


def test_maps_keep_the_places_of_patches(vit):
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = vit.forward_intermediates(images, intermediates_only=True)
        cls = pooled_blocks(vit, images, (0, 1, 2), ("cls",))["cls"]
    maps, cls_maps = dense.token_maps(vit, images, (0, 1, 2))
    for block in range(3):
        assert torch.allclose(maps[block], expected[block], atol=1e-5)
        assert torch.equal(cls_maps[block], cls[block][:, :, None, None].expand(2, 32, 4, 4))


def test_mean_iou_equals_counting_by_hand():
    guess, mask = torch.randint(3, (2, 4, 4)), torch.randint(3, (2, 4, 4))
    mask[0, 0, :2] = masks.IGNORE

    def model(images):
        return torch.nn.functional.one_hot(guess, 3).permute(0, 3, 1, 2).float()[None]

    batches = [(torch.zeros(2, 3, 4, 4), mask)]
    found = dense.mean_iou(model, batches, dense.DenseConfig(3), window=4, device="cpu")
    counted = mask != masks.IGNORE
    by_hand = []
    for c in range(3):
        a, b = (guess == c) & counted, (mask == c) & counted
        by_hand.append(((a & b).sum() / (a | b).sum()).item())
    assert found.item() == pytest.approx(np.mean(by_hand))


def test_ade20k_settings_are_the_papers():
    config = dense.ade20k()
    assert (config.epochs, config.batch_size, config.learning_rates, config.ignore_zero) == (
        50,
        16,
        (0.1,),
        True,
    )
    assert (config.join, config.stride) == (False, None)
    assert (config.classes, config.blocks) == (150, "all")
    config = dense.ade20k_transfer(24)
    assert config.classes == 150
    assert config.blocks == (11, 15, 19, 23)  # -13, -9, -5, -1
    assert (config.epochs, config.batch_size, len(config.learning_rates), config.ignore_zero) == (
        50,
        16,
        9,
        True,
    )
    assert (config.scale, config.max_share, config.stride, config.enlarge) == (
        (0.5, 2.0),
        0.75,
        170,
        "nearest",
    )
    assert (config.join, config.cls) == (True, True)
    assert dense.ade20k_transfer(12).blocks == (3, 7, 11)


def test_a_window_of_the_images_size_is_a_plain_forward(vit):
    model = dense.DenseProbes(vit, dense.DenseConfig(3, blocks=(0, 2))).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        plain = model(images)
        slid = list(dense.slide(model, images, 32, 20, "bilinear"))
    assert len(slid) == 2
    for logits, found in zip(plain, slid, strict=True):
        assert torch.equal(
            found,
            torch.nn.functional.interpolate(
                logits, size=(32, 32), mode="bilinear", align_corners=False
            ),
        )


@pytest.mark.parametrize("size", [(70, 32), (61, 45), (33, 90), (20, 50)])
def test_sliding_equals_a_loop_over_pixels(vit, size):
    """Every pixel is the mean of what the windows over it say; where the image ends, a window ends
    with it.
    """
    model = dense.DenseProbes(vit, dense.DenseConfig(3, blocks=(2,))).eval()
    images, window, stride = torch.randn(1, 3, *size), 32, 20
    padded = torch.zeros(1, 3, max(size[0], window), max(size[1], window))
    padded[..., : size[0], : size[1]] = images

    def starts(side):
        found = [0]
        while found[-1] + window < side:
            found.append(min(found[-1] + stride, side - window))
        return found

    said = {}
    with torch.no_grad():
        for top in starts(padded.shape[2]):
            for left in starts(padded.shape[3]):
                logits = model(padded[..., top : top + window, left : left + window])[0, 0]
                for y in range(window):
                    for x in range(window):
                        # The nearest of 4 x 4 patches
                        said.setdefault((top + y, left + x), []).append(logits[:, y // 8, x // 8])
        (found,) = dense.slide(model, images, window, stride, "nearest")
    assert found.shape == (1, 3, *size)
    for (y, x), values in said.items():
        if y < size[0] and x < size[1]:
            assert torch.allclose(found[0, :, y, x], torch.stack(values).mean(0), atol=1e-5)


def test_squares_keep_image_and_mask_together():
    """The red channel tells the class, so that every pixel of a square can be checked."""
    rng = np.random.default_rng(0)
    mask = np.repeat(np.repeat(rng.integers(5, size=(3, 6)), 20, 0), 20, 1).astype(np.uint8)
    image = np.zeros((60, 120, 3), np.uint8)
    image[..., 0] = 50 * mask
    config = dense.DenseConfig(5, scale=(0.5, 2.0))
    for _ in range(20):
        square, labels = masks.random_square(
            Image.fromarray(image), Image.fromarray(mask), 32, config, (7, 7, 7), rng
        )
        pixels, labels = np.asarray(square)[..., 0].astype(int), np.asarray(labels)
        assert pixels.shape == labels.shape == (32, 32)
        inside = labels != masks.IGNORE
        assert (pixels[~inside] == 7).all()
        assert (
            abs(pixels - 50 * labels.astype(int))[inside] < 25
        ).mean() > 0.8  # but for blurred borders
    half = Image.fromarray(np.repeat([[0] * 100 + [1] * 20], 60, 0).astype(np.uint8))
    shares = []
    for most in (1.0, 0.75):
        config = dense.DenseConfig(2, scale=(1.0, 1.0), max_share=most)
        squares = [
            masks.random_square(Image.fromarray(image), half, 32, config, (7, 7, 7), rng)[1]
            for _ in range(100)
        ]
        counts = [np.bincount(np.asarray(x).ravel(), minlength=2) for x in squares]
        shares.append(np.mean([count.max() / 1024 <= 0.75 for count in counts]))
    assert shares[1] > shares[0] + 0.2  # squares of one class are drawn again


def test_transfer_joins_blocks_and_validation_chooses_the_rate(vit, folder):
    train, val = parts(folder)
    config = dense.ade20k_transfer(len(vit.blocks))
    assert config.blocks == (2,)
    changes = {"classes": 3, "ignore_zero": False, "learning_rates": (1e-9, 0.1), "stride": 20}
    config = replace(config, epochs=20, batch_size=8, blocks=(0, 2), **changes)
    rows = dense.dense_probe(vit, train, val, config, val=val)
    assert rows[["block", "pool"]].to_numpy().tolist() == [[2, "tokens"], [2, "tokens+cls"]]
    assert rows["setting"].tolist() == ["lr=0.1 blocks=0+2"] * 2
    assert (rows["value"] > 0.5).all()
    assert vit.blocks[0].attn.qkv.weight.requires_grad
    with pytest.raises(
        mr.InputError, match="choosing among 2 learning rates needs validation images"
    ):
        dense.dense_probe(vit, train, val, config)
    with pytest.raises(
        mr.InputError, match="stride must be between 1 and the window of 32 pixels, got 33"
    ):
        dense.dense_probe(vit, train, val, replace(config, stride=33), val=val)


def test_probes_do_not_disturb_each_other(vit, folder):
    trained = []
    for rates in ((0.1,), (0.1, 0.5)):
        config = dense.DenseConfig(3, blocks=(1,), epochs=1, batch_size=8, learning_rates=rates)
        model = dense.DenseProbes(vit, config)
        dense._train(model, next(parts(folder)), config, torch.device("cpu"), 0)
        trained.append([layer.weight for layer in model.layers])
    assert torch.allclose(trained[0][0], trained[1][0], atol=1e-6)
    assert not torch.allclose(trained[1][0], trained[1][1], atol=1e-2)


def test_bad_folders_are_named(vit, folder, tmp_path):
    with pytest.raises(mr.InputError, match="expected PATH/images/SPLIT"):
        masks.SegmentationFolder(folder, "test")
    train, val = parts(folder)
    with pytest.raises(mr.InputError, match="a mask holds class 2, expected classes 0 to 1"):
        dense.dense_probe(vit, train, val, dense.DenseConfig(2, epochs=1))
    (folder / "masks" / "val" / "3.png").write_bytes(b"no image")
    with pytest.raises(mr.InputError, match="cannot be decoded"):
        val[3]
    (folder / "masks" / "val" / "3.png").unlink()
    with pytest.raises(mr.InputError, match=r"3\.jpg has no mask"):
        masks.SegmentationFolder(folder, "val")
