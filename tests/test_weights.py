import argparse
import pickle
import sys
import types

import pytest
import safetensors.torch
import torch

import mimrefiner as mr
from mimrefiner.models.tensors import read_checkpoint
from mimrefiner.models.weights import save_encoder


@pytest.fixture
def settings_classes(monkeypatch):
    """Modules that look like omegaconf and fairseq; gone again before anything is loaded."""
    made = {}
    for module, name in (
        ("omegaconf.dictconfig", "DictConfig"),
        ("omegaconf.base", "ContainerMetadata"),
        ("fairseq.tasks", "Task"),
    ):
        made[module] = types.ModuleType(module)
        made[module.split(".")[0]] = types.ModuleType(module.split(".")[0])
        setattr(made[module], name, type(name, (), {"__module__": module}))
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
    return made


@pytest.mark.parametrize("zipped", [True, False])
def test_settings_beside_the_weights_stay_inert(zipped, settings_classes, tmp_path, monkeypatch):
    config = settings_classes["omegaconf.dictconfig"].DictConfig()
    config.__dict__ |= {
        "_metadata": settings_classes["omegaconf.base"].ContainerMetadata(),
        "_content": {"lr": 1e-3},
        "t": dict,
    }
    file = {
        "args": argparse.Namespace(lr=0.1, nested=[1]),
        "cfg": config,
        "task": settings_classes["fairseq.tasks"].Task(),
    }
    file["model"] = {"x": torch.arange(3.0)}
    torch.save(file, tmp_path / "file.pt", _use_new_zipfile_serialization=zipped)
    for name in settings_classes:
        monkeypatch.delitem(sys.modules, name)
    loaded = read_checkpoint(tmp_path / "file.pt")
    assert torch.equal(loaded["model"]["x"], torch.arange(3.0))
    assert not isinstance(loaded["args"], argparse.Namespace)
    assert "omegaconf" not in sys.modules


class _Malicious:
    def __init__(self, call, *args):
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("call", [exec, open])
def test_a_malicious_file_is_refused(call, zipped, tmp_path):
    target = tmp_path / "owned"
    bad = (
        _Malicious(exec, f"open({str(target)!r}, 'w')")
        if call is exec
        else _Malicious(open, str(target), "w")
    )
    torch.save(
        {"model": {"x": torch.zeros(1)}, "cfg": bad},
        tmp_path / "bad.pt",
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(mr.InputError, match="was not loaded: it refers to"):
        mr.load_encoder(tmp_path / "bad.pt")
    assert not target.exists()


def test_settings_modules_lend_no_functions(tmp_path):
    """A function of an allowed module becomes an inert class too: it is not called."""
    target = tmp_path / "owned"
    target.mkdir()
    torch.save({"model": {}, "cfg": _Malicious(argparse._sys.exit, 1)}, tmp_path / "exit.pt")
    with pytest.raises(mr.InputError, match="refused"):
        mr.load_encoder(tmp_path / "exit.pt")


@pytest.mark.parametrize("content", [b"", b"12345678", pickle.dumps([1, 2], 2)])
def test_damaged_files_are_named(content, tmp_path):
    (tmp_path / "bad.pth").write_bytes(content)
    with pytest.raises(mr.InputError, match=r"bad\.pth"):
        mr.load_encoder(tmp_path / "bad.pth")


def test_half_precision_files_load_as_float32(vit, tmp_path):
    half = mr.load_encoder("simmim_digits").half()
    save_encoder(half, tmp_path / "half.safetensors")
    again = mr.load_encoder(tmp_path / "half.safetensors")
    assert {x.dtype for x in again.parameters()} == {torch.float32}


def test_a_full_disk_is_an_os_error(vit, tmp_path, monkeypatch):
    def full(*args):
        raise safetensors.SafetensorError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="could not be written: No space left"):
        save_encoder(vit, tmp_path / "e.safetensors")
    assert list(tmp_path.iterdir()) == []
