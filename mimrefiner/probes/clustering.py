"""k-means clusters and class separation of every block.

As in the authors' nearest published code, features are standardised, k-means starts ten times and
keeps the lowest inertia, and accuracy is measured after the best matching of clusters to classes.
That code takes mini batches, as this one does for many images; there scikit-learn compares starts
on a sample only, so whole runs are compared. The paper says no more; silhouette and Davies-Bouldin
index are those of the true classes.
"""

import warnings
from numbers import Integral

import numpy as np
import pandas as pd
from scipy.optimize import linear_sum_assignment
from sklearn import metrics
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.exceptions import ConvergenceWarning

from mimrefiner.errors import InputError
from mimrefiner.probes.checks import check_count, check_finite, each_block, tidy
from mimrefiner.probes.features import Features
from mimrefiner.probes.protocols import KMEANS
from mimrefiner.progress import progress

MANY_IMAGES = 20_000  # from here on mini batches
SAMPLE = 5000  # images whose silhouette is measured


def cluster(
    features: Features, *, clusters: int | None = None, starts: int = 10, seed: int = 0
) -> pd.DataFrame:
    """Cluster the images after every block, for every pooling.

    Args:
        features: of the images to cluster; where they have labels, clusters are compared with them.
        clusters: k; None takes the number of classes.
        starts: how often k-means begins anew; the result with the lowest inertia is kept.
        seed: draws the starts.

    Returns:
        Rows with the metrics ACC, NMI, AMI, ARI (0 to 1, higher is better), silhouette (-1 to 1,
        higher is better) and davies_bouldin (lower is better); without labels silhouette and
        davies_bouldin of the clusters themselves, called cluster_silhouette and
        cluster_davies_bouldin. The last two are left out where they are not defined: a single
        cluster (constant features), or as many as images. Columns as
        :data:`mimrefiner.probes.checks.COLUMNS`.

    Raises:
        InputError: neither labels nor ``clusters``; more clusters than images; NaN features.

    >>> import torch
    >>> y = torch.arange(30) % 3
    >>> x = torch.eye(3)[y] + 0.01 * torch.arange(30)[:, None]
    >>> rows = cluster(Features({"cls": x[None]}, y, blocks=(11,), depth=12))
    >>> rows.set_index("metric").loc[["ACC", "NMI"], "value"].round(2).tolist()
    [1.0, 1.0]
    """
    check_finite(features)
    check_count("starts", starts)
    labels = features.y.numpy()
    labelled = has_classes(labels)
    k = number_of_clusters(labels, clusters)
    common = {"protocol": KMEANS.name, "seed": seed, "n_train": 0, "n_test": len(labels)}
    rows = []
    for pool, block, x in progress(list(each_block(features)), "k-means"):
        x = x.double().numpy()
        x = (x - x.mean(0)) / (x.std(0) + 1e-6)
        found = _clusters(x, k, starts, seed)
        values = agreement(labels, found) if labelled else {}
        values |= _shape(x, labels, seed) if labelled else _shape(x, found, seed, "cluster_")
        rows += [
            {**common, "block": block, "pool": pool, "metric": name, "value": float(value)}
            for name, value in values.items()
        ]
    return tidy([{**row, "setting": f"k={k}"} for row in rows])


def _clusters(x: np.ndarray, k: int, starts: int, seed: int) -> np.ndarray:
    """The cluster of every row of ``x``, (images,)."""
    with warnings.catch_warnings():
        # Equal images; rows tell
        warnings.filterwarnings("ignore", "Number of distinct clusters", ConvergenceWarning)
        if len(x) < MANY_IMAGES:
            return KMeans(k, n_init=starts, max_iter=1000, random_state=seed).fit_predict(x)
        seeds = np.random.SeedSequence(seed).generate_state(starts)
        runs = (
            MiniBatchKMeans(k, n_init=starts, max_iter=1000, random_state=int(own)).fit(x)
            for own in progress(seeds, "mini batches", starts)
        )
        return min(runs, key=lambda run: run.inertia_).labels_


def _shape(x: np.ndarray, of: np.ndarray, seed: int, prefix: str = "") -> dict[str, float]:
    """How well groups ``of`` images, (images,), are separated; {} where that is not defined."""
    if not 1 < len(np.unique(of)) < len(x):
        return {}
    sample = {"sample_size": min(len(x), SAMPLE), "random_state": seed}
    return {
        f"{prefix}silhouette": metrics.silhouette_score(x, of, **sample),
        f"{prefix}davies_bouldin": metrics.davies_bouldin_score(x, of),
    }


def has_classes(labels: np.ndarray) -> bool:
    """Whether every image has a label, and there are two or more."""
    return bool((labels >= 0).all()) and len(np.unique(labels)) > 1


def number_of_clusters(labels: np.ndarray, clusters: int | None) -> int:
    """``clusters``, or for None the number of classes in ``labels``, (images,).

    Raises:
        InputError: no labels of two or more classes; fewer than two clusters or more than images.
    """
    if clusters is None and not has_classes(labels):
        raise InputError(
            "this data set has no labels of two or more classes: say how many clusters (clusters=)"
        )
    k = len(np.unique(labels)) if clusters is None else clusters
    if not isinstance(k, Integral) or not 1 < k <= len(labels):
        raise InputError(
            "clusters must be a whole number between 2 and the number of images "
            f"{len(labels)}, got {k}"
        )
    return k


def agreement(labels: np.ndarray, clusters: np.ndarray) -> dict[str, float]:
    """ACC, NMI, AMI and ARI between classes and clusters, (images,) each, any integers."""
    return {
        "ACC": matched_accuracy(labels, clusters),
        "NMI": metrics.normalized_mutual_info_score(labels, clusters),
        "AMI": metrics.adjusted_mutual_info_score(labels, clusters),
        "ARI": metrics.adjusted_rand_score(labels, clusters),
    }


def matched_accuracy(labels: np.ndarray, clusters: np.ndarray) -> float:
    """Share of images whose cluster is matched to their class.

    The Hungarian method finds the best one-to-one matching.

    >>> matched_accuracy(np.array([0, 0, 1, 1]), np.array([5, 5, 3, 5]))
    0.75
    """
    table = metrics.cluster.contingency_matrix(labels, clusters)
    rows, columns = linear_sum_assignment(table, maximize=True)
    return float(table[rows, columns].sum() / len(labels))
