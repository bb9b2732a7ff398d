import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image

import mimrefiner as mr
from mimrefiner.data import scenes
from mimrefiner.data.scenes import Labels
from mimrefiner.models.blocks import pooled_blocks
from mimrefiner.probes import dense
from mimrefiner.probes.segmentation import Window, segmented, slide


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


def one_scene(folder, mask, image=None):
    """What is read of a folder with one image, of zeros, and one mask."""
    image = np.zeros((6, 6, 3), np.uint8) if image is None else image
    for kind, pixels in (("images", image), ("masks", mask)):
        (folder / kind / "train").mkdir(parents=True, exist_ok=True)
        held = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
        held.save(folder / kind / "train" / "a.png")
    return scenes.SegmentationFolder(folder, "train")[0]


def test_masks_keep_their_numbers_or_are_refused(tmp_path):
    numbers = np.arange(36).reshape(6, 6) % 3
    palette = Image.fromarray(numbers.astype(np.uint8))
    palette = palette.convert("P")
    palette.putdata(numbers.ravel().tolist())
    for mask in (numbers.astype(np.uint8), numbers.astype(np.uint16), palette):
        assert np.array_equal(np.asarray(one_scene(tmp_path, mask)[1]), numbers)
    assert np.array_equal(np.asarray(one_scene(tmp_path, numbers > 1)[1]), numbers > 1)
    for mask, message in [
        ((numbers * 129).astype(np.uint16), "holds the number 258: expected classes of 0 to 254"),
        (np.stack([numbers] * 3, -1).astype(np.uint8), "is an image of mode RGB: expected a mask"),
        (np.stack([numbers] * 2, -1).astype(np.uint8), "is an image of mode LA: expected a mask"),
    ]:
        with pytest.raises(mr.InputError, match=rf"masks/train/a\.png {message}") as found:
            one_scene(tmp_path, mask)
        assert "\n" not in str(found.value)


def test_images_of_scenes_are_read_as_all_images_are(tmp_path):
    grey = np.full((6, 6), 32_896, np.uint16)  # 128 * 257
    image, _ = one_scene(tmp_path, np.zeros((6, 6), np.uint8), grey)
    assert image.getpixel((0, 0)) == (128, 128, 128)
    (tmp_path / "images" / "train" / "._a.png").write_bytes(b"\0\5\x16\7")  # of macOS
    assert len(scenes.SegmentationFolder(tmp_path, "train")) == 1


def parts(folder):
    return (scenes.SegmentationFolder(folder, split) for split in ("train", "val"))


def small(**changes):
    """Per block, 32 px, three classes."""
    return replace(dense.DenseConfig().at(32), labels=Labels(3), batch_size=8, **changes)


def test_every_block_learns_colours(vit, folder):
    config = small(epochs=20, learning_rates=(1.6,))
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


