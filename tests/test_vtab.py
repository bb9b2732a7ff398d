"""VTAB-1K at small size: its lists, its search, and what an interrupted search keeps."""

from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import mimrefiner as mr
from mimrefiner.data import vtab as data
from mimrefiner.probes import vtab
from mimrefiner.training.finetune import finetune_recipe

# protocols.md, section 4.1, written down from there
GROUPS = {
    "natural": "caltech101 6085, cifar 10000, dtd 1880, oxford_flowers102 6149, "
    "oxford_iiit_pet 3669, sun397 21750, svhn 26032",
    "specialised": "patch_camelyon 32768, eurosat 5400, resisc45 6300, diabetic_retinopathy 42670",
    "structured": "clevr_count 15000, clevr_dist 15000, dmlab 22735, kitti 711, "
    "dsprites_loc 73728, dsprites_ori 73728, smallnorb_azi 12150, smallnorb_ele 12150",
}
RECIPE = {
    "epochs": 50,
    "warmup_epochs": 5,  # a tenth of the updates: 60 of 600, 75 of 750
    "batch_size": 64,
    "micro_batch": None,
    "min_lr": 0.0,
    "warmup_to_peak": True,
    "betas": (0.9, 0.999),
    "weight_decay": 0.05,
    "decay_cls": True,
    "layer_decay": 0.75,
    "drop_path": 0.0,
    "frozen_share": 0.0,
    "prompts": 0,
    "pool": "cls",
    "learn_positions": False,
    "head_norm": False,
    "resize": None,
    "crop_scale": None,
    "flip": False,
    "rand_augment": "",
    "erasing": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "smoothing": 0.0,
    "test_float32": True,
}
SMALL = vtab.VTABProtocol(
    replace(vtab.RECIPE, epochs=2, warmup_epochs=1, batch_size=8), (1e-2, 1e-3), (0, 1)
)
DTD, KITTI = data.tasks_named(["dtd", "kitti"])


def test_every_field_of_the_protocol_is_the_published_one():
    protocol = vtab.VTABProtocol()
    assert protocol.learning_rates == (1e-3, 7.5e-4, 5e-4, 2.5e-4, 1e-4)
    assert protocol.seeds == (0, 1, 2, 3, 4)
    found = asdict(protocol.recipe)
    assert {name: found[name] for name in RECIPE} == RECIPE
    assert set(found) - set(RECIPE) - {"images", "classes"} == {
        *("name", "models", "source", "base_lr", "seed", "prompt_dim")
    }
    run = protocol.of(7.5e-4, 3)
    assert run.base_lr * run.batch_size / 256 == pytest.approx(7.5e-4) and run.seed == 3
    large = vtab.RECIPE_2B14
    assert large.frozen_blocks(24) == 6 and vtab.MEMORY_2B14.micro_batch * 8 == 64
    expected = [
        (*entry.split(), group) for group, tasks in GROUPS.items() for entry in tasks.split(", ")
    ]
    assert [(t.name, str(t.test_images), t.group) for t in data.TASKS] == expected
    assert data.SIX == {
        "caltech101": (3060, 6084, 102),
        "cifar100": (50000, 10000, 100),
        "dtd": (3760, 1880, 47),
        "flowers": (2040, 6149, 102),
        "pets": (3680, 3669, 37),
        "sun397": (87002, 21752, 397),
    }


def test_rates_rise_to_their_peak_and_fall_to_0():
    stages = []

    class Begun(Exception):
        pass

    def begin(self, stage, **parts):
        stages.append(stage)
        raise Begun

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mimrefiner.training.run.TrainingRun.begin", begin)
        images = mr.load_dataset("digits", split="train").take(800)
        with pytest.raises(Begun):
            finetune_recipe(
                mr.build_vit(mr.ViTConfig(dim=16, depth=2, num_heads=2)),
                images,
                images,
                vtab.VTABProtocol().of(5e-4, 0),
            )
    (stage,) = stages
    assert stage.steps == 600
    assert stage.lr(0) == pytest.approx(5e-4 / 60) and stage.lr(59) == pytest.approx(5e-4)
    assert stage.lr(60) == pytest.approx(5e-4) and stage.lr(599) < 5e-4 / 1e4


@pytest.fixture
def folder(tmp_path):
    """``dtd`` (3 classes) and ``kitti`` (2): the class is the colour, with noise."""
    rng = np.random.default_rng(0)
    for name, classes in (("dtd", 3), ("kitti", 2)):
        path = tmp_path / "vtab-1k" / name
        (path / "images").mkdir(parents=True)
        lines = []
        for i in range(36):
            pixels = rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)
            pixels[..., i % classes] = 255
            Image.fromarray(pixels).save(path / "images" / f"{i}.png")
            lines.append(f"images/{i}.png {i % classes}")
        parts = {"train800": lines[:16], "val200": lines[16:24], "test": lines[24:]}
        for part, listed in (parts | {"train800val200": lines[:24]}).items():
            (path / f"{part}.txt").write_text("\n".join(listed) + "\n")
    return tmp_path / "vtab-1k"


