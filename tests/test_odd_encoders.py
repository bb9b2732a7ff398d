"""Encoders as people have them: loaded right and written so that they load again equal, or refused
in one line before any work.
"""

import json
from dataclasses import replace
from functools import partial

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

import mimrefiner as mr
from mimrefiner.__main__ import main
from mimrefiner.data.subsets import few_labels
from mimrefiner.models.catalogue import BY_NAME
from mimrefiner.models.export import export
from mimrefiner.models.layouts import ReleasedViT, ViTShape
from mimrefiner.models.weights import check_savable, save_encoder
from mimrefiner.models.wrappers import unwrapped
from mimrefiner.training.checkpoints import Saving
from mimrefiner.training.finetune import finetune
from mimrefiner.training.optim import layer_decay_groups
from mimrefiner.training.recipes import L16

CONFIG = mr.ViTConfig(dim=32, depth=3, num_heads=2)


@pytest.fixture
def state(vit):
    return vit.state_dict()


@pytest.fixture
def images(digits):
    return digits["test"].take(8)


def loaded(folder, file, **options):
    torch.save(file, folder / "file.pth")
    return mr.load_encoder(folder / "file.pth", **{"num_heads": 2, **options})


def tokens(encoder, image=None):
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return encoder.eval().forward_features(image)


# ---- files


@pytest.mark.parametrize("beside", ["model", "state_dict", "student"])
@pytest.mark.parametrize("average", ["ema", "teacher", "model_ema", "state_dict_ema", "ema_model"])
def test_the_average_wins_wherever_it_lies(average, beside, state, vit, tmp_path):
    noise = {name: torch.randn_like(x) for name, x in state.items()}
    encoder = loaded(tmp_path, {beside: noise, average: state, "epoch": 3})
    torch.testing.assert_close(tokens(encoder), tokens(vit), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("average", [{}, None, {"decay": 0.99}])
def test_an_average_without_weights_is_none(average, state, vit, tmp_path):
    encoder = loaded(tmp_path, {"model": state, "ema": average, "model_ema": average})
    torch.testing.assert_close(tokens(encoder), tokens(vit), atol=1e-5, rtol=1e-5)


def test_a_name_of_the_table_is_no_other_model(state, vit, tmp_path, monkeypatch):
    sizes = "width 32, 3 blocks and patches of 8 px, the model of that name 768, 12 and 16 px"
    torch.save(state, tmp_path / "file.pth")
    save_encoder(vit, tmp_path / "own.safetensors")
    for name in ("file.pth", "own.safetensors"):
        with pytest.raises(mr.InputError, match=f"is no mae_b16: it has {sizes}"):
            mr.load_encoder(f"mae_b16@{tmp_path / name}")
    row = replace(BY_NAME["mae_b16"], dim=32, depth=3, patch=8, heads=4)
    monkeypatch.setitem(BY_NAME, "mae_b16", row)
    encoder = mr.load_encoder(f"mae_b16@{tmp_path / 'file.pth'}")
    assert encoder.blocks[0].attn.num_heads == 4


def test_transposed_weights_are_refused(state, tmp_path):
    name = "blocks.0.attn.qkv.weight"
    turned = {**state, name: state[name].t().contiguous()}
    with pytest.raises(mr.InputError, match=r"should be \(96, 32\), got \(32, 96\)"):
        loaded(tmp_path, turned)


@pytest.mark.parametrize("form", ["(1, dim, rows, columns)", "(1, dim, number)", "(number, dim)"])
def test_positions_are_read_in_every_form(form, state, vit, tmp_path):
    cls, grid = state["pos_embed"][:, :1], state["pos_embed"][:, 1:]
    positions = {
        "(1, dim, rows, columns)": grid.mT.reshape(1, 32, 4, 4),
        "(1, dim, number)": grid.mT,
        "(number, dim)": grid[0],
    }[form].contiguous()
    file = {**state, "pos_embed": positions, "cls_token": state["cls_token"] + cls}
    torch.testing.assert_close(tokens(loaded(tmp_path, file)), tokens(vit), atol=1e-5, rtol=1e-5)


def test_positions_of_another_width_are_refused(state, tmp_path):
    with pytest.raises(mr.InputError, match=r"expected positions \(1, number, 32\) or .* 17, 16\)"):
        loaded(tmp_path, {**state, "pos_embed": torch.zeros(1, 17, 16)})


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("int8", lambda x: (100 * x).to(torch.int8)),
        ("complex64", lambda x: x.to(torch.complex64)),
        ("sparse", lambda x: x.to_sparse()),
    ],
)
def test_weights_that_are_no_plain_numbers_are_refused(kind, change, state, tmp_path):
    name = "blocks.1.mlp.fc1.weight"
    torch.save({**state, name: change(state[name])}, tmp_path / "file.pth")
    with pytest.raises(mr.InputError, match=f"{name} is {kind}, expected plain floating point"):
        mr.load_encoder(tmp_path / "file.pth", num_heads=2)
    torch.save(
        {**timm.create_model("test_vit").state_dict(), "norm.bias": change(torch.ones(64))},
        tmp_path / "timm.pth",
    )
    with pytest.raises(mr.InputError, match=f"norm.bias is {kind}, expected plain floating point"):
        mr.load_encoder("test_vit", file=tmp_path / "timm.pth")


