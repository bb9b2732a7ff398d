"""k-means clusters and class separation of every block.

As the nearest published code of the authors does it: standardised features, the best of ten k-means
runs by inertia, accuracy after the best matching of clusters to classes (the paper does not say
more; silhouette and Davies-Bouldin are of the true classes).
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
from mimrefiner.progress import progress

MANY_IMAGES = 20_000  # from here on mini batches, and the silhouette of a sample


def cluster(
    features: Features, *, clusters: int | None = None, runs: int = 10, seed: int = 0
) -> pd.DataFrame:
    """Cluster every block and pooling.

    Args:
        features: of the images to cluster; where they have labels, clusters are compared with them.
        clusters: k; None takes the number of classes.
        runs: k-means starts, the one with the lowest inertia is kept.
        seed: of the starts.

    Returns:
        Rows with the metrics ACC, NMI, AMI, ARI (0 to 1, higher is better), silhouette (-1 to 1,
        higher is better) and davies_bouldin (lower is better); without labels silhouette and
        davies_bouldin of the clusters themselves, called cluster_silhouette and
        cluster_davies_bouldin. The last two are left out where they are not defined: a single
        cluster (constant features), or as many as images. Columns as
        :data:`mimrefiner.probes.checks.COLUMNS`.

    Raises:
        InputError: neither labels nor ``clusters``; more clusters than images; NaN features.
    """
    check_finite(features)
    check_count("runs", runs)
    labels = features.y.numpy()
    labelled = has_classes(labels)
    k = number_of_clusters(labels, clusters)
    algorithm = MiniBatchKMeans if len(labels) >= MANY_IMAGES else KMeans
    rows = []
    for pool, block, x in progress(list(each_block(features)), "k-means"):
        x = x.double().numpy()
        x = (x - x.mean(0)) / (x.std(0) + 1e-6)
        with warnings.catch_warnings():
            # Equal images; rows tell
            warnings.filterwarnings("ignore", "Number of distinct clusters", ConvergenceWarning)
            found = algorithm(k, n_init=runs, max_iter=1000, random_state=seed).fit_predict(x)
        values = agreement(labels, found) if labelled else {}
        of, prefix = (labels, "") if labelled else (found, "cluster_")
        if 1 < len(np.unique(of)) < len(x):
            sample = min(len(x), 5000)
            values[f"{prefix}silhouette"] = metrics.silhouette_score(
                x, of, sample_size=sample, random_state=seed
            )
            values[f"{prefix}davies_bouldin"] = metrics.davies_bouldin_score(x, of)
        common = {
            "block": block,
            "pool": pool,
            "protocol": "kmeans",
            "seed": seed,
            "n_train": 0,
            "n_test": len(x),
        }
        rows += [
            {**common, "metric": name, "value": float(value), "setting": f"k={k}"}
            for name, value in values.items()
        ]
    return tidy(rows)


def has_classes(labels: np.ndarray) -> bool:
    """Whether every image has a label, and there are two or more."""
    return bool((labels >= 0).all()) and len(np.unique(labels)) > 1


def number_of_clusters(labels: np.ndarray, clusters: int | None) -> int:
    """``clusters``, or for None the number of classes; InputError where neither fits ``labels``,
    (images,).
    """
    if clusters is None and not has_classes(labels):
        raise InputError(
            "this data set has no labels of two or more classes: say how many clusters (clusters=)"
        )
    k = len(np.unique(labels)) if clusters is None else clusters
    if not isinstance(k, Integral) or not 1 < k <= len(labels):
        raise InputError(
            f"clusters must be a whole number between 2 and the number of images {len(labels)}, got {k}"
        )
    return k


def agreement(labels: np.ndarray, clusters: np.ndarray) -> dict[str, float]:
    """ACC, NMI, AMI and ARI of a clustering, (images,) each, any integers."""
    return {
        "ACC": matched_accuracy(labels, clusters),
        "NMI": metrics.normalized_mutual_info_score(labels, clusters),
        "AMI": metrics.adjusted_mutual_info_score(labels, clusters),
        "ARI": metrics.adjusted_rand_score(labels, clusters),
    }


def matched_accuracy(labels: np.ndarray, clusters: np.ndarray) -> float:
    """Share of images whose cluster is matched to their class by the best one-to-one matching
    (Hungarian method).
    """
    table = metrics.cluster.contingency_matrix(labels, clusters)
    rows, columns = linear_sum_assignment(table, maximize=True)
    return float(table[rows, columns].sum() / len(labels))
