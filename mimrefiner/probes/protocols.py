"""The protocols of the probes: what each is called in csv, in titles and in sentences.

A row of results carries a protocol's name; whoever shows rows takes title and label from the
protocol itself.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

PERCENT = frozenset({"accuracy", "ACC"})  # the metrics that are shown as percentages


@dataclass(frozen=True)
class Protocol:
    """How something is measured.

    Attributes:
        name: what rows of results call it.
        title: what stands over a panel that shows it.
        label: what tables and sentences call it.
        metrics: the metrics that a summary shows, the first one before the others.
        unit: the unit of its values in rows of results.
        settings: the numbers that define it.
    """

    name: str
    title: str
    label: str
    metrics: tuple[str, ...] = ("accuracy",)
    unit: str = "share"
    settings: dict = field(default_factory=dict, compare=False)


def knn(k: int = 10, temperature: float = 0.07) -> Protocol:
    """The vote of the ``k`` nearest training images, on standardised features.

    >>> knn(5).name, knn(5).title
    ('knn_k5_t0.07_standardized', 'k-NN (k = 5, temperature 0.07)')
    """
    return Protocol(
        f"knn_k{k}_t{temperature:g}_standardized",
        f"k-NN (k = {k}, temperature {temperature:g})",
        "k-NN",
        settings={"k": k, "temperature": temperature},
    )


def linear(epochs: int | None = None) -> Protocol:
    """A linear classifier on frozen features; ``epochs`` where a study sets how long it trains."""
    name = "linear" if epochs is None else f"linear_{epochs}epochs"
    settings = {} if epochs is None else {"epochs": epochs}
    return Protocol(name, "linear probe", "linear probe", settings=settings)


def low_shot(amount: float) -> Protocol:
    """Logistic regression on ``amount`` images of every class, or on that share of the images.

    >>> low_shot(1).name, low_shot(1).label, low_shot(0.01).name, low_shot(0.01).label
    ('logistic_1shot', '1-shot', 'logistic_0.01', '1 %')
    """
    if amount < 1:
        name, words, label = f"{amount}", f"{100 * amount:g} % of the images", f"{100 * amount:g} %"
    else:
        name, label = f"{amount}shot", f"{amount}-shot"
        words = f"{amount} image{'' if amount == 1 else 's'} per class"
    return Protocol(f"logistic_{name}", f"low-shot: {words}", label, settings={"shots": amount})


KNN = knn()
WITHIN_KINDS = Protocol(
    f"within_kinds_{KNN.name}",
    f"{KNN.title}, among images of one kind",
    "k-NN within a kind",
    settings=KNN.settings,
)
LINEAR = linear()
SHOTS = (1, 2, 5)  # images per class, as in the paper's tables
KMEANS = Protocol(
    "kmeans", "k-means", "k-means", metrics=("ACC", "cluster_silhouette"), unit="index"
)
SPECTRUM = Protocol(
    "spectrum", "effective rank", "effective rank", metrics=("effective_rank",), unit="dimensions"
)
DECODER = Protocol(
    "decoder_per_block", "decoder per block", "decoder per block", ("masked_mse",), unit="mse"
)
HEADS = Protocol(
    "queue_top1", "nearest neighbour in the queue", "queue", metrics=("neighbour_accuracy",)
)


def labels(protocols: Iterable[Protocol]) -> dict[str, str]:
    """Name -> label of every protocol.

    >>> labels((KNN, low_shot(5)))
    {'knn_k10_t0.07_standardized': 'k-NN', 'logistic_5shot': '5-shot'}
    """
    return {protocol.name: protocol.label for protocol in protocols}
