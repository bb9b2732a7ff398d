"""The paper-* presets in notebooks: released weights and ImageNet by path, here small random files
in their place.
"""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import mimrefiner as mr
from mimrefiner.batch import runner
from mimrefiner.models.catalogue import BY_NAME
from mimrefiner.probes import protocols
from mimrefiner.study import claims, paper, presets, store

PRESET = "paper-mae-l16"


def write_weights(file, dim=16, depth=24, patch=16, size=224):
    """A random encoder in MAE's layout."""
    x = {
        "cls_token": (1, 1, dim),
        "pos_embed": (1, (size // patch) ** 2 + 1, dim),
        "norm.weight": (dim,),
        "norm.bias": (dim,),
    }
    x |= {"patch_embed.proj.weight": (dim, 3, patch, patch), "patch_embed.proj.bias": (dim,)}
    shapes = {"norm1": dim, "attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim), "norm2": dim}
    shapes |= {"mlp.fc1": (4 * dim, dim), "mlp.fc2": (dim, 4 * dim)}
    for block in range(depth):
        for name, shape in shapes.items():
            shape = shape if isinstance(shape, tuple) else (shape,)
            x |= {f"blocks.{block}.{name}.weight": shape, f"blocks.{block}.{name}.bias": shape[:1]}
    file.parent.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(len(file.name))
    tensors = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in x.items()}
    torch.save({"model": tensors}, file)


@pytest.fixture
def released(tmp_path, monkeypatch):
    """The two files of the preset, where a download would put them."""
    monkeypatch.setenv("MIMREFINER_CACHE", str(tmp_path / "cache"))
    for name in store.PUBLISHED[PRESET]:
        write_weights(
            tmp_path
            / "cache"
            / "weights"
            / f"{name}{BY_NAME[name].url[BY_NAME[name].url.rindex('.') :]}"
        )


@pytest.fixture
def imagenet(tmp_path, monkeypatch):
    folder, rng = tmp_path / "imagenet", np.random.default_rng(0)
    for part, n in (("train", 20), ("val", 8)):
        for name in ("ant", "bee"):
            (folder / part / name).mkdir(parents=True)
            for i in range(n):
                Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(
                    folder / part / name / f"{i}.png"
                )
    monkeypatch.setenv("MIMREFINER_IMAGENET", str(folder))
    return folder


def test_every_paper_preset_names_models_of_the_table():
    for before, refined in store.PUBLISHED.values():
        assert BY_NAME[before].url
        assert BY_NAME[refined].url
        assert BY_NAME[before].depth == BY_NAME[refined].depth


def test_without_imagenet_nothing_runs_and_one_line_says_what_to_set(tmp_path, monkeypatch):
    monkeypatch.setenv("MIMREFINER_IMAGENET", str(tmp_path / "nowhere"))
    monkeypatch.setattr(runner, "LocalProcess", lambda *args: pytest.fail("executed"))
    with pytest.raises(
        mr.InputError, match=r"needs ImageNet-1K.*nowhere: set MIMREFINER_IMAGENET to the folder"
    ):
        runner.run_notebooks(["01"], preset=PRESET, seeds="0", out=tmp_path / "out")


def test_without_weights_one_line_says_where_to_put_them(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setenv("MIMREFINER_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(
        mr.InputError, match=r"released weights mae_l16 .*no network.*/weights/mae_l16\.pth"
    ):
        store.pretrained(mr.load_preset(PRESET))


def test_tiny_imagenet_is_found_by_its_variable_or_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("MIMREFINER_TINY_IMAGENET", str(tmp_path / "nowhere"))
    with pytest.raises(
        mr.InputError,
        match=r"natural needs Tiny-ImageNet.*nowhere: set MIMREFINER_TINY_IMAGENET to the folder",
    ):
        presets.load_split(mr.load_preset("natural"), "train")


@pytest.mark.usefixtures("released")
def test_released_weights_stand_for_the_stages():
    preset = mr.load_preset(PRESET)
    before, refined, untrained = (
        store.pretrained(preset).encoder,
        store.refined(preset),
        store.untrained(preset),
    )
    assert refined.encoder is refined.ema_encoder
    weights = [model.blocks[0].attn.qkv.weight for model in (before, refined.encoder, untrained)]
    assert not torch.equal(weights[0], weights[1])
    assert weights[2].std().item() == pytest.approx(0.02, rel=0.2)
    assert (untrained.norm.weight == 1).all()
    assert store.is_stored("refined", preset)
    with pytest.raises(mr.InputError, match="has no longer pre-trained control"):
        store.pretrained_longer(preset)


@pytest.mark.usefixtures("released", "imagenet")
def test_notebooks_run_with_released_weights_and_their_numbers_meet_the_papers(tmp_path):
    runner.run_notebooks(["06", "09"], preset=PRESET, seeds="0", out=tmp_path / "out")
    rows = pd.read_csv(tmp_path / "out" / "results.csv")
    assert set(rows["dataset"]) == {"imagefolder:imagenet", "fruit64"}  # not where it lies here
    table = pd.read_csv(tmp_path / "out" / "tables" / "09_paper_vs_measured.csv").query(
        "measured.notna()"
    )
    assert set(table["model"]) == {"MAE", "MAE-Refined"}
    assert set(table["backbone"]) == {"L/16"}
    assert set(table["comparable"]) == {"no"}  # 40 training images are not ImageNet
    assert (
        table["why_not"]
        .str.contains("of the 1,281,167 training images|fine-tunes|augments|drawn here")
        .all()
    )
    assert str(tmp_path / "imagenet") not in json.dumps(rows.to_dict("records"))


def row(**changes):
    base = dict.fromkeys(claims.ROW_COLUMNS, "") | {
        "preset": PRESET,
        "model": "before",
        "dataset": presets.IMAGENET,
        "n_train": paper.IMAGENET_TRAIN,
        "block": 23,
        "pool": "cls",
        "protocol": protocols.KNN.name,
        "metric": "accuracy",
        "value": 0.5,
        "seed": 0,
    }
    return base | changes


def test_measurements_are_those_of_the_last_block_of_released_weights():
    rows = pd.DataFrame(
        [
            row(),
            row(model="refined (EMA)", preset="paper-mae-2b14"),
            row(block=22),
            row(pool="mean"),
            row(dataset="digits", preset="tiny"),
            row(protocol="linear"),
            row(protocol="logistic_1shot", n_train=100),
            row(model="random weights"),
        ]
    )
    measured, reasons = paper.measurements(rows)
    assert sorted(measured["paper_id"]) == [
        "MAE-Refined|2B/14|IN1K|k-NN|top1",
        "MAE|L/16|IN1K 1-shot|low-shot|top1",
        "MAE|L/16|IN1K|k-NN|top1",
        "MAE|L/16|IN1K|linear probe|top1",
    ]
    assert (measured["value"] == 50).all()
    assert reasons == {
        "MAE|L/16|IN1K|linear probe|top1": "features of centre crops; the paper augments",
        "MAE|L/16|IN1K 1-shot|low-shot|top1": paper.DRAWN,
    }
    table = paper.compare(measured, reasons)
    assert table["measured"].notna().sum() >= 4  # every id is one of the paper's


def test_only_the_largest_bank_of_a_model_counts():
    small = row(protocol=protocols.KNN.name, n_train=100_000, value=0.4)
    measured, reasons = paper.measurements(pd.DataFrame([small, row()]))
    assert list(measured["value"]) == [50]
    assert not reasons
    measured, reasons = paper.measurements(pd.DataFrame([small]))
    assert list(measured["value"]) == [pytest.approx(40)]
    assert reasons == {
        "MAE|L/16|IN1K|k-NN|top1": "drawn from 100,000 of the 1,281,167 training images"
    }


def test_draws_of_labelled_images_are_no_seeds_and_seeds_of_a_probe_are():
    draws = [
        row(protocol="logistic_1shot", n_train=1000, seed=s, value=v)
        for s, v in ((0, 0.1), (1, 0.2), (1, 0.2), (2, 0.3))
    ]
    probes = [row(protocol="linear", seed=s, value=v) for s, v in ((0, 0.5), (1, 0.7))]
    votes = [row(seed=s) for s in (0, 1)]  # the same weights, so the same vote
    table = (
        paper.comparison(pd.DataFrame(draws + probes + votes))
        .query("n_seeds.notna()")
        .drop_duplicates("protocol")
    )
    table = table.set_index("protocol")
    assert table["n_seeds"].to_dict() == {"low-shot": 1, "linear probe": 2, "k-NN": 1}
    assert table["measured"].to_dict() == pytest.approx(
        {"low-shot": 20, "linear probe": 60, "k-NN": 50}
    )


def test_a_number_that_was_not_measured_says_what_it_needs():
    table = paper.comparison(pd.DataFrame([row()]))
    missing = table[table["measured"].isna()]
    assert set(missing["comparable"]) == {"not measured"}
    assert (missing["why_not"] != "").all()
    assert set(table.loc[table["measured"].notna(), "comparable"]) == {"yes"}
    assert len(paper.comparison(pd.DataFrame(columns=claims.ROW_COLUMNS))) == len(table)


def test_every_published_number_says_what_it_needs():
    needs = {
        number["table_or_figure"]: paper.needs(number)
        for number in paper.paper_values().to_dict("records")
    }
    assert all(needs.values())
    number = {
        "model": "MAE-Refined",
        "backbone": "H/14",
        "dataset": "IN1K",
        "protocol": "k-NN",
        "metric": "top1",
    }
    assert paper.needs(number).endswith("mimrefiner run 06 --preset paper-mae-h14")
    assert paper.needs({**number, "protocol": "full fine-tune"}).startswith("not possible")
    assert "mimrefiner probe ibot_l16" in paper.needs(
        {**number, "model": "iBOT", "backbone": "L/16"}
    )
    assert paper.needs({**number, "model": "BYOL", "backbone": "ResNet-200x2"}).startswith(
        "not possible: no weights"
    )
