import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

import mimrefiner as mr
from mimrefiner.probes.features import Features
from mimrefiner.probes.logistic import draw_shots, fit_logistic


def problem(seed, n, dim, classes=4, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    centres = torch.randn(classes, dim, generator=generator)
    x = centres[y] + spread * torch.randn(n, dim, generator=generator)
    return torch.nn.functional.normalize(x - x.mean(-1, keepdim=True), dim=-1), y


@pytest.mark.parametrize(("n", "dim"), [(12, 40), (60, 16)])
@pytest.mark.parametrize("strength", [1.0, 4000.0])
def test_batched_solution_equals_scikit_learns(n, dim, strength):
    problems = [problem(seed, n, dim) for seed in range(3)]
    x, y = torch.stack([p[0] for p in problems]), torch.stack([p[1] for p in problems])
    weights = fit_logistic(x, y, 4, strength, iterations=5000, tolerance=1e-7)
    for (x_one, y_one), weight in zip(problems, weights, strict=True):
        exact = LogisticRegression(C=strength, fit_intercept=False, tol=1e-8, max_iter=20_000).fit(
            x_one.numpy(), y_one.numpy()
        )
        queries = torch.randn(500, dim)
        theirs = exact.decision_function(queries.numpy())
        ours = (queries @ weight).numpy()
        assert np.allclose(
            ours - ours.mean(1, keepdims=True),
            theirs - theirs.mean(1, keepdims=True),
            atol=1e-2 * abs(theirs).max(),
        )
        assert (ours.argmax(1) == theirs.argmax(1)).mean() > 0.995


@pytest.mark.parametrize("shot", [1, 5, 0.1])
def test_accuracy_is_that_of_scikit_learns_converged_solution(shot):
    """Pixels of digits are correlated, so that a loose tolerance costs points."""
    digits = load_digits()
    x, y = torch.tensor(digits.data), torch.tensor(digits.target)
    x = torch.nn.functional.normalize(x - x.mean(-1, keepdim=True), dim=-1)
    rows = torch.stack([draw_shots(y, y.unique(), shot, seed) for seed in range(2)])
    for row, weight in zip(rows, fit_logistic(x[rows], y[rows], 10, 4000.0), strict=True):
        exact = LogisticRegression(C=4000.0, fit_intercept=False, tol=1e-9, max_iter=20_000).fit(
            x[row].numpy(), y[row].numpy()
        )
        theirs, ours = (
            exact.score(x.numpy(), y.numpy()),
            ((x @ weight).argmax(-1) == y).double().mean().item(),
        )
        assert abs(ours - theirs) <= 0.001  # 0.1 points


def test_problems_that_converge_early_keep_their_solution():
    """One problem is easy, one is hard: both must be as if solved alone."""
    problems = [problem(0, 24, 30, spread=0.01), problem(1, 24, 30, spread=2.0)]
    x, y = torch.stack([p[0] for p in problems]), torch.stack([p[1] for p in problems])
    together = fit_logistic(x, y, 4, torch.tensor([1.0, 4000.0]))
    alone = [
        fit_logistic(x[i : i + 1], y[i : i + 1], 4, strength)[0]
        for i, strength in enumerate((1.0, 4000.0))
    ]
    for one, other in zip(together, alone, strict=True):
        assert torch.allclose(one, other, atol=1e-3 * other.abs().max())


def test_equal_images_and_huge_strength_are_solved():
    x, y = problem(0, 12, 40)
    x = torch.cat([x, x])  # a singular Gram matrix
    weights = fit_logistic(x[None], torch.cat([y, y])[None], 4, 1e12)
    assert torch.isfinite(weights).all()
    assert ((x @ weights[0]).argmax(-1) == torch.cat([y, y])).all()


@pytest.fixture
def features():
    x, y = problem(0, 120, 16, spread=0.6)
    return Features({"cls": torch.stack([x, torch.randn_like(x)])}, y, (0, 1), 2)


def test_rows_for_every_block_shots_and_split(features):
    rows = mr.low_shot(features, features.subset(range(40)), shots=(1, 5, 0.1))
    assert len(rows) == 2 * 3 * 3
    assert rows["value"].between(0, 1).all()
    assert set(rows["protocol"]) == {"logistic_1shot", "logistic_5shot", "logistic_0.1"}
    five = rows[rows["protocol"] == "logistic_5shot"].groupby("block")["value"].mean()
    assert five[0] > 0.8 > five[1]
    assert set(rows[rows["protocol"] == "logistic_5shot"]["n_train"]) == {20}


def test_same_seed_same_rows(features):
    tables = [mr.low_shot(features, features, shots=(2,), seed=3) for _ in range(2)]
    assert tables[0].equals(tables[1])


def test_strength_is_chosen_on_validation(features):
    rows = mr.low_shot(features, features, shots=(5,), strengths=(1e-6, 100.0), val=features)
    assert set(rows["setting"]) <= {"C=1e-06", "C=100"}
    with pytest.raises(mr.InputError, match="needs validation features"):
        mr.low_shot(features, features, strengths=(1.0, 2.0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strengths": (-1,)}, r"strengths C > 0, got shots \[1, 2, 5\], strengths \[-1\]"),
        ({"strengths": (0,)}, "strengths C > 0"),
        ({"strengths": ()}, "strengths C > 0"),
        ({"shots": ()}, "one or more shots"),
        ({"splits": 0}, "splits must be a whole number >= 1, got 0"),
    ],
)
def test_bad_settings_are_named(features, settings, message):
    with pytest.raises(mr.InputError, match=message):
        mr.low_shot(features, features, **settings)


def test_splits_are_balanced_and_fixed():
    y = torch.arange(40) % 4
    rows = draw_shots(y, torch.arange(4), 3, 0)
    assert torch.bincount(y[rows]).tolist() == [3, 3, 3, 3]
    assert torch.equal(rows, draw_shots(y, torch.arange(4), 3, 0))
    assert not torch.equal(rows, draw_shots(y, torch.arange(4), 3, 1))
    assert torch.bincount(y[draw_shots(y, torch.arange(4), 0.1, 0)]).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.zeros(120, dtype=torch.long)}, "needs at least two classes"),
        ({"y": torch.full((120,), -1)}, "this data set has none"),
        ({"y": torch.tensor([0] * 118 + [1] * 2)}, "class 1 has 2 images, fewer than 5 shots"),
    ],
)
def test_bad_labels_are_named(features, change, message):
    features.y = change["y"]
    with pytest.raises(mr.InputError, match=message):
        mr.low_shot(features, features)


def test_shots_and_features_are_checked(features):
    for shot in (1.5, 1.0, 0):
        with pytest.raises(
            mr.InputError, match=f"whole numbers such as 1 or shares between 0 and 1, got {shot}"
        ):
            mr.low_shot(features, features, shots=(shot,))
    features.x["cls"][1, 3, 2] = float("nan")
    with pytest.raises(mr.InputError, match=r"cls features of block 1 \(0-based\) hold NaN"):
        mr.low_shot(features, features)


def test_hits_are_what_the_accuracies_count(features):
    test = features.subset(range(40))
    rows = mr.low_shot(features, test, shots=(1, 5), hits=True)
    assert rows["value"].tolist() == [right.float().mean().item() for right in rows["hits"]]
    assert rows.drop(columns="hits").equals(mr.low_shot(features, test, shots=(1, 5)))