def test_the_content_of_a_file_decides_and_not_its_name(state, vit, tmp_path):
    safetensors.torch.save_file(state, tmp_path / "a.pth")
    safetensors.torch.save_file(state, tmp_path / "blob")
    with (tmp_path / "b.safetensors").open("wb") as stream:
        torch.save(state, stream)
    save_encoder(vit, tmp_path / "own.pth")
    for name, heads in (("a.pth", 2), ("blob", 2), ("b.safetensors", 2), ("own.pth", None)):
        encoder = mr.load_encoder(tmp_path / name, num_heads=heads)
        torch.testing.assert_close(tokens(encoder), tokens(vit), atol=1e-5, rtol=1e-5)
    half = (tmp_path / "a.pth").read_bytes()[:5000]
    (tmp_path / "half.safetensors").write_bytes(half)
    with pytest.raises(mr.InputError, match="is damaged or no safetensors file"):
        mr.load_encoder(tmp_path / "half.safetensors", num_heads=2)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("VIT_TINY_PATCH16_224", "close names: vit_tiny_patch16_224"),
        ("vit_tiny_patch16_24", "close names: vit_tiny_patch16_224"),
        ("simmim_digts", "close names: simmim_digits"),
        ("facebook/vit-mae-base", "in timm's format is hf-hub:facebook/vit-mae-base, one of"),
        ("x" * 300, f"unknown model '{'x' * 100}...': expected a timm model name"),
        ("", "expected the name of a model, or the path of a file, got ''"),
        (None, "expected the name of a model, or the path of a file, got None"),
        (nn.Linear(2, 2), "this is a model already: give it to extract_features"),
    ],
)
def test_what_names_no_model_is_told_what_might(name, message):
    with pytest.raises(mr.InputError, match=message):
        mr.load_encoder(name)


def test_files_without_a_model_are_told_apart(vit, tmp_path):
    optimizer = torch.optim.AdamW(vit.parameters()).state_dict()
    with pytest.raises(mr.InputError, match="holds an optimiser's state and no model"):
        loaded(tmp_path, {"optimizer": optimizer, "epoch": 3})
    (tmp_path / ".metadata").write_text("")
    with pytest.raises(mr.InputError, match=r"join it by .* dcp_to_torch"):
        mr.load_encoder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    (tmp_path / "file.pth").unlink()
    with pytest.raises(mr.InputError, match=r"several parts .* join them, such as by"):
        mr.load_encoder(tmp_path)


# ---- transformers' folders


def transformers_folder(folder, vit, **config):
    parts = {}
    for name, x in vit.state_dict().items():
        name = name.replace("patch_embed.proj", "embeddings.patch_embeddings.projection")
        name = {
            "pos_embed": "embeddings.position_embeddings",
            "cls_token": "embeddings.cls_token",
        }.get(name, name)
        name = name.replace("blocks.", "encoder.layer.").replace("norm1", "layernorm_before")
        name = name.replace("norm2", "layernorm_after").replace(
            "attn.proj", "attention.output.dense"
        )
        name = name.replace("mlp.fc1", "intermediate.dense").replace("mlp.fc2", "output.dense")
        name = "layernorm" + name.removeprefix("norm") if name.startswith("norm.") else name
        if ".attn.qkv." in name:
            for part, third in zip(("query", "key", "value"), x.chunk(3), strict=True):
                parts[name.replace("attn.qkv", f"attention.attention.{part}")] = third.clone()
        else:
            parts[name] = x
    safetensors.torch.save_file(parts, folder / "model.safetensors")
    text = {"model_type": "vit", "num_attention_heads": 2, "hidden_act": "gelu", **config}
    (folder / "config.json").write_text(json.dumps(text))
    return folder


