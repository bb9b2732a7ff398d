import collections
import colorsys
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from torchvision.transforms import ColorJitter, RandomResizedCrop
from torchvision.transforms import functional as TF

from mimrefiner.config import Crop
from mimrefiner.data import augment, pixels, views
from mimrefiner.data.views import CROP_TRIES, DRAWS


def photometric(x, crop, u):
    """One view of a batch: (batch, 3, height, width)."""
    return views.photometric(x[None], [crop], u[:, None])[0]


@pytest.mark.parametrize(
    "recipe",
    [augment.paper_views(24, 12, 3), augment.small_views(24, 4, 3), augment.digit_views(24, 8)],
)
def test_views_coloured_together_equal_views_coloured_alone(recipe):
    """Bit for bit, with other recipes and other sizes beside them."""
    u = torch.from_numpy(views.uniforms(3, 1, np.arange(6), len(recipe.crops)))
    for group in views.size_groups(recipe):
        crops = recipe.crops[group]
        x = torch.rand(len(crops), 6, 3, crops[0].size, crops[0].size)
        together = views.photometric(x, crops, u[:, group])
        alone = [photometric(x[v], crop, u[:, group][:, v]) for v, crop in enumerate(crops)]
        assert torch.equal(together, torch.stack(alone))
        assert not torch.equal(together, x)


def draws(n, seed=0):
    return torch.from_numpy(np.stack([views.uniforms(seed, 0, i, 1)[0] for i in range(n)]))


@pytest.fixture
def images():
    return torch.rand(6, 3, 12, 10)


@pytest.mark.parametrize(
    ("op", "reference"),
    [
        (pixels.brightness, lambda x, s: TF.adjust_brightness(x, 1 + s)),
        (pixels.contrast, lambda x, s: TF.adjust_contrast(x, 1 + s)),
        (pixels.saturation, lambda x, s: TF.adjust_saturation(x, 1 + s)),
        (pixels.hue, TF.adjust_hue),
    ],
)
def test_jitter_equals_torchvision_image_by_image(op, reference, images):
    shift = torch.linspace(-0.4, 0.4, len(images))
    ours = op(images, shift[:, None, None, None])
    for image, s, x in zip(images, shift.tolist(), ours, strict=True):
        assert torch.allclose(x, reference(image, s), atol=2e-3)


def test_hue_equals_the_standard_library():
    x = torch.rand(1, 3, 1, 20)
    ours = pixels.hue(x, torch.full((1, 1, 1, 1), 0.1))
    for i in range(20):
        h, s, v = colorsys.rgb_to_hsv(*x[0, :, 0, i].tolist())
        assert ours[0, :, 0, i].tolist() == pytest.approx(
            colorsys.hsv_to_rgb((h + 0.1) % 1, s, v), abs=1e-5
        )


def test_blur_equals_torchvision(images):
    sigma = torch.tensor([0.3, 0.5, 0.8, 1.0, 1.5, 2.0])
    ours = pixels.blur(images, sigma, radius=3)
    padded = torch.nn.functional.pad(images, (3,) * 4, mode="replicate")
    for image, s, x in zip(padded, sigma.tolist(), ours, strict=True):
        assert torch.allclose(x, TF.gaussian_blur(image, 7, s)[:, 3:-3, 3:-3], atol=1e-5)


def test_probabilities_are_kept():
    x = torch.rand(1, 3, 4, 4).expand(4000, -1, -1, -1)
    u = draws(4000)

    def share_changed(**settings):
        crop = Crop(4, (1.0, 1.0), **{"jitter_p": 0.0, "grey_p": 0.0, **settings})
        return (photometric(x, crop, u) != x).flatten(1).any(1).float().mean().item()

    assert share_changed() == 0
    assert share_changed(jitter_p=0.8) == pytest.approx(0.8, abs=0.03)
    assert share_changed(grey_p=0.2) == pytest.approx(0.2, abs=0.03)
    assert share_changed(blur_p=0.5) == pytest.approx(0.5, abs=0.03)
    assert share_changed(solarize_p=0.2) == pytest.approx(0.2, abs=0.03)


def test_photometric_leaves_its_input_alone_and_does_not_mix_images(images):
    crop, u = Crop(12, (1.0, 1.0), blur_p=0.5, solarize_p=0.5), draws(6)
    before = images.clone()
    together = photometric(images, crop, u)
    assert torch.equal(images, before)
    assert together.min() >= 0
    assert together.max() <= 1
    alone = torch.cat([photometric(images[[i]], crop, u[[i]]) for i in range(6)])
    assert torch.allclose(together, alone, atol=1e-6)


