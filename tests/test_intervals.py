import numpy as np
import pytest
from scipy import stats

from mimrefiner.study import intervals
from mimrefiner.study.intervals import image_difference, seed_difference


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
