import math

import pytest
import torch
import torch.nn.functional as F

import mimrefiner as mr
from mimrefiner.method.losses import nna_terms, pair_weights
from mimrefiner.training.optim import head_weights


def relative_error(measured, expected):
    return ((measured - expected).norm() / expected.norm()).item()


@pytest.fixture
def loss_file(golden):
    """The golden tensors with a heads dimension of one in front."""
    tensors = golden("nna_loss")
    return tensors, [tensors[name][None] for name in ("z", "nn_z", "p")]


@pytest.mark.parametrize("pairing", ["published", "intended"])
def test_loss_and_gradient_equal_the_official_ones(loss_file, pairing):
    tensors, (z, nn_z, p) = loss_file
    p.requires_grad_(True)
    loss = mr.multi_view_nna_loss(
        z, nn_z, p, temperature=tensors["temperature"].item(), pairing=pairing
    )
    assert loss.shape == (1,)
    assert relative_error(loss.detach()[0], tensors[f"total_as_{pairing}"]) < 1e-5
    loss.sum().backward()
    assert relative_error(p.grad[0], tensors[f"grad_p_as_{pairing}"]) < 1e-5


def test_swapping_negatives_too_equals_the_official_variant(loss_file):
    tensors, (z, nn_z, p) = loss_file
    loss = mr.multi_view_nna_loss(z, nn_z, p, pairing="published", swap_negatives=True)
    assert relative_error(loss[0], tensors["total_swap_all_as_published"]) < 1e-5


def test_global_loss_and_alignment_equal_the_official_ones(loss_file):
    tensors, (z, nn_z, p) = loss_file
    terms = nna_terms(z, nn_z, p[:, :, :2])[0]
    different = ~torch.eye(2, dtype=torch.bool)
    assert relative_error(terms.mean(-1)[different].mean(), tensors["global_loss"]) < 1e-5
    assert (
        relative_error(terms.neg().exp().mean(-1)[different].mean(), tensors["alignment_global"])
        < 1e-5
    )


def test_published_pairing_gives_the_last_local_crops_no_gradient(loss_file):
    _, (z, nn_z, p) = loss_file
    p.requires_grad_(True)
    mr.multi_view_nna_loss(z, nn_z, p, pairing="published").sum().backward()
    per_view = p.grad.norm(dim=-1).mean((0, 1))
    assert (per_view[-2:] == 0).all() and (per_view[:-2] > 0).all()


def test_pair_weights_count_22_terms():
    assert pair_weights(2, 12, "intended").sum() == 22
    assert pair_weights(2, 12, "published").sum() == 22
    assert pair_weights(2, 2, "published").equal(pair_weights(2, 2, "intended"))


def naive_nna(z, nn_z, p, temperature, swap_negatives):
    z, nn_z, p = (F.normalize(x, dim=-1) for x in (z, nn_z, p))
    total = 0.0
    for i in range(len(z)):
        positive = math.exp(float(nn_z[i] @ p[i]) / temperature)
        targets = nn_z if swap_negatives else z
        negatives = sum(
            math.exp(float(targets[i] @ p[j]) / temperature) for j in range(len(p)) if j != i
        )
        total -= math.log(positive / (positive + negatives))
    return total / len(z)


@pytest.mark.parametrize("swap_negatives", [False, True])
@pytest.mark.parametrize("temperature", [0.1, 0.35])
def test_one_pair_equals_a_double_loop(temperature, swap_negatives):
    z, nn_z, p = torch.randn(3, 9, 6).unbind()
    loss = mr.nna_loss(z, nn_z, p, temperature=temperature, swap_negatives=swap_negatives)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(
        naive_nna(z, nn_z, p, temperature, swap_negatives), rel=1e-5
    )


def test_gradient_reaches_p_only():
    z, nn_z, p = (torch.randn(5, 4, requires_grad=True) for _ in range(3))
    mr.nna_loss(z, nn_z, p).backward()
    assert z.grad is None and nn_z.grad is None and p.grad.abs().sum() > 0


def test_heads_are_independent_and_may_have_their_own_temperature():
    z, nn_z, p = torch.randn(3, 6, 2, 4), torch.randn(3, 6, 2, 4), torch.randn(3, 6, 5, 4)
    temperatures = torch.tensor([0.1, 0.2, 0.5])
    together = mr.multi_view_nna_loss(z, nn_z, p, temperature=temperatures)
    alone = [
        mr.multi_view_nna_loss(z[[h]], nn_z[[h]], p[[h]], temperature=t.item())
        for h, t in enumerate(temperatures)
    ]
    assert torch.allclose(together, torch.cat(alone))


