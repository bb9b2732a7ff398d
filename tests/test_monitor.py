from dataclasses import replace

import pandas as pd
import pytest
import torch

import mimrefiner as mr
from mimrefiner.models.weights import sha256_of
from mimrefiner.probes.monitor import Monitor, queue_spread
from mimrefiner.progress import Meter


@pytest.fixture
def preset():
    return mr.load_preset("smoke")


@pytest.fixture
def refiner(preset):
    return mr.MIMRefiner(mr.build_vit(preset.encoder), preset.refine)


def test_every_epoch_has_a_row_and_training_is_not_changed(preset, digits, tmp_path):
    some = digits["train"].take(128)
    encoder, config = mr.build_vit(preset.encoder), replace(preset.refine, refine_epochs=2)
    alone = mr.refine(encoder, some, config)
    watched = mr.refine(
        encoder, some, config, monitor=Monitor(some, digits["val"].take(50), tmp_path)
    )
    assert sha256_of(watched.encoder) == sha256_of(alone.encoder)
    table = watched.epochs
    assert list(zip(table["stage"], table["epoch"], strict=True)) == [(2, 1), (3, 1), (3, 2)]
    for column in ("knn_last_block", "knn_head2", "knn_head3", "data_wait_share"):
        assert table[column].between(0, 1).all(), column
    assert (table["images_per_second"] > 0).all() and (table["peak_memory_mib"] > 0).all()
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "epochs.csv"), table, check_exact=False)


def test_knn_of_a_head_is_that_of_its_first_layer(refiner, digits):
    train, test = digits["train"].take(100), digits["val"].take(60)
    epochs = [{"stage": 2, "epoch": 1}]
    Monitor(train, test)(refiner, epochs)
    x = []
    for data in (train, test):
        features = mr.extract_features(refiner.encoder, data, blocks=(2, 3), pools=("cls",))
        x.append(features.x["cls"][0] @ refiner.heads.projector[0].weight[0].detach())
    labels = [torch.tensor(data.labels) for data in (train, test)]
    assert epochs[0]["knn_head2"] == pytest.approx(
        mr.knn_accuracy(x[0], labels[0], x[1], labels[1])
    )


def test_collapse_is_said(refiner, digits, caplog):
    assert (queue_spread(refiner) - 1).abs().max() < 0.05  # random directions
    few = digits["train"].take(20)
    Monitor(few, few)(refiner, [{"stage": 2, "epoch": 1}])
    assert caplog.text == ""
    refiner.queue.z[0] = torch.randn(16) + 0.01 * torch.randn(refiner.queue.size, 16)
    refiner.queue._refresh_unit(None)
    Monitor(few, few)(refiner, [{"stage": 2, "epoch": 1}])
    assert "the head on block 2 collapses" in caplog.text and "block 3" not in caplog.text


def test_a_full_disk_does_not_end_training(refiner, digits, tmp_path, caplog, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_csv", full)
    few, epochs = digits["train"].take(20), [{"stage": 2, "epoch": 1}]
    Monitor(few, few, tmp_path)(refiner, epochs)
    assert "knn_last_block" in epochs[0] and list(tmp_path.iterdir()) == []
    assert "epochs.csv not written" in caplog.text and "training goes on" in caplog.text


def test_what_cannot_be_measured_is_said_before_training(digits, tmp_path, monkeypatch):
    few = digits["train"].take(20)
    unlabelled = few.subset(range(20))
    unlabelled.labels = None
    with pytest.raises(mr.InputError, match=r"--watch.* needs a label"):
        Monitor(few, unlabelled)
    monkeypatch.setattr("mimrefiner.probes.monitor.find_spec", lambda name: None)
    with pytest.raises(mr.InputError, match=r"pip install 'mimrefiner\[tensorboard\]'"):
        Monitor(few, few, tmp_path, tensorboard=True)


def test_events_are_written(refiner, digits, tmp_path):
    pytest.importorskip("tensorboard")
    few = digits["train"].take(20)
    Monitor(few, few, tmp_path, tensorboard=True)(refiner, [{"stage": 2, "epoch": 1}])
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 1


def test_waiting_is_counted(monkeypatch):
    now = iter([0.0, 1.0, 4.0, 6.0, 7.0, 10.0])  # start; ask, get, ask, get; read
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    meter = Meter(8)
    batches = meter.waiting("ab")
    assert [next(batches), next(batches)] == ["a", "b"]
    values = meter.read()
    assert values["data_wait_share"] == pytest.approx(0.4)
    assert values["images_per_second"] == pytest.approx(1.6)


def test_a_stage_of_less_than_an_epoch_is_measured_at_its_end(preset, digits):
    config = replace(preset.refine, batch_size=32, heads_epochs=0.5, refine_epochs=1.5)
    some = digits["train"].take(128)
    watched = mr.refine(
        mr.build_vit(preset.encoder), some, config, monitor=Monitor(some, digits["val"].take(50))
    )
    assert watched.epochs[["stage", "epoch"]].to_numpy().tolist() == [[2, 0.5], [3, 1], [3, 1.5]]
    assert watched.epochs["knn_last_block"].between(0, 1).all()
