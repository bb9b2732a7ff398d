from dataclasses import replace

import pytest
import torch

import mimrefiner as mr
from mimrefiner.probes import knn
from mimrefiner.probes.features import Features


@pytest.fixture
def knn_file(golden):
    tensors = golden("knn")
    return tensors, [tensors[name] for name in ("train_x", "train_y", "test_x", "test_y")]


@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize("temperature", [0.07, 0.2])
@pytest.mark.parametrize("k", [1, 5, 10, 20])
def test_accuracy_equals_the_official_one(knn_file, k, temperature, standardize):
    tensors, arguments = knn_file
    accuracy = mr.knn_accuracy(*arguments, k=k, temperature=temperature, standardize=standardize)
    name = f"acc_{'standardized' if standardize else 'plain'}_k{k}_t{temperature}"
    assert accuracy == tensors[name].item()


def test_predictions_equal_the_official_ones(knn_file):
    tensors, (train_x, train_y, test_x, _) = knn_file
    matches = [
        torch.equal(
            mr.knn_predict(train_x, train_y, test_x, standardize=s)[0, 0], tensors["pred_k10_t007"]
        )
        for s in (True, False)
    ]
    assert any(matches)


def test_one_search_over_blocks_equals_separate_ones(knn_file, monkeypatch):
    _, (train_x, train_y, test_x, test_y) = knn_file
    train, test = (
        torch.stack([train_x, train_x.flip(1) ** 3]),
        torch.stack([test_x, test_x.flip(1) ** 3]),
    )
    together = mr.knn_predict(train, train_y, test, ks=(1, 20), temperatures=(0.07, 0.2))
    assert together.shape == (2, 2, 2, len(test_y))
    for j, k in enumerate((1, 20)):
        for i, t in enumerate((0.07, 0.2)):
            for b in range(2):
                alone = mr.knn_predict(train[b], train_y, test[b], ks=(k,), temperatures=(t,))
                assert torch.equal(alone[0, 0], together[j, i, b])
    monkeypatch.setattr("mimrefiner.probes.knn.SEARCH_BYTES", 1)
    assert torch.equal(
        together, mr.knn_predict(train, train_y, test, ks=(1, 20), temperatures=(0.07, 0.2))
    )


def test_labels_need_not_start_at_zero_and_may_be_missing_in_test(knn_file):
    _, (train_x, train_y, test_x, test_y) = knn_file
    accuracy = mr.knn_accuracy(train_x, train_y, test_x, test_y)
    assert mr.knn_accuracy(train_x, train_y * 10 + 1000, test_x, test_y * 10 + 1000) == accuracy
    some = test_y < 3
    assert 0 <= mr.knn_accuracy(train_x, train_y, test_x[some], test_y[some]) <= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"ks": (5, 401)},
            "k must be a whole number between 1 and the number of training images 400, got 401",
        ),
        ({"ks": (0, 5)}, "k must be a whole number between 1 and .* got 0"),
        ({"ks": (2.5,)}, "k must be a whole number between 1 and .* got 2.5"),
        ({"ks": ()}, "one or more ks and temperatures, got none"),
        ({"temperatures": ()}, "one or more ks and temperatures, got none"),
        ({"temperatures": (0.07, 0.0)}, "temperature must be > 0, got 0.0"),
    ],
)
def test_bad_settings_are_named(knn_file, change, message):
    with pytest.raises(mr.InputError, match=message):
        mr.knn_predict(*knn_file[1][:3], **change)


@pytest.mark.parametrize(
    ("which", "change", "message"),
    [
        (3, lambda y: y[:-1], r"one label per test image as a tensor \(\d+,\), got \("),
        (3, lambda y: y[:, None], "one label per test image as a tensor"),
        (3, lambda y: y.numpy(), "one label per test image as a tensor .*, got ndarray"),
        (
            3,
            lambda y: torch.full_like(y, -1),
            "test images have no label, and k-NN counts right answers: leave them out",
        ),
        (
            0,
            lambda x: x.numpy(),
            r"features and labels as tensors, got ndarray, .*torch\.from_numpy",
        ),
        (
            0,
            lambda x: x.index_fill(0, torch.tensor([3]), torch.nan),
            "hold NaN or infinite values: check the weights",
        ),
        (
            2,
            lambda x: x.index_fill(0, torch.tensor([3]), torch.inf),
            "hold NaN or infinite values: check the weights",
        ),
    ],
)
@pytest.mark.parametrize("standardize", [True, False])
def test_bad_features_and_labels_are_named(knn_file, which, change, message, standardize):
    arguments = list(knn_file[1])
    arguments[which] = change(arguments[which])
    with pytest.raises(mr.InputError, match=message):
        mr.knn_accuracy(*arguments, standardize=standardize)


def test_no_test_images_are_named(knn_file):
    _, (train_x, train_y, test_x, test_y) = knn_file
    with pytest.raises(mr.InputError, match="k-NN needs test images, and there are none"):
        mr.knn_accuracy(train_x, train_y, test_x[:0], test_y[:0])


def test_a_small_temperature_is_the_vote_of_the_nearest(knn_file):
    _, (train_x, train_y, test_x, _) = knn_file
    nearest = mr.knn_predict(train_x, train_y, test_x, ks=(1,))
    assert torch.equal(
        mr.knn_predict(train_x, train_y, test_x, ks=(10,), temperatures=(1e-4,)), nearest
    )


