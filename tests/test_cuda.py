"""What needs a real GPU: ``pytest -m cuda --device cuda``; ``--device pretend`` rehearses it."""

import os
import signal
import subprocess
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from pretend_gpu import devices, pretend_gpu

import mimrefiner as mr
from mimrefiner import device
from mimrefiner.config import Crop, Views
from mimrefiner.data.augment import small_views
from mimrefiner.data.views import photometric, resident_crops, size_groups, uniforms
from mimrefiner.errors import Stopped
from mimrefiner.models.layouts import ViTShape
from mimrefiner.models.weights import sha256_of
from mimrefiner.probes import reconstruction, similarity
from mimrefiner.training import cost, optim
from mimrefiner.training.checkpoints import Saving
from mimrefiner.training.finetune import finetune
from mimrefiner.training.run import TrainingRun

pytestmark = pytest.mark.cuda
GPU = "cuda"


@pytest.fixture(autouse=True)
def pretended(request):
    """The pretend GPU in a rehearsal, None on a real one."""
    if request.config.getoption("--device") == "pretend":
        with pretend_gpu() as gpu:
            yield gpu
    else:
        yield None


@pytest.fixture
def float32(monkeypatch):
    """Training is in float32 on both devices."""
    monkeypatch.setattr(device, "has_bfloat16", lambda _: False)


