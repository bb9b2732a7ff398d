"""Pickles inside of checkpoints: what torch's safe reader may meet, and what it does not read.

``torch.load(weights_only=True)`` reads pickle protocol 2 and few classes. Settings that authors
stored beside the weights become inert stand-ins, NumPy's scalars and arrays are let through, and
protocols 3 to 5 are rewritten as protocol 2, operation by operation, without running anything.
"""

import io
import pickletools
import re
import struct
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import BinaryIO

import numpy as np

SETTINGS = re.compile(
    r"(argparse|omegaconf|fairseq|typing|pathlib|lightning|lightning_fabric|pytorch_lightning|"
    r"lightning_utilities|hydra|yacs|easydict|ml_collections|addict|mmengine|mmcv)(\.|$)"
)
PLAIN = {
    ("collections", "defaultdict"),
    *product(("builtins", "__builtin__"), ("dict", "list", "tuple", "int", "float", "str", "bool")),
}
MAGIC = bytes.fromhex("6cfc9c46f9206aa85019")  # of torch.save in files that are no zip archive
LEGACY = 5  # pickles at the beginning of a file that is no zip archive


class _Inert:
    """Takes the place of a class that a checkpoint names: whatever it is given, nothing happens."""

    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setitem__(self, key, value):
        pass

    def __setstate__(self, state):
        pass


def allowed(source: Path | BinaryIO) -> list:
    """What ``torch.serialization.safe_globals`` takes for ``source``: NumPy's scalars and arrays,
    and stand-ins for the settings classes that its pickles name; nothing is imported.
    """
    found = set()
    for stream in _streams(source):
        with stream, suppress(ValueError):  # no pickle: torch.load says so
            for _ in range(LEGACY - 1):  # the fourth holds the checkpoint
                found |= {
                    arg for opcode, arg, _ in pickletools.genops(stream) if opcode.name == "GLOBAL"
                }
    if not isinstance(source, Path):
        source.seek(0)  # torch.load tells the format from the bytes at this place
    classes = [tuple(name.split(" ")) for name in sorted(found)]
    settings = [name for name in classes if SETTINGS.match(name[0]) or name in PLAIN]
    return [*(_stand_in(*name) for name in settings), *_numpy_globals()]


def _stand_in(module: str, name: str) -> type:
    module = module.replace("__builtin__", "builtins")
    return type(name, (_Inert,), {"__module__": module, "__qualname__": name})


def _numpy_globals() -> list:
    """NumPy's scalars and arrays under the names that its versions 1 and 2 pickle."""
    inner = np.zeros(1).__reduce__()[0].__module__  # numpy._core.multiarray in version 2
    makers = {"scalar": np.float64(0).__reduce__()[0], "_reconstruct": np.zeros(1).__reduce__()[0]}
    modules = dict.fromkeys(("numpy.core.multiarray", "numpy._core.multiarray", inner))
    found = [(makers[name], f"{module}.{name}") for module in modules for name in makers]
    numeric = ("numpy.core.numeric", "numpy._core.numeric")
    from_buffer = np.zeros(1).__reduce_ex__(5)[0]  # what protocol 5 names
    buffers = [(from_buffer, f"{module}._frombuffer") for module in numeric]
    kinds = [getattr(np.dtypes, name) for name in np.dtypes.__all__]
    found += [(kind, f"numpy.dtypes.{kind.__name__}") for kind in kinds]
    return [*found, *buffers, (np.dtype, "numpy.dtype"), (np.ndarray, "numpy.ndarray")]


def _streams(source: Path | BinaryIO) -> Iterator[BinaryIO]:
    if zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            names = [name for name in archive.namelist() if name.endswith("data.pkl")]
            yield from [io.BytesIO(archive.read(name)) for name in names]
    else:
        yield source.open("rb") if isinstance(source, Path) else io.BytesIO(source.getvalue())


def readable(path: Path) -> Path | io.BytesIO:
    """``path``, or the same file in memory with its pickles in protocol 2.

    Raises:
        ValueError: a pickle that is none, or has what protocol 2 cannot express.
    """
    if not zipfile.is_zipfile(path):
        with path.open("rb") as stream:
            if _protocol(stream.read(2)) < 3:
                return path
            stream.seek(0)
            parts = [as_protocol_2(stream) for _ in range(LEGACY)]
            return io.BytesIO(b"".join([*parts, stream.read()]))
    with zipfile.ZipFile(path) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("data.pkl")]
        if not any(_protocol(archive.read(name)[:2]) >= 3 for name in pickles):
            return path
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as copy:
            for name in archive.namelist():
                content = archive.read(name)
                copy.writestr(
                    name, as_protocol_2(io.BytesIO(content)) if name in pickles else content
                )
    out.seek(0)
    return out


