import pytest
import torch
from torch import nn

import mimrefiner as mr
from mimrefiner.models.classifier import (
    DropPath,
    Head,
    ImageClassifier,
    kept_rows,
    load_classifier,
    save_classifier,
)
from mimrefiner.models.encoders import released_encoder
from mimrefiner.models.layouts import ReleasedViT, ViTShape
from mimrefiner.training.finetune import recipe_groups
from mimrefiner.training.recipes import L16, replace

IMAGES = torch.randn(4, 3, 32, 32)


def released(**form):
    shape = ViTShape(32, 8, dim=32, depth=3, num_heads=2, mlp_dim=64, **form)
    return released_encoder(ReleasedViT(shape))


def test_the_final_norm_is_applied_to_the_pooled_vector(vit):
    nn.init.normal_(vit.norm.weight)
    tokens = vit.forward_intermediates(
        IMAGES, indices=[2], norm=False, output_fmt="NLC", return_prefix_tokens=True
    )[1][0]
    patches, cls = tokens[0], tokens[1][:, 0]
    for pool, pooled in (("cls", cls), ("mean", patches.mean(1))):
        model = ImageClassifier(vit, Head(5, pool)).eval()
        assert torch.allclose(model(IMAGES), model.linear(vit.norm(pooled)), atol=1e-6)
    assert not torch.allclose(vit.norm(patches.mean(1)), vit.norm(patches).mean(1), atol=1e-3)


def test_post_norm_gets_a_new_norm_and_crossmae_none():
    d2v2 = ImageClassifier(released(post_norm=True, final_norm=False), Head(5))
    assert isinstance(d2v2.head_norm, nn.LayerNorm) and d2v2.head_norm.eps == 1e-6
    assert d2v2.head_norm.weight.eq(1).all() and d2v2.head_norm.bias.eq(0).all()
    with torch.no_grad():
        d2v2.head_norm.bias += 1
    plain = d2v2.encoder.forward_features(IMAGES)[:, 0]
    assert torch.allclose(d2v2.eval()(IMAGES), d2v2.linear(d2v2.head_norm(plain)), atol=1e-6)
    without = ImageClassifier(released(post_norm=True, final_norm=False), Head(5, head_norm=False))
    crossmae = ImageClassifier(released(final_norm=False), Head(5, "mean"))
    assert isinstance(without.head_norm, nn.Identity)
    assert isinstance(crossmae.head_norm, nn.Identity)


def test_the_classifier_starts_as_published(vit):
    model = ImageClassifier(vit, Head(2000), seed=3)
    assert model.linear.weight.std().item() == pytest.approx(2e-5, rel=0.02)
    assert model.linear.bias.eq(0).all()
    assert torch.equal(model.linear.weight, ImageClassifier(vit, Head(2000), seed=3).linear.weight)
    other = ImageClassifier(vit, Head(2000), seed=4).linear.weight
    assert not torch.equal(model.linear.weight, other)


def test_fixed_positions_become_a_parameter_and_the_given_encoder_stays():
    encoder = released()
    model = ImageClassifier(encoder, Head(5))
    assert isinstance(model.encoder.pos_embed, nn.Parameter)
    assert torch.equal(model.encoder.pos_embed, encoder.pos_embed)
    assert "pos_embed" in dict(encoder.named_buffers())
    fixed = ImageClassifier(encoder, Head(5, learn_positions=False))
    assert "pos_embed" in dict(fixed.encoder.named_buffers())


def test_learned_positions_can_stay_as_they_are(vit):
    assert ImageClassifier(vit, Head(5)).encoder.pos_embed.requires_grad
    fixed = ImageClassifier(vit, Head(5, learn_positions=False)).encoder
    assert not fixed.pos_embed.requires_grad and vit.pos_embed.requires_grad


def test_rates_and_decays_of_every_parameter():
    """Block i has decay ** (depth - i), what is before decay ** (depth + 1), norm and head 1."""
    model = ImageClassifier(released(), Head(5))
    recipe = replace(L16, layer_decay=0.5, weight_decay=0.1)
    name_of = {id(x): name for name, x in model.named_parameters()}
    found = {
        name_of[id(x)]: (group["lr_scale"], group["weight_decay"])
        for group in recipe_groups(model, recipe)
        for x in group["params"]
    }
    assert found.keys() == set(name_of.values())
    expected = {
        "encoder.pos_embed": (0.5**4, 0),
        "encoder.cls_token": (0.5**4, 0),
        "encoder.patch_embed.proj.weight": (0.5**4, 0.1),
        "encoder.patch_embed.proj.bias": (0.5**4, 0),
        "encoder.blocks.0.attn.qkv.weight": (0.5**3, 0.1),
        "encoder.blocks.2.mlp.fc1.bias": (0.5, 0),
        "encoder.blocks.2.norm1.weight": (0.5, 0),
        "encoder.norm.weight": (1, 0),
        "linear.weight": (1, 0.1),
        "linear.bias": (1, 0),
    }
    assert {name: found[name] for name in expected} == expected
    decayed = recipe_groups(model, replace(recipe, decay_cls=True))
    (cls,) = (g for g in decayed for x in g["params"] if x is model.encoder.cls_token)
    assert cls["weight_decay"] == 0.1