@pytest.fixture(params=[False, True], ids=["float32", "tf32"])
def tf32(request):
    """Whether GPUs may round inputs of products to 10 bits."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = request.param
    yield request.param
    for backend, allowed in zip(backends, before, strict=True):
        backend.allow_tf32 = allowed


@pytest.fixture(scope="module")
def images():
    return mr.load_dataset("digits", split="train").take(96)


@pytest.fixture
def small():
    """Preset smoke with two blocks: a few steps of each stage."""
    smoke = mr.load_preset("smoke")
    recipe = replace(smoke.refine, batch_size=32, clip_norm=1.0)
    pretrain = replace(smoke.pretrain, epochs=2, batch_size=32, decoder_dim=16, decoder_heads=2)
    return replace(smoke, encoder=replace(smoke.encoder, depth=2), pretrain=pretrain, refine=recipe)


@pytest.fixture
def encoder(small):
    return mr.build_vit(small.encoder)


# ---- golden tensors


def distance(found, expected) -> float:
    return ((found.cpu() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("pairing", ["published", "intended"])
def test_loss_is_the_official_one(golden, tf32, pairing):
    tensors, exact = golden("nna_loss"), 5e-3 if tf32 else 1e-5
    z, nn_z, p = (tensors[name][None].to(GPU) for name in ("z", "nn_z", "p"))
    how = {"temperature": tensors["temperature"].item(), "pairing": pairing}
    loss = mr.multi_view_nna_loss(z, nn_z, p.requires_grad_(True), **how)
    loss.sum().backward()
    assert distance(loss.detach()[0], tensors[f"total_as_{pairing}"]) < exact
    assert distance(p.grad[0], tensors[f"grad_p_as_{pairing}"]) < exact


def test_queue_is_the_official_one(golden, tf32):
    tensors = golden("queue_top1")
    queue = mr.NNQueue(1, 37, 8).to(GPU)
    queue.load_state_dict({**queue.state_dict(), "z": tensors["queue_init"][None]})
    same = []
    for step in range(9):
        z = tensors[f"step{step}.z"].view(2, 7, 8).permute(1, 0, 2)[None].to(GPU)
        index = tensors[f"step{step}.index"].to(GPU)
        found = queue.lookup(z, index)[0].permute(1, 0, 2).flatten(0, 1).cpu()
        same.append((found == tensors[f"step{step}.neighbour"]).all(-1).float().mean().item())
        queue.enqueue(z[:, :, 0], index)
    assert np.mean(same) > (0.9 if tf32 else 0.999)


def test_votes_are_the_official_ones(golden, tf32):
    tensors = golden("knn")
    arguments = [tensors[name].to(GPU) for name in ("train_x", "train_y", "test_x", "test_y")]
    found = mr.knn_accuracy(*arguments, k=10, temperature=0.07)
    one = 1.001 / len(tensors["test_y"])  # with TF32 an image may fall on the other side
    assert abs(found - tensors["acc_standardized_k10_t0.07"].item()) < (3 * one if tf32 else 1e-9)


@pytest.mark.parametrize("form", ["pre", "post"])
def test_encoders_are_the_official_ones(golden, tf32, form, tmp_path):
    tensors, out = golden(f"hub_{form}norm_vit"), []
    state = {key.removeprefix("sd."): x for key, x in tensors.items() if key.startswith("sd.")}
    torch.save({"state_dict": state}, tmp_path / "file.th")
    encoder = mr.load_encoder(tmp_path / "file.th", num_heads=3).to(GPU)
    for block in encoder.blocks:
        block.register_forward_hook(lambda *x: out.append(x[2]))
    with torch.no_grad():
        encoder.forward_features(tensors["x"].to(GPU))
    exact = 1e-2 if tf32 else 2e-5
    assert all(distance(x, tensors[f"block{i}"]) < exact for i, x in enumerate(out)) and out


# ---- CPU against GPU


def losses(result) -> np.ndarray:
    return result.history["loss"].to_numpy()


@pytest.mark.parametrize("method", ["simmim", "mae"])
def test_pretraining_as_on_the_cpu(float32, small, encoder, images, method):
    config = replace(small.pretrain, method=method)
    there, here = (mr.pretrain(encoder, images, config, device=d) for d in (GPU, "cpu"))
    assert devices(there) == {"cpu"}
    np.testing.assert_allclose(losses(there), losses(here), rtol=1e-2)


def test_refinement_as_on_the_cpu(float32, small, encoder, images):
    there, here = (mr.refine(encoder, images, small.refine, device=d) for d in (GPU, "cpu"))
    assert devices(there) == {"cpu"}
    np.testing.assert_allclose(losses(there), losses(here), rtol=1e-2)
    first = here.history["step"] == 0
    np.testing.assert_allclose(losses(there)[first], losses(here)[first], rtol=1e-4)


def test_fine_tuning_as_on_the_cpu(float32, small, encoder, images):
    there, here = (
        finetune(encoder, images, small.refine, flops=3e9, device=d) for d in (GPU, "cpu")
    )
    assert devices(there) == {"cpu"} and there.flops == here.flops
    np.testing.assert_allclose(losses(there), losses(here), rtol=1e-2)


def test_views_as_on_the_cpu(images):
    recipe = small_views(32, 8, n_local=3)
    u = torch.from_numpy(uniforms(0, 0, np.arange(64), len(recipe.crops)))
    data, keys = images.in_memory(), [[(0, i) for i in range(64)]]
    there, here = (
        next(resident_crops(data.pixels, data.labels, recipe, iter(keys), 0, torch.device(d)))[0]
        for d in (GPU, "cpu")
    )
    for group, a, b in zip(size_groups(recipe), there, here, strict=True):
        crops = recipe.crops[group]
        a, b = (photometric(x, crops, u[:, group]).cpu() for x in (a, b))
        # A rounded level or solarisation's threshold may fall on the other side
        assert ((a - b).abs() < 1e-4).float().mean() > 0.995


def test_features_as_on_the_cpu(encoder, images):
    here = mr.extract_features(encoder, images, device="cpu")
    there = mr.extract_features(encoder, images, device=GPU)
    half = mr.extract_features(encoder, images, device=GPU, autocast=torch.bfloat16)
    assert devices([there, half, encoder]) == {"cpu"}
    for pool, x in here.x.items():
        assert distance(there.x[pool], x) < 1e-4
        assert distance(half.x[pool].float(), x) < 3e-2


def test_probes_as_on_the_cpu(encoder, images):
    train, test = (mr.extract_features(encoder, images.subset(x)) for x in (range(64), range(96)))
    hits, found = (mr.knn_hits(train, test, device=d) for d in ("cpu", GPU))
    assert all((hits[pool] == found[pool]).float().mean() > 0.99 for pool in hits)
    linear, low = (
        [probe(train, test, device=d, **how)["value"].to_numpy() for d in ("cpu", GPU)]
        for probe, how in (
            (mr.linear_probe, {"epochs": 3, "batch_size": 16}),
            (mr.low_shot, {"shots": (1, 2), "splits": 2}),
        )
    )
    np.testing.assert_allclose(*linear, atol=0.04)
    np.testing.assert_allclose(*low, atol=0.02)


def test_reconstruction_and_attention_as_on_the_cpu(float32, encoder, images):
    config = reconstruction.DecoderConfig(1, 16, 2, epochs=2, batch_size=32)
    (there, model), (here, _) = (
        reconstruction.reconstruction(encoder, images, images, config, device=d)
        for d in (GPU, "cpu")
    )
    assert devices([model, encoder]) == {"cpu"}
    np.testing.assert_allclose(there["value"], here["value"], rtol=1e-2)
    batch = torch.rand(8, 3, 32, 32)
    here = similarity.attention_distance(encoder, batch)
    there = similarity.attention_distance(encoder.to(GPU), batch.to(GPU))
    assert devices(there) == {"cpu"} and distance(there, here) < 1e-3


def test_report_on_the_gpu(encoder, images):
    rows = mr.probe(encoder, (images, images), probes=("knn", "low_shot"), shots=(1,), blocks=[1])
    assert rows["value"].between(0, 1).all() and devices(encoder) == {"cpu"}


# ---- equal runs


def agree(a, b, record_property) -> None:
    """First losses are equal; the rest may differ where kernels add in any order."""
    record_property("bit for bit", sha256_of(a.ema_encoder) == sha256_of(b.ema_encoder))
    assert losses(a)[0] == losses(b)[0]
    np.testing.assert_allclose(losses(a), losses(b), rtol=2e-2)


def test_two_equal_runs(small, encoder, images, record_property):
    data = images.in_memory()
    agree(*(mr.refine(encoder, data, small.refine) for _ in range(2)), record_property)


def test_killed_and_resumed(small, encoder, images, tmp_path, record_property):
    data, recipe = images.in_memory(), replace(small.refine, refine_epochs=2)

    def stop(_, epochs):
        if len(epochs) == 2:
            signal.raise_signal(signal.SIGTERM)

    saving = Saving(tmp_path)
    with pytest.raises(Stopped, match="stage 3"):
        mr.refine(encoder, data, recipe, saving=saving, monitor=stop)
    again = mr.refine(encoder, data, recipe, saving=replace(saving, resume=True))
    agree(mr.refine(encoder, data, recipe), again, record_property)


# ---- against the plan


@pytest.mark.parametrize("method", ["simmim", "mae"])
def test_operations_are_the_plans(small, images, method):
    shape = ViTShape(32, 8, 48, 2, 3, 192)
    config = replace(small.refine, blocks=(1,))
    first = replace(small.pretrain, method=method)
    encoder = mr.build_vit(mr.ViTConfig(dim=48, depth=2, num_heads=3))
    result = mr.refine(encoder, images, config)
    planned = cost.make_plan(shape, config, len(images))
    assert result.flops == pytest.approx(planned.heads_total + planned.refine_total, rel=5e-3)
    flops = mr.pretrain(encoder, images, first).flops
    assert flops == pytest.approx(cost.pretrain_total(shape, first, len(images)), rel=5e-3)


def test_memory_is_the_plans(pretended, record_property, monkeypatch):
    """The plan may be cautious: up to 60 % above what the allocator saw."""
    shape = ViTShape(64, 16, 192, 3, 3, 768)
    batch = 32 if pretended else 1024
    views = Views((Crop(64, (0.3, 1)),) * 2, Crop(32, (0.1, 0.3)), 2)
    config = replace(
        mr.load_preset("smoke").refine,
        views=views,
        hidden_dim=256,
        out_dim=64,
        predictor_dim=256,
        batch_size=batch,
        queue_size=2048,
    )
    data = mr.load_dataset("fruit64", split="train").take(batch)
    estimate = cost.training_bytes(shape, config, train_encoder=True)
    torch.cuda.reset_peak_memory_stats()
    if pretended:
        pretended.peak = estimate / 1.2
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda *_: None)
    mr.refine(mr.build_vit(mr.ViTConfig(64, 16, 192, 3, 3)), data, config)
    ratio = estimate / torch.cuda.max_memory_allocated()
    record_property("plan / peak memory", round(ratio, 3))
    assert 0.95 < ratio < 1.6


# ---- waits and processes


@pytest.mark.filterwarnings("default")
def test_quiet_steps_wait_for_nothing(pretended, small, encoder, images, monkeypatch):
    """By torch's own debug mode, which does not see pageable copies."""
    monkeypatch.setattr(optim, "LOG_POINTS", 1)
    if pretended:
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    end, waits = TrainingRun.end_step, {}

    def end_step(self, step, *args):
        caught = [str(x.message) for x in seen if "synchroniz" in str(x.message)]
        if not (self.stage.is_logged(step) or self.stage.is_logged(step - 1)):
            waits[self.stage.number, step] = caught
        end(self, step, *args)
        seen.clear()

    monkeypatch.setattr(TrainingRun, "end_step", end_step)
    data = images.in_memory()
    recipe = replace(small.refine, batch_size=16)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            mr.refine(encoder, data, recipe)
            mr.pretrain(encoder, data, replace(small.pretrain, batch_size=16))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert {stage for stage, _ in waits} == {1, 2, 3} and not any(waits.values()), waits


def command(out, device: str) -> list[str]:
    how = ["--preset", "smoke", "--model", "mae_tiny_64", "--data", "fruit64"]
    return ["-m", "mimrefiner", "refine", *how, "--heads", "1", "--out", str(out / device)]


def test_two_processes_of_one_gpu(pretended, tmp_path):
    """They are refused in one line; on the CPUs the same two train together."""
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    env = os.environ | {"MIMREFINER_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    if not pretended and torch.cuda.device_count() == 1:
        told = subprocess.run(
            [*start, *command(tmp_path, "gpu")], capture_output=True, text=True, env=env
        )
        assert told.returncode and "has no GPU of its own" in told.stderr
    hidden = env | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*start, *command(tmp_path, "cpu")], capture_output=True, text=True, env=hidden
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "cpu" / "ema_encoder.safetensors").exists()