@pytest.mark.parametrize(("said", "eps"), [({}, 1e-12), ({"layer_norm_eps": 0.1}, 0.1)])
def test_the_epsilon_of_a_folder_is_taken_and_kept(said, eps, vit, tmp_path):
    encoder = mr.load_encoder(transformers_folder(tmp_path, vit, **said))
    for module in vit.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps
    torch.testing.assert_close(tokens(encoder), tokens(vit), atol=1e-5, rtol=1e-5)
    save_encoder(encoder, tmp_path / "own.safetensors")
    again = mr.load_encoder(tmp_path / "own.safetensors")
    assert torch.equal(tokens(again), tokens(encoder))
    with pytest.raises(mr.InputError, match=f"cannot express the model.*eps={eps}"):
        export(encoder, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_torchvisions_names_are_read(tmp_path):
    from torchvision.models import VisionTransformer

    theirs = VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64
    ).eval()
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        nn.init.normal_(theirs.class_token)
        patches = theirs._process_input(image)
        expected = theirs.encoder(torch.cat([theirs.class_token.expand(2, -1, -1), patches], 1))
    encoder = loaded(tmp_path, {"module." + k: x for k, x in theirs.state_dict().items()})
    torch.testing.assert_close(tokens(encoder), expected, atol=1e-5, rtol=1e-5)


def test_another_activation_is_refused(vit, tmp_path):
    folder = transformers_folder(tmp_path, vit, hidden_act="relu")
    with pytest.raises(mr.InputError, match="hidden_act 'relu': only gelu can be loaded"):
        mr.load_encoder(folder)


def test_a_processor_may_write_one_mean_for_all_colours(vit, tmp_path):
    folder = transformers_folder(tmp_path, vit)
    processor = {"image_mean": 0.25, "image_std": [0.5, 0.5, 0.5], "size": 32}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    encoder = mr.load_encoder(folder)
    assert encoder.pretrained_cfg["mean"] == (0.25, 0.25, 0.25)
    assert encoder.pretrained_cfg["crop_mode"] == "squash"
    save_encoder(encoder, folder / "own.safetensors")
    assert mr.load_encoder(folder / "own.safetensors").pretrained_cfg["crop_mode"] == "squash"
    for module in encoder.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6
    export(encoder, folder / "out.safetensors")
    again = mr.load_encoder(folder / "out.safetensors", num_heads=2)
    assert again.pretrained_cfg["crop_mode"] == "squash"
    written = json.loads((folder / "out.json").read_text())["pretrained_cfg"]
    assert written["crop_mode"] == "squash"


# ---- models in memory, written and read again


def timm_vit(**arguments):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    how = {**sizes, "num_classes": 0, "dynamic_img_size": True, **arguments}
    return timm.create_model("vit_tiny_patch16_224", **how).eval()


def with_adapter(vit):
    vit.blocks[0].attn.qkv = nn.Sequential(vit.blocks[0].attn.qkv, nn.Linear(96, 96))
    return vit


def without_architecture():
    vit = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, qkv_bias=False, num_classes=3
    )
    vit.pretrained_cfg = {"input_size": (3, 32, 32), "mean": (0.1,) * 3, "std": (0.5,) * 3}
    return vit.eval()


