"""The pretend GPU says what a real one would: of single lines, and of faults put in the package."""

import copy
import doctest
import sys
from dataclasses import replace

import pretend_gpu
import pytest
import torch
from pretend_gpu import devices
from torch import nn

import mimrefiner as mr
from mimrefiner.data.augment import paper_views

GPU = "cuda"
RUN = (mr.refine, mr.pretrain, mr.extract_features)  # asked for, so that their modules are there


def test_its_example():
    assert doctest.testmod(pretend_gpu).failed == 0


def some_tensors() -> dict:
    """Names for lines of code: ``v`` (4,) and ``x`` () on the GPU, ``host`` (4,) on the CPU."""
    there = {"v": torch.arange(4.0, device=GPU), "x": torch.ones((), device=GPU)}
    return globals() | there | {"host": torch.arange(4.0)}


@pytest.mark.parametrize(
    ("code", "waits"),
    [
        ("x.item()", ["_local_scalar_dense"]),
        ("float(x)", ["_local_scalar_dense"]),
        ("3 if x > 2 else 4", ["_local_scalar_dense"]),
        ("v[x.long()]", ["_local_scalar_dense"]),
        ("v.tolist()", ["tolist"]),
        ("v.nonzero()", ["nonzero"]),
        ("torch.where(v > 0)", ["nonzero"]),
        ("v.unique()", ["_unique2"]),
        ("v.masked_select(v > 0)", ["masked_select"]),
        ("v[v > 0]", ["boolean mask"]),
        ("v.__setitem__(v > 0, v[1:].clone())", ["boolean mask"]),
        ("v.__setitem__(v > 0, 1.0)", []),
        ("v.masked_fill_(v > 0, 1.0)", []),
        ("v[host.long()]", ["blocking copy to the GPU"]),
        ("v[v.long()]", []),
        ("v[1:3].fill_(2)", []),
        ("torch.equal(v, v)", ["equal"]),
        ("v.repeat_interleave(v.long())", ["repeat_interleave"]),
        ("v.repeat_interleave(2)", []),
        ("v.cpu()", ["copy to the CPU"]),
        ("host.copy_(v)", ["copy to the CPU"]),
        ("v.copy_(host)", ["blocking copy to the GPU"]),
        ("v.copy_(host, non_blocking=True)", []),
        ("host.to(v)", ["blocking copy to the GPU"]),
        ("host.cuda()", ["blocking copy to the GPU"]),
        ("host.to(v.device, non_blocking=True)", []),
        ("torch.tensor([1.0], device=v.device)", ["blocking copy to the GPU"]),
        ("torch.full((3,), 1.0, device=v.device)", []),
        ("torch.zeros(2**14).to(GPU, non_blocking=True)", []),
        ("torch.zeros(2**15).to(GPU, non_blocking=True)", ["copy of 131072 pageable bytes"]),
        ("torch.zeros(2**15).pin_memory().to(GPU, non_blocking=True)", []),
        ("torch.cuda.synchronize()", ["synchronize"]),
        ("v * 2 + torch.tensor(3.0)", []),
        ("copy.deepcopy(v) + v", []),
        ("v[None].bfloat16().mT @ torch.ones_like(v, dtype=torch.bfloat16)[None]", []),
    ],
)
def test_waits(code, waits):
    with pretend_gpu.pretend_gpu() as gpu:
        names = some_tensors()
        assert gpu.waits == []
        eval(code, names)
        found = gpu.waits
    assert len(found) == len(waits)
    assert all(text.startswith(word) for text, word in zip(found, waits, strict=True))


@pytest.mark.parametrize(
    "code",
    [
        "v + host",
        "host + v",
        "host[v.long()]",
        "v.__setitem__(v.long(), host)",
        "torch.cat([v, host])",
        "torch.stack([x, torch.tensor(3.0)])",
        "torch.tensor(3.0).add_(x)",
        "nn.Linear(4, 4)(v)",
        "torch.optim.AdamW([{'params': model.parameters()}], fused=True).step()",
        "torch.rand(3, device=GPU, generator=torch.Generator())",
        "v.uniform_(generator=torch.Generator())",
        "v.numpy()",
        "v.pin_memory()",
    ],
)
def test_refusals(code):
    with pretend_gpu.pretend_gpu():
        names = some_tensors()
        model = names["model"] = nn.Linear(4, 4).to(GPU)
        model(names["v"]).sum().backward()
        model.bias.grad = torch.zeros(4)
        with pytest.raises((RuntimeError, TypeError), match=r"cuda|CPU"):
            eval(code, names)


