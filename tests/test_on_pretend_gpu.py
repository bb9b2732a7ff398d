"""The package under the pretend GPU: runs go through, return what is on the CPU, and ask no more of
the GPU per step than the table at the top allows.
"""

import signal
from dataclasses import replace

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
from PIL import Image
from pretend_gpu import PretendGpu, Step, devices, pretend_gpu

import mimrefiner as mr
from mimrefiner.__main__ import main
from mimrefiner.batch import runner
from mimrefiner.data.scenes import Labels, SceneCrop, SegmentationFolder
from mimrefiner.errors import Stopped
from mimrefiner.models.export import export
from mimrefiner.models.masked import build_masked_model, random_mask
from mimrefiner.models.upernet import UperNetConfig
from mimrefiner.models.weights import sha256_of
from mimrefiner.probes import dense, feature_cache, linear, reconstruction, similarity
from mimrefiner.probes.monitor import Monitor
from mimrefiner.probes.segmentation import fine_tuned
from mimrefiner.study import presets
from mimrefiner.training import optim, refine
from mimrefiner.training.checkpoints import Saving
from mimrefiner.training.finetune import finetune
from mimrefiner.training.memory import Memory
from mimrefiner.training.segment import SegmentationRecipe

# The most that a step may ask which logs nothing: launches, copies to the GPU, waits. Preset
# natural-gpu with narrow layers: neither widths nor batch sizes change the numbers.
BOUNDS = {"stage 2": (1264, 6, 0), "stage 3": (1926, 7, 0), "mae": (812, 4, 0)}

NARROW = {"hidden_dim": 8, "out_dim": 8, "predictor_dim": 8}


@pytest.fixture(autouse=True)
def _log_ends_only(monkeypatch):
    monkeypatch.setattr(optim, "LOG_POINTS", 1)  # of every stage the first step and the last one


@pytest.fixture
def gpu():
    with pretend_gpu() as gpu:
        yield gpu


@pytest.fixture(scope="module")
def images():
    return mr.load_dataset("digits", split="train").take(48)


@pytest.fixture
def small():
    """Preset smoke with two blocks: three steps of each stage."""
    smoke = mr.load_preset("smoke")
    recipe = replace(smoke.refine, batch_size=16, queue_size=32, **NARROW)
    recipe = replace(recipe, views=replace(recipe.views, n_local=1), clip_norm=1.0)
    pretrain = replace(smoke.pretrain, epochs=1, batch_size=16, decoder_dim=8, decoder_heads=2)
    encoder = replace(smoke.encoder, dim=16, depth=2, patch_size=16)
    return replace(smoke, encoder=encoder, pretrain=pretrain, refine=recipe)


@pytest.fixture
def encoder(small):
    return mr.build_vit(small.encoder)


def quiet_waits(gpu: PretendGpu) -> list[str]:
    """Waits of the steps that log nothing, where every stage has three: the third of each is
    counted from the end of the second, behind what the first one logs.
    """
    steps = gpu.steps[:-1]
    assert len(steps) % 3 == 0 and all(step.launches for step in steps)
    return [wait for step in steps[2::3] for wait in step.waits]


def test_bounds_of_a_step():
    preset, fruit = mr.load_preset("natural-gpu"), mr.load_dataset("fruit64", split="train")
    encoder, fruit = mr.build_vit(replace(preset.encoder, dim=24)), fruit.take(72).in_memory()
    epochs = {"heads_epochs": 1, "refine_epochs": 1, "batch_size": 24}
    recipe = replace(preset.refine, queue_size=128, **NARROW, **epochs)
    mae = replace(preset.pretrain, decoder_dim=16, decoder_heads=2, epochs=1, batch_size=24)
    with pretend_gpu() as refined:
        mr.refine(encoder, fruit, recipe)
    with pretend_gpu() as pretrained:
        mr.pretrain(encoder, fruit, mae)
    steps = {"stage 2": refined.steps[2], "stage 3": refined.steps[5], "mae": pretrained.steps[2]}
    found = {key: (len(s.launches), len(s.copies), len(s.waits)) for key, s in steps.items()}
    assert all(x <= most for key in BOUNDS for x, most in zip(found[key], BOUNDS[key], strict=True))


