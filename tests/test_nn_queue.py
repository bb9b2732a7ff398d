import pytest
import torch
import torch.nn.functional as F

import mimrefiner as mr


def test_queue_follows_the_official_one_step_by_step(golden):
    """Neighbours, contents, indices, age and pointer over two wrap-arounds (z in the file is
    view-major).
    """
    tensors = golden("queue_top1")
    queue = mr.NNQueue(1, 37, 8)
    queue.load_state_dict({**queue.state_dict(), "z": tensors["queue_init"][None]})
    for step in range(9):
        # (heads, batch, views, dim)
        z = tensors[f"step{step}.z"].view(2, 7, 8).permute(1, 0, 2)[None]
        index = tensors[f"step{step}.index"]
        slots = queue.lookup_slots(z, index)
        found = queue.lookup(z, index)
        assert torch.equal(
            found[0].permute(1, 0, 2).flatten(0, 1), tensors[f"step{step}.neighbour"]
        )
        assert queue.age[slots].float().mean() == pytest.approx(tensors[f"step{step}.age"].item())
        similarity = F.cosine_similarity(z, found, dim=-1).mean()
        assert similarity.item() == pytest.approx(
            tensors[f"step{step}.similarity"].item(), rel=1e-5
        )
        queue.enqueue(z[:, :, 0], index)
        assert torch.equal(queue.z[0], tensors[f"step{step}.queue_after"])
        assert torch.equal(queue.index, tensors[f"step{step}.queue_index_after"])
        assert torch.equal(queue.ptr, tensors[f"step{step}.ptr_after"])


def test_lookup_writes_nothing():
    queue = mr.NNQueue(2, 16, 4)
    before = {name: x.clone() for name, x in queue.state_dict().items()}
    queue.lookup(torch.randn(2, 5, 3, 4), torch.arange(5), top_k=3)
    assert all(torch.equal(x, before[name]) for name, x in queue.state_dict().items())


def test_an_entry_of_the_same_image_is_passed_over():
    queue = mr.NNQueue(1, 8, 4)
    z = torch.randn(1, 3, 4)
    queue.enqueue(z, torch.tensor([5, 6, 7]))
    own = queue.lookup(z[:, :, None], None)[:, :, 0]
    assert torch.equal(own, z)
    other = queue.lookup_slots(z[:, :, None], torch.tensor([5, 6, 7]))[0, :, 0]
    assert (queue.index[other] != torch.tensor([5, 6, 7])).all()


def test_top_k_draws_uniformly_among_the_nearest():
    queue = mr.NNQueue(1, 50, 6)
    z = torch.randn(1, 1, 1, 6).expand(1, 4000, 1, 6)
    slots = queue.lookup_slots(z, None, top_k=4, generator=torch.Generator().manual_seed(1))[
        0, :, 0
    ]
    nearest = F.cosine_similarity(queue.z[0], z[0, 0], dim=-1).topk(4).indices
    counts = torch.stack([(slots == n).sum() for n in nearest])
    assert counts.sum() == 4000
    assert (counts > 850).all() and (counts < 1150).all()


def test_the_same_generator_state_draws_the_same_and_chunking_changes_nothing(monkeypatch):
    queue, z = mr.NNQueue(2, 64, 8), torch.randn(2, 10, 2, 8)
    whole = queue.lookup_slots(z, None, top_k=5, generator=torch.Generator().manual_seed(3))
    pieces, topk = [], torch.Tensor.topk
    monkeypatch.setattr(
        torch.Tensor,
        "topk",
        lambda x, *args, **options: pieces.append(x.numel()) or topk(x, *args, **options),
    )
    # Similarities of three images
    monkeypatch.setattr("mimrefiner.method.nn_queue.LOOKUP_BYTES", 4 * 3 * 2 * 2 * 64)
    assert torch.equal(
        whole, queue.lookup_slots(z, None, top_k=5, generator=torch.Generator().manual_seed(3))
    )
    assert pieces == [3 * 2 * 2 * 64] * 3 + [2 * 2 * 64]


def test_heads_have_their_own_entries():
    queue, z = mr.NNQueue(3, 20, 4), torch.randn(3, 6, 2, 4)
    together = queue.lookup(z, None)
    for head in range(3):
        alone = mr.NNQueue(1, 20, 4)
        alone.load_state_dict({**queue.state_dict(), "z": queue.z[[head]]})
        assert torch.equal(alone.lookup(z[[head]], None), together[[head]])


def test_saved_and_loaded_queue_answers_the_same():
    queue, other, z = mr.NNQueue(1, 20, 4), mr.NNQueue(1, 20, 4), torch.randn(1, 6, 2, 4)
    queue.enqueue(torch.randn(1, 9, 4), torch.arange(9), torch.arange(9))
    other.load_state_dict(queue.state_dict())
    assert torch.equal(other.lookup(z, None), queue.lookup(z, None))


def test_bad_input_is_named():
    queue = mr.NNQueue(1, 8, 4)
    before = {name: x.clone() for name, x in queue.state_dict().items()}
    for z, index, label in ((3, 3, 2), (3, 2, 3), (3, 4, None)):
        with pytest.raises(mr.InputError, match=r"index and label as \(batch,\), got \(1, 3, 4\)"):
            queue.enqueue(
                torch.randn(1, z, 4),
                torch.arange(index),
                None if label is None else torch.arange(label),
            )
    assert all(torch.equal(x, before[name]) for name, x in queue.state_dict().items())
    with pytest.raises(
        mr.InputError, match=r"expected index as \(2,\) for z \(1, 2, 1, 4\), got \(3,\)"
    ):
        queue.lookup(torch.randn(1, 2, 1, 4), torch.arange(3))
    with pytest.raises(
        mr.InputError, match=r"expected z as \(1, batch, views, 4\), got \(1, 2, 4\)"
    ):
        queue.lookup(torch.randn(1, 2, 4), None)
    with pytest.raises(ValueError, match="top_k must be between 1 and the queue's size 8, got 9"):
        queue.lookup(torch.randn(1, 2, 1, 4), None, top_k=9)
    with pytest.raises(ValueError, match="expected z as"):
        queue.lookup(torch.randn(2, 2, 1, 4), None)
    with pytest.raises(ValueError, match="a batch of 9 does not fit a queue of 8"):
        queue.enqueue(torch.randn(1, 9, 4), torch.arange(9))
    with pytest.raises(ValueError, match="expected z as"):
        queue.enqueue(torch.randn(1, 3, 5), torch.arange(3))
