import math
import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform

import mimrefiner as mr
from mimrefiner.data import labelled
from mimrefiner.data.datasets import ImageDataset
from mimrefiner.data.labelled import (
    ERASE_DRAWS,
    Augmentation,
    Mixing,
    drawn_from,
    erase,
    erased_box,
    labelled_batches,
)
from mimrefiner.data.views import Order
from mimrefiner.training.recipes import RAND_AUGMENT

PLAIN = {"mean": (0.0,) * 3, "std": (1.0,) * 3}


@pytest.fixture(scope="module")
def photographs():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 40, 60, 3), dtype=np.uint8)
    images = [Image.fromarray(x) for x in pixels]
    return ImageDataset("noise", "train", images.__getitem__, [0, 1, 2, 0, 1, 2])


def batches(dataset, augmentation, first=0, steps=3, seed=0, part=(0, 1), **how):
    order = Order(2, steps, seed, first, part)
    return [
        (x.numpy(), y.tolist())
        for x, y in labelled_batches(dataset, augmentation, order, **{**PLAIN, **how})
    ]


def test_images_do_not_depend_on_where_the_sequence_is_entered(photographs):
    """A resumed run, loader processes and global generators change nothing."""
    full = Augmentation(32, rand_augment=RAND_AUGMENT, erasing=1.0)
    whole = batches(photographs, full, steps=6)
    random.seed(1), np.random.seed(1)  # noqa: NPY002
    later = batches(photographs, full, first=4, steps=6, num_workers=1)
    for (x, y), (x2, y2) in zip(whole[4:], later, strict=True):
        assert np.array_equal(x, x2) and y == y2
    other = batches(photographs, full, steps=6, seed=1)
    assert not any(np.array_equal(a[0], b[0]) for a, b in zip(whole, other, strict=True))


def test_processes_share_a_batch(photographs):
    crops = Augmentation(32, rand_augment=RAND_AUGMENT, erasing=1.0)
    (whole,) = batches(photographs, crops, steps=1)
    shares = [batches(photographs, crops, steps=1, part=(rank, 2))[0] for rank in (0, 1)]
    assert np.array_equal(np.concatenate([x for x, _ in shares]), whole[0])
    assert [label for _, y in shares for label in y] == whole[1]


def test_an_image_is_squeezed_or_resized_before_the_crop(photographs):
    squeezed = batches(photographs, Augmentation(32, crop_scale=None, flip=False), steps=1)[0][0]
    first = next(Order(2, 1, 0).batches(6))[0][1]
    image = photographs[first][0]
    expected = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC))
    assert np.array_equal(np.rint(squeezed[0] * 255), expected.transpose(2, 0, 1))
    # 40 x 60 pixels become 80 x 120; a crop of everything that fits is the centre of 4 : 3
    whole = Augmentation(80, resize=80, crop_scale=(1.0, 1.0), flip=False)
    resized = batches(photographs, whole, steps=1)[0][0]
    bigger = image.resize((120, 80), Image.Resampling.BICUBIC)
    centre = np.asarray(bigger.resize((80, 80), Image.Resampling.BICUBIC, (6, 0, 113, 80)))
    assert np.array_equal(np.rint(resized[0] * 255), centre.transpose(2, 0, 1))


def test_half_of_the_images_are_mirrored(photographs):
    halves = Augmentation(16, crop_scale=None)
    plain = np.asarray(photographs[0][0].resize((16, 16), Image.Resampling.BICUBIC))
    kinds = [x for x, _ in batches(photographs.subset([0, 0]), halves, steps=100)]
    pixels = [np.rint(255 * x).transpose(1, 2, 0) for batch in kinds for x in batch]
    flipped = [np.array_equal(x, plain[:, ::-1]) for x in pixels]
    assert all(f or np.array_equal(x, plain) for f, x in zip(flipped, pixels, strict=True))
    assert 75 <= sum(flipped) <= 125


