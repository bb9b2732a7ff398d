"""Benchmarks of features and probes: ``python -m tests.benchmarks.probing`` prints the tables of
docs/probing.md.
"""

import functools
import subprocess
import sys
import time
import warnings
from itertools import groupby

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

import mimrefiner as mr
from mimrefiner.models.blocks import pooled_blocks
from mimrefiner.probes.features import Features
from mimrefiner.probes.linear import linear_probe
from mimrefiner.probes.logistic import draw_shots, fit_logistic
from tests.benchmarks.harness import compare as side_by_side
from tests.benchmarks.harness import machine, own_peak, resident
from tests.peak import PeakBytes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
compare = functools.partial(
    side_by_side, rounds=3, clock=time.perf_counter if DEVICE == "cuda" else time.process_time
)


def encoder_and_images(images: int):
    encoder = mr.load_encoder("vit_small_patch16_224", pretrained=False).to(DEVICE)
    return encoder, torch.randn(images, 3, 224, 224, device=DEVICE)


@torch.no_grad()
def plain(encoder, images):
    return encoder.forward_features(images)


@torch.no_grad()
def pooled(encoder, images):
    return pooled_blocks(encoder, images, range(12), ("cls", "mean"))


@torch.no_grad()
def intermediates(encoder, images):
    kept = encoder.forward_intermediates(
        images, return_prefix_tokens=True, intermediates_only=True, output_fmt="NLC"
    )
    return [(prefix[:, 0], patches.mean(1)) for patches, prefix in kept]


EXTRACTION = {
    "plain forward": plain,
    "all blocks, pooled inside": pooled,
    "forward_intermediates, then pooled": intermediates,
}


def peak_mib(run, encoder, images) -> float:
    """Most memory of all tensors at one time, those given aside."""
    if DEVICE == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(encoder, images)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with PeakBytes() as measured:
        measured.add([*encoder.state_dict(keep_vars=True).values(), images])
        before = measured.now
        run(encoder, images)
    return (measured.peak - before) / 2**20


def extraction() -> str:
    encoder, images = encoder_and_images(8)
    runs = {name: (lambda run=run: run(encoder, images)) for name, run in EXTRACTION.items()}
    text = compare("Features of 8 images, ViT-S/16, 224 px, 12 blocks x 2 poolings", runs)
    encoder, images = encoder_and_images(32)
    peaks = {name: peak_mib(run, encoder, images) for name, run in EXTRACTION.items()}
    first = next(iter(peaks.values()))
    lines = [
        "| batch of 32 images | peak of tensors above model and images, MiB | ratio to the first |",
        "|---|---|---|",
    ]
    lines += [f"| {name} | {value:.0f} | {value / first:.2f} |" for name, value in peaks.items()]
    return text + "\n" + "\n".join(lines) + "\n"


def one_hot_knn(train_x, train_y, test_x, k, temperature):
    """The straightforward version: one search per setting, votes as one-hot vectors."""
    similarity, neighbour = (F.normalize(test_x, dim=-1) @ F.normalize(train_x, dim=-1).T).topk(k)
    votes = F.one_hot(train_y[neighbour], 100) * (similarity / temperature).exp()[..., None]
    return votes.sum(1).argmax(1)


def knn() -> str:
    train_x, test_x = torch.randn(24, 2000, 192), torch.randn(24, 200, 192)
    train_y = torch.randint(100, (2000,))
    ks, temperatures = (1, 5, 10, 20), (0.04, 0.07, 0.2)

    def naive():
        for block in range(24):
            for k in ks:
                for temperature in temperatures:
                    one_hot_knn(train_x[block], train_y, test_x[block], k, temperature)

    def scikit():
        for block in range(24):
            bank, queries = (F.normalize(x[block], dim=-1).numpy() for x in (train_x, test_x))
            for k in ks:
                for t in temperatures:
                    classifier = KNeighborsClassifier(
                        k,
                        algorithm="brute",
                        metric="cosine",
                        weights=lambda d, t=t: np.exp((1 - d) / t),
                    )
                    classifier.fit(bank, train_y.numpy()).predict(queries)

    runs = {
        "one search for all": lambda: mr.knn_predict(
            train_x, train_y, test_x, ks=ks, temperatures=temperatures, standardize=False
        ),
        "one-hot votes, one search per setting": naive,
        "scikit-learn, one search per setting": scikit,
    }
    return compare(
        "k-NN, 4 k x 3 temperatures x 24 blocks, 2,000 x 200 images, dim 192, 100 classes", runs
    )


