import sys

import pytest
import safetensors.torch
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

import mimrefiner as mr
from experiments import front, real_encoder
from experiments.front import Front

DIM = 16


def varint(n):
    out = b""
    while n > 127:
        out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])


def field(number, value):
    """One field of a protobuf message: an integer, or bytes behind their length."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def tensor(name, x):
    sizes = b"".join(field(1, size) for size in x.shape)
    data = x.contiguous().numpy().astype("<f4").tobytes()
    return field(5, sizes + field(2, 1) + field(8, name.encode()) + field(9, data))


def node(kind, inputs, outputs):
    named = [field(1, name.encode()) for name in inputs]
    named += [field(2, name.encode()) for name in outputs]
    return field(1, b"".join(named) + field(4, kind.encode()))


def onnx(state):
    """A timm state dict as the ONNX file has it."""
    parts, nameless = [], iter(f"onnx_{i}" for i in range(99))

    def linear(name, weight, bias):
        matrix = next(nameless)
        parts.append(tensor(matrix, weight.T))
        parts.append(tensor(f"backbone.{name}.bias", bias))
        parts.append(node("MatMul", ["x", matrix], [f"{name}/product"]))
        parts.append(node("Add", [f"backbone.{name}.bias", f"{name}/product"], [f"{name}/out"]))

    for name in ("norm.weight", "norm.bias"):
        parts.append(tensor(f"backbone.layer{name}", state[name]))
    for end in ("weight", "bias"):
        name = f"backbone.embeddings.patch_embeddings.projection.{end}"
        parts.append(tensor(name, state[f"patch_embed.proj.{end}"]))
    parts.append(tensor("backbone.embeddings.cls_token", state["cls_token"]))
    for positions in (state["pos_embed"][:, 1:], state["pos_embed"][:, :1]):
        parts.append(tensor(next(nameless), positions))
    for block in range(2):
        ours, theirs = f"blocks.{block}.", f"encoder.layer.{block}."
        for name, other in real_encoder.VECTORS.items():
            parts.append(tensor(f"backbone.{theirs}{other}", state[ours + name]))
        for i, name in enumerate(("query", "key", "value")):
            rows = slice(i * DIM, (i + 1) * DIM)
            weight, bias = (state[f"{ours}attn.qkv.{end}"][rows] for end in ("weight", "bias"))
            linear(f"{theirs}attention.attention.{name}", weight, bias)
        for name, other in real_encoder.LAYERS.items():
            weight, bias = (state[f"{ours}{name}.{end}"] for end in ("weight", "bias"))
            linear(f"{theirs}{other}", weight, bias)
    return field(1, 8) + field(7, b"".join(parts))


def dinov2(image_size):
    """Two blocks of the architecture, narrow, with random numbers everywhere."""
    how = {"patch_size": 14, "embed_dim": DIM, "depth": 2, "num_heads": 2, "init_values": 1e-5}
    model = VisionTransformer(image_size, **how, num_classes=0, dynamic_img_size=True).eval()
    for x in model.parameters():
        torch.nn.init.normal_(x)
    return model


@pytest.fixture
def converted(tmp_path):
    """The encoder that was written, and the state that was read."""
    file, encoder = tmp_path / "tiny.onnx", dinov2(56)
    file.write_bytes(onnx(encoder.state_dict()))
    return encoder, real_encoder.convert(file)


def test_every_tensor_comes_back_under_timms_name(converted):
    encoder, state = converted
    assert state.keys() == encoder.state_dict().keys()
    assert all(torch.equal(x, state[name]) for name, x in encoder.state_dict().items())
    with torch.device("meta"):
        names = timm.create_model(real_encoder.ARCHITECTURE, num_classes=0).state_dict()
    blocks = ("blocks.0.", "blocks.1.")
    assert state.keys() == {n for n in names if n.startswith(blocks) or "blocks" not in n}


def test_positions_follow_the_image_and_every_key_must_match(converted, monkeypatch):
    encoder, state = converted
    monkeypatch.setattr(
        real_encoder, "load_encoder", lambda name, image_size, **_: dinov2(image_size)
    )
    images = torch.rand(2, 3, 56, 56)
    same, smaller = (real_encoder.build(state, size) for size in (56, 28))
    with torch.no_grad():
        assert torch.equal(same(images), encoder(images))
    expected = timm.layers.resample_abs_pos_embed(
        state["pos_embed"], [2, 2], num_prefix_tokens=1, antialias=False
    )
    assert torch.equal(smaller.pos_embed, expected)
    for wrong in ({**state, "head.weight": images}, {"pos_embed": state["pos_embed"]}, {}):
        with pytest.raises(mr.InputError, match="these are not the tensors of vit_small_patch14"):
            real_encoder.build(wrong, 56)


@pytest.mark.parametrize(
    "content",
    [b"", b"not a model", field(7, 3), field(7, tensor("other", torch.ones(2)))],
    ids=["empty", "text", "no graph", "another model"],
)
def test_a_wrong_file_gives_one_line(content, tmp_path, monkeypatch):
    file = tmp_path / "model.onnx"
    file.write_bytes(content)
    out = tmp_path / "out.safetensors"
    arguments = ["real_encoder", "convert", "--onnx", str(file), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as told:
        real_encoder.main()
    assert told.value.code.startswith(f"real_encoder: error: {file} is not the ONNX file")
    assert "\n" not in told.value.code and not out.exists()


def test_missing_files_are_named(tmp_path):
    with pytest.raises(mr.InputError, match=r"no\.onnx cannot be read \(No such file"):
        real_encoder.convert(tmp_path / "no.onnx")
    with pytest.raises(mr.InputError, match="does not exist: the command convert writes it"):
        real_encoder.study(tmp_path / "no.safetensors", "digits", tmp_path)


def test_convert_writes_what_was_read(converted, tmp_path, monkeypatch):
    out = tmp_path / "out.safetensors"
    arguments = [
        "real_encoder",
        "convert",
        "--onnx",
        str(tmp_path / "tiny.onnx"),
        "--out",
        str(out),
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    real_encoder.main()
    written = safetensors.torch.load_file(out)
    assert all(torch.equal(x, written[name]) for name, x in converted[1].items())


def test_kept_tokens_give_the_features_of_the_whole_encoder(vit, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(front, "BATCH", 8)
    images = digits["val"].take(20)
    expected = mr.extract_features(vit, images)
    found = Front(vit, 2, tmp_path).features(vit, images)
    assert found.blocks == expected.blocks and torch.equal(found.y, expected.y)
    for pool in ("cls", "mean"):
        torch.testing.assert_close(found.x[pool], expected.x[pool])
    monkeypatch.setattr(Front, "_write", None)  # what leaves the front is kept
    later = mr.build_vit(mr.ViTConfig(dim=32, depth=3, num_heads=2), seed=1)
    first = {name: x for name, x in vit.state_dict().items() if "blocks.2" not in name}
    later.load_state_dict(first, strict=False)
    later.blocks[0].norm1.bias.data.neg_()  # from 0.0 to -0.0, as averages may do
    found = Front(vit, 2, tmp_path).features(later, images)
    torch.testing.assert_close(found.x["cls"], mr.extract_features(later, images).x["cls"])
    with pytest.raises(mr.InputError, match="first blocks of this encoder are not those"):
        Front(vit, 3, tmp_path).features(later, images)
    assert Front(vit, 2, tmp_path).features(None, images).x.keys() == {"pixels"}