@pytest.mark.parametrize("method", ["simmim", "mae"])
@pytest.mark.parametrize("resident", [False, True])
def test_pretraining(gpu, small, encoder, images, method, resident):
    data = images.in_memory() if resident else images
    result = mr.pretrain(encoder, data, replace(small.pretrain, method=method))
    assert devices([result, encoder]) == {"cpu"} and quiet_waits(gpu) == []
    assert result.history["loss"].notna().all()


@pytest.mark.parametrize(
    "memory",
    [Memory(), Memory(micro_batch=8), Memory(recompute=True)],
    ids=["plenty", "micro", "recompute"],
)
@pytest.mark.parametrize("resident", [False, True])
def test_refinement(gpu, small, encoder, images, memory, resident):
    data = images.in_memory() if resident else images
    result = mr.refine(encoder, data, small.refine, memory=memory)
    assert devices([result, encoder]) == {"cpu"} and quiet_waits(gpu) == []


def test_loaders_in_processes(gpu, small, encoder, images):
    result = mr.refine(encoder, images, small.refine, num_workers=1)
    assert devices(result) == {"cpu"} and quiet_waits(gpu) == []


def test_monitored_stopped_and_resumed(gpu, small, encoder, images, tmp_path):
    watch, data = Monitor(images.take(20), images.take(20), tmp_path), images.in_memory()
    recipe, saving = replace(small.refine, refine_epochs=2), Saving(tmp_path)

    def stop(refiner, epochs):
        watch(refiner, epochs)
        if len(epochs) == 2:  # the first epoch of stage 3 is over
            signal.raise_signal(signal.SIGTERM)

    whole = mr.refine(encoder, data, recipe, monitor=watch)
    with pytest.raises(Stopped, match="stage 3, step 3"):
        mr.refine(encoder, data, recipe, saving=saving, monitor=stop)
    again = mr.refine(encoder, data, recipe, saving=replace(saving, resume=True), monitor=watch)
    assert devices([whole, again]) == {"cpu"}
    assert sha256_of(again.ema_encoder) == sha256_of(whole.ema_encoder)


def test_heads_alone(gpu, small, encoder, images):
    refiner = mr.MIMRefiner(encoder, small.refine).to("cuda")
    history, _ = refine.train_heads(refiner, images)
    assert devices(refiner) == {"cuda"} and quiet_waits(gpu) == [] and len(history)


def test_fine_tuning(gpu, small, encoder, images):
    result = finetune(encoder, images, small.refine, flops=2e8)
    assert devices([result, encoder]) == {"cpu"} and len(gpu.steps) > 4
    assert gpu.steps[2].waits == []


def test_features_and_probes(gpu, small, encoder, images, tmp_path):
    train = mr.extract_features(encoder, images)
    kept = feature_cache.cached_features(encoder, images, tmp_path / "features")
    half = mr.extract_features(encoder, images, autocast=torch.bfloat16)
    assert devices([train, kept, half, encoder]) == {"cpu"}
    hits = mr.knn_hits(train, train, device="cuda")
    close = mr.knn_predict(
        train.x["cls"], train.y, train.x["cls"], search_dtype=torch.bfloat16, device="cuda"
    )
    assert devices([hits, close]) == {"cpu"}
    here = mr.knn_hits(train, train)
    assert all(torch.equal(hits[pool], here[pool]) for pool in here)
    rows = mr.linear_probe(train, train, epochs=2, batch_size=16, device="cuda", hits=True)
    assert devices(list(rows["hits"])) <= {"cpu"} and rows["value"].between(0, 1).all()
    training = linear.Training(
        epochs=1, batch_size=16, learning_rates=(0.1,), seed=0, device="cuda"
    )
    augmented = linear.linear_probe_augmented(encoder, images, train, train, training)
    assert augmented["value"].between(0, 1).all() and devices(encoder) == {"cpu"}
    few = replace(train, x={"cls": train.x["cls"][:1]}, blocks=(0,))
    low = [mr.low_shot(few, few, shots=(1,), splits=2, device=d)["value"] for d in ("cuda", "cpu")]
    assert np.allclose(*low)


def test_report(gpu, encoder, images):
    data, probes = (images, images), ("knn", "low_shot", "rank")
    rows = mr.probe(encoder, data, probes=probes, shots=(1,), blocks=[1], pools=["cls"])
    assert len(gpu.launches) > 100 and len(rows) and devices(encoder) == {"cpu"}


