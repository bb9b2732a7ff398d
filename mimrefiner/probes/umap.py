"""Maps of features in the plane (UMAP, arXiv 1802.03426)."""

import warnings

import numpy as np
from torch import Tensor


def umap_map(x: Tensor, *, seed: int = 0, neighbours: int = 15, min_dist: float = 0.1) -> np.ndarray:
    """Standardised features (images, dim) as points in the plane, (images, 2); one thread, so that a seed repeats.

    ``neighbours`` and ``min_dist`` are UMAP's; neighbours are cut to the number of images there are.
    """
    import umap  # late: importing it compiles for seconds

    x = x.double().numpy()
    x = (x - x.mean(0)) / (x.std(0) + 1e-6)
    fit = umap.UMAP(n_neighbors=min(neighbours, len(x) - 1), min_dist=min_dist, random_state=seed, n_jobs=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "n_jobs value", UserWarning)  # umap repeats what n_jobs=1 already says
        warnings.filterwarnings("ignore", "'force_all_finite' was renamed", FutureWarning)  # umap behind scikit-learn
        return fit.fit_transform(x)