KEPT = {
    "sizes": timm_vit,
    "classes": partial(timm_vit, num_classes=10),
    "registers": partial(timm_vit, reg_tokens=4),
    "mean": partial(timm_vit, global_pool="avg"),
    "no cls": partial(timm_vit, global_pool="avg", class_token=False),
    "narrow": partial(timm_vit, mlp_ratio=2),
    "no bias": partial(timm_vit, qkv_bias=False),
    "layer scale": partial(timm_vit, init_values=0.1),
    "dropout": partial(timm_vit, drop_path_rate=0.2, proj_drop_rate=0.1),
    "by hand": without_architecture,
    "compiled": lambda: torch.compile(timm_vit(), backend="eager"),
    "parallel": lambda: nn.DataParallel(timm_vit()),
    "half": lambda: timm_vit().half(),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_is_written_loads_again_equal(name, images, tmp_path):
    encoder = KEPT[name]()
    save_encoder(encoder, tmp_path / "own.safetensors")
    again = mr.load_encoder(tmp_path / "own.safetensors")
    expected, found = (mr.extract_features(e.float(), images).x for e in (encoder, again))
    assert expected.keys() == found.keys()
    for pool in expected:
        torch.testing.assert_close(found[pool], expected[pool], atol=1e-6, rtol=1e-5)
    assert not hasattr(again.head, "weight")


REFUSED = {
    "activation": (partial(timm_vit, act_layer="relu"), r"blocks.0.mlp.act is ReLU\(\)"),
    "epsilon": (
        partial(timm_vit, norm_layer=partial(nn.LayerNorm, eps=0.1)),
        r"eps=0.1.* and would be .*eps=1e-06",
    ),
    "form": (partial(timm_vit, img_size=(64, 32)), "PatchEmbed.*grid_size=.8, 4.."),
    "adapter": (lambda: with_adapter(timm_vit()), "blocks.0.attn.qkv is Sequential"),
    "no vit": (partial(timm.create_model, "test_convnext"), "ConvNeXt can not be written"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_load_as_another_function_is_not_written(name, digits, tmp_path, caplog):
    make, message = REFUSED[name]
    encoder, path = make(), tmp_path / "own.safetensors"
    with pytest.raises(mr.InputError, match=message):
        save_encoder(encoder, path)
    if name != "no vit":
        with pytest.raises(mr.InputError):
            export(encoder, path)
        config = replace(mr.load_preset("smoke").refine, batch_size=8, queue_size=32)
        with pytest.raises(mr.InputError, match=message):
            mr.refine(encoder, digits["train"].take(16), config, saving=Saving(tmp_path / "c", 1))
    assert list(tmp_path.iterdir()) == []


def test_the_check_of_a_file_draws_nothing(vit):
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    check_savable(vit)
    assert torch.equal(torch.rand(2), expected)


# ---- wrapped, of another precision, without timm's methods

WRAPPERS = {
    "compiled": partial(torch.compile, backend="eager"),
    "parallel": nn.DataParallel,
    "both": lambda vit: nn.DataParallel(torch.compile(vit, backend="eager")),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_training_goes_by_the_names_below_a_wrapper(name, vit):
    wrapped = WRAPPERS[name](vit)
    assert unwrapped(wrapped) is vit
    refiner = mr.MIMRefiner(wrapped, mr.load_preset("smoke").refine)
    groups = layer_decay_groups(refiner.encoder, 0.05, 0.65)
    scales = {id(x): group["lr_scale"] for group in groups for x in group["params"]}
    assert scales[id(vit.norm.weight)] == 1
    assert scales[id(vit.blocks[0].mlp.fc1.weight)] == 0.65**3
    assert scales[id(vit.patch_embed.proj.weight)] == 0.65**4


@pytest.mark.parametrize("how", ["refine", "finetune", "finetune_recipe"])
def test_a_wrapped_encoder_trains_as_the_plain_one(how, digits):
    train, test = digits["train"].take(16), digits["test"].take(8)
    config = replace(mr.load_preset("smoke").refine, batch_size=8, queue_size=32, frozen_blocks=1)

    def trained(encoder):
        if how == "refine":
            return mr.refine(encoder, train, replace(config, refine_epochs=1)).encoder
        if how == "finetune":
            return finetune(encoder, train, config, flops=1e8).encoder
        recipe = replace(L16, epochs=1, batch_size=8, warmup_epochs=0)
        return mr.finetune_recipe(encoder, train, test, recipe).model.encoder

    plain = trained(mr.build_vit(CONFIG)).state_dict()
    for wrap in (WRAPPERS["both"], lambda vit: vit.double()):
        wrapped = trained(wrap(mr.build_vit(CONFIG))).state_dict()
        assert plain.keys() == wrapped.keys()
        for key, x in plain.items():
            assert torch.equal(x, wrapped[key]), key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_images_take_the_precision_of_the_weights(dtype, vit, images):
    expected = mr.extract_features(vit, images).x["cls"]
    found = mr.extract_features(vit.to(dtype), images).x["cls"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)
    assert dtype != torch.float64 or (found - expected).abs().max() < 1e-4


def test_a_model_without_settings_is_told_which_to_set(images):
    bare = timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=32, num_heads=2)
    config = mr.load_preset("smoke").refine
    for work in (
        lambda: mr.extract_features(bare, images),
        lambda: mr.refine(bare, images, config),
        lambda: save_encoder(bare, "nowhere.safetensors"),
    ):
        with pytest.raises(mr.InputError, match=r"set encoder.pretrained_cfg = dict.input_size="):
            work()


def test_a_model_without_memory_is_told_to_load(images):
    with torch.device("meta"):
        empty = timm_vit()
    with pytest.raises(mr.InputError, match="lies on the meta device, without weights"):
        mr.extract_features(empty, images)


class ForwardOnly(nn.Module):
    """As torch.hub's DINO: blocks, and no ``forward_features``."""

    def __init__(self, vit):
        super().__init__()
        self.blocks, self.cls_token = vit.blocks, vit.cls_token
        self.patch_embed, self.pretrained_cfg = vit.patch_embed, vit.pretrained_cfg
        self.tokens = vit._pos_embed

    def forward(self, images):
        return self.blocks(self.tokens(self.patch_embed(images)))[:, 0]


def test_a_model_with_forward_alone_can_be_probed(vit, images):
    expected = mr.extract_features(vit, images).x
    found = mr.extract_features(ForwardOnly(vit), images).x
    assert found.keys() == {"cls", "mean"}
    for pool, x in found.items():
        assert torch.equal(x, expected[pool])


# ---- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "cuda"}, "device cuda is not here: torch sees 0 GPUs"),
        ({"device": "gpu"}, "device must be such as 'cpu' or 'cuda:0', got 'gpu'"),
        ({"autocast": "bf16"}, "autocast must be one of torch's float32, bfloat16, .* got 'bf16'"),
        ({"batch_size": 2.5}, r"batch_size and num_workers must be whole numbers, got \(2.5, 0\)"),
    ],
)
def test_settings_of_features_are_one_line(settings, message, vit, images):
    with pytest.raises(mr.InputError, match=message):
        mr.extract_features(vit, images, **settings)


def test_precisions_may_be_given_by_name(vit, images, tmp_path):
    named, own = (
        mr.extract_features(vit, images, autocast=kind).x["cls"]
        for kind in ("bfloat16", torch.bfloat16)
    )
    assert torch.equal(named, own)
    save_encoder(vit, tmp_path / "own.safetensors")
    half = mr.load_encoder(tmp_path / "own.safetensors", dtype="bfloat16")
    assert half.cls_token.dtype == torch.bfloat16
    with pytest.raises(mr.InputError, match=r"dtype must be one of torch's .* got 'int8'"):
        mr.load_encoder(tmp_path / "own.safetensors", dtype="int8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"refine_top_k": 1.5}, "top_k must be a whole number, got 1.5"),
        ({"betas": 0.9}, "betas must be two numbers >= 0 and < 1, got 0.9"),
        ({"betas": ("0.9", 0.95)}, "betas must be two numbers >= 0 and < 1"),
        ({"temperature": "0.2"}, "temperature must be > 0 and finite, got '0.2'"),
        ({"refine_base_lr": "1e-3"}, "refine_base_lr must be >= 0 and finite, got '1e-3'"),
        ({"layer_decay": "0.6"}, "layer_decay must be > 0 and at most 1, got '0.6'"),
        ({"ema_decay": "0.9"}, "ema_decay must be >= 0 and < 1, or None, got 0.9"),
        ({"clip_norm": "1"}, "clip_norm must be > 0 or None, got '1'"),
    ],
)
def test_settings_of_refinement_are_one_line(change, message):
    with pytest.raises(mr.InputError, match=message):
        replace(mr.load_preset("smoke").refine, **change)


def test_released_models_keep_their_epsilon_when_they_are_resized():
    encoder = ReleasedViT(ViTShape(32, 8, 32, 1, 2, 64, norm_eps=0.1))
    encoder.set_input_size(48)
    assert encoder.shape.norm_eps == encoder.blocks[0].norm1.eps == 0.1


def test_a_share_below_one_image_of_each_class_says_what_it_became(digits):
    part = few_labels(digits["train"], 0.0001)
    assert len(part) == 10 and part.drawn == "0.88 %, one of each class, drawn with seed 0"
    assert few_labels(digits["train"], 0.1).drawn == "10 %, drawn with seed 0"


def test_export_into_an_impossible_folder_is_one_line(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    to = tmp_path / "file" / "folder" / "e.safetensors"
    assert main(["export", "simmim_digits", "--to", str(to)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("mimrefiner: error: cannot write to") and "with --to" in error