def test_pictures_of_attention_and_export(gpu, small, encoder, images, tmp_path):
    refined = mr.refine(encoder, images.in_memory(), small.refine).ema_encoder
    batch = torch.rand(4, 3, 32, 32)
    there = similarity.attention_distance(encoder.to("cuda"), batch.to("cuda"))
    assert devices(there) == {"cpu"} and there.shape == (2, 2)
    for name, form in (("a.safetensors", "timm"), ("b.th", "hub"), ("c.safetensors", "mimrefiner")):
        export(refined, tmp_path / name, form)
    loaded = mr.load_encoder(tmp_path / "c.safetensors")
    assert torch.equal(loaded.pos_embed, refined.pos_embed)


@pytest.fixture
def scenes(tmp_path):
    rng = np.random.default_rng(0)
    for kind in ("images", "masks"):
        for split in ("train", "val"):
            (tmp_path / kind / split).mkdir(parents=True)
            for i in range(8):
                shape = (32, 32, 3) if kind == "images" else (32, 32)
                pixels = rng.integers(0, 255 if kind == "images" else 3, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / kind / split / f"{i}.png")
    return [SegmentationFolder(tmp_path, split) for split in ("train", "val")]


def test_dense_probe(gpu, encoder, scenes):
    config = dense.DenseConfig(Labels(3), epochs=1, batch_size=4).at(32)
    rows = dense.dense_probe(encoder, *scenes, config, device="cuda")
    assert len(rows) == 2 and devices(encoder) == {"cpu"}


def test_upernet(gpu, scenes):
    encoder = mr.build_vit(mr.ViTConfig(dim=8, depth=4, num_heads=2))
    network = UperNetConfig(3, 32, auxiliary_dim=8)
    recipe = SegmentationRecipe(network, False, steps=2, batch_size=4, crop=SceneCrop(32))
    rows, result = fine_tuned(encoder, *scenes, recipe, device="cuda")
    assert rows["value"].between(0, 1).all() and devices([encoder, result.model]) == {"cpu"}


def test_reconstruction(gpu, small, encoder, images):
    config = reconstruction.DecoderConfig(1, 8, 2, epochs=1, batch_size=16)
    rows, model = reconstruction.reconstruction(encoder, images, images, config, device="cuda")
    assert rows["value"].notna().all() and len(gpu.steps) == 4
    assert devices([model, encoder]) == {"cpu"}
    mask = torch.zeros(2, 4, dtype=torch.bool)
    mask[:, 0] = True
    assert devices(model.predict(torch.rand(2, 3, 32, 32), mask)) == {"cpu"}


def test_no_step_of_reconstruction_waits(gpu, small, encoder, images):
    config = reconstruction.DecoderConfig(1, 8, 2, epochs=1, batch_size=16)
    reconstruction.reconstruction(encoder, images.in_memory(), images, config, device="cuda")
    assert [wait for step in gpu.steps[1:-1] for wait in step.waits] == []


@pytest.mark.parametrize("method", ["simmim", "mae"])
def test_masks_of_large_batches_do_not_wait(small, method):
    """More than 64 KB of pageable memory would."""
    encoder = mr.build_vit(mr.ViTConfig(image_size=16, patch_size=2, dim=4, depth=1, num_heads=1))
    config = replace(small.pretrain, method=method, decoder_dim=4, decoder_heads=1)
    with pretend_gpu() as gpu:
        model = build_masked_model(encoder, config).to("cuda")
        images = torch.zeros(1100, 3, 16, 16, device="cuda")
        gpu.steps.append(Step())
        model(images, random_mask(1100, 64, 0.75)).backward()
    assert gpu.steps[-1].waits == [] and len(gpu.steps[-1].copies) in (1, 2)


@pytest.mark.parametrize("depth", [1, 3])
def test_a_checkpoint_looks_at_all_weights_at_once(gpu, small, images, tmp_path, depth):
    """However many there are; three steps, of which the first and the last are logged."""
    encoder = mr.build_vit(replace(small.encoder, depth=depth))
    mr.pretrain(encoder, images, small.pretrain, saving=Saving(tmp_path, every=1))
    looks = [wait for wait in gpu.waits if not wait.startswith(("copy", "blocking copy"))]
    assert len(looks) == 3 * 2 + 2 * 2 and all("training/run.py" in wait for wait in looks)