def test_devices_launches_and_copies():
    with pretend_gpu.pretend_gpu() as gpu:
        assert torch.cuda.is_available() and torch.cuda.device_count() == 1
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).to(GPU)
        assert next(model.parameters()).device == torch.device("cuda", 0)
        assert next(model.parameters()).is_cuda and not next(model.parameters()).is_cpu
        assert len(gpu.copies) == 7
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        average = copy.deepcopy(model)
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(torch.ones(8, 4, device=GPU)).square().mean()
            loss.backward()
            optimizer.step()
        left = devices(average.cpu())
        copies = torch.zeros(4, device="cpu") + model.cpu()[0].bias.detach()
    assert devices(copies) == left == devices({"model": [model]}) == {"cpu"}
    assert devices([loss]) == {"cuda"}
    # One up to the end of each step, then one with the average's and the trained weights' return
    assert len(gpu.steps) == 4
    first, second, third, rest = gpu.steps
    assert len(second.launches) == len(third.launches) > 10
    assert not any("empty" in x or "view" in x for x in second.launches)
    assert second.copies == second.waits == third.waits == []
    assert len(first.copies) == 7 and len(rest.waits) == 14 + 4
    assert not torch.cuda.is_available()


def test_the_random_state_of_the_gpu_and_its_peak():
    with pretend_gpu.pretend_gpu(bfloat16=False, memory=2**34) as gpu:
        torch.manual_seed(5)
        before = torch.cuda.get_rng_state()
        with torch.random.fork_rng(devices=[]):  # which keeps the CPU's state only
            torch.manual_seed(6)
        assert not torch.equal(before, torch.cuda.get_rng_state())
        torch.manual_seed(5)
        with torch.random.fork_rng():
            torch.manual_seed(6)
        assert torch.equal(before, torch.cuda.get_rng_state())
        gpu.peak = 7
        assert torch.cuda.max_memory_allocated() == 7
        torch.cuda.reset_peak_memory_stats()
        assert torch.cuda.max_memory_allocated() == 0
        assert torch.cuda.get_device_properties(0).total_memory == 2**34
        assert torch.cuda.is_bf16_supported() and not torch.cuda.is_bf16_supported(False)


# What the mutants are planted in: three steps of stage 3, of MAE, and an extraction of features


def light(crop):
    """Without what is drawn for each image: every step launches the same."""
    return replace(crop, jitter_p=0.0, grey_p=0.0, blur_p=0.0, solarize_p=0.0)


@pytest.fixture(scope="module")
def runs():
    images = mr.load_dataset("digits", split="train").take(72)
    resident, few = images.in_memory(), images.take(24)
    views = paper_views(32, 16, n_local=0)
    views = replace(views, global_crops=tuple(map(light, views.global_crops)))
    widths = {"hidden_dim": 8, "out_dim": 8, "predictor_dim": 8, "queue_size": 32}
    epochs = {"heads_epochs": 0, "refine_epochs": 1, "warmup_epochs": 0}
    recipe = mr.RefineConfig(views, batch_size=24, clip_norm=1.0, **widths, **epochs)
    mae = mr.PretrainConfig(
        "mae", decoder_dim=8, decoder_heads=2, epochs=1, batch_size=24, clip_norm=1.0
    )

    def encoder():
        return mr.build_vit(mr.ViTConfig(patch_size=16, dim=16, depth=1, num_heads=2))

    def refine():
        return mr.refine(encoder(), resident, recipe)

    def pretrain():
        return mr.pretrain(encoder(), images, mae)

    def extract():
        model = encoder()
        return model, mr.extract_features(model, few)

    return {"refine": refine, "pretrain": pretrain, "extract": extract}


def holding(name: str) -> list:
    """The package's modules that have ``name``."""
    modules = [module for key, module in sys.modules.items() if key.startswith("mimrefiner.")]
    found = [module for module in modules if name in vars(module)]
    assert found, f"nothing is called {name} any more"
    return found


