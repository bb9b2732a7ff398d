"""Two to four processes (gloo) against one; forked, so that they need not import all again."""

import errno
import os
import signal
import socket
import sys
import time
from dataclasses import replace
from functools import partial

import lightning_fabric  # noqa: F401  here once, not in every process
import pytest
import torch
from torch import nn

import mimrefiner as mr
from mimrefiner import distributed
from mimrefiner.data.augment import digit_views
from mimrefiner.errors import Stopped
from mimrefiner.method.heads import StackedBatchNorm
from mimrefiner.models.weights import sha256_of
from mimrefiner.probes import feature_cache
from mimrefiner.probes.linear_grid import IN1K, linear_grid
from mimrefiner.probes.monitor import Monitor
from mimrefiner.study import store
from mimrefiner.training import checkpoints, engine, optim
from mimrefiner.training.checkpoints import Checkpoints, Saving
from mimrefiner.training.finetune import finetune, finetune_recipe
from mimrefiner.training.memory import Memory
from mimrefiner.training.recipes import L16
from mimrefiner.training.refine import forward_backward
from mimrefiner.training.run import TrainingRun

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def on_several(function, folder, *, world=2, timeout=60):
    """What ``function(rank)`` returns on every process (tensors, numbers, text), and their exit
    codes.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
                os.environ |= {
                    "MASTER_ADDR": "localhost",
                    "MASTER_PORT": str(port),
                    "MIMREFINER_TIMEOUT": str(timeout),
                }
                sys.stderr = (folder / f"err{rank}").open("w")
                with engine.processes():
                    torch.save(function(rank), folder / f"out{rank}.pt")
                code = 0
            except Exception as error:
                (folder / f"failed{rank}").write_text(f"{type(error).__name__}: {error}")
            finally:
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    outputs = [folder / f"out{rank}.pt" for rank in range(world)]
    return [torch.load(f, weights_only=True) if f.exists() else None for f in outputs], codes


def close(a, b):
    """Equal to a relative 1e-4 of the tensor's scale."""
    return (a - b).abs().max() <= 1e-4 * b.abs().max().clamp_min(1e-6)


@pytest.fixture
def refiner(vit):
    config = mr.RefineConfig(
        views=digit_views(32, 8, n_local=2),
        blocks=(0, 1, 2),
        hidden_dim=24,
        out_dim=12,
        predictor_dim=20,
        queue_size=64,
        batch_size=16,
        refine_top_k=4,
    )
    return mr.MIMRefiner(vit, config)


def test_a_group_of_the_caller_needs_no_launcher(digits, tmp_path):
    preset, some = mr.load_preset("smoke"), digits["train"].take(64)

    def job(rank):
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            del os.environ[name]
        result = mr.refine(
            mr.build_vit(preset.encoder), some, replace(preset.refine, refine_epochs=1)
        )
        return {"hash": sha256_of(result.encoder)}

    outputs, codes = on_several(job, tmp_path)
    assert codes == [0, 0], (tmp_path / "failed0").read_text()
    assert outputs[0] == outputs[1]


def test_gathered_rows_are_in_order_and_gradients_summed(tmp_path):
    def job(rank):
        x = torch.arange(3.0).add(10 * rank).requires_grad_()
        out = distributed.gather(x)
        (out * torch.arange(6.0) * (rank + 1)).sum().backward()
        return {"out": out.detach(), "grad": x.grad}

    outputs, _ = on_several(job, tmp_path)
    for rank, output in enumerate(outputs):
        assert output["out"].tolist() == [0, 1, 2, 10, 11, 12]
        assert torch.equal(output["grad"], 3 * torch.arange(6.0)[3 * rank : 3 * rank + 3])


