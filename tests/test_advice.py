"""The advice of a block report: chosen on validation images, judged on test images."""

import pandas as pd
import pytest
import torch

import mimrefiner as mr
from mimrefiner.probes.features import Features
from mimrefiner.study.advice import Advice, advice_from, choice_rows


def features(n, right, *, dim=4, seed=0):
    """Two classes; a share ``right`` of the images of every block lies with its own class."""
    rng = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 2
    blocks = []
    for share in right:
        shown = torch.where(torch.rand(n, generator=rng) < share, y, 1 - y)
        centres = torch.eye(2, dim)[shown]
        blocks.append(centres + 0.01 * torch.randn(n, dim, generator=rng))
    return Features({"cls": torch.stack(blocks)}, y, tuple(range(len(right))), len(right))


def advice_on(right, n_train=400, n_test=300):
    rows = choice_rows(features(n_train, right), features(n_test, right, seed=1), **OPTIONS)
    return advice_from(rows), rows


OPTIONS = {"seed": 0, "device": "cpu"}


def test_a_better_block_is_named_with_what_it_gains():
    advice, rows = advice_on([0.6, 0.95, 0.75])
    assert (advice.block, advice.last, advice.pool, advice.n_val) == (1, 2, "cls", 40)
    train, test = features(400, [0.6, 0.95, 0.75]), features(300, [0.6, 0.95, 0.75], seed=1)
    shares = mr.knn_hits(train, test)["cls"].float().mean(1)
    assert advice.accuracy == pytest.approx(shares[1].item())
    assert advice.gain == pytest.approx((shares[1] - shares[2]).item())
    assert 0 < advice.low < advice.gain < advice.high
    points = f"{100 * advice.gain:+.1f}"
    assert str(advice) == (
        f"Take block 2's cls token: {points} points of k-NN accuracy over the last block "
        f"(95 % interval {100 * advice.low:+.1f} to {100 * advice.high:+.1f}, 300 test images; "
        "chosen on 40 validation images)."
    )
    assert list(rows["val_accuracy"].idxmax() == rows["accuracy"].dropna().index) == [True]


def test_test_images_do_not_choose():
    """What is best on test images only is not chosen."""
    train, test = features(400, [0.95, 0.6, 0.9]), features(300, [0.6, 0.95, 0.9], seed=1)
    advice = advice_from(choice_rows(train, test, **OPTIONS))
    assert advice.block == 0 and advice.gain < 0
    assert str(advice).startswith("Stay with the last block's cls token: block 1, the choice of 40")


def test_the_last_block_is_taken_where_none_before_it_is_better():
    advice, _ = advice_on([0.6, 0.7, 0.95])
    assert (advice.block, advice.gain) == (2, 0)
    assert str(advice) == (
        "Take the last block's cls token: no earlier block did better on 40 validation images."
    )
    advice, _ = advice_on([1.0, 1.0, 1.0])  # equally good ones: the last
    assert advice.block == 2


def test_a_small_gain_may_be_chance():
    advice = Advice(3, 5, "mean", 0.5, 0.01, -0.02, 0.04, 50, 100)
    assert str(advice) == (
        "Stay with the last block's patch mean: block 4, the choice of 50 validation images, "
        "changes k-NN accuracy by +1.0 points, which may be chance (95 % interval -2.0 to +4.0, "
        "100 test images)."
    )
    assert advice.finding == "No block is clearly better than the last one (patch mean)"


def test_no_advice_from_one_block_or_few_images():
    assert advice_on([0.9])[0] is None
    assert advice_on([0.9, 0.5], n_train=60)[0] is None


def test_the_report_ends_in_advice_that_resuming_keeps(digits, tmp_path, capsys, monkeypatch):
    from mimrefiner.study import report

    data = digits["train"].take(200), digits["test"].take(100)
    options = {"blocks": (3, 7, 11), "baselines": False, "out": tmp_path}
    table = mr.probe("simmim_digits", data, **options)
    text = (tmp_path / "report.md").read_text()
    assert table.attrs["advice"] and text.endswith(f"|\n\n**{table.attrs['advice']}**\n")
    kept = pd.read_csv(tmp_path / "choice.csv")
    assert kept["block"].tolist() == [3, 7, 11] * 2 and set(kept["n_val"]) == {20}
    monkeypatch.setattr(report, "_features", None)  # nothing is left to do
    again = mr.probe("simmim_digits", data, resume=True, **options)
    assert again.attrs == table.attrs
    rank = mr.probe("simmim_digits", data, resume=True, **options, probes=("knn",))
    assert rank.attrs == table.attrs


def test_without_knn_there_is_no_advice(vit, digits):
    data = digits["train"].take(120), digits["test"].take(60)
    table = mr.probe(vit, data, probes=("rank",), baselines=False)
    assert table.attrs["advice"] == ""
