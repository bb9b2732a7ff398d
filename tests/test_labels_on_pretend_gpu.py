"""Training with labels under the pretend GPU: it goes through, comes back, and no step waits."""

from dataclasses import replace

import pytest
from pretend_gpu import devices, pretend_gpu

import mimrefiner as mr
from mimrefiner.probes.linear_grid import IN1K, linear_grid
from mimrefiner.training import optim
from mimrefiner.training.finetune import finetune_recipe
from mimrefiner.training.memory import Memory
from mimrefiner.training.recipes import L16, P1_L16


@pytest.fixture(autouse=True)
def _log_ends_only(monkeypatch):
    monkeypatch.setattr(optim, "LOG_POINTS", 1)  # the first step and the last one


@pytest.fixture(scope="module")
def images():
    return mr.load_dataset("digits", split="train").take(48)


@pytest.fixture
def encoder():
    return mr.build_vit(mr.ViTConfig(dim=16, depth=2, patch_size=16))


@pytest.mark.parametrize(
    ("recipe", "memory"),
    [(L16, Memory()), (L16, Memory(micro_batch=4, recompute=True)), (P1_L16, Memory())],
    ids=["everything", "less memory", "crops alone"],
)
def test_a_recipe_of_fine_tuning(encoder, images, recipe, memory):
    recipe = replace(recipe, epochs=1, warmup_epochs=0, batch_size=12)
    with pretend_gpu() as gpu:
        result = finetune_recipe(encoder, images, images.take(8), recipe, memory=memory)
    paths = [path.factor for path in result.model.paths]
    assert devices([result, encoder]) == {"cpu"} and result.flops > 0 and not any(paths)
    # Four steps: the third begins behind what the first one logs, and ends before the last's test
    assert len(gpu.steps) == 5 and gpu.steps[2].launches and gpu.steps[2].waits == []


@pytest.mark.parametrize("resident", [False, True])
def test_linear_probes(encoder, images, resident):
    """Twice as many steps of half the size wait as often: no step does."""
    waits = []
    for batch in (12, 6):
        recipe = replace(IN1K, epochs=1, batch_size=batch, inputs=("cls", "cls+mean_last2"))
        data = images.in_memory() if resident else images
        with pretend_gpu() as gpu:
            result = linear_grid(encoder, data, images.take(8), recipe, val=images.take(6))
        assert devices([encoder]) == {"cpu"} and result.rows["value"].between(0, 1).all()
        waits.append(len(gpu.waits))
    assert waits[0] == waits[1]


def test_what_will_not_fit_is_said_before_it_is_tried(encoder, images, caplog):
    recipe = replace(P1_L16, epochs=1, batch_size=12)
    with pretend_gpu(memory=10_000):
        finetune_recipe(encoder, images, images.take(8), recipe)
    (line,) = (r.message for r in caplog.records if r.message.startswith("fine-tuning needs about"))
    assert "may run out of memory" in line and "--micro-batch" in line
