import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mimrefiner as mr
from mimrefiner.models.encoders import eval_transform
from mimrefiner.probes.features import Features
from mimrefiner.probes.linear import JointProbes, Training, linear_probe_augmented, schedule


@pytest.fixture
def features():
    """Two blocks: one that tells the classes apart, one of noise."""
    y = torch.arange(90) % 3
    good = torch.eye(3)[y] @ torch.randn(3, 8) + 0.3 * torch.randn(90, 8)
    return Features({"cls": torch.stack([torch.randn(90, 8), good])}, y, (0, 1), 2)


def test_joint_probes_equal_separate_torch_modules():
    x, y = torch.randn(2, 32, 8), torch.randint(3, (32,))
    rates = torch.tensor([0.05, 0.5])
    joint = JointProbes(2, 8, 3, rates, seed=0, device=torch.device("cpu"))
    modules = {}
    for kind in range(2):
        for r, rate in enumerate(rates.tolist()):
            model = nn.Sequential(nn.BatchNorm1d(8, affine=False), nn.Linear(8, 3))
            with torch.no_grad():
                model[1].weight.copy_(joint.weight[kind, :, r].T)
                model[1].bias.zero_()
            modules[kind, r] = model, torch.optim.SGD(model.parameters(), rate, momentum=0.9)
    for step in range(5):
        joint.step(x, y, schedule(step, 5))
        for (kind, r), (model, optimizer) in modules.items():
            optimizer.param_groups[0]["lr"] = schedule(step, 5) * rates[r].item()
            optimizer.zero_grad()
            F.cross_entropy(model(x[kind]), y).backward()
            optimizer.step()
    joint.norm.eval()
    logits = joint.logits(x)
    for (kind, r), (model, _) in modules.items():
        assert torch.allclose(model.eval()(x[kind]), logits[kind, :, r], atol=1e-5)


def test_finds_the_good_block_and_reports_once(features):
    rows = mr.linear_probe(features, features.subset(range(30)), epochs=20, batch_size=32)
    value = rows.set_index("block")["value"]
    assert value[1] > 0.9
    assert value[0] < 0.8
    assert rows["setting"].str.startswith("lr=").all()
    assert rows["n_train"].tolist() == [81, 81]  # a tenth held out
    again = mr.linear_probe(features, features.subset(range(30)), epochs=20, batch_size=32)
    assert rows.equals(again)


def test_widths_may_differ(features):
    wide = features.joined(("cls_last2",))
    assert [x.shape[1] for x in wide.x["cls_last2"]] == [8, 16]
    rows = mr.linear_probe(wide, wide, epochs=5)
    assert rows[["pool", "block"]].to_numpy().tolist() == [["cls_last2", 0], ["cls_last2", 1]]


def test_unknown_test_classes_count_as_wrong(features):
    test = features.subset(range(30))
    test.y = test.y + 100
    assert (mr.linear_probe(features, test, epochs=2)["value"] == 0).all()


def test_constant_features_do_not_break_it(features):
    features.x["cls"][0] = 1.0
    rows = mr.linear_probe(features, features, epochs=5)
    assert rows["value"].between(0, 1).all()


def test_one_class_is_refused(features):
    features.y[:] = 7
    with pytest.raises(mr.InputError, match="at least two classes, and all labels are 7"):
        mr.linear_probe(features, features)


def test_images_without_labels_are_refused(features):
    features.y[:2] = -1
    with pytest.raises(
        mr.InputError, match="a linear probe needs labels, and 2 of 90 training images have none"
    ):
        mr.linear_probe(features, features)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs must be a whole number >= 1, got 0"),
        ({"epochs": 1.5}, "epochs must be a whole number >= 1, got 1.5"),
        ({"batch_size": 0}, "batch_size must be a whole number >= 2, got 0"),
        ({"batch_size": 1}, "batch_size must be a whole number >= 2, got 1"),
        ({"learning_rates": ()}, "learning rates must be > 0"),
    ],
)
def test_bad_settings_are_named(features, settings, message):
    with pytest.raises(mr.InputError, match=message):
        mr.linear_probe(features, features, **settings)


def test_two_images_are_too_few(features):
    with pytest.raises(
        mr.InputError, match="at least 2 training images beside those held out, got 1"
    ):
        mr.linear_probe(features.subset([0, 1]), features)


def test_validation_chooses_the_pooling_too(features):
    noise = torch.randn(2, 90, 8)
    both = Features({"mean": noise, "cls": features.x["cls"]}, features.y, (3, 7), 8)
    rows = mr.linear_probe(both, both, epochs=20, batch_size=32, choose=True).set_index(
        ["pool", "block"]
    )
    assert rows.loc[("chosen", 7), "value"] == rows.loc[("cls", 7), "value"] > 0.9
    assert rows.loc[("chosen", 7), "setting"] == f"cls {rows.loc[('cls', 7), 'setting']}"
    assert len(rows) == 6


POOLS = ("cls", "mean", "cls+mean_last2")


def test_augmented_probe_runs_on_every_block_and_pooling(vit, digits):
    train, test = (
        digits["train"].take(64),
        mr.extract_features(vit, digits["test"].take(40)).joined(POOLS),
    )
    training = Training(epochs=2, batch_size=32, learning_rates=(0.1,))
    rows = linear_probe_augmented(vit.train(), train, test, test, training)
    assert vit.training
    assert rows["pool"].drop_duplicates().tolist() == list(POOLS)
    assert rows["block"].tolist() == 3 * [0, 1, 2]
    assert rows["value"].between(0, 1).all()
    cls = test.joined(("cls",))
    few = linear_probe_augmented(vit, train, cls, cls, training)
    assert few["value"].tolist() == rows["value"].tolist()[:3]  # probes do not disturb each other


def test_without_augmentation_the_augmented_probe_is_the_cached_one(vit, digits, monkeypatch):
    """The crop is taken away and both go through the images in the same order."""
    train, test = digits["train"].take(40), mr.extract_features(vit, digits["test"].take(40))
    cached = mr.extract_features(vit, train)
    images = torch.stack([eval_transform(vit)(train[i][0]) for i in range(40)])
    options = {"epochs": 3, "batch_size": 40, "learning_rates": (0.1,)}
    batches = [([images], None, torch.tensor(train.labels))] * 3
    monkeypatch.setattr("mimrefiner.probes.linear.view_batches", lambda *a, **k: batches)
    augmented = linear_probe_augmented(vit, train, test, test, Training(**options))
    assert (
        augmented["value"].tolist()
        == mr.linear_probe(cached, test, val=test, **options)["value"].tolist()
    )


def test_augmented_probe_needs_labels(vit, digits):
    test = mr.extract_features(vit, digits["test"].take(40))
    with pytest.raises(mr.InputError, match="no attribute labels"):
        linear_probe_augmented(vit, [digits["test"][0]], test, test)


def test_hits_are_what_the_accuracies_count(features):
    test = features.subset(range(30))
    rows = mr.linear_probe(features, test, epochs=5, batch_size=32, choose=True, hits=True)
    assert rows["value"].tolist() == [right.float().mean().item() for right in rows["hits"]]
    assert all(right.shape == (30,) for right in rows["hits"])
    assert rows.drop(columns="hits").equals(
        mr.linear_probe(features, test, epochs=5, batch_size=32, choose=True)
    )
