"""Maps of features in the plane (UMAP, arXiv 1802.03426)."""

import math
import warnings

import numpy as np
from scipy.spatial import cKDTree
from torch import Tensor

FEW = 8  # its spectral start takes 7 vectors of as many entries as there are images


def umap_map(
    x: Tensor, *, seed: int = 0, neighbours: int = 15, min_dist: float = 0.1
) -> np.ndarray:
    """Standardised features (images, dim) as points in the plane, (images, 2).

    It takes one thread, so that a seed repeats. ``neighbours`` and ``min_dist`` are UMAP's; of few
    images, all are neighbours. Fewer than 8 images are too few for UMAP's start: they are laid out
    by their principal components.
    """
    x = x.double().numpy()
    x = (x - x.mean(0)) / (x.std(0) + 1e-6)
    if len(x) < FEW:
        u, s, _ = np.linalg.svd(x, full_matrices=False)
        return np.pad(u * s, ((0, 0), (0, 2)))[:, :2]
    import umap  # late: importing it compiles for seconds

    fit = umap.UMAP(
        n_neighbors=min(neighbours, len(x) - 1), min_dist=min_dist, random_state=seed, n_jobs=1
    )
    with warnings.catch_warnings():
        # Umap repeats what n_jobs=1 already says
        warnings.filterwarnings("ignore", "n_jobs value", UserWarning)
        # Umap behind scikit-learn
        warnings.filterwarnings("ignore", "'force_all_finite' was renamed", FutureWarning)
        return fit.fit_transform(x)


def own_class_share(xy: np.ndarray, labels, *, k: int = 10) -> float:
    """Share of the ``k`` nearest points on a map (images, 2) that have the point's own class.

    One point alone has none: NaN.

    >>> own_class_share(np.array([[0.0, 0], [1, 0], [9, 0], [10, 0]]), [0, 0, 1, 0], k=1)
    0.5
    """
    labels = np.asarray(labels)
    if len(labels) < 2:
        return math.nan
    return float((labels[_nearest(xy, k)] == labels[:, None]).mean())


def shared_neighbours(a: np.ndarray, b: np.ndarray, *, k: int = 10) -> float:
    """Share of a point's ``k`` nearest points on one map (images, 2) that are near on the other.

    >>> points = np.array([[0.0, 0], [1, 0], [9, 0], [10, 0]])
    >>> shared_neighbours(points, 2 * points, k=1)
    1.0
    """
    if len(a) < 2:
        return math.nan
    pairs = zip(_nearest(a, k), _nearest(b, k), strict=True)
    return float(np.mean([len(np.intersect1d(x, y)) / len(x) for x, y in pairs]))


def _nearest(xy: np.ndarray, k: int) -> np.ndarray:
    """(images, k) rows of the nearest other points."""
    ranks = np.arange(2, min(k, len(xy) - 1) + 2)  # the first is the point itself
    return cKDTree(xy).query(xy, ranks)[1]
