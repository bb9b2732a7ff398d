"""Where and how precisely things are computed, as far as a machine without a GPU can tell."""

import pytest
import torch

import mimrefiner as mr
from mimrefiner import device
from mimrefiner.errors import InputError
from mimrefiner.probes import reconstruction
from mimrefiner.progress import Meter
from mimrefiner.training import engine
from mimrefiner.training.finetune import Classifier, _flops_per_step, finetune


def test_random_weights_leave_the_generators_of_gpus_alone(monkeypatch, vit):
    """``torch.manual_seed`` would seed them too, and drop path would ignore the user's seed."""

    def seeds_gpus(*_):
        raise AssertionError("a generator of a GPU was seeded")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds_gpus)
    with pytest.raises(AssertionError):
        torch.manual_seed(0)
    smoke = mr.load_preset("smoke")
    before = torch.get_rng_state()
    encoder = mr.build_vit(smoke.encoder, seed=3)
    mr.MIMRefiner(encoder, smoke.refine)
    assert torch.equal(torch.get_rng_state(), before)
    again = mr.build_vit(smoke.encoder, seed=3)
    assert all(
        torch.equal(a, b) for a, b in zip(encoder.parameters(), again.parameters(), strict=True)
    )


@pytest.mark.parametrize("supported", [False, True])
def test_bfloat16_only_where_the_device_has_it(monkeypatch, supported):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    assert device.has_bfloat16(torch.device("cuda")) is supported
    monkeypatch.setattr(device, "has_bfloat16", lambda _: supported)
    wide, narrow = (mr.build_vit(mr.ViTConfig(dim=d, depth=1, num_heads=1)) for d in (192, 64))
    for encoder, helps in ((wide, supported), (narrow, False)):
        with device.autocast(torch.device("cpu"), encoder):
            assert torch.is_autocast_enabled("cpu") is helps


def test_features_are_full_float32(vit, digits):
    before, seen = torch.backends.cudnn.allow_tf32, []
    vit.patch_embed.register_forward_hook(
        lambda *_: seen.append(torch.backends.cudnn.allow_tf32) and None
    )
    mr.extract_features(vit, digits["test"].take(4))
    assert seen == [False] and torch.backends.cudnn.allow_tf32 is before


def test_a_process_without_a_gpu_of_its_own_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"LOCAL_RANK": "1", "RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="process 1 of this machine has no GPU of its own"):
        engine._fabric(None)


def test_the_peak_of_memory_is_that_of_this_training(monkeypatch):
    reset = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    Meter(8, "cuda")
    assert reset == [torch.device("cuda")]


def test_a_gpu_without_memory_gives_advice(monkeypatch, vit, digits):
    def full(*_, **__):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("mimrefiner.probes.features.pooled_blocks", full)
    with pytest.raises(InputError, match="fewer images at a time"):
        mr.extract_features(vit, digits["test"].take(4))


def test_training_on_features_and_labels_gives_advice_too(monkeypatch, vit, digits):
    def full(*_, **__):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    images = digits["test"].take(30)
    features = mr.extract_features(vit, images)
    monkeypatch.setattr("mimrefiner.probes.linear.JointProbes.step", full)
    with pytest.raises(InputError, match="fewer learning rates"):
        mr.linear_probe(features, features, val=features)
    monkeypatch.setattr(Classifier, "forward", full)
    config = mr.load_preset("smoke").refine
    with pytest.raises(InputError, match="smaller batch"):
        finetune(vit, images, config, flops=1e9, device="cpu")


def test_reconstruction_keeps_masks_on_the_cpu(monkeypatch, vit, digits):
    """The number of visible patches is read off the mask: on a GPU that would wait."""
    config = reconstruction.DecoderConfig(depth=1, dim=16, heads=2)
    decoders = reconstruction.DecoderPerBlock(vit, config).to("meta")
    mask = torch.arange(16).expand(2, -1) < 12
    assert decoders(torch.zeros(2, 3, 32, 32, device="meta"), mask).shape == (3,)
    with pytest.raises(RuntimeError):  # such a device cannot be asked how many there are
        decoders(torch.zeros(2, 3, 32, 32, device="meta"), mask.to("meta"))
    seen = []
    monkeypatch.setattr(
        reconstruction.DecoderPerBlock,
        "forward",
        lambda self, images, mask: (
            seen.append((images.device.type, mask.device.type)) or torch.zeros(3)
        ),
    )
    images = digits["test"].take(4)
    reconstruction.held_out_loss(decoders, images, config, torch.device("meta"))
    assert seen == [("meta", "cpu")]


def test_operations_of_fine_tuning_include_attention():
    """A block's attention products are counted: 3 times (forward, twice back) 2 of 2 n n d."""
    vit = mr.build_vit(mr.ViTConfig(image_size=64, patch_size=4, dim=32, depth=2, num_heads=2))
    counted = _flops_per_step(Classifier(vit, 3), 2, 64, torch.device("cpu"))
    tokens, dim, depth, images = 257, 32, 2, 2
    attention = 3 * 4 * tokens**2 * dim
    products = 3 * 2 * tokens * dim * 12 * dim
    embed = 2 * 2 * 256 * 48 * dim
    expected = images * (depth * (attention + products) + embed + 3 * 2 * dim * 3)
    assert counted == pytest.approx(expected, rel=1e-3)