@pytest.mark.parametrize(
    "make",
    [
        lambda encoder, small: mr.build_vit(small.encoder),
        lambda encoder, small: mr.MIMRefiner(encoder, small.refine),
        lambda encoder, small: build_masked_model(encoder, small.pretrain),
        lambda encoder, small: reconstruction.DecoderPerBlock(
            encoder, reconstruction.DecoderConfig(1, 8, 2)
        ),
    ],
    ids=["build_vit", "refiner", "masked", "decoders"],
)
def test_new_weights_leave_the_generator_of_the_gpu_alone(gpu, encoder, small, make):
    torch.manual_seed(7)
    before = torch.cuda.get_rng_state()
    make(encoder, small)
    assert torch.equal(before, torch.cuda.get_rng_state())


def test_each_training_has_a_peak_of_its_own(gpu, small, encoder, images):
    gpu.peak = 7 * 2**30  # of what was before
    watch = Monitor(images, images)
    epochs = mr.refine(encoder, images.in_memory(), small.refine, monitor=watch).epochs
    assert (epochs["peak_memory_mib"] < 7 * 2**10).all()


def test_a_gpu_without_bfloat16_is_not_given_any(small, encoder, images):
    with pretend_gpu(bfloat16=False) as gpu:
        seen = []
        encoder.patch_embed.proj.register_forward_hook(lambda *x: seen.append(x[2].dtype))
        mr.pretrain(encoder, images, small.pretrain)
    assert gpu.launches and torch.bfloat16 not in seen and seen


def test_low_shot_sends_the_images_it_needs(encoder, images):
    features = mr.Features({"cls": torch.rand(1, 4096, 64)}, torch.arange(4096) % 4, (0,), 1)
    with pretend_gpu() as gpu:
        mr.low_shot(features, features.subset(range(8)), shots=(1,), splits=1, device="cuda")
    assert max(int(copy.split()[0]) for copy in gpu.copies) < 4 * 64 * 4096


def test_lack_of_memory_in_extraction_comes_with_advice(gpu, encoder, images, monkeypatch):
    def lack(*_, **__):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(torch.nn.Conv2d, "forward", lack)
    with pytest.raises(mr.InputError, match="memory does not suffice"):
        mr.extract_features(encoder, images)


def test_command_line(gpu, tmp_path, monkeypatch):
    monkeypatch.setenv("MIMREFINER_CACHE", str(tmp_path / "cache"))
    common = ["--data", "digits", "--preset", "smoke", "--out"]
    main(["pretrain", *common, str(tmp_path / "mim"), "--workers", "1"])
    model = str(tmp_path / "mim" / "encoder.safetensors")
    main(["refine", "--model", model, *common, str(tmp_path / "refined")])
    model = str(tmp_path / "refined" / "ema_encoder.safetensors")
    main(["probe", model, "digits", "--no-baselines", "--out", str(tmp_path / "report")])
    assert len(gpu.steps) > 16 and (tmp_path / "report" / "report.md").exists()


NOTEBOOKS = runner.find_notebooks(["00", "02", "05", "08", "09"])


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Of the models that notebooks share."""
    return tmp_path_factory.mktemp("cache")


def few_images(name: str, *, split: str):
    return mr.load_dataset(name, split=split).take(96 if name == "digits" else 40)


@pytest.mark.filterwarnings("default")  # as in a notebook
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=[path.stem[:2] for path in NOTEBOOKS])
def test_notebooks(notebook, cache, tmp_path, monkeypatch):
    """Their code in this process, with few images; what they train is trained on the GPU."""
    monkeypatch.setenv("MIMREFINER_CACHE", str(cache))
    monkeypatch.setattr(presets, "load_dataset", few_images)
    cells = nbformat.read(notebook, as_version=4).cells
    parameters, *code = [cell.source for cell in cells if cell.cell_type == "code"]
    names = {"__name__": "__main__"}
    exec(parameters, names)
    names |= {"preset": "smoke", "out": str(tmp_path / "out")}
    with pretend_gpu() as gpu:
        for source in code:
            exec(compile(source, notebook.name, "exec"), names)
            plt.close("all")
    assert all(step.launches for step in gpu.steps[:-1])
