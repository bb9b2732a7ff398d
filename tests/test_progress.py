import pytest

from mimrefiner import progress


@pytest.fixture
def clock(monkeypatch):
    """Six seconds pass between two looks."""
    monkeypatch.setenv("MIMREFINER_PROGRESS", "log")
    seconds = iter(range(0, 600, 6))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(seconds))


def test_a_log_has_a_line_every_ten_seconds(clock, caplog):
    caplog.set_level("INFO", "mimrefiner")
    assert list(progress.progress(range(5), "work")) == list(range(5))
    assert caplog.messages == [
        "work: 1 of 5 (20%), about 48 s left",
        "work: 3 of 5 (60%), about 16 s left",
    ]


def test_a_slow_first_item_ends_nothing(caplog, monkeypatch):
    caplog.set_level("INFO", "mimrefiner")
    monkeypatch.setenv("MIMREFINER_PROGRESS", "log")
    seconds = iter([0, 30, 60])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(seconds))
    assert list(progress.progress(range(2), "work")) == [0, 1]
    assert caplog.messages == [
        "work: 0 of 2 (0%)",
        "work: 1 of 2 (50%), about 60 s left",
    ]


def test_of_several_processes_the_first_shows_it(clock, caplog, monkeypatch):
    caplog.set_level("INFO", "mimrefiner")
    monkeypatch.setenv("RANK", "1")
    assert list(progress.progress(range(5), "work")) == list(range(5))
    assert caplog.messages == []
