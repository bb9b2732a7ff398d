"""Checkpoints whose pickles torch's safe reader does not take as they are."""

import argparse
import gzip
import io
import pickle
import zipfile

import numpy as np
import pytest
import torch

import mimrefiner as mr
from mimrefiner.models.pickles import as_protocol_2
from mimrefiner.models.tensors import read_checkpoint

WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, 2], dtype=torch.int64)}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol_is_read(protocol, zipped, tmp_path):
    """With names that are used twice, settings, bytes and NumPy's numbers beside the weights."""
    file = {
        "model": WEIGHTS,
        "again": {"model": WEIGHTS["b"]},
        "args": argparse.Namespace(lr=0.1, names=["model", "a.weight"]),
        "best": np.float64(0.5),
        "rows": np.arange(4, dtype=np.int32).reshape(2, 2),
        "note": b"\x00\xff",
        "text": "é\n'",
    }
    options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": zipped}
    torch.save(file, tmp_path / "file.pth", **options)
    found = read_checkpoint(tmp_path / "file.pth")
    for name, x in WEIGHTS.items():
        assert torch.equal(found["model"][name], x) and found["model"][name].dtype == x.dtype
    assert torch.equal(found["again"]["model"], WEIGHTS["b"])
    assert float(found["best"]) == 0.5 and found["rows"].tolist() == [[0, 1], [2, 3]]
    assert found["text"] == "é\n'"
    assert "lr" not in vars(found["args"])  # an inert stand-in


class Calls:
    """A pickle that runs code when it is loaded."""

    def __reduce__(self):
        return eval, ("1 + 1",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [4, 5])
def test_rewritten_pickles_run_no_code(protocol, zipped, tmp_path):
    options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": zipped}
    torch.save({"model": WEIGHTS, "x": Calls()}, tmp_path / "file.pth", **options)
    with pytest.raises(mr.InputError, match=r"refers to (builtins\.)?eval, which is refused"):
        read_checkpoint(tmp_path / "file.pth")


def test_a_pickle_means_the_same_in_protocol_2():
    shared = ["x"]
    value = {"a": (1, 2.5, None, True), "twice": [shared, shared], "b": b"bytes", "c": 1 + 2j}
    for protocol in (3, 4, 5):
        content = pickle.dumps(value, protocol=protocol)
        again = as_protocol_2(io.BytesIO(content))
        assert again[:2] == b"\x80\x02" and pickle.loads(again) == value
        twice = pickle.loads(again)["twice"]
        assert twice[0] is twice[1]


def of_numpy(folder):
    file = folder / "weights.npz"
    np.savez(file, a=np.zeros(2))
    return file


def of_script(folder):
    file = folder / "script.pt"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/code/__torch__.py", "")
        archive.writestr("archive/data.pkl", pickle.dumps(1))
    return file


def of_bytes(content, name="file.pth"):
    def write(folder):
        (folder / name).write_bytes(content)
        return folder / name

    return write


@pytest.mark.parametrize(
    ("write", "what"),
    [
        (of_bytes(b""), "it is empty"),
        (of_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "it is a Git LFS pointer"),
        (of_bytes(b"<!DOCTYPE html><html>"), "it is a web page: the download went wrong"),
        (of_bytes(b"\x89HDF\r\n\x1a\n"), "it is an HDF5 file"),
        (of_bytes(gzip.compress(b"x")), r"it is compressed \(gzip\)"),
        (of_bytes(pickle.dumps({"a": np.zeros(2)})), "it is a pickle that torch.save has not"),
        (of_bytes(b"no checkpoint at all"), "damaged or no checkpoint"),
        (of_numpy, r"it holds NumPy arrays \(.npz\): give the timm name too"),
        (of_script, "it is a TorchScript archive: save the state_dict"),
    ],
)
def test_what_is_no_checkpoint_is_called_by_its_name(write, what, tmp_path):
    with pytest.raises(mr.InputError, match=what):
        mr.load_encoder(write(tmp_path))