def said(run, patch) -> tuple[str, list[int]]:
    """What the pretend GPU says of a run: refusals, waits of its last whole step, which logs
    nothing, and results on the GPU; and how many launches and copies that step has.
    """
    for module in holding("LOG_POINTS"):
        patch.setattr(module, "LOG_POINTS", 1)  # the first and the last step are logged
    with pretend_gpu.pretend_gpu() as gpu:
        try:
            result = run()
        except (RuntimeError, TypeError) as error:
            return f"refused: {error}", [0, 0]
    quiet = gpu.steps[-2] if len(gpu.steps) > 1 else pretend_gpu.Step()
    found = [*quiet.waits, *(["returned on the GPU"] if "cuda" in devices(result) else [])]
    return "\n".join(found), [len(quiet.launches), len(quiet.copies)]


@pytest.fixture(scope="module")
def sound(runs):
    with pytest.MonkeyPatch.context() as patch:
        return {name: said(run, patch) for name, run in runs.items()}


@pytest.mark.parametrize("name", ["refine", "pretrain", "extract"])
def test_no_false_alarm(sound, name):
    assert sound[name][0] == ""


MUTANTS = []


def mutant(run: str, found: str):
    """Register a fault: what plants it, the run that has it then, and what must be said of it."""

    def add(plant):
        MUTANTS.append(pytest.param(plant, run, found, id=plant.__name__))
        return plant

    return add


def replaced(patch, name: str, new) -> None:
    """Let ``new(real, ...)`` be called for the package's function ``name``, wherever it is."""
    places = holding(name)
    (real,) = {vars(module)[name] for module in places}
    for module in places:
        patch.setattr(module, name, lambda *args, **how: new(real, *args, **how))


def in_step(patch, fault) -> None:
    """Let ``fault(result, label)`` happen after every step of a refiner."""
    step = mr.MIMRefiner.step

    def faulty(self, z, p, index, label, **how):
        result = step(self, z, p, index, label, **how)
        fault(result, label)
        return result

    patch.setattr(mr.MIMRefiner, "step", faulty)


@mutant("refine", "_local_scalar_dense")
def item_in_a_step(patch):
    in_step(patch, lambda result, label: result.loss[0].item())


@mutant("refine", "tolist")
def metrics_as_a_list(patch):
    in_step(patch, lambda result, label: result.metrics["nn_age"].tolist())


@mutant("refine", "copy to the CPU")
def loss_to_the_cpu(patch):
    in_step(patch, lambda result, label: result.loss.detach().cpu())


@mutant("refine", "refused: can't convert")
def numpy_of_the_gpu(patch):
    in_step(patch, lambda result, label: result.loss.detach().numpy())


@mutant("refine", "_unique2")
def classes_of_a_batch(patch):
    in_step(patch, lambda result, label: label.unique())


@mutant("refine", "blocking copy to the GPU")
def number_as_a_tensor(patch):
    in_step(patch, lambda result, label: result.loss * torch.tensor([0.5], device=label.device))


@mutant("refine", "synchronize")
def synchronized(patch):
    in_step(patch, lambda result, label: torch.cuda.synchronize())


@mutant("refine", "refused: add_")
def sum_on_the_cpu(patch):
    total = torch.zeros(())
    in_step(patch, lambda result, label: total.add_(result.loss.detach().mean()))


@mutant("refine", "_local_scalar_dense")
def clipped_if_large(patch):
    def clip(real, parameters, limit):
        parameters = [x for x in parameters if x.grad is not None]
        if parameters[0].grad.norm() > limit:
            real(parameters, limit)

    replaced(patch, "clip_gradients", clip)


@mutant("refine", "equal at")
def average_compared(patch):
    def update(real, average, model, decay):
        if not torch.equal(next(average.parameters()), next(model.parameters())):
            real(average, model, decay)

    replaced(patch, "update_average", update)


@mutant("refine", "refused: _foreach_lerp_")
def average_on_the_cpu(patch):
    replaced(patch, "update_average", lambda real, average, *more: real(average.cpu(), *more))


@mutant("refine", "refused: _fused_adamw_")
def moments_on_the_cpu(patch):
    step = torch.optim.AdamW.step

    def faulty(self):
        step(self)
        for moments in self.state.values():
            moments["exp_avg"] = moments["exp_avg"].cpu()

    patch.setattr(torch.optim.AdamW, "step", faulty)


@mutant("refine", "boolean mask")
def bright_images_by_mask(patch):
    def views(real, x, crop, u):
        x = real(x, crop, u)
        x[x.amax((2, 3, 4)) > 0.5] *= 0.9
        return x

    replaced(patch, "photometric", views)


