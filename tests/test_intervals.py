import numpy as np
import pytest
from scipy import stats

from mimrefiner.study import intervals
from mimrefiner.study.intervals import image_difference, paired_difference, seed_difference


def test_bootstrap_interval_covers_the_truth():
    rng = np.random.default_rng(0)
    covered = 0
    for i in range(200):
        a, b = rng.random(300) < 0.8, rng.random(300) < 0.7
        mean, low, high = intervals.paired_bootstrap(a, b, draws=1000, seed=i)
        assert mean == pytest.approx(a.mean() - b.mean())
        covered += low <= 0.1 <= high
    assert 0.90 <= covered / 200 <= 0.99


def test_bootstrap_is_paired_and_averages_seeds():
    right = np.random.default_rng(0).random((3, 100)) < 0.5
    assert intervals.paired_bootstrap(right, right) == (0, 0, 0)
    better = right.copy()
    better[0] = True
    mean, low, high = intervals.paired_bootstrap(better, right)
    assert mean == pytest.approx((1 - right[0].mean()) / 3)
    assert 0 < low < mean < high


def test_a_claim_about_images_asks_every_seed():
    rng = np.random.default_rng(0)
    base = rng.random(500) < 0.5
    better, worse = base | (rng.random(500) < 0.3), base & (rng.random(500) < 0.7)
    assert image_difference([better, better], [base, base]).seen
    assert image_difference([worse], [base]).opposite
    mixed = image_difference([better, better, base], [base] * 3)
    # One seed alone is not above zero, and the interval shown is the one that decides
    assert mixed.low == 0 and not mixed.seen and not mixed.opposite
    assert mixed.by_seed[2] == 0 and mixed.mean == pytest.approx(np.mean(mixed.by_seed))
    assert mixed.high == pytest.approx(image_difference([better], [base]).high)
    assert "by seed, 95 % interval over images, of all seeds +0.0 to" in str(mixed)
    assert mixed.columns()["by_seed"].split()[2] == "0.0"


def test_a_claim_about_seeds_uses_students_interval():
    ours, theirs = np.array([0.62, 0.58, 0.66]), np.array([0.5, 0.5, 0.5])
    found = seed_difference(ours, theirs)
    low, high = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((low, high)) and found.seen
    assert seed_difference(theirs, ours).opposite
    few = seed_difference(ours, theirs, images=20)
    assert few.low < 0 < few.high and few.seen is False and "seeds and images" in str(few)
    images_alone = seed_difference([0.6, 0.6], [0.5, 0.5], images=100)
    assert images_alone.high - images_alone.mean == pytest.approx(
        1.96 * np.sqrt((0.24 + 0.25) / 100), rel=1e-3
    )


def test_pairing_images_narrows_the_interval_of_seeds_and_images():
    rng = np.random.default_rng(0)
    base = rng.random((3, 400)) < 0.8
    ours = base ^ (rng.random((3, 400)) < 0.05)  # they agree on 95 % of the images
    found = paired_difference(ours, base)
    apart = seed_difference(ours.mean(1), base.mean(1), images=400)
    assert found.mean == pytest.approx(apart.mean) and found.by_seed == apart.by_seed
    assert found.high - found.low < apart.high - apart.low
    change = (ours.astype(float) - base).mean(0)
    over_seeds = stats.t.ppf(0.975, 2) * np.std(found.by_seed, ddof=1) / np.sqrt(3)
    over_images = stats.norm.ppf(0.975) * np.std(change, ddof=1) / 20
    assert found.high - found.mean == pytest.approx(np.hypot(over_seeds, over_images))
    one = paired_difference(ours[:1], base[:1])
    assert one.seen is None and one.mean == pytest.approx(found.by_seed[0])


def test_a_paired_interval_covers_no_difference_between_random_models():
    rng, outside = np.random.default_rng(3), 0
    for _ in range(300):
        easy = rng.beta(4, 1, 200)  # images differ in how often any model gets them right
        ours, theirs = rng.random((2, 6, 200)) < easy
        outside += paired_difference(ours, theirs).seen or paired_difference(ours, theirs).opposite
    assert outside / 300 <= 0.06


def test_seeds_alone_give_few_false_alarms():
    rng = np.random.default_rng(1)
    found = [seed_difference(rng.normal(size=3), rng.normal(size=3)) for _ in range(1000)]
    assert 0.02 < np.mean([x.seen or x.opposite for x in found]) < 0.08


def test_one_seed_leaves_values_open():
    one = seed_difference([0.7], [0.5])
    assert (
        one.seen is None and not one.opposite and str(one) == "+20.0 points (one seed: no interval)"
    )
    assert one.columns() == {"difference": 20.0, "low": None, "high": None, "by_seed": "20.0"}
