import sys
from dataclasses import replace

import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression

import mimrefiner as mr
from mimrefiner.probes.features import Features
from mimrefiner.probes.logistic import rows_normalised
from mimrefiner.probes.shots import (
    CONVERGED,
    PUBLISHED,
    LogisticRecipe,
    fit_weights,
    logistic_shots,
)


@pytest.fixture
def clouds():
    """Four classes that overlap; features far from 0 and of different lengths."""
    torch.manual_seed(1)
    y = torch.arange(400) % 4
    centres = 2 * torch.randn(4, 24)
    x = (centres[y] + 2 * torch.randn(400, 24) + 3) * (0.5 + torch.rand(400, 1))
    return Features({"cls": x[None]}, y, (11,), 12)


def test_the_recipe_is_the_published_one():
    """lambda 2.5e-4 / N, no intercept, it0 10, tol 1e-3, 300 epochs, seed 0, raw test rows."""
    expected = {
        "penalty": 2.5e-4,
        "intercept": False,
        "interval": 10,
        "tolerance": 1e-3,
        "max_epochs": 300,
        "seed": 0,
        "prepare_test": False,
        "solver": "cyanure",
        "name": "logistic_published",
    }
    assert LogisticRecipe() == PUBLISHED
    assert {name: getattr(PUBLISHED, name) for name in expected} == expected
    assert (CONVERGED.penalty, CONVERGED.intercept) == (2.5e-4, False)


def test_the_solution_is_scikit_learns(clouds):
    """lambda / 2 |w|^2 with lambda = 2.5e-4 / N is C = 4000."""
    train = clouds.subset(range(20))
    x = rows_normalised(train.x["cls"][0])
    ours = fit_weights(x, train.y, 4, CONVERGED)
    theirs = LogisticRegression(C=4000, fit_intercept=False, tol=1e-10, max_iter=100_000)
    theirs.fit(x.double().numpy(), train.y.numpy())
    weights = torch.from_numpy(theirs.coef_.T).float()
    assert torch.allclose(ours, weights, atol=1e-3 * weights.abs().max())
    raw = clouds.x["cls"][0][20:]
    rows = logistic_shots({"a": train}, clouds.subset(range(20, 400)), CONVERGED)
    expected = theirs.predict(rows_normalised(raw).double().numpy()) == clouds.y[20:].numpy()
    assert rows["value"].item() == pytest.approx(expected.mean(), abs=1 / 380)
    assert 0.4 < rows["value"].item() < 0.99


def test_raw_test_rows_give_the_same_answers(clouds):
    """Weights sum to 0, so neither the rows' means nor their lengths change the largest logit."""
    splits = {name: clouds.subset(range(i, i + 8)) for i, name in enumerate("abc")}
    test = clouds.subset(range(20, 400))
    prepared = logistic_shots(splits, test, CONVERGED)
    raw = logistic_shots(splits, test, replace(CONVERGED, prepare_test=False))
    pd.testing.assert_frame_equal(prepared, raw)
    assert prepared["setting"].tolist() == ["a", "b", "c"]
    assert prepared["seed"].tolist() == [0, 1, 2] and prepared["n_train"].tolist() == [8] * 3
    assert prepared["value"].nunique() > 1


def test_cyanure_solves_the_same_problem(clouds):
    pytest.importorskip("cyanure")
    splits = {"a": clouds.subset(range(40))}
    test = clouds.subset(range(40, 400))
    theirs, ours = (logistic_shots(splits, test, recipe) for recipe in (PUBLISHED, CONVERGED))
    assert theirs["protocol"].item() == "logistic_published"
    assert theirs["value"].item() == pytest.approx(ours["value"].item(), abs=0.03)


def test_what_is_missing_is_said_in_one_line(clouds, monkeypatch):
    monkeypatch.setitem(sys.modules, "cyanure", None)
    monkeypatch.setitem(sys.modules, "cyanure.estimators", None)
    with pytest.raises(mr.InputError, match="not installed: pip install cyanure, or take the conv"):
        logistic_shots({"a": clouds}, clouds, PUBLISHED)
    with pytest.raises(mr.InputError, match="expected one or more splits, got none"):
        logistic_shots({}, clouds, CONVERGED)
    one = clouds.subset([0, 4, 8])
    with pytest.raises(mr.InputError, match="at least two classes, and all labels are 0"):
        logistic_shots({"a": one}, clouds, CONVERGED)
    with pytest.raises(mr.InputError, match="unknown solver 'lbfgs': choose one of converged, cya"):
        replace(CONVERGED, solver="lbfgs")
    with pytest.raises(mr.InputError, match="neither solver here fits an intercept"):
        replace(CONVERGED, intercept=True)
