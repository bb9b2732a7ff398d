import itertools

import numpy as np
import pytest
import torch
from sklearn.cluster import MiniBatchKMeans
from sklearn.metrics import normalized_mutual_info_score

import mimrefiner as mr
from mimrefiner.probes.clustering import matched_accuracy
from mimrefiner.probes.features import Features
from mimrefiner.probes.umap import own_class_share, shared_neighbours


@pytest.fixture
def features():
    y = torch.arange(60) % 3
    tight = torch.eye(3)[y] * 5 + 0.1 * torch.randn(60, 3)
    return Features({"mean": torch.stack([torch.randn(60, 3), tight])}, y, (4, 7), 8)


def test_tight_classes_are_found(features):
    table = mr.cluster(features).pivot(index="block", columns="metric", values="value")
    assert (table.loc[7, ["ACC", "NMI", "AMI", "ARI"]] > 0.99).all()
    assert (table.loc[4, ["ACC", "AMI"]] < table.loc[7, ["ACC", "AMI"]]).all()
    assert table.loc[7, "silhouette"] > 0.8 > table.loc[4, "silhouette"]
    assert table.loc[7, "davies_bouldin"] < table.loc[4, "davies_bouldin"]


def test_matching_equals_the_best_permutation():
    rng = np.random.default_rng(0)
    labels, found = rng.integers(4, size=50), rng.integers(4, size=50)
    best = max(
        (np.array(order)[found] == labels).mean() for order in itertools.permutations(range(4))
    )
    assert matched_accuracy(labels, found) == pytest.approx(best)
    assert matched_accuracy(labels, labels * 10 + 3) == 1.0


def test_of_many_images_whole_runs_of_mini_batches_are_compared(monkeypatch):
    """The one of lowest inertia is kept, over all images."""
    monkeypatch.setattr("mimrefiner.probes.clustering.MANY_IMAGES", 100)
    kept = []

    class Kept(MiniBatchKMeans):
        def fit(self, x):
            kept.append(super().fit(x))
            return self

    monkeypatch.setattr("mimrefiner.probes.clustering.MiniBatchKMeans", Kept)
    y = torch.arange(200) % 20
    rows = mr.cluster(
        Features({"cls": (torch.randn(20, 4)[y] + 0.3 * torch.randn(200, 4))[None]}, y, (11,), 12),
        starts=3,
    )
    inertias = [run.inertia_ for run in kept]
    assert len(inertias) == 3 and len(set(inertias)) > 1
    assert [(run.n_init, run.max_iter) for run in kept] == [(3, 1000)] * 3
    best = kept[int(np.argmin(inertias))]
    found = rows.set_index("metric")["value"]["NMI"]
    assert found == pytest.approx(normalized_mutual_info_score(y, best.labels_))


def test_without_labels_the_clusters_judge_themselves(features):
    features.y[:] = -1
    rows = mr.cluster(features, clusters=3)
    assert set(rows["metric"]) == {"cluster_silhouette", "cluster_davies_bouldin"}
    with pytest.raises(mr.InputError, match="say how many clusters"):
        mr.cluster(features)


def test_more_clusters_than_images_are_refused(features):
    with pytest.raises(mr.InputError, match="starts must be a whole number >= 1, got 0"):
        mr.cluster(features, clusters=3, starts=0)
    with pytest.raises(
        mr.InputError, match=r"a whole number between 2 and the number of images 60, got 2\.5"
    ):
        mr.cluster(features, clusters=2.5)
    with pytest.raises(mr.InputError, match="between 2 and the number of images 60, got 61"):
        mr.cluster(features, clusters=61)


def test_constant_features_leave_out_what_is_not_defined(features):
    features.x["mean"][0] = 1.0
    rows = mr.cluster(features)
    assert set(rows.loc[rows["block"] == 4, "metric"]) == {
        "ACC",
        "NMI",
        "AMI",
        "ARI",
        "silhouette",
        "davies_bouldin",
    }
    features.y[:] = -1
    assert set(mr.cluster(features, clusters=3)["block"]) == {7}


def test_neighbours_on_a_map():
    xy = np.array([[0.0, 0], [0, 1], [0, 2], [9, 0], [9, 1], [9, 2]])
    assert own_class_share(xy, [0, 0, 0, 1, 1, 1], k=2) == 1
    assert own_class_share(xy, [0, 1, 0, 1, 0, 1], k=1) == 0
    assert shared_neighbours(xy, 3 * xy[:, ::-1] + 1, k=2) == 1
    assert shared_neighbours(xy, xy[[0, 3, 1, 4, 2, 5]], k=2) < 1