def knn_peer() -> str:
    """One search beside faiss's exact flat index (where faiss-cpu is installed) and beside its own
    floor, the matrix product alone. Run it with OPENBLAS_NUM_THREADS as many as torch has.
    """
    bank, queries = torch.randn(20_000, 192), torch.randn(2000, 192)
    y = torch.randint(100, (20_000,))

    def product():
        x, out = F.normalize(bank), torch.empty(400, 20_000)
        for few in F.normalize(queries).split(400):
            torch.mm(few, x.T, out=out)

    runs = {
        "k-NN with votes": lambda: mr.knn_predict(bank, y, queries, standardize=False),
        "the matrix product alone": product,
        "similarities, then topk": lambda: (F.normalize(queries) @ F.normalize(bank).T).topk(10),
    }
    try:
        import faiss
    except ImportError:
        return compare("k-NN, 20,000 x 2,000 x 192 (no faiss here)", runs)
    faiss.omp_set_num_threads(torch.get_num_threads())

    def flat():
        index = faiss.IndexFlatIP(192)
        index.add(F.normalize(bank).numpy())
        return index.search(F.normalize(queries).numpy(), 10)

    return compare("k-NN, 20,000 x 2,000 x 192", runs | {"faiss, flat index, no votes": flat})


BANKS = (320_000, 640_000, 1_280_000)  # the last is about ImageNet's training set
QUERIES = (250, 500, 1000)


def knn_memory() -> str:
    """Memory above the features of one block, each bank in a process of its own."""
    lines = [
        "**k-NN of one block, dim 768, float16 features, 1,000 classes, k = 10: "
        "memory above the features**",
        "",
    ]
    lines += [
        "| training images | features, MiB | queries | memory above them, MiB | seconds |",
        "|---|---|---|---|---|",
    ]
    for images, queries in [
        *((n, QUERIES[0]) for n in BANKS),
        *((BANKS[0], n) for n in QUERIES[1:]),
    ]:
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "tests.benchmarks.probing",
                "--knn-memory",
                str(images),
                str(queries),
            ],
            capture_output=True,
            text=True,
            check=True,
        )
        features, above, seconds = map(float, done.stdout.split())
        lines.append(
            f"| {images:,} | {features:,.0f} | {queries:,} | {above:,.0f} | {seconds:.0f} |"
        )
    return "\n".join(lines) + "\n"


def measure_knn(images: int, queries: int) -> None:
    """Prints MiB of the features, peak MiB above them, CPU seconds."""
    bank, y = torch.empty(images, 768, dtype=torch.float16), torch.arange(images) % 1000
    for part in bank.split(2**14):
        part.copy_(torch.randn(part.shape))
    test = torch.randn(queries, 768).half()
    mr.knn_predict(bank[:2000], y[:2000], test[:10])  # what the first call loads
    before, began = resident(), time.process_time()
    mr.knn_predict(bank, y, test)
    print(bank.nbytes / 2**20, own_peak() - before, time.process_time() - began)


def linear() -> str:
    y = torch.randint(20, (2000,))
    features = Features(
        {"cls": torch.randn(12, 2000, 192), "mean": torch.randn(12, 2000, 192)},
        y,
        tuple(range(12)),
        12,
    )
    rates = (0.001, 0.01, 0.1)

    def one_by_one():
        for pool in ("cls", "mean"):
            for block in range(12):
                one = Features({pool: features.x[pool][block : block + 1]}, y, (block,), 12)
                for rate in rates:
                    linear_probe(one, one, epochs=5, batch_size=256, learning_rates=(rate,))

    runs = {
        "all probes together": lambda: linear_probe(
            features, features, epochs=5, batch_size=256, learning_rates=rates
        ),
        "one probe after another": one_by_one,
    }
    return compare("Linear probes, 12 blocks x 2 poolings x 3 rates, 2,000 images, 5 epochs", runs)