def is_pickle(path: Path) -> bool:
    """Whether a file begins as a pickle of protocol 2 or later does, or holds one."""
    with path.open("rb") as stream:
        return stream.read(1) == b"\x80" or zipfile.is_zipfile(path)


def _protocol(head: bytes) -> int:
    return head[1] if len(head) == 2 and head[0] == 0x80 else 0


def as_protocol_2(stream: BinaryIO) -> bytes:
    """One pickle of ``stream`` in protocol 2, which is all that torch's safe reader knows.

    Strings are written out wherever they are used, so that none has to be remembered: then the two
    that name a class lie right before the operation that takes them off the stack.

    >>> import pickle
    >>> pickle.loads(as_protocol_2(io.BytesIO(pickle.dumps({"a": [b"x", 1.5]}, protocol=5))))
    {'a': [b'x', 1.5]}
    """
    begin = stream.tell()
    operations = list(pickletools.genops(stream))
    end = stream.tell()
    stream.seek(begin)
    content = stream.read(end - begin)
    ends = [*(place - begin for _, _, place in operations[1:]), end - begin]
    out: list[bytes | str] = []
    texts: dict[int, str] = {}  # what is remembered, where it is a string
    remembered: set[int] = set()
    for (operation, value, place), stop in zip(operations, ends, strict=True):
        name = operation.name
        if name == "PROTO":
            out.append(b"\x80\x02")
        elif name == "FRAME":
            continue
        elif name.endswith(("BINUNICODE", "BINUNICODE8")):
            out.append(value)
        elif name.endswith(("BINBYTES", "BINBYTES8")):
            out.append(_bytes(value))
        elif name == "BYTEARRAY8":
            out.append(b"cbuiltins\nbytearray\n" + _bytes(bytes(value)) + b"\x85R")
        elif name == "MEMOIZE" or name.endswith("PUT"):
            number = len(remembered) if name == "MEMOIZE" else int(value)
            remembered.add(number)
            if isinstance(out[-1], str):
                texts[number] = out[-1]
            else:
                out.append(b"r" + struct.pack("<I", number))
        elif name.endswith("GET"):
            number = int(value)
            out.append(texts.get(number, b"j" + struct.pack("<I", number)))
        elif name == "STACK_GLOBAL":
            attribute, module = out.pop(), out.pop()
            out.append(f"c{module}\n{attribute}\n".encode())
        else:
            out.append(content[place - begin : stop])
    return b"".join(_written(part) for part in out)


def _bytes(value: bytes) -> bytes:
    """Bytes as protocol 2 has them: a string that is encoded."""
    parts = (b"c_codecs\nencode\n", value.decode("latin1"), "latin1", b"\x86R")
    return b"".join(_written(part) for part in parts)


def _written(part: bytes | str) -> bytes:
    """A string as protocol 2 pushes it; other operations as they are."""
    if isinstance(part, bytes):
        return part
    text = part.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(text)) + text


def what_it_is(path: Path) -> str:
    """What a file is that is no checkpoint, "" where its first bytes do not tell."""
    with path.open("rb") as stream:
        head = stream.read(64)
    if not head:
        return "it is empty"
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if any("/code/" in name or name.endswith("constants.pkl") for name in names):
            return "it is a TorchScript archive: save the state_dict() of torch.jit.load(FILE)"
        if any(name.endswith(".npy") for name in names):
            return "it holds NumPy arrays (.npz): give the timm name too, NAME@FILE.npz"
        if not any(name.endswith("data.pkl") for name in names):
            return "it is a zip archive without a checkpoint in it"
        return ""
    if head[0] == 0x80 and MAGIC not in head:
        return "it is a pickle that torch.save has not written: write it anew by torch.save"
    for start, what in KINDS.items():
        if head.lstrip().lower().startswith(start):
            return what
    return ""


KINDS = {
    b"version https://git-lfs": "it is a Git LFS pointer: fetch the file itself (git lfs pull)",
    b"<": "it is a web page: the download went wrong",
    b"{": "it is JSON",
    b"\x89hdf": "it is an HDF5 file (Keras): convert it to PyTorch first",
    b"\x08": "it looks like an ONNX file: convert it to PyTorch first",
    b"\x1f\x8b": "it is compressed (gzip): unpack it first",
}
