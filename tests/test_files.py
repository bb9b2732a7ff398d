import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mimrefiner import files
from mimrefiner.errors import InputError
from mimrefiner.files import Entry


@pytest.fixture
def entry(tmp_path):
    return Entry.named(tmp_path, "squares", {"upto": 3, "of": {"step": 1}})


def fill(entry, text="1 4 9"):
    with entry.filled_aside() as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "squares.txt").write_text(text)
        entry.finish(folder, {"n": 3})


def test_a_finished_entry_gives_its_facts_again(entry):
    assert entry.facts() is None and not entry.is_there
    fill(entry)
    again = Entry(entry.folder, dict(reversed(entry.settings.items())))
    assert again.facts() == {"n": 3} and again.is_there
    assert again.damage() is None and again.different() == []


def test_the_name_follows_the_settings_and_not_their_order(tmp_path):
    names = [
        Entry.named(tmp_path, "a", settings).folder.name
        for settings in ({"x": 1, "y": 2}, {"y": 2, "x": 1}, {"x": 1, "y": 3})
    ]
    assert names[0] == names[1] != names[2]
    assert names[0].startswith("a-")


def test_numbers_of_numpy_and_tuples_are_those_that_the_file_gives_back(tmp_path):
    entry = Entry(tmp_path / "a", {"n": np.int64(3), "x": np.float32(0.5), "blocks": (1, 2)})
    fill(entry)
    assert Entry(tmp_path / "a", {"n": 3, "x": 0.5, "blocks": [1, 2]}).facts() == {"n": 3}


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "deep/squares.txt").write_text("1 4 8"), "squares.txt is"),
        (lambda folder: (folder / "deep/squares.txt").unlink(), "squares.txt is missing"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json is missing or"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json is missing or"),
    ],
)
def test_a_damaged_entry_counts_as_absent_and_is_announced(entry, caplog, damage, said):
    fill(entry)
    damage(entry.folder)
    assert said in entry.damage()
    assert entry.facts() is None
    fill(entry, "1 4 9 16")
    assert f"{entry.folder} is damaged (" in caplog.text and said in caplog.text
    assert entry.facts() == {"n": 3}
    assert (entry.folder / "deep" / "squares.txt").read_text() == "1 4 9 16"


def test_other_settings_are_named_and_not_called_damage(entry, caplog):
    fill(entry)
    other = Entry(entry.folder, {"upto": 4, "of": {"step": 1}, "new": None})
    assert other.different() == ["upto"]
    assert other.facts() is None and other.damage() is None
    fill(other)
    assert caplog.text == ""
    assert other.facts() == {"n": 3} and entry.facts() is None


def test_only_the_files_that_are_named_belong_to_an_entry_in_place(tmp_path):
    entry = Entry(tmp_path, {"a": 1}, manifest="notes/done.json")
    for name in ("kept.txt", "other.txt"):
        (tmp_path / name).write_text(name)
    entry.finish(tmp_path, {}, [tmp_path / "kept.txt"])
    (tmp_path / "other.txt").write_text("changed")
    assert entry.facts() == {}
    assert list(json.loads((tmp_path / "notes/done.json").read_text())["files"]) == ["kept.txt"]
    (tmp_path / "kept.txt").write_text("changed")
    assert entry.damage() == "kept.txt is missing or changed"


def test_an_interrupted_entry_leaves_what_was_there(entry):
    def fill_half():
        with entry.filled_aside() as folder:
            (folder / "half.txt").write_text("half")
            raise KeyboardInterrupt

    fill(entry)
    with pytest.raises(KeyboardInterrupt):
        fill_half()
    assert entry.facts() == {"n": 3}
    assert [file.name for file in entry.folder.parent.iterdir()] == [entry.folder.name]


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    entry = Entry(tmp_path / "a[1]", {})
    kill = "import os, sys; sys.path[:] = {path!r}; from pathlib import Path\n"
    kill += "from mimrefiner.files import Entry\n"
    kill += "with Entry(Path({folder!r}), {{}}).filled_aside() as part:\n    os._exit(9)"
    for folder in (entry.folder, tmp_path / "a[1].b", tmp_path / "a"):
        code = kill.format(path=sys.path, folder=str(folder))
        assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    assert len(list(tmp_path.iterdir())) == 3
    fill(entry)
    left = sorted(
        file.name.rpartition(".")[0] for file in tmp_path.iterdir() if file != entry.folder
    )
    assert left == [".a", ".a[1].b"]


LOCK_AND_SAY = """
import sys
from pathlib import Path
from mimrefiner.files import Entry
entry = Entry(Path(sys.argv[1]), {})
print("ready", flush=True)
sys.stdin.readline()
with entry.locked():
    if entry.facts() is None:
        print("fills", flush=True)
        sys.stdin.readline()
        with entry.filled_aside() as folder:
            entry.finish(folder, {})
    else:
        print("finds", flush=True)
"""


@pytest.fixture
def processes(entry):
    """Two processes that fill the entry when told to: tell(i) and hear(i)."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-c", LOCK_AND_SAY, str(entry.folder)]
    both = [subprocess.Popen(command, **pipes, text=True) for _ in range(2)]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    yield both
    for process in both:
        process.kill()
        process.communicate()


def tell(process):
    process.stdin.write("go\n")
    process.stdin.flush()


def test_of_two_processes_one_fills_and_the_other_waits_and_finds(entry, processes):
    first, second = processes
    tell(first)
    assert first.stdout.readline() == "fills\n"
    tell(second)
    assert second.stderr.readline() == (
        f"another process is filling {entry.folder.name}: waiting for it\n"
    )
    tell(first)
    assert second.stdout.readline() == "finds\n"
    assert [process.wait(30) for process in processes] == [0, 0]


def test_the_lock_of_a_killed_process_is_free(processes):
    first, second = processes
    tell(first)
    assert first.stdout.readline() == "fills\n"
    first.kill()
    first.wait()
    tell(second)
    assert second.stdout.readline() == "fills\n"


def test_a_file_is_whole_or_absent(tmp_path):
    file = tmp_path / "new" / "note.txt"

    def write_half():
        with files.atomic_file(file) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert list(file.parent.iterdir()) == []
    umask = os.umask(0o027)
    try:
        with files.atomic_file(file) as temporary:
            temporary.write_text("whole")
    finally:
        os.umask(umask)
    assert file.read_text() == "whole" and file.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    ("name", "folder"),
    [("MIMREFINER_CACHE", files.cache_folder), ("MIMREFINER_DATA", files.data_folder)],
)
def test_folders_in_the_environment_may_begin_with_a_tilde(monkeypatch, name, folder):
    monkeypatch.setenv(name, "~/somewhere")
    assert folder() == Path.home() / "somewhere"
    monkeypatch.delenv(name)
    assert folder().is_relative_to(Path.home() / ".cache" / "mimrefiner")


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write to .*file.*choose another folder"):
        files.check_writable(tmp_path / "file")
    files.check_writable(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def test_a_full_disk_is_said_and_ends_nothing(caplog):
    with files.goes_on_without("history"):
        raise OSError(28, "No space left on device")
    assert (
        "history not written ([Errno 28] No space left on device): training goes on" in caplog.text
    )
    with pytest.raises(ValueError, match="other"), files.goes_on_without("history"):
        raise ValueError("other")