def logistic() -> str:
    """Both to the same tolerance, which accuracies within 0.1 points of the solution need."""
    tables = []
    train = mr.extract_features(
        mr.load_encoder("mae_tiny_64"), mr.load_dataset("fruit64", split="train"), pools=("mean",)
    )
    classes = train.y.unique()
    rows = [draw_shots(train.y, classes, shot, split) for shot in (1, 2, 5) for split in range(3)]
    tables.append(
        _against_scikit(
            "mae_tiny_64 on fruit64, 14 classes x 1, 2, 5 images", train.x["mean"], train.y, rows
        )
    )
    y = torch.arange(4000) % 20
    x = torch.randn(12, 4000, 192) + torch.randn(12, 20, 192)[:, y]
    rows = [draw_shots(y, y.unique(), 5, split) for split in range(9)]
    tables.append(_against_scikit("separate normal clouds, 20 classes x 5 images", x, y, rows))
    return "\n".join(tables)


def _against_scikit(title: str, x, y, rows) -> str:
    x, classes = F.normalize(x - x.mean(-1, keepdim=True), dim=-1), len(y.unique())

    def scikit():
        for block in x.double():
            for part in rows:
                LogisticRegression(C=4000, fit_intercept=False, tol=1e-7, max_iter=10_000).fit(
                    block[part].numpy(), y[part].numpy()
                )

    def batched():
        for _, group in groupby(rows, key=len):
            parts = torch.stack(list(group))
            fit_logistic(x[:, parts].flatten(0, 1), y[parts].repeat(12, 1), classes, 4000.0)

    runs = {"batched L-BFGS": batched, "scikit-learn, one after another": scikit}
    return compare(f"Logistic regression, 12 blocks x 9 splits, dim 192; {title}", runs)


def growth() -> str:
    """Seconds when one size is doubled and the others stay."""

    def problem(images: int = 2000, blocks: int = 6, classes: int = 20) -> Features:
        y = torch.arange(images) % classes
        return Features({"cls": torch.randn(blocks, images, 192)}, y, tuple(range(blocks)), blocks)

    sizes = {
        "base": {},
        "2 x images": {"images": 4000},
        "2 x blocks": {"blocks": 12},
        "2 x classes": {"classes": 40},
    }
    problems = {name: problem(**size) for name, size in sizes.items()}
    probes = {
        "k-NN (bank and queries grow)": lambda f: mr.knn_hits(f, f),
        "linear probes, 3 rates, 5 epochs": lambda f: linear_probe(
            f, f, epochs=5, learning_rates=(0.001, 0.01, 0.1)
        ),
        "low-shot, 5 images per class, 3 splits": lambda f: mr.low_shot(f, f, shots=(5,)),
        "k-means, 2 starts": lambda f: mr.cluster(f, starts=2),
    }
    tables = []
    for title, run in probes.items():
        contenders = {name: functools.partial(run, f) for name, f in problems.items()}
        tables.append(
            compare(f"{title}; base: 2,000 images, 6 blocks, 20 classes, dim 192", contenders)
        )
    return "\n".join(tables)


TABLES = {
    "extraction": extraction,
    "knn": knn,
    "knn_peer": knn_peer,
    "knn_memory": knn_memory,
    "linear": linear,
    "logistic": logistic,
    "growth": growth,
}


def main() -> None:
    if "--knn-memory" in sys.argv:
        measure_knn(*map(int, sys.argv[-2:]))
        return
    warnings.simplefilter("ignore")
    print(f"Measured on: {machine()}; seconds are {'wall' if DEVICE == 'cuda' else 'CPU'} time\n")
    for name in sys.argv[1:] or TABLES:
        print(TABLES[name](), flush=True)


if __name__ == "__main__":
    main()