def test_every_field_of_both_protocols_is_the_published_one():
    """protocols.md, section 5.2, and record.md, section 1.3, written down from there."""
    config = dense.ade20k_transfer(24)
    assert asdict(config) == {
        "labels": {"classes": 150, "ignore_zero": True},
        "blocks": (11, 15, 19, 23),  # -13, -9, -5, -1
        "epochs": 50,
        "batch_size": 16,
        "learning_rates": (1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
        "crop": {
            "size": 224,
            "long": 448,
            "short": 224,
            "ratio": (0.5, 2.0),
            "max_share": 0.75,
            "jitter": (),
            "flip": 0.5,
        },
        "window": {
            "name": "sliding",
            "size": 224,
            "fit": "keep",
            "stride": 170,
            "enlarge": "nearest",
        },
        "join": True,
        "cls": True,
        "evaluate_every": 10,
        "seed": 0,
    }
    assert dense.ade20k_transfer(12).blocks == (3, 7, 11)
    config = dense.ade20k()
    assert (config.epochs, config.batch_size, config.learning_rates) == (50, 16, (0.1,))
    assert (config.blocks, config.join, config.cls) == ("all", False, False)
    assert (config.labels.classes, config.labels.ignore_zero) == (150, True)
    assert (config.window.size, config.window.fit) == (224, "scene")


def test_rates_are_for_256_images_and_weights_begin_as_published(vit, folder, monkeypatch):
    seen = []

    class Seen(torch.optim.SGD):
        def step(self):
            seen.append([group["lr"] for group in self.param_groups])
            return super().step()

    monkeypatch.setattr(torch.optim, "SGD", Seen)
    config = small(epochs=10, blocks=(2,), learning_rates=(0.1, 0.4))
    model = dense.DenseProbes(vit, config)
    for layer in model.layers:
        assert 0.008 < layer.weight.std() < 0.012 and not layer.bias.any()
    dense._train(model, next(parts(folder)), config, 0)
    assert len(seen) == 30  # 3 batches of 8 from 24 images, ten times
    peak, low = 0.1 * 8 / 256, 1e-6
    # Three steps of warm-up that begin at a quarter; the cosine would end one step after the last
    rising = [peak * part / 4 for part in (1, 2, 3)]
    falling = [low + (peak - low) * (1 + math.cos(math.pi * s / 27)) / 2 for s in range(27)]
    assert [rates[0] for rates in seen] == pytest.approx(rising + falling)
    assert max(rates[1] for rates in seen) == pytest.approx(0.4 * 8 / 256)


def test_the_encoder_runs_in_bfloat16_and_the_probes_in_float32(monkeypatch):
    monkeypatch.setattr("mimrefiner.device.has_bfloat16", lambda device: True)
    wide = mr.build_vit(mr.ViTConfig(dim=192, depth=2, num_heads=2))
    model, seen = dense.DenseProbes(wide, small(blocks=(1,))), []
    wide.blocks[1].mlp.fc2.register_forward_hook(lambda module, given, x: seen.append(x.dtype))
    assert model(torch.randn(2, 3, 32, 32)).dtype == torch.float32
    assert seen == [torch.bfloat16]


def test_a_window_of_the_images_size_is_a_plain_forward(vit):
    model = dense.DenseProbes(vit, small(blocks=(0, 2))).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        plain = model(images)
        slid = list(slide(model, images, Window("a", 32, "keep", 20)))
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
    model = dense.DenseProbes(vit, small(blocks=(2,))).eval()
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
        how = Window("a", window, "keep", stride, "nearest")
        (found,) = segmented(model, images, how)
    assert found.shape == (1, 3, *size)
    for (y, x), values in said.items():
        if y < size[0] and x < size[1]:
            assert torch.allclose(found[0, :, y, x], torch.stack(values).mean(0), atol=1e-5)


def test_transfer_joins_blocks_and_validation_chooses_the_rate(vit, folder):
    train, val = parts(folder)
    config = dense.ade20k_transfer(len(vit.blocks))
    assert config.blocks == (2,)
    rates = (1e-9, 1.6)
    config = replace(config.at(32), labels=Labels(3), blocks=(0, 2), learning_rates=rates)
    config = replace(config, epochs=20, batch_size=8)
    rows = dense.dense_probe(vit, train, val, config, val=val)
    assert rows[["block", "pool"]].to_numpy().tolist() == [[2, "tokens"], [2, "tokens+cls"]]
    assert rows["setting"].tolist() == ["lr=1.6 blocks=0+2"] * 2
    assert (rows["value"] > 0.5).all()
    assert vit.blocks[0].attn.qkv.weight.requires_grad
    with pytest.raises(
        mr.InputError, match="choosing among 2 learning rates needs validation images"
    ):
        dense.dense_probe(vit, train, val, config)
    with pytest.raises(mr.InputError, match=r"encoder's input of 32 px: use config.at\(32\)"):
        dense.dense_probe(vit, train, val, dense.ade20k(), val=val)


def test_the_best_on_test_is_asked_for_by_name_and_says_so(vit, folder):
    train, val = parts(folder)
    config = small(epochs=4, blocks=(2,), learning_rates=(0.1, 1.6), evaluate_every=1)
    best = dense.dense_probe(vit, train, val, config, best_on_test=True)
    assert best["setting"].str.endswith("best rate and evaluation on test").all()
    first = replace(config, learning_rates=(0.1,))
    last = dense.dense_probe(vit, train, val, first)["value"][0]
    assert best["value"][0] >= last  # it is one of the four evaluations of two probes


def test_probes_do_not_disturb_each_other(vit, folder):
    trained = []
    for rates in ((0.1,), (0.1, 0.5)):
        config = small(blocks=(1,), epochs=1, learning_rates=tuple(16 * rate for rate in rates))
        model = dense.DenseProbes(vit, config)
        dense._train(model, next(parts(folder)), config, 0)
        trained.append([layer.weight for layer in model.layers])
    assert torch.allclose(trained[0][0], trained[1][0], atol=1e-6)
    assert not torch.allclose(trained[1][0], trained[1][1], atol=1e-2)


def test_bad_folders_are_named(vit, folder, tmp_path):
    with pytest.raises(mr.InputError, match="expected PATH/images/SPLIT"):
        scenes.SegmentationFolder(folder, "test")
    train, val = parts(folder)
    with pytest.raises(mr.InputError, match="a mask holds class 2, expected classes 0 to 1"):
        dense.dense_probe(vit, train, val, replace(small(epochs=1), labels=Labels(2)))
    (folder / "masks" / "val" / "3.png").write_bytes(b"no image")
    with pytest.raises(mr.InputError, match="cannot be decoded"):
        val[3]
    (folder / "masks" / "val" / "3.png").unlink()
    with pytest.raises(mr.InputError, match=r"3\.jpg has no mask"):
        scenes.SegmentationFolder(folder, "val")


def test_ade20k_is_read_as_its_zip_has_it(folder):
    """images/training, annotations/validation and so on; label 0 is no class."""
    expected = [(np.asarray(image), np.asarray(mask)) for image, mask in next(parts(folder))]
    (folder / "masks").rename(folder / "annotations")
    for kind in ("images", "annotations"):
        for ours, theirs in (("train", "training"), ("val", "validation")):
            (folder / kind / ours).rename(folder / kind / theirs)
    train, val = parts(folder)
    assert len(train) == 24 and len(val) == 8
    for found, pair in zip(train, expected, strict=True):
        assert all((np.asarray(x) == y).all() for x, y in zip(found, pair, strict=True))