PROBES = [mr.knn_hits, mr.linear_probe, mr.low_shot]


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": (1, 2)}, r"the cls features of block 0 \(0-based\), 8 wide, are not in both"),
        ({"x": {"mean": torch.randn(2, 40, 8)}}, "the cls features of block 0"),
        ({"x": {"cls": torch.randn(2, 40, 9)}}, "the cls features of block 0"),
        ({"y": torch.tensor([-1] * 10 + [0, 1, 2] * 10)}, "10 of 40 test images have no label"),
        (
            {"x": {"cls": torch.randn(2, 0, 8)}, "y": torch.tensor([])},
            "needs test images, and there are none",
        ),
        (
            {"x": {"cls": torch.full((2, 40, 8), torch.nan)}},
            r"cls features of block 0 \(0-based\) hold NaN",
        ),
    ],
)
def test_probes_refuse_test_features_that_do_not_fit(probe, change, message):
    train = Features({"cls": torch.randn(2, 40, 8)}, torch.tensor([0, 1] * 20), (0, 1), 4)
    with pytest.raises(mr.InputError, match=message):
        probe(train, replace(train, **change))


@pytest.mark.parametrize(
    ("label", "message"), [(-1, "needs labels"), (3, "at least two classes, and all labels are 3")]
)
def test_data_without_labels_or_of_one_class_are_refused(knn_file, label, message):
    _, (train_x, train_y, test_x, test_y) = knn_file
    with pytest.raises(mr.InputError, match=message):
        mr.knn_accuracy(train_x, torch.full_like(train_y, label), test_x, test_y)


def test_training_images_without_labels_do_not_vote(knn_file):
    _, (train_x, train_y, test_x, _) = knn_file
    train_y = train_y.clone()
    train_y[:3] = -1
    with pytest.raises(
        mr.InputError, match="k-NN needs labels, and 3 of 400 training images have none"
    ):
        mr.knn_predict(train_x, train_y, test_x)


def test_constant_features_vote_for_a_class_that_is_there(knn_file):
    _, (train_x, train_y, test_x, _) = knn_file
    predicted = mr.knn_predict(torch.ones_like(train_x), train_y, torch.ones_like(test_x))
    assert torch.isin(predicted, train_y).all()


def test_search_in_pieces_and_in_low_precision_finds_the_same(knn_file, monkeypatch):
    _, (train_x, train_y, test_x, _) = knn_file
    settings = {"ks": (1, 10, 20), "temperatures": (0.07,)}
    exact = mr.knn_predict(train_x, train_y, test_x, **settings)
    assert torch.equal(
        exact, mr.knn_predict(train_x, train_y, test_x, search_dtype=torch.bfloat16, **settings)
    )
    # 11 pieces, the last of 30 images
    monkeypatch.setattr("mimrefiner.probes.knn.BANK_BYTES", 4 * train_x.shape[1] * 37)
    assert torch.equal(exact, mr.knn_predict(train_x, train_y, test_x, **settings))
    assert torch.equal(
        exact, mr.knn_predict(train_x, train_y, test_x, search_dtype=torch.float16, **settings)
    )


def test_rescored_similarities_are_float32(knn_file):
    _, (train_x, _, test_x, _) = knn_file
    bank, queries = (torch.nn.functional.normalize(x, dim=-1) for x in (train_x, test_x))
    low = bank.bfloat16()
    exact, rows = knn._nearest(queries, bank, bank, 5, bank.new_empty(len(queries), len(bank)))
    coarse, coarse_rows = knn._nearest(
        queries, bank, low, 5, low.new_empty(len(queries), len(bank))
    )
    assert torch.equal(rows, coarse_rows)
    assert torch.allclose(exact, coarse, atol=1e-6)


def test_the_features_given_stay_as_they_are(knn_file):
    _, (train_x, train_y, test_x, _) = knn_file
    bank, queries = train_x.clone(), test_x.clone()
    for standardize in (True, False):
        mr.knn_predict(bank, train_y, queries, standardize=standardize)
        assert torch.equal(bank, train_x)
        assert torch.equal(queries, test_x)


def test_within_groups_only_images_of_the_group_vote():
    """Classes 0 and 1 form one group, 2 and 3 another; each group by itself is what the whole
    gives.
    """
    train, test = (
        Features({"cls": torch.randn(2, n, 8)}, torch.arange(n) % 4, (0, 1), 2) for n in (60, 40)
    )
    groups = torch.tensor([0, 0, 1, 1])
    hits = knn.knn_hits_within(train, test, groups)["cls"]
    for group in (0, 1):
        bank, asked = groups[train.y] == group, groups[test.y] == group
        for block in range(2):
            expected = mr.knn_accuracy(
                train.x["cls"][block][bank],
                train.y[bank],
                test.x["cls"][block][asked],
                test.y[asked],
            )
            assert hits[block, asked].float().mean().item() == pytest.approx(expected)


@pytest.mark.parametrize("k", [1, 10, 26, 100])
def test_the_largest_of_groups_of_columns_are_those_of_the_row(k):
    """Columns that fill no group are searched too; for many neighbours there are too few groups."""
    x = torch.randn(7, 64 * knn.GROUP + 5)
    x[0, -1] = x[1, 0] = 9.0
    found, expected = knn._largest(x, k), x.topk(k, dim=1)
    assert torch.equal(found[0], expected.values) and torch.equal(found[1], expected.indices)