@pytest.fixture
def encoder():
    return mr.build_vit(mr.ViTConfig(dim=16, depth=2, num_heads=2))


def both(folder):
    return {task: data.read_task(folder, task) for task in (DTD, KITTI)}


def test_search_and_final_runs_are_what_they_say(encoder, folder, tmp_path):
    rows = vtab.vtab1k(encoder, both(folder), tmp_path / "runs", protocol=SMALL)
    assert rows.groupby(["dataset", "phase"]).size().to_dict() == {
        **{(name, "search"): 4 for name in ("dtd", "kitti")},
        **{(name, "final"): 2 for name in ("dtd", "kitti")},
    }
    for task, parts in both(folder).items():
        own = rows[rows["dataset"] == task.name]
        search, final = (own[own["phase"] == phase] for phase in ("search", "final"))
        assert set(search["n_train"]) == {16} and set(search["n_test"]) == {8}
        assert set(final["n_train"]) == {24} and set(final["n_test"]) == {12}
        means = search.groupby("lr")["value"].mean()
        best = max(SMALL.learning_rates, key=lambda rate: means[rate])  # the first of equals
        assert set(final["lr"]) == {best}
        direct = finetune_recipe(
            encoder,
            parts["train800val200"],
            parts["test"],
            SMALL.of(best, 1),
            classes=len(set(parts["test"].labels)),
        )
        assert final[final["seed"] == 1]["value"].item() == direct.rows["value"].iloc[0]


def test_an_interrupted_search_goes_on(encoder, folder, tmp_path, monkeypatch):
    runs = tmp_path / "runs"
    done, real = [], vtab.finetune_recipe

    def counted(*args, **options):
        if len(done) == 7:
            done.append("interrupted")
            raise KeyboardInterrupt
        done.append(args[3].seed)
        return real(*args, **options)

    monkeypatch.setattr(vtab, "finetune_recipe", counted)
    with pytest.raises(KeyboardInterrupt):
        vtab.vtab1k(encoder, both(folder), runs, protocol=SMALL)
    rows = vtab.vtab1k(encoder, both(folder), runs, protocol=SMALL)
    assert len(rows) == 12 and len(done) == 12 + 1
    again = vtab.vtab1k(encoder, both(folder), runs, protocol=SMALL)
    assert again.equals(rows) and len(done) == 13
    other = replace(SMALL, recipe=replace(SMALL.recipe, epochs=3))
    with pytest.raises(mr.InputError, match=r"holds a run with other settings \(epochs\)"):
        vtab.vtab1k(encoder, both(folder), runs, protocol=other)


def test_a_run_that_another_process_does_is_left_to_it(encoder, folder, tmp_path, monkeypatch):
    """Here the other one ends while this one waits, and this one takes its run over."""
    task, parts = next(iter(both(folder).items()))
    search = vtab.Search(encoder, task, parts, SMALL, tmp_path / "runs")
    theirs, order = search.entry("search", 1e-2, 1), []
    hold = theirs.taken()
    hold.__enter__()
    monkeypatch.setattr(
        vtab.Search,
        "run",
        lambda self, *which: order.append(which[:3]) or {"accuracy": which[1], "seconds": 0.0},
    )
    monkeypatch.setattr("mimrefiner.files.time.sleep", lambda s: hold.__exit__(None, None, None))
    vtab.vtab1k(encoder, {task: parts}, tmp_path / "runs", protocol=SMALL)
    assert order == [
        *(("search", 1e-2, 0), ("search", 1e-3, 0), ("search", 1e-3, 1), ("search", 1e-2, 1)),
        *(("final", 1e-2, 0), ("final", 1e-2, 1)),
    ]


def test_the_table_has_group_means_and_both_counts():
    rng = np.random.default_rng(0)
    rows = pd.DataFrame(
        {
            "dataset": t.name,
            "group": t.group,
            "phase": "final",
            "lr": 1e-3,
            "seed": seed,
            "value": rng.random(),
            "images": "published lists",
        }
        for t in data.TASKS
        for seed in range(5)
    )
    table = vtab.table(rows).set_index("name")
    mean = {t.name: 100 * rows[rows["dataset"] == t.name]["value"].mean() for t in data.TASKS}
    assert table["accuracy"]["kitti"] == pytest.approx(mean["kitti"])
    assert table["sd"]["kitti"] == pytest.approx(
        100 * rows[rows["dataset"] == "kitti"]["value"].std()
    )
    natural = list(mean.values())[:7]
    assert table["accuracy"]["mean, natural"] == pytest.approx(np.mean(natural))
    assert table["accuracy"]["mean, structured"] == pytest.approx(np.mean(list(mean.values())[11:]))
    assert table["accuracy"]["mean of 19"] == pytest.approx(np.mean(list(mean.values())))
    flowers = mean.pop("oxford_flowers102")
    assert flowers != pytest.approx(table["accuracy"]["mean of 19"])
    assert table["accuracy"]["mean of 18, without Flowers"] == pytest.approx(
        np.mean(list(mean.values()))
    )
    without = vtab.table(rows[rows["dataset"] != "kitti"]).set_index("name")["accuracy"]
    assert without[["mean, structured", "mean of 19"]].isna().all()
    assert without["mean, natural"] == pytest.approx(np.mean(natural))