def test_rand_augment_is_timms_with_the_published_settings():
    """Two operations of 15, each with probability 1/2, magnitude 9 +- 0.5 out of 10."""
    ours = labelled.rand_augment(RAND_AUGMENT, 224, (124, 116, 104))
    assert len(ours.ops) == 15 and ours.num_layers == 2 and ours.choice_weights is None
    names = {op.name for op in ours.ops}
    assert {"PosterizeIncreasing", "SolarizeIncreasing", "SolarizeAdd", "Rotate"} <= names
    for op in ours.ops:
        assert (op.prob, op.magnitude, op.magnitude_std) == (0.5, 9, 0.5)
        assert op.magnitude_max is None  # 10
        assert op.kwargs["fillcolor"] == (124, 116, 104)
        assert op.kwargs["resample"] == Image.Resampling.BICUBIC
    image = Image.effect_noise((64, 64), 50).convert("RGB")
    options = {
        "translate_const": 100,
        "img_mean": (124, 116, 104),
        "interpolation": Image.Resampling.BICUBIC,
    }
    theirs = rand_augment_transform("rand-m9-mstd0.5-inc1", options)
    for seed in range(20):
        with drawn_from(seed):
            expected = np.asarray(theirs(image))
        with drawn_from(seed):
            assert np.array_equal(np.asarray(ours(image)), expected)
    assert ours.ops[0].hparams["translate_const"] == 100  # 0.45 of the side


def test_posterising_to_no_bits_gives_black_and_a_bad_name_one_line():
    image = Image.new("RGB", (2, 2), (255, 128, 3))
    assert labelled.posterize(image, 0).getpixel((0, 0)) == (0, 0, 0)
    assert labelled.posterize(image, 2).getpixel((0, 0)) == (192, 128, 0)
    with pytest.raises(mr.InputError, match="expected timm's name of a RandAugment"):
        labelled.rand_augment("augment", 32, (0, 0, 0))


def test_erased_rectangles_have_the_published_sizes():
    draws = np.random.default_rng(0).random((4000, ERASE_DRAWS), dtype=np.float32)
    boxes = np.array([erased_box(100, 0.25, x) for x in draws])
    some = boxes[boxes[:, 2] > 0]
    assert len(some) / 4000 == pytest.approx(0.25, abs=0.02)
    height, width = some[:, 2] - some[:, 0], some[:, 3] - some[:, 1]
    area, shape = height * width / 1e4, np.log(height / width)
    assert area.min() > 0.018 and area.max() < 0.34
    assert area.mean() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.02)
    assert shape.max() < math.log(1 / 0.3) + 0.1 and abs(shape.mean()) < 0.1
    assert (some[:, :2] >= 0).all() and (some[:, 2:] <= 100).all()
    assert some[:, 0].min() == 0 and some[:, 2].max() == 100


def test_noise_is_standard_normal_inside_of_the_rectangle_only():
    x = torch.full((2, 3, 40, 40), 7.0)
    boxes = torch.tensor([[0, 5, 40, 35, 3], [0, 0, 0, 0, 4]])
    noisy = erase(x.clone(), boxes)
    inside = noisy[0, :, :, 5:35]
    assert abs(inside.mean()) < 0.05 and inside.std().item() == pytest.approx(1, abs=0.05)
    assert noisy[0, :, :, :5].eq(7).all() and noisy[0, :, :, 35:].eq(7).all()
    assert noisy[1].eq(7).all()
    boxes[0, 4] = 5
    assert not torch.equal(erase(x.clone(), boxes)[0], noisy[0])


def test_mixing_is_mixup_or_cutmix_with_the_true_share():
    images, labels = torch.arange(8.0)[:, None, None, None].expand(-1, 3, 20, 20), torch.arange(8)
    mix = Mixing(0.8, 1.0, 0.1, 10)
    kinds = []
    for seed in range(60):
        x, target = mix(images, labels, seed)
        on, off = 1 - 0.1 + 0.1 / 10, 0.1 / 10
        share = (target[0, 0].item() - off) / (on - off)  # of image 0; the rest is image 7
        assert target.sum(1).allclose(torch.ones(8))
        assert target[0, 7].item() == pytest.approx(off + (1 - share) * (on - off), abs=1e-5)
        if len(x[0].unique()) == 1:  # the same everywhere: blended (or one image only)
            assert x[0, 0, 0, 0].item() == pytest.approx(7 * (1 - share), abs=1e-4)
            kinds.append("mixup")
        else:
            assert x[0].eq(0).float().mean().item() == pytest.approx(share, abs=1e-5)
            assert set(x[0].unique().tolist()) == {0, 7}
            kinds.append("cutmix")
    assert 15 < kinds.count("mixup") < 45
    assert images[0, 0, 0, 0] == 0  # what was given stays
    only = [Mixing(0.8, 0.0, 0.0, 10)(images, labels, seed)[0] for seed in range(10)]
    assert all(len(x[0].unique()) == 1 for x in only)
    with pytest.raises(mr.InputError, match="mixing takes images in pairs, got 7 at a time"):
        mix(images[:7], labels[:7], 0)
