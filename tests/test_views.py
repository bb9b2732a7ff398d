import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import mimrefiner as mr
from mimrefiner.data.augment import digit_views, paper_views, small_views
from mimrefiner.data.views import Order, loaded_crops, resident_crops, uniforms, view_batches

HALF = {"mean": (0.5,) * 3, "std": (0.5,) * 3}


def batches(dataset, size=16, steps=5, seed=3, first_step=0, part=(0, 1), num_workers=0):
    order, recipe = Order(size, steps, seed, first_step, part), digit_views(32, 8, n_local=2)
    return list(view_batches(dataset, recipe, order, **HALF, num_workers=num_workers))


def test_view_batches_have_the_documented_shapes(digits):
    views, index, label = batches(digits["train"])[0]
    assert [tuple(v.shape) for v in views] == [(16, 3, 32, 32)] * 2 + [(16, 3, 16, 16)] * 2
    assert torch.equal(label, torch.from_numpy(digits["train"].labels)[index])
    assert min(v.min() for v in views) >= -1
    assert max(v.max() for v in views) <= 1


def test_views_depend_on_seed_epoch_and_image_only(digits):
    some = digits["train"].subset(range(40))  # two batches an epoch
    whole = batches(some)
    again = batches(some, num_workers=2)
    resumed = batches(some, first_step=3)
    for a, b in [*zip(whole, again, strict=True), *zip(whole[3:], resumed, strict=True)]:
        assert torch.equal(a[1], b[1])
        assert all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True))
    assert not torch.equal(whole[0][1], batches(some, seed=4)[0][1])
    assert len(set(whole[0][1].tolist() + whole[1][1].tolist())) == 32  # no image twice in an epoch


def test_a_batch_larger_than_the_data_is_named(digits):
    with pytest.raises(
        mr.InputError,
        match="a batch of 16 needs at least that many images, the data set has 9: take a smaller",
    ):
        batches(digits["train"].subset(range(9)))


def test_uniforms_are_uniform_and_keyed():
    u = np.concatenate([uniforms(0, 0, i, 4, 50).ravel() for i in range(200)])
    assert abs(u.mean() - 0.5) < 0.01
    assert abs(np.histogram(u, 10, (0, 1))[0] / len(u) - 0.1).max() < 0.01
    assert len(np.unique(u)) > 0.99 * len(u)
    assert np.array_equal(uniforms(1, 2, 3, 4)[:2], uniforms(1, 2, 3, 2))
    for other in (uniforms(2, 2, 3, 4), uniforms(1, 3, 3, 4), uniforms(1, 2, 4, 4)):
        assert not np.array_equal(uniforms(1, 2, 3, 4), other)


def test_later_steps_and_shares_are_parts_of_the_same_sequence(digits):
    """A resumed run, and every process, sees what one uninterrupted process would."""
    some = digits["train"].take(40)
    whole, later = batches(some, 8, 7), batches(some, 8, 7, first_step=4)
    shares = [batches(some, 8, 7, part=(i, 2)) for i in range(2)]
    assert len(whole) == 7 and len(later) == 3
    for step, (views, index, _) in enumerate(whole):
        assert torch.equal(torch.cat([share[step][1] for share in shares]), index)
        assert torch.equal(torch.cat([share[step][0][3] for share in shares]), views[3])
        if step >= 4:
            assert torch.equal(later[step - 4][0][0], views[0])


@pytest.mark.parametrize(
    "views",
    [small_views(64, 8, n_local=2), paper_views(224, 96, n_local=2)],
    ids=["smaller", "larger"],
)
def test_crops_cut_for_the_whole_batch_equal_those_of_pillow(views):
    """What a GPU does with images in memory, here on the CPU: draws, index and labels are equal,
    pixels to a grey level of 255.
    """
    photos = mr.load_dataset("fruit64", split="test").subset(range(40, 72)).in_memory()
    keys = [[(epoch, i) for i in range(start, start + 8)] for epoch in (0, 3) for start in (0, 24)]
    device = torch.device("cpu")
    one_by_one = loaded_crops(photos, views, iter(keys), 5, device, 0)
    together = resident_crops(photos.pixels, photos.labels, views, iter(keys), 5, device)
    for expected, found in zip(one_by_one, together, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(expected[1:], found[1:], strict=True))
        for a, b in zip(expected[0], found[0], strict=True):
            levels = 255 * (a - b).abs()
            assert levels.max() < 2.1
            assert (levels > 0.5).float().mean() < 1e-3


def test_pixels_are_those_of_images_of_one_size_in_memory(image_folder, digits):
    assert digits["val"].pixels is None
    kept = digits["val"].in_memory().subset([5, 2])
    assert np.array_equal(kept.pixels, np.stack([np.asarray(digits["val"][i][0]) for i in (5, 2)]))
    Image.new("RGB", (50, 60)).save(image_folder / "train" / "ant" / "other_size.png")
    mixed = mr.load_dataset(f"imagefolder:{image_folder}", split="trainval").in_memory()
    assert mixed.pixels is None and len(mixed) == 21


def test_loaders_end_with_a_process_that_ends_by_an_error():
    """They outlive SIGTERM, by which multiprocessing would end them, and wait."""
    script = """
import mimrefiner as mr
from mimrefiner.data.augment import digit_views
from mimrefiner.data.views import Order, view_batches
digits = mr.load_dataset("digits", split="train")
options = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "num_workers": 2}
batches = view_batches(digits, digit_views(32, 8, n_local=2), Order(16, 50, seed=0), **options)
next(batches)
raise RuntimeError("something else")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1 and done.stderr.endswith("RuntimeError: something else\n")