@mutant("refine", "blocking copy to the GPU")
def draws_copied(patch):
    def views(real, x, crop, u):
        return real(x, crop, u) + 0 * u.to(x.device).sum()

    replaced(patch, "photometric", views)


@mutant("refine", "refused: sub")
def images_on_the_cpu(patch):
    replaced(patch, "photometric", lambda real, *args: real(*args).cpu())


@mutant("refine", "nonzero")
def empty_slots_sought(patch):
    enqueue = mr.NNQueue.enqueue

    def faulty(self, *args):
        (self.index < 0).nonzero()
        enqueue(self, *args)

    patch.setattr(mr.NNQueue, "enqueue", faulty)


@mutant("refine", "refused: index_put_")
def rows_never_sent(patch):
    enqueue = mr.NNQueue.enqueue

    def faulty(self, z, index, label):
        enqueue(self, z, torch.arange(len(index)), label)

    patch.setattr(mr.NNQueue, "enqueue", faulty)


@mutant("refine", "blocking copy to the GPU")
def index_on_the_cpu(patch):
    def gather(self, slots):
        return self.z[torch.arange(len(self.z))[:, None, None], slots]

    patch.setattr(mr.NNQueue, "gather", gather)


@mutant("refine", "refused: expected a generator of cuda")
def generator_of_the_cpu(patch):
    lookup = mr.NNQueue.lookup_slots

    def faulty(self, z, *args, generator, **how):
        torch.randint(3, z.shape[:3], generator=generator, device=z.device)
        return lookup(self, z, *args, generator=generator, **how)

    patch.setattr(mr.NNQueue, "lookup_slots", faulty)


@mutant("refine", "refused: ")
def buffer_not_registered(patch):
    def register(self, name, x, **how):
        if name == "age":
            self.age = x
        else:
            nn.Module.register_buffer(self, name, x, **how)

    patch.setattr(mr.NNQueue, "register_buffer", register)


@mutant("refine", "more launches")
def part_after_part(patch):
    def views(real, x, crop, u):
        return torch.cat([real(few, crop, u[:6]) for few in x.split(6)])

    replaced(patch, "photometric", views)


@mutant("refine", "more copies")
def draws_one_by_one(patch):
    def views(real, x, crop, u):
        for draws in u:
            draws.to(x.device, non_blocking=True)
        return real(x, crop, u)

    replaced(patch, "photometric", views)


@mutant("refine", "returned on the GPU")
def encoder_left_there(patch):
    patch.setattr(nn.Module, "cpu", lambda self: self)


@mutant("pretrain", "returned on the GPU")
def decoder_left_there(patch):
    cpu = nn.Module.cpu

    def faulty(self):
        cpu(self).decoder.to(GPU)
        return self

    patch.setattr(nn.Module, "cpu", faulty)


@mutant("pretrain", "refused: mul")
def mask_never_sent(patch):
    def loss(real, predicted, images, mask, patch_size):
        return real(predicted, images, torch.ones(mask.shape), patch_size)

    replaced(patch, "masked_pixel_loss", loss)


@mutant("pretrain", "pageable bytes")
def loader_without_pinned_memory(patch):
    make = torch.utils.data.DataLoader.__init__

    def faulty(self, *args, **how):
        make(self, *args, **{**how, "pin_memory": False})

    patch.setattr(torch.utils.data.DataLoader, "__init__", faulty)


@mutant("extract", "returned on the GPU")
def encoder_not_brought_home(patch):
    to = nn.Module.to

    def faulty(self, device):
        return to(self, device) if torch.device(device).type == GPU else self

    patch.setattr(nn.Module, "to", faulty)


@mutant("extract", "refused: convolution")
def images_never_sent(patch):
    def faulty(real, encoder, images, *args, **how):
        return real(encoder, torch.ones(images.shape), *args, **how)

    replaced(patch, "pooled_blocks", faulty)


@pytest.mark.parametrize(("plant", "run", "found"), MUTANTS)
def test_mutants_are_caught(runs, sound, monkeypatch, plant, run, found):
    plant(monkeypatch)
    words, counts = said(runs[run], monkeypatch)
    for kind, now, before in zip(("launches", "copies"), counts, sound[run][1], strict=True):
        words += f"\nmore {kind}" * (now > before)
    assert found in words
