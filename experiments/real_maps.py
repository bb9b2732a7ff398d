"""The real encoder in pictures: maps of its last block, and CKA between its blocks.

It takes what ``experiments.real_encoder`` keeps in FOLDER, the refined encoder with seed 0::

    python -m experiments.real_maps --encoder vits14.safetensors --out FOLDER

The places of the images on the maps lie beside this file in ``evidence_real_maps.csv``, CKA in
``evidence_real_cka.csv``; the maps drawn with the images themselves are ``docs/real_maps.png``.
"""

import argparse
import itertools
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from experiments.real_encoder import study
from experiments.trials import Study, add_places
from mimrefiner.data.datasets import ImageDataset, load_dataset
from mimrefiner.errors import InputError
from mimrefiner.files import atomic_file, write_csv
from mimrefiner.notices import show_notices
from mimrefiner.probes.features import Features
from mimrefiner.probes.similarity import cka
from mimrefiner.probes.umap import own_class_share, umap_map
from mimrefiner.study.figures import use_style
from mimrefiner.study.pictures import plot_thumbnails

HERE = Path(__file__).parent
MODELS = ("before", "refined")


def maps(features: dict[str, Features], images: ImageDataset) -> pd.DataFrame:
    """Where every image lies on a UMAP of the last block's cls token: model, image, class, x, y."""
    tables = []
    for model, of_model in features.items():
        xy = umap_map(of_model.x["cls"][-1], seed=0)
        classes = [images.classes[label] for label in images.labels]
        places = {"image": images.rows, "class": classes, "x": xy[:, 0], "y": xy[:, 1]}
        tables.append(pd.DataFrame({"model": model, **places}))
    return pd.concat(tables, ignore_index=True).round(3)


def similarities(features: dict[str, Features], pool: str = "cls") -> pd.DataFrame:
    """CKA between all blocks: of each model with itself, and of the two."""
    rows = []
    for a, b in itertools.combinations_with_replacement(features, 2):
        table = cka(features[a], features[b], pool_a=pool).numpy()
        for (i, j), value in np.ndenumerate(table):
            rows.append({"a": a, "b": b, "pool": pool, "block_a": i, "block_b": j, "value": value})
    return pd.DataFrame(rows).round(4)


def draw(places: pd.DataFrame, images: ImageDataset) -> plt.Figure:
    """Both maps, drawn with the images."""
    xy = {name: places.loc[places["model"] == name, ["x", "y"]].to_numpy() for name in MODELS}
    share = {name: 100 * own_class_share(points, images.labels) for name, points in xy.items()}
    title = "Of ten neighbours on the map, "
    title += f"{share['before'] / 10:.1f} have the image's class before refinement, "
    title += f"{share['refined'] / 10:.1f} after it"
    pixels = [np.asarray(image) for image, _ in images]
    return plot_thumbnails(xy, pixels, images.labels, images.classes, title=title)


def measure(of_file: Study, n: int) -> None:
    """Write both tables and the picture, of ``n`` test images."""
    test = load_dataset(of_file.preset.dataset, split="test").take(n)
    models = {"before": of_file.encoder, "refined": of_file.train("refined", 0)}
    features = {name: of_file.extract(model, test) for name, model in models.items()}
    places = maps(features, test)
    write_csv(places, HERE / "evidence_real_maps.csv")
    write_csv(similarities(features), HERE / "evidence_real_cka.csv")
    use_style()
    with atomic_file(HERE.parent / "docs" / "real_maps.png") as temporary:
        draw(places, test).savefig(temporary, dpi=200, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m experiments.real_maps", description=__doc__.splitlines()[0]
    )
    add_places(parser)
    parser.add_argument("--encoder", type=Path, required=True, help="what convert has written")
    parser.add_argument("--images", type=int, default=2000, help="of the test split")
    args = parser.parse_args()
    show_notices()
    try:
        measure(study(args.encoder, args.data, args.out), args.images)
    except InputError as error:
        sys.exit(f"real_maps: error: {error}")


if __name__ == "__main__":
    main()
