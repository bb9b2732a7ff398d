"""Heads placed by measurement."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

import mimrefiner as mr
from mimrefiner.__main__ import main
from mimrefiner.training import placement


@pytest.fixture(scope="module")
def encoder():
    return mr.build_vit(mr.ViTConfig(dim=32, depth=4, num_heads=2), seed=3)


@pytest.fixture(scope="module")
def digits():
    return mr.load_dataset("digits", split="train").take(120)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_accuracy_is_that_of_neighbours_left_out_one_by_one(encoder, digits, pool):
    """Against scikit-learn, which is fitted anew without every image."""
    found = placement.neighbour_accuracy(encoder, digits, pool, images=80, seed=5)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(5))[:80]
    features = mr.extract_features(encoder, digits.subset(order.tolist()), pools=(pool,))
    y = features.y.numpy()
    for block in range(4):
        x = torch.nn.functional.normalize(features.x[pool][block].float(), dim=-1).numpy()
        right = 0
        for i in range(len(y)):
            others = [j for j in range(len(y)) if j != i]
            knn = KNeighborsClassifier(placement.NEIGHBOURS, algorithm="brute")
            right += knn.fit(x[others], y[others]).predict(x[i : i + 1])[0] == y[i]
        assert found[block] == pytest.approx(right / len(y), abs=1.5 / len(y))


def test_refine_places_the_heads_and_finds_its_choice_again(
    encoder, digits, tmp_path, monkeypatch, caplog
):
    config = replace(mr.load_preset("smoke").refine, blocks="auto", batch_size=40, queue_size=64)
    measured = iter([torch.tensor([0.1, 0.2, 0.4, 0.3])])  # a second measurement would fail
    monkeypatch.setattr(placement, "neighbour_accuracy", lambda *args, **how: next(measured))
    with caplog.at_level(logging.INFO, "mimrefiner"):
        chosen = placement.placed(config, encoder, digits, tmp_path)
    assert chosen == replace(config, blocks=(2, 3))
    assert "heads are placed on blocks 2, 3 (0-based)" in caplog.text
    kept = json.loads((tmp_path / "placement.json").read_text())
    assert kept["blocks"] == [2, 3] and kept["percent"] == [10.0, 20.0, 40.0, 30.0]
    assert placement.placed(config, encoder, digits, tmp_path) == chosen
    with pytest.raises(StopIteration):  # another encoder, another choice
        placement.placed(config, mr.build_vit(mr.ViTConfig(dim=32, depth=4)), digits, tmp_path)


def test_refinement_with_placed_heads_is_that_with_the_blocks_given(encoder, digits):
    config = replace(mr.load_preset("smoke").refine, batch_size=40, queue_size=64)
    auto = mr.refine(encoder, digits, replace(config, blocks="auto"))
    given = placement.placed(replace(config, blocks="auto"), encoder, digits).blocks
    assert set(auto.history["block"]) == set(given)
    same = mr.refine(encoder, digits, replace(config, blocks=given))
    for ours, theirs in zip(auto.encoder.parameters(), same.encoder.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_images_without_a_class_cannot_place_heads(encoder):
    images = [(mr.load_dataset("digits", split="train")[i][0], -1) for i in range(20)]
    with pytest.raises(mr.InputError, match="without a class: give blocks such as"):
        placement.neighbour_accuracy(encoder, images, "cls")


def test_what_has_no_images_says_that_heads_are_still_to_be_placed(encoder):
    with pytest.raises(mr.InputError, match='blocks "auto" needs images'):
        mr.MIMRefiner(encoder, replace(mr.load_preset("smoke").refine, blocks="auto"))


def test_the_command_places_heads_and_keeps_where(tmp_path):
    out = tmp_path / "refined"
    main(["refine", "--preset", "smoke", "--blocks", "auto", "--out", str(out)])
    blocks = json.loads((out / "placement.json").read_text())["blocks"]
    assert json.loads((out / "settings.json").read_text())["settings"]["blocks"] == blocks