def test_bad_input_is_one_line(encoder, folder, tmp_path):
    with pytest.raises(mr.InputError, match="unknown data set of VTAB-1K 'dtdd'"):
        data.tasks_named(["dtdd"])
    with pytest.raises(mr.InputError, match=r"svhn does not exist: expected the folder that vtab"):
        data.read_task(folder, data.tasks_named(["svhn"])[0])
    with pytest.raises(mr.InputError, match="torchvision has no dmlab"):
        data.draw_task(data.tasks_named(["dmlab"])[0])
    with pytest.raises(mr.InputError, match="a batch of 64 needs at least that many images"):
        vtab.vtab1k(encoder, both(folder), tmp_path / "runs")
    (folder / "kitti" / "test.txt").write_text("images/0.png 5\n")
    with pytest.raises(mr.InputError, match="kitti: test has label 5, and train800val200 has"):
        vtab.vtab1k(encoder, both(folder), tmp_path / "runs", protocol=SMALL)
    (folder / "kitti" / "test.txt").write_text("images/0.png\n")
    with pytest.raises(mr.InputError, match=r"line 1: expected PATH LABEL, got 'images/0\.png'"):
        data.read_task(folder, KITTI)
    (folder / "kitti" / "test.txt").write_text("images/x.png 0\n")
    with pytest.raises(mr.InputError, match=r"lists .*x\.png, which does not exist"):
        data.read_task(folder, KITTI)
    (folder / "kitti" / "val200.txt").unlink()
    with pytest.raises(mr.InputError, match=r"val200\.txt does not exist"):
        data.read_task(folder, KITTI)
    assert not (tmp_path / "runs").exists()


def test_splits_of_the_six_run_one_generator_through_the_classes(tmp_path, monkeypatch):
    """Caltech-101 and SUN397 as torchvision unpacks them; 30 images, or 80 %, of a class train."""
    monkeypatch.setenv("MIMREFINER_DATA", str(tmp_path))
    for name in ("Caltech101", "SUN397"):
        monkeypatch.setattr(f"torchvision.datasets.{name}", lambda root, download: None)
    sizes = {"BACKGROUND_Google": 35, "Faces": 33}
    for name, n in sizes.items():
        path = tmp_path / "caltech101" / "101_ObjectCategories" / name
        path.mkdir(parents=True)
        (path / "tmp").write_text("no image")
        for i in range(n):
            Image.new("RGB", (2, 2), (i, 0, 0)).save(path / f"image_{i:04d}.png")
    train, test = data.whole("caltech101")
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(n, generator=generator).tolist() for n in sizes.values()]
    reds = [np.asarray(image)[0, 0, 0] for image, _ in train]
    assert reds == [*orders[0][:30], *orders[1][:30]]
    assert train.labels.tolist() == [0] * 30 + [1] * 30 and len(test) == 5 + 3
    assert {np.asarray(image)[0, 0, 0] for image, y in test if y} == set(orders[1][30:])
    sizes = {"/b/beach": 6, "/a/abbey": 4}  # the order of ClassName.txt counts
    (tmp_path / "SUN397").mkdir()
    (tmp_path / "SUN397" / "ClassName.txt").write_text("".join(f"{name}\n" for name in sizes))
    for name, n in sizes.items():
        (tmp_path / "SUN397" / name[1:]).mkdir(parents=True)
        for i in range(n):
            file = tmp_path / "SUN397" / name[1:] / f"sun_{i}.jpg"
            Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(file, quality=100)
    train, test = data.whole("sun397")
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(n, generator=generator).tolist() for n in sizes.values()]
    reds = [round(np.asarray(image)[0, 0, 0] / 20) for image, _ in train]
    assert reds == [*orders[0][:5], *orders[1][:3]]
    assert train.labels.tolist() == [0] * 5 + [1] * 3 and test.labels.tolist() == [0, 1]


def test_a_thousand_images_drawn_from_torchvision_say_so(monkeypatch):
    class Parts(torch.utils.data.Dataset):
        def __init__(self, root, split, download):
            self.labels = np.arange(1200 if split == "train" else 50) % 10

        def __len__(self):
            return len(self.labels)

        def __getitem__(self, i):
            return Image.new("L", (4, 4), i % 256), self.labels[i]

    monkeypatch.setattr("torchvision.datasets.SVHN", Parts)
    parts = data.draw_task(data.tasks_named(["svhn"])[0])
    sizes = {"train800": 800, "val200": 200, "train800val200": 1000, "test": 50}
    assert {name: len(part) for name, part in parts.items()} == sizes
    assert "not the published ones" in parts["train800"].drawn and parts["test"].drawn == ""
    together = {*parts["train800"].rows.tolist(), *parts["val200"].rows.tolist()}
    assert together == set(parts["train800val200"].rows.tolist()) and len(together) == 1000
    image, label = parts["val200"][3]
    row = parts["val200"].rows[3]
    assert image.mode == "RGB" and label == row % 10 and image.getpixel((0, 0))[0] == row % 256