def test_batch_norm_equals_that_of_the_whole_batch(tmp_path):
    torch.manual_seed(1)
    x, weight = 3 + 2 * torch.randn(10, 2, 6), torch.randn(10, 2, 6)

    def run(rows):
        norm, part = StackedBatchNorm(2, 6), x[rows].clone().requires_grad_()
        out = norm(part)
        (out * weight[rows]).sum().backward()
        return {
            "out": out.detach(),
            "grad": part.grad,
            **{n: b.float() for n, b in norm.named_buffers()},
        }

    outputs, _ = on_several(lambda rank: run(slice(5 * rank, 5 * rank + 5)), tmp_path)
    whole = run(slice(0, 10))
    for name in ("out", "grad"):
        assert torch.allclose(torch.cat([o[name] for o in outputs]), whole[name], atol=1e-5), name
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.allclose(outputs[0][name], whole[name], rtol=1e-5), name


@pytest.mark.parametrize(
    ("processes", "micro_batch", "blocks"),
    [(2, None, (0, 1, 2)), (2, 3, (0, 1, 2)), (4, None, (0, 1, 2)), (2, 3, (0, 1))],
)
def test_processes_equal_one_with_the_whole_batch(
    refiner, tmp_path, monkeypatch, processes, micro_batch, blocks
):
    """Loss, gradients, queue and batch norm after two steps, also where no loss reaches the last
    block; neighbours are pinned so that near-ties cannot flip.
    """
    refiner = mr.MIMRefiner(refiner.encoder, replace(refiner.config, blocks=blocks))

    def pinned(self, z, index, *, part, **_):
        heads = torch.arange(z.shape[0])[:, None, None]
        return (7 * index[None, :, None] + 3 * torch.arange(z.shape[2]) + heads) % self.size

    monkeypatch.setattr(mr.NNQueue, "lookup_slots", pinned)
    torch.manual_seed(2)
    batches = [
        [torch.randn(16, 3, c.size, c.size) for c in refiner.config.views.crops] for _ in range(2)
    ]

    def run(rank, world):
        rows = slice(rank * 16 // world, (rank + 1) * 16 // world)
        how = {
            "through": (engine.averaged(refiner.encoder), engine.averaged(refiner.heads)),
            "micro_batch": micro_batch,
        }
        for step, views in enumerate(batches):
            index = torch.arange(16) + 16 * step
            result = forward_backward(
                refiner, ([x[rows] for x in views], index[rows], index[rows] % 3), top_k=1, **how
            )
        values = {
            f"grad of {name}": x.grad
            for name, x in refiner.named_parameters()
            if x.grad is not None
        }
        values |= {name: x.float() for name, x in refiner.named_buffers()}
        return {**values, "loss": distributed.mean(result.loss.detach())}

    outputs, _ = on_several(lambda rank: run(rank, processes), tmp_path, world=processes)
    whole = run(0, 1)
    assert len(whole) > 20 * len(blocks)
    assert any(name.startswith("grad of encoder.blocks.2") for name in whole) == (2 in blocks)
    assert outputs[0].keys() == whole.keys()
    for name, x in whole.items():
        if x.abs().max() < 3e-5:
            continue  # zero but for rounding: means and gradients behind a batch norm
        assert close(outputs[0][name], x), name
        assert all(torch.equal(outputs[0][name], other[name]) for other in outputs[1:]), name


def test_messages_of_a_step_are_as_many_for_any_number_of_heads(vit, tmp_path, monkeypatch):
    """One per batch-norm layer, one for the predictions, and the queue's three, forward; gradients
    go back through as many.
    """
    sent, gather, scatter = [], distributed.ALL_GATHER, distributed.REDUCE_SCATTER
    monkeypatch.setattr(
        distributed, "ALL_GATHER", lambda *args: sent.append("gather") or gather(*args)
    )
    monkeypatch.setattr(
        distributed, "REDUCE_SCATTER", lambda *args: sent.append("scatter") or scatter(*args)
    )

    def run(rank):
        counts = []
        for blocks in ((2,), (0, 1, 2)):
            config = mr.RefineConfig(
                views=digit_views(32, 8, n_local=1),
                blocks=blocks,
                hidden_dim=8,
                out_dim=8,
                predictor_dim=8,
                queue_size=32,
                batch_size=8,
                refine_top_k=1,
            )
            refiner = mr.MIMRefiner(vit, config)
            sent.clear()
            views = [torch.randn(4, 3, c.size, c.size) for c in config.views.crops]
            forward_backward(refiner, (views, torch.arange(4), torch.arange(4)), top_k=1)
            counts.append([sent.count("gather"), sent.count("scatter")])
        return counts

    for one_head, three_heads in on_several(run, tmp_path)[0]:
        assert one_head == three_heads == [4 + 1 + 3, 4 + 1]


def test_processes_equal_one_in_bfloat16(tmp_path, monkeypatch):
    """Loss and gradients of an encoder wide enough for autocast, to the precision of bfloat16."""
    monkeypatch.setattr("mimrefiner.device.has_bfloat16", lambda _: True)  # some CPUs emulate it
    config = mr.RefineConfig(
        views=digit_views(32, 8, n_local=2),
        hidden_dim=24,
        out_dim=12,
        predictor_dim=20,
        queue_size=64,
        batch_size=16,
    )
    wide = mr.MIMRefiner(mr.build_vit(mr.ViTConfig(dim=192, depth=3, num_heads=3)), config)
    monkeypatch.setattr(
        mr.NNQueue,
        "lookup_slots",
        lambda self, z, *_, **__: torch.zeros(z.shape[:3], dtype=torch.long),
    )
    torch.manual_seed(2)
    views = [torch.randn(16, 3, c.size, c.size) for c in config.views.crops]
    kinds = []
    wide.encoder.blocks[0].register_forward_hook(lambda m, i, o: kinds.append(o.dtype))
    wide.encoder.blocks[0].attn.qkv.register_forward_hook(lambda m, i, o: kinds.append(o.dtype))

    def run(rank, world):
        rows = slice(rank * 16 // world, (rank + 1) * 16 // world)
        through = engine.averaged(wide.encoder), engine.averaged(wide.heads)
        batch = [x[rows] for x in views], torch.arange(16)[rows], None
        result = forward_backward(wide, batch, top_k=1, through=through)
        grads = torch.cat(
            [x.grad.flatten() for x in wide.encoder.parameters() if x.grad is not None]
        )
        return {"loss": distributed.mean(result.loss.detach()), "grads": grads}

    outputs, _ = on_several(lambda rank: run(rank, 2), tmp_path)
    whole = run(0, 1)
    assert torch.bfloat16 in kinds
    assert torch.equal(outputs[0]["grads"], outputs[1]["grads"])
    for name, x in whole.items():
        assert (outputs[0][name] - x).norm() < 0.02 * x.norm(), name


def test_neighbours_are_counted_over_all_processes(refiner, tmp_path, monkeypatch):
    """One process knows labels of 8 images, 3 of them right; the other knows none, of which it
    cannot make a share.
    """
    monkeypatch.setattr(
        mr.NNQueue,
        "lookup_slots",
        lambda self, z, index, **_: torch.zeros(z.shape[:3], dtype=torch.long),
    )
    refiner.queue.label.zero_()
    label = torch.tensor([0] * 3 + [1] * 5 + [-1] * 8)

    def job(rank):
        rows = slice(8 * rank, 8 * rank + 8)
        views = [torch.randn(8, 3, c.size, c.size) for c in refiner.config.views.crops]
        return {
            "accuracy": refiner.step(
                *refiner(views), torch.arange(16)[rows], label[rows], top_k=1
            ).metrics["nn_accuracy"]
        }

    outputs, _ = on_several(job, tmp_path)
    assert all(output["accuracy"].tolist() == [3 / 8] * 3 for output in outputs)


def test_draws_do_not_depend_on_the_number_of_processes():
    queue, z = mr.NNQueue(2, 64, 8), torch.randn(2, 10, 2, 8)

    def draw(rows, part):
        generator = torch.Generator().manual_seed(5)
        return queue.lookup_slots(z[:, rows], None, top_k=6, generator=generator, part=part)

    whole = draw(slice(None), (0, 1))
    assert torch.equal(torch.cat([draw(slice(0, 5), (0, 2)), draw(slice(5, 10), (1, 2))], 1), whole)


def test_training_on_two_processes_follows_that_on_one(digits, tmp_path):
    """All three stages; both processes end with one set of weights, and the first losses are those
    of one process.
    """
    preset, some = mr.load_preset("smoke"), digits["train"].take(128)
    refining = replace(preset.refine, heads_epochs=1, refine_epochs=1)

    def run(_=0):
        first = mr.pretrain(mr.build_vit(preset.encoder), some, replace(preset.pretrain, epochs=1))
        second = mr.refine(first.encoder, some, refining)
        losses = [*first.history["loss"], *second.history["loss"]]
        return {
            "loss": torch.tensor(losses),
            "hash": sha256_of(second.ema_encoder),
            "flops": first.flops + second.flops,
        }

    outputs, _ = on_several(run, tmp_path)
    alone = run()
    assert outputs[0]["hash"] == outputs[1]["hash"]
    assert torch.allclose(outputs[0]["loss"][:4], alone["loss"][:4], rtol=1e-4)
    assert torch.allclose(outputs[0]["loss"], alone["loss"], rtol=0.02)
    assert outputs[0]["flops"] == pytest.approx(alone["flops"], rel=1e-3)


def test_fine_tuning_is_shared_by_the_processes(digits, tmp_path):
    preset, some = mr.load_preset("smoke"), digits["train"].take(128)
    config = replace(preset.refine, refine_base_lr=2e-2, warmup_epochs=0)

    def run(_=0):
        result = finetune(mr.build_vit(preset.encoder), some, config, flops=1e9)
        loss = torch.tensor(result.history["loss"])
        return {"loss": loss, "hash": sha256_of(result.encoder), "flops": result.flops}

    outputs, codes = on_several(run, tmp_path)
    assert codes == [0, 0], (tmp_path / "failed0").read_text()
    alone = run()
    assert outputs[0]["hash"] == outputs[1]["hash"]
    assert outputs[0]["flops"] == alone["flops"]
    assert alone["loss"].std() > 1e-2
    assert torch.allclose(outputs[0]["loss"], alone["loss"], rtol=1e-3)


@pytest.mark.parametrize("memory", [Memory(), Memory(micro_batch=3), Memory(shard=True)])
def test_a_recipe_of_fine_tuning_is_shared_by_the_processes(digits, tmp_path, memory):
    """Mixing and drop path act within a share, as one process does it with micro-batches."""
    train, val, test = (
        digits[name].take(n) for name, n in (("train", 48), ("val", 15), ("test", 9))
    )
    recipe = replace(L16, epochs=2, warmup_epochs=0, batch_size=16, base_lr=0.1)

    def run(_=0, memory=memory, **change):
        changed = replace(recipe, **change)
        encoder = mr.build_vit(mr.load_preset("smoke").encoder)
        result = finetune_recipe(encoder, train, test, changed, val=val, memory=memory)
        return {
            "loss": torch.tensor(result.history["loss"]),
            "hash": sha256_of(result.model),
            "weight": result.model.linear.weight.detach(),
            "values": torch.tensor(result.epochs["val"].tolist() + result.rows["value"].tolist()),
            "flops": result.flops,
        }

    outputs, codes = on_several(run, tmp_path)
    assert codes == [0, 0], (tmp_path / "failed0").read_text()
    alone = run(memory=Memory(), micro_batch=8)
    first, second = outputs
    assert first["hash"] == second["hash"] and torch.equal(first["values"], second["values"])
    assert torch.allclose(first["loss"], alone["loss"], rtol=1e-3)
    assert torch.allclose(first["weight"], alone["weight"], atol=1e-4)
    assert first["flops"] == pytest.approx(alone["flops"], rel=1e-6)
    assert torch.allclose(first["values"], alone["values"], atol=0.15)  # one image or two


def test_linear_probes_are_shared_by_the_processes(digits, tmp_path):
    train, val, test = (
        digits[name].take(n) for name, n in (("train", 48), ("val", 15), ("test", 9))
    )
    recipe = replace(IN1K, epochs=2, batch_size=16, learning_rates=(0.5,), inputs=("cls",))

    def run(_=0):
        encoder = mr.build_vit(mr.load_preset("smoke").encoder)
        return torch.tensor(linear_grid(encoder, train, test, recipe, val=val).probes["val"])

    outputs, codes = on_several(run, tmp_path)
    assert codes == [0, 0], (tmp_path / "failed0").read_text()
    assert torch.equal(outputs[0], outputs[1]) and torch.allclose(outputs[0], run())


@pytest.mark.parametrize(
    ("memory", "later"),
    [
        (Memory(shard=True), Memory(shard=True)),
        (Memory(micro_batch=12, recompute=True, shard=True), Memory()),
    ],
)
def test_a_sharded_encoder_is_trained_as_a_whole_one(digits, tmp_path, memory, later):
    """Stages 2 and 3 with frozen blocks, clipping, a monitor; left alone, and stopped in step 5
    after a checkpoint at 4 to go on sharded (then bit for bit the same) or not.
    """
    preset, some = mr.load_preset("smoke"), digits["train"].take(129)
    config = replace(preset.refine, refine_epochs=3, frozen_blocks=1, clip_norm=0.5)
    monitor = Monitor(some.take(33), digits["val"].take(17))
    encoder = mr.build_vit(preset.encoder)

    def run(rank, memory=memory, **how):
        result = mr.refine(encoder, some, config, memory=memory, monitor=monitor, **how)
        numbers = {
            "loss": result.history["loss"],
            "knn": result.epochs.filter(like="knn").to_numpy(),
        }
        weights = {
            f"{name} {n}": x
            for name in ("encoder", "ema_encoder")
            for n, x in getattr(result, name).state_dict().items()
        }
        # These biases have no gradient but rounding, which AdamW enlarges:
        for name in list(weights):
            if name.endswith("qkv.bias"):
                weights[name] = weights[name].unflatten(0, (3, -1))[[0, 2]]  # keys
            elif name.endswith("encoder norm.bias"):  # a batch norm follows
                del weights[name]
        return {name: torch.tensor(x) for name, x in numbers.items()} | weights

    def interrupted(rank):
        saving = Saving(tmp_path / "checkpoints", every=2)
        stop = pytest.MonkeyPatch()
        stop.setattr(optim, "update_average", partial(_stop_after, [5], optim.update_average))
        with pytest.raises(KeyboardInterrupt):
            run(rank, saving=saving)
        stop.undo()
        if rank == 0:
            assert Checkpoints(saving.folder).newest()["step"] == 4
        return run(rank, memory=later, saving=replace(saving, resume=True))

    (tmp_path / "whole").mkdir()
    expected, _ = on_several(partial(run, memory=Memory()), tmp_path / "whole")
    alone, codes = on_several(run, tmp_path)
    assert codes == [0, 0], (tmp_path / "failed0").read_text()
    resumed, codes = on_several(interrupted, tmp_path)
    assert codes == [0, 0], (tmp_path / "failed0").read_text()
    for output in alone + resumed:
        assert output.keys() == expected[0].keys()
        for name, x in expected[0].items():
            assert close(output[name], x), name
    if later == memory:
        assert all(torch.equal(resumed[0][name], x) for name, x in alone[0].items())


def _stop_after(left, update, *args):
    update(*args)
    left[0] -= 1
    if not left[0]:
        raise KeyboardInterrupt


def test_three_processes_resume_bit_for_bit(digits, tmp_path):
    """A sum of three depends on its order, which DDP changes after a run's first step unless it is
    kept from that.
    """
    preset, some = mr.load_preset("smoke"), digits["train"].take(120)
    config = replace(preset.refine, batch_size=30, heads_epochs=0.25, refine_epochs=2)
    encoder, saving = mr.build_vit(preset.encoder), Saving(tmp_path / "checkpoints", every=3)

    def weights(**how):
        result = mr.refine(encoder, some, config, **how)
        return {
            "hashes": [sha256_of(result.encoder), sha256_of(result.ema_encoder)],
            "loss": list(result.history["loss"]),
        }

    def interrupted(rank):
        stop = pytest.MonkeyPatch()
        stop.setattr(optim, "update_average", partial(_stop_after, [5], optim.update_average))
        with pytest.raises(KeyboardInterrupt):
            weights(saving=saving)
        stop.undo()
        return weights(saving=replace(saving, resume=True))

    alone, _ = on_several(lambda rank: weights(), tmp_path, world=3)
    resumed, codes = on_several(interrupted, tmp_path, world=3)
    assert codes == [0, 0, 0], (tmp_path / "failed0").read_text()
    assert resumed == alone == [alone[0]] * 3


@pytest.mark.parametrize(
    ("stage", "step"), [(2, 1), (3, 1)]
)  # the last steps of stages that are shorter than CHECK_EVERY
def test_sigterm_in_the_last_step_stops_all_processes(digits, tmp_path, monkeypatch, stage, step):
    preset, some, saving = (
        mr.load_preset("smoke"),
        digits["train"].take(128),
        Saving(tmp_path / "checkpoints"),
    )
    watch = TrainingRun.watch

    def spy(self, now, losses):
        if (self.stage.number, now, distributed.rank()) == (stage, step, 1):
            os.kill(os.getpid(), signal.SIGTERM)
        watch(self, now, losses)

    def job(rank):
        with pytest.raises(Stopped, match=f"stage {stage}, step {step + 1}; resume from"):
            mr.refine(
                mr.build_vit(preset.encoder),
                some,
                replace(preset.refine, heads_epochs=1, refine_epochs=1),
                saving=saving,
            )
        # By the first, before any leaves
        return {"saved": Checkpoints(saving.folder).files()[-1].name}

    monkeypatch.setattr(TrainingRun, "watch", spy)
    outputs, codes = on_several(job, tmp_path)
    assert codes == [0, 0], [file.read_text() for file in tmp_path.glob("failed*")]
    assert all(output["saved"].startswith(f"stage{stage}-step{step + 1:08d}") for output in outputs)


@pytest.mark.parametrize("trouble", ["not shared", "holds checkpoints already", "other settings"])
def test_processes_that_cannot_resume_together_all_say_so(vit, tmp_path, monkeypatch, trouble):
    """None waits for another (the time limit is far longer than the test)."""
    monkeypatch.setattr(checkpoints, "digest_of", _only_on_the_first(checkpoints.digest_of))
    Checkpoints(tmp_path / "shared").save({"stage": 1, "step": 7, "settings": {"a": 1}})

    def job(rank):
        folder = "own" if trouble == "not shared" and rank else "shared"
        resuming = trouble != "holds checkpoints already"
        settings = {"a": 1 + (rank if trouble == "other settings" else 0)}
        TrainingRun(Saving(tmp_path / folder, resume=resuming), lambda: settings)

    _, codes = on_several(job, tmp_path)
    assert codes == [1, 1]
    expected = {"not shared": "not all processes see", "other settings": "other settings"}.get(
        trouble, trouble
    )
    for rank in range(2):
        assert expected in (tmp_path / f"failed{rank}").read_text()


def _only_on_the_first(function):
    """``function``, not to be called on other processes: a checkpoint is large, one reads all of
    it.
    """

    def called(*args):
        assert distributed.rank() == 0
        return function(*args)

    return called


def test_pretraining_with_a_sharded_model(digits, tmp_path):
    """Three processes, so that widths of 32 are not shared equally."""
    preset, some = mr.load_preset("smoke"), digits["train"].take(120)
    config = replace(
        preset.pretrain, method="mae", decoder_dim=32, decoder_heads=2, clip_norm=0.5, batch_size=60
    )

    def run(shard, rank):
        result = mr.pretrain(mr.build_vit(preset.encoder), some, config, shard=shard)
        return {"loss": torch.tensor(result.history["loss"])} | result.model.state_dict()

    expected = run(False, 0)
    outputs, codes = on_several(partial(run, True), tmp_path, world=3)
    assert codes == [0, 0, 0], (tmp_path / "failed0").read_text()
    for name, x in expected.items():
        assert all(close(output[name], x) for output in outputs), name


def test_a_shard_is_a_share(tmp_path, vit):
    """Every process holds about half of weights, gradients and moments; a checkpoint's tensors are
    whole.
    """

    def job(rank):
        engine.shard(vit)
        vit.forward_features(torch.randn(2, 3, 32, 32)).sum().backward()
        optimizer = torch.optim.AdamW(vit.parameters())
        optimizer.step()
        moments = [values["exp_avg"] for values in optimizer.state.values()]
        held = [
            sum(engine.local(x).numel() for x in xs)
            for xs in (vit.parameters(), [p.grad for p in vit.parameters()], moments)
        ]
        saved = engine.whole(optimizer.state_dict())["state"].values()
        return {"held": held, "saved": sum(x["exp_avg"].numel() for x in saved)}

    count = sum(x.numel() for x in vit.parameters())
    outputs, _ = on_several(job, tmp_path)
    for output in outputs:
        assert all(0.4 * count < held < 0.6 * count for held in output["held"])
        assert output["saved"] == count


def test_sharding_alone_is_refused(vit):
    with pytest.raises(mr.InputError, match="start with torchrun"):
        engine.shard(vit)


def test_a_preset_alone_is_trained_by_all_processes_together(tmp_path, monkeypatch):
    """What the store does not hold is trained once, by all; the first one locks and writes."""
    monkeypatch.setenv("MIMREFINER_CACHE", str(tmp_path / "cache"))
    preset = mr.load_preset("smoke")

    def run(rank):
        first, again = (store.pretrained(preset) for _ in range(2))
        return {
            "hashes": [sha256_of(first.model), sha256_of(again.model)],
            "seconds": [first.seconds, again.seconds],
        }

    outputs, codes = on_several(run, tmp_path)
    assert codes == [0, 0], (tmp_path / "failed0").read_text()
    assert outputs[0] == outputs[1]
    assert len(set(outputs[0]["hashes"])) == len(set(outputs[0]["seconds"])) == 1
    assert sorted(f.name.partition("-")[0] for f in (tmp_path / "cache").iterdir()) == [
        "locks",
        "pretrain",
        "unfinished",
    ]
    assert store.is_stored("pretrained", preset)


@pytest.mark.parametrize("limit", [1e-3, 1e6])
def test_clipping_is_that_of_torch(vit, limit):
    vit(torch.randn(2, 3, 32, 32)).sum().backward()
    grads = [x.grad.clone() for x in vit.parameters()]
    engine.clip_gradients(vit.parameters(), limit)
    ours = [x.grad.clone() for x in vit.parameters()]
    for x, grad in zip(vit.parameters(), grads, strict=True):
        x.grad = grad
    nn.utils.clip_grad_norm_(vit.parameters(), limit)
    assert all(
        torch.allclose(a, x.grad, rtol=1e-5) for a, x in zip(ours, vit.parameters(), strict=True)
    )


@pytest.mark.parametrize("way", ["dies", "hangs"])
def test_a_lost_process_ends_the_other(tmp_path, way):
    def job(rank):
        if rank == 1:
            distributed.mean(torch.zeros(1))
            if way == "dies":
                os._exit(9)
            time.sleep(3)
            os._exit(9)
        for _ in range(2):
            distributed.mean(torch.zeros(1))

    began = time.monotonic()
    _, codes = on_several(job, tmp_path, timeout=1)
    assert codes == [1, 9]
    assert time.monotonic() - began < 60
    assert "Error" in (tmp_path / "failed0").read_text()


def test_a_process_lost_in_the_backward_pass_ends_the_other(digits, tmp_path):
    preset = mr.load_preset("smoke")
    some, encoder = digits["train"].take(128), mr.build_vit(preset.encoder)

    def job(rank):
        if rank == 1:
            encoder.blocks[1].register_full_backward_hook(lambda *_: os._exit(9))
        mr.refine(encoder, some, preset.refine)

    _, codes = on_several(job, tmp_path, timeout=5)
    assert codes == [1, 9]
    assert "RuntimeError" in (tmp_path / "failed0").read_text()


@pytest.fixture
def cached(vit, digits, tmp_path, monkeypatch):
    """Fill a cache with the features of 20 images; ``killed``: rank -> the batch of 3 images before
    which it is killed.
    """
    monkeypatch.setattr(feature_cache, "SHARD", 8)
    images, real = digits["test"].subset(range(20)), feature_cache.feature_batches

    def run(killed, rank=0):
        extracted = []

        def batches(encoder, dataset, rows, *how):
            extracted.extend(rows)
            for i, batch in enumerate(real(encoder, dataset, rows, *how)):
                if killed.get(rank) == i:
                    (tmp_path / f"ready{rank}").touch()
                    while not all((tmp_path / f"ready{other}").exists() for other in killed):
                        time.sleep(0.01)
                    os.kill(os.getpid(), signal.SIGKILL)
                yield batch

        monkeypatch.setattr(feature_cache, "feature_batches", batches)
        features = feature_cache.cached_features(vit, images, tmp_path / "cache", batch_size=3)
        x = {pool: torch.stack(blocks) for pool, blocks in features.x.items()}
        return {**x, "y": features.y, "extracted": torch.tensor(extracted)}

    return run


def same_features(found, vit, digits):
    expected = mr.extract_features(vit, digits["test"].subset(range(20)))
    assert torch.equal(found["y"], expected.y)
    assert all(torch.allclose(found[pool], x, atol=1e-5) for pool, x in expected.x.items())


def test_processes_fill_one_cache(vit, digits, tmp_path, cached):
    outputs, codes = on_several(partial(cached, {}), tmp_path)
    assert codes == [0, 0], (tmp_path / "failed0").read_text()
    shares = [[*range(4), *range(8, 12), 16, 17], [*range(4, 8), *range(12, 16), 18, 19]]
    for output, share in zip(outputs, shares, strict=True):
        assert output["extracted"].tolist() == share
        same_features(output, vit, digits)
    alone = cached({})
    assert len(alone["extracted"]) == 0  # one process reads what two have written
    same_features(alone, vit, digits)


@pytest.mark.parametrize("then", [1, 2, 3])
@pytest.mark.parametrize("killed", [{1: 2}, {0: 2, 1: 2}])
def test_a_cache_goes_on_after_a_kill_with_any_number_of_processes(
    vit, digits, tmp_path, caplog, cached, killed, then
):
    """After two batches of three every process has written its four images of the first shard."""
    _, codes = on_several(partial(cached, killed), tmp_path)
    assert codes == [-9 if rank in killed else 1 for rank in range(2)]
    outputs = (
        [cached({})] if then == 1 else on_several(partial(cached, {}), tmp_path, world=then)[0]
    )
    extracted = [output["extracted"].tolist() for output in outputs]
    assert {row for rows in extracted for row in rows} == set(range(8, 20))
    # Rows repeat where the shares differ: all processes pass equally many images
    assert len({len(rows) for rows in extracted}) == 1
    assert sum(map(len, extracted)) < 12 + 2 * then
    for output in outputs:
        same_features(output, vit, digits)
    same_features(cached({}), vit, digits)
    assert caplog.text == ""  # nothing was found damaged


def test_two_go_on_where_one_was_killed(vit, digits, tmp_path, cached):
    child = os.fork()
    if child == 0:
        try:
            cached({0: 4})
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9
    outputs, _ = on_several(partial(cached, {}), tmp_path)
    extracted = torch.cat([output["extracted"] for output in outputs]).tolist()
    assert sorted(extracted) == list(range(8, 20))
    for output in outputs:
        same_features(output, vit, digits)


def test_a_full_disk_is_said_by_all_processes(tmp_path, cached, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    _, codes = on_several(partial(cached, {}), tmp_path)
    assert codes == [1, 1]
    for rank in range(2):
        assert "InputError: the features need 0.0 MiB" in (tmp_path / f"failed{rank}").read_text()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["locks"]


def test_a_batch_that_cannot_be_shared_is_named(digits):
    from mimrefiner.data.views import Order

    with pytest.raises(mr.InputError, match="a batch of 9 cannot be shared equally by 2 processes"):
        next(Order(9, steps=1, seed=0, part=(0, 2)).batches(len(digits["train"])))


def test_one_process_needs_none_of_it():
    x = torch.ones(3, requires_grad=True)
    assert distributed.gather(x) is x
    assert distributed.mean(x) is x
    assert distributed.world() == 1 and distributed.rank() == 0
    part = nn.Linear(2, 2)
    assert engine.averaged(part) is engine.call
    # DDP wants all on one device
    assert list(engine._Called(part).parameters()) == list(part.parameters())