def test_crops_follow_scale_and_ratio():
    boxes, flips = views.crop_boxes(
        100, 100, np.array([(0.25, 1.0)]), views.uniforms(0, 0, np.arange(2000), 1)
    )
    left, top, right, bottom = boxes[:, 0].T
    assert (left >= 0).all() and (left < right).all() and (right <= 100).all()
    assert (top >= 0).all() and (top < bottom).all() and (bottom <= 100).all()
    assert 0.45 < np.mean(flips) < 0.55
    shares, ratios = (right - left) * (bottom - top) / 1e4, (right - left) / (bottom - top)
    assert 0.24 < min(shares) < 0.27
    reference = [
        RandomResizedCrop.get_params(torch.zeros(3, 100, 100), (0.25, 1.0), (3 / 4, 4 / 3))[2:]
        for _ in range(2000)
    ]
    expected = np.prod(reference, axis=1) / 1e4
    assert np.mean(shares) == pytest.approx(expected.mean(), abs=0.02)
    assert np.std(shares) == pytest.approx(expected.std(), abs=0.02)
    assert min(ratios) > 3 / 4 - 0.03
    assert max(ratios) < 4 / 3 + 0.03
    assert abs(np.mean(np.log(ratios))) < 0.02


def test_a_long_image_falls_back_to_a_centred_crop():
    boxes, _ = views.crop_boxes(1000, 10, np.array([(0.9, 1.0)]), views.uniforms(0, 0, 0, 1))
    assert boxes.tolist() == [[493, 0, 506, 10]]


def test_flip_is_taken_from_its_draw():
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    u = np.zeros((1, DRAWS), dtype=np.float32)
    u[0, : 2 * CROP_TRIES] = 0.5
    u[0, 2 * CROP_TRIES + 2] = 0.4
    (box,), (flip,) = views.crop_boxes(4, 4, np.array([(1.0, 1.0)]), u)
    flipped = views.crop_view(image, Crop(4, (1.0, 1.0), flip_p=0.5), box, flip)
    plain = views.crop_view(image, Crop(4, (1.0, 1.0), flip_p=0.0), box, flip)
    assert np.array_equal(flipped, plain[:, ::-1])
    assert np.array_equal(plain, np.asarray(image))


def test_paper_recipe():
    """record of the released configuration: train_byolaug_localviews.yaml."""
    recipe = augment.paper_views()
    first, second = recipe.global_crops
    assert len(recipe.crops) == 12
    assert (first.size, first.scale, first.blur_p, first.solarize_p) == (224, (0.25, 1.0), 1.0, 0.0)
    assert (second.blur_p, second.solarize_p) == (0.1, 0.2)
    local = recipe.local_crop
    assert (local.size, local.scale, local.blur_p, local.solarize_p) == (96, (0.05, 0.25), 0.5, 0.0)
    for crop in recipe.crops:
        assert (crop.flip_p, crop.jitter_p, crop.grey_p, crop.blur_sigma) == (
            0.5,
            0.8,
            0.2,
            (0.1, 2.0),
        )
        assert (crop.brightness, crop.contrast, crop.saturation, crop.hue) == (0.4, 0.4, 0.2, 0.1)


@pytest.mark.parametrize(("size", "patch"), [(28, 4), (28, 7), (32, 8), (64, 8), (96, 16)])
def test_small_recipes_fit_the_patch_size(size, patch):
    for recipe in (augment.small_views(size, patch), augment.digit_views(size, patch)):
        assert all(crop.size % patch == 0 and crop.size <= size for crop in recipe.crops)
        assert math.isclose(recipe.crops[0].size, size)


def test_colour_jitter_is_distributed_as_torchvisions():
    """Brightness, contrast and colour of one image after many draws (Kolmogorov-Smirnov tests)."""
    torch.manual_seed(0)
    image, n = 0.2 + 0.6 * torch.rand(3, 6, 6), 1500
    crop = Crop(
        6,
        (1.0, 1.0),
        jitter_p=1.0,
        grey_p=0.0,
        brightness=0.4,
        contrast=0.4,
        saturation=0.2,
        hue=0.1,
    )
    ours = photometric(image.expand(n, -1, -1, -1), crop, draws(n))
    jitter = ColorJitter(0.4, 0.4, 0.2, 0.1)
    theirs = torch.stack([jitter(image) for _ in range(n)])
    for what in (
        lambda x: x.mean((1, 2, 3)),
        lambda x: x.std((1, 2, 3)),
        lambda x: (x[:, 0] - x[:, 2]).std((1, 2)),
        lambda x: x[:, 0, 0, 0],
    ):
        assert ks_2samp(what(ours).numpy(), what(theirs).numpy()).pvalue > 0.001


def test_the_four_changes_of_colour_come_in_every_order(monkeypatch):
    orders = collections.Counter()
    seen = []
    monkeypatch.setattr(
        views, "JITTER", [lambda x, _, op=op: seen.append(op) or x for op in range(4)]
    )
    crop, u = Crop(2, (1.0, 1.0), jitter_p=1.0, grey_p=0.0), draws(1200)
    for i in range(1200):
        photometric(torch.zeros(1, 3, 2, 2), crop, u[[i]])
        orders[tuple(seen)] += 1
        seen.clear()
    assert len(orders) == math.factorial(4) and min(orders.values()) > 25