def test_drop_path_lets_a_fixed_number_pass():
    generator = torch.Generator().manual_seed(0)
    factors = torch.stack([kept_rows(0.3, 10, generator) for _ in range(400)])
    assert (factors > 0).sum(1).eq(7).all()
    assert torch.allclose(factors[factors > 0], torch.tensor(10 / 7))
    assert factors.mean(0).sub(1).abs().max() < 0.15  # every image alike
    # 4 * 0.7 would be rounded down to 2 of 4: drawn one by one instead
    few = torch.stack([kept_rows(0.3, 4, generator) for _ in range(2000)])
    assert few[few > 0].unique().tolist() == pytest.approx([1 / 0.7])
    assert few.mean().item() == pytest.approx(1, abs=0.03)
    assert (few > 0).sum(1).unique().tolist() == [0, 1, 2, 3, 4]


def test_drop_path_grows_linearly_and_acts_in_training_only(vit):
    model = ImageClassifier(vit, Head(5, drop_path=0.4))
    rates = [[block.drop_path1, block.drop_path2] for block in model.encoder.blocks]
    assert all(isinstance(x, nn.Identity) for x in rates[0])
    assert [[x.rate for x in pair] for pair in rates[1:]] == [[0.2, 0.2], [0.4, 0.4]]
    nn.init.normal_(model.linear.weight)
    plain = model.eval()(IMAGES)
    factors = model.draw_paths(4, torch.Generator().manual_seed(0))
    assert factors.shape == (4, 4)
    model.use_paths(factors)
    assert torch.equal(model(IMAGES), plain)
    assert not torch.allclose(model.train()(IMAGES), plain)
    model.use_paths(torch.zeros(4, 4))  # blocks 1 and 2 are left out
    only = ImageClassifier(vit, Head(5))
    only.load_state_dict(model.state_dict())
    only.encoder.blocks[1] = only.encoder.blocks[2] = nn.Identity()
    assert torch.allclose(model(IMAGES), only(IMAGES), atol=1e-6)
    assert sum(isinstance(m, DropPath) for m in vit.modules()) == 0


@pytest.mark.parametrize("form", [{}, {"post_norm": True, "final_norm": False}])
def test_a_saved_classifier_comes_back(form, tmp_path):
    model = ImageClassifier(released(**form), Head(7, "mean")).eval()
    nn.init.normal_(model.linear.weight)
    files = save_classifier(model, tmp_path)
    assert [file.name for file in files] == ["encoder.safetensors", "classifier.safetensors"]
    again = load_classifier(tmp_path)
    assert torch.equal(again(IMAGES), model(IMAGES)) and again.head.pool == "mean"
    assert isinstance(mr.load_encoder(files[0]).pos_embed, nn.Parameter)


def test_what_cannot_be_a_classifier_is_refused(vit, tmp_path):
    with pytest.raises(mr.InputError, match="at least two classes, got 1"):
        ImageClassifier(vit, Head(1))
    without = released(cls_token=False)
    with pytest.raises(mr.InputError, match="needs a cls token, which this model does not have"):
        ImageClassifier(without, Head(3))
    with pytest.raises(mr.InputError, match="does not exist: expected a folder that"):
        load_classifier(tmp_path)
    model = ImageClassifier(vit, Head(3))
    _, head = save_classifier(model, tmp_path)
    head.write_bytes(head.read_bytes()[:50])
    with pytest.raises(mr.InputError, match="is damaged"):
        load_classifier(tmp_path)
    save_classifier(model, tmp_path)
    other = ImageClassifier(mr.build_vit(mr.ViTConfig(dim=16, depth=2)), Head(3))
    save_classifier(other, tmp_path / "other")
    (tmp_path / "other" / "encoder.safetensors").replace(tmp_path / "encoder.safetensors")
    with pytest.raises(mr.InputError, match=r"is damaged: Error|does not belong"):
        load_classifier(tmp_path)