def test_a_share_of_the_batch_with_offset_equals_the_whole():
    z, nn_z, p = torch.randn(2, 8, 2, 4), torch.randn(2, 8, 2, 4), torch.randn(2, 8, 6, 4)
    whole = mr.multi_view_nna_loss(z, nn_z, p)
    shares = [
        mr.multi_view_nna_loss(z[:, i : i + 4], nn_z[:, i : i + 4], p, offset=i) for i in (0, 4)
    ]
    assert torch.allclose(whole, (shares[0] + shares[1]) / 2)


@pytest.mark.parametrize(
    ("temperature", "message"),
    [
        (0.0, "must be > 0"),
        (-1.0, "must be > 0"),
        (float("nan"), "must be > 0"),
        ([0.1, 0.2], "must be a number, or one per head"),
    ],
)
def test_temperature_must_be_positive(temperature, message):
    with pytest.raises(mr.InputError, match=f"temperature {message}"):
        mr.nna_loss(*torch.randn(3, 4, 4).unbind(), temperature=temperature)


def test_shapes_that_do_not_fit_are_named():
    shapes = r"\(2, 4, 3\), \(2, 4, 3\), \(2, 4, 3\)"
    with pytest.raises(
        mr.InputError, match=rf"expected z, nn_z and p as \(batch, dim\), got {shapes}"
    ):
        mr.nna_loss(*torch.randn(3, 2, 4, 3).unbind())
    with pytest.raises(mr.InputError, match=f"of one shape .* got {shapes}"):
        mr.multi_view_nna_loss(*torch.randn(3, 2, 4, 3).unbind())
    with pytest.raises(mr.InputError, match="pairs of different views, got 1 global of 1 in all"):
        mr.multi_view_nna_loss(*torch.randn(3, 2, 4, 1, 3).unbind())
    with pytest.raises(mr.InputError, match=r"got \(1, 4, 1, 5\)"):
        mr.multi_view_nna_loss(
            torch.randn(1, 4, 1, 3), torch.randn(1, 4, 1, 3), torch.randn(1, 4, 1, 5)
        )


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [[1, 1, 1]] * 3),
        ("uniform decay", [[1, 1, 1], [0.5, 0.5, 1], [0, 0, 1]]),
        ("staggered step", [[1, 1, 1], [0, 0, 1], [0, 0, 1]]),
        ("one-hot", [[0.1, 0.1, 1], [0, 1, 1], [0, 0, 1]]),
    ],
)
def test_head_weights_at_the_beginning_after_three_fifths_and_at_the_end(schedule, expected):
    for progress, weights in zip((0.0, 0.6, 1.0), expected, strict=True):
        assert head_weights(schedule, 3, progress) == pytest.approx(weights, abs=1e-6)


def test_head_weights_at_the_epochs_of_the_released_schedules():
    """24 blocks, 8 heads, 20 epochs: block 16 (0-based) begins to fade at epoch 4, each later one 2
    epochs after it.
    """
    for head in range(7):
        begin = (4 + 2 * head) / 20
        for name, before, after in (("staggered step", 1.0, 0.0), ("one-hot", 0.1, 1.0)):
            assert head_weights(name, 8, begin - 1e-6)[head] == before
            assert head_weights(name, 8, begin + 1e-6)[head] == after
        assert head_weights("staggered decay", 8, begin)[head] == 1
        assert head_weights("staggered decay", 8, (begin + 1) / 2)[head] == pytest.approx(0.5)
        assert head_weights("one-hot", 8, begin + 0.1 + 1e-6)[head] == 0
    assert head_weights("one-hot", 1, 0.5) == [1]


def test_under_autocast_the_products_are_rounded_and_the_losses_are_not():
    torch.manual_seed(0)
    z, nn_z, p = torch.randn(2, 8, 2, 16), torch.randn(2, 8, 2, 16), torch.randn(2, 8, 4, 16)
    with torch.autocast("cpu", torch.bfloat16):
        terms = nna_terms(z, nn_z, p)
        loss = mr.multi_view_nna_loss(z, nn_z, p)
    assert loss.dtype == torch.float32
    weights = pair_weights(2, 4, "intended")
    expected = (terms.double().mean(-1) * weights).sum((1, 2)) / weights.sum()
    assert loss.tolist() == pytest.approx(expected.tolist(), rel=1e-6)
