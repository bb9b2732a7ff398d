"""Robustness of a fine-tuned classifier: ImageNet-C, -A, -R and -Sketch, without further training.

Every set, and of ImageNet-C every corruption and severity, is a run of its own: what is finished
stays, and several processes can share the work.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from timm.data import ImageNetInfo
from torch import Tensor

from mimrefiner.data.datasets import data_hash
from mimrefiner.data.listed import class_folders, read_classes
from mimrefiner.device import device_of
from mimrefiner.errors import InputError
from mimrefiner.files import Entry, take_turns
from mimrefiner.models.classifier import ImageClassifier
from mimrefiner.models.weights import sha256_of
from mimrefiner.training.testing import Testing, logit_batches

IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class RobustnessProtocol:
    """What is measured on which sets; the defaults are the paper's.

    The released code: ``y/eval/robustness/*.yaml``, ``offline_imagenet_c_callback.py`` (mean over
    19 x 5), ``offline_classsubset_accuracy_callback.py`` (ImageNet-A and -R: the logits of their
    200 classes). It does not compute mCE: Hendrycks and Dietterich, arXiv 1903.12261, over the 15
    standard corruptions; ``alexnet`` has AlexNet's mean errors from hendrycks/robustness, in the
    same order.

    >>> protocol = RobustnessProtocol()
    >>> len(protocol.corruptions) * len(protocol.severities)
    95
    """

    standard: tuple[str, ...] = (
        *("gaussian_noise", "shot_noise", "impulse_noise"),
        *("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
        *("snow", "frost", "fog", "brightness"),
        *("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    )
    extra: tuple[str, ...] = ("gaussian_blur", "saturate", "spatter", "speckle_noise")
    severities: tuple[int, ...] = (1, 2, 3, 4, 5)
    alexnet: tuple[float, ...] = (
        *(0.886428, 0.894468, 0.922640, 0.819880, 0.826268, 0.785948, 0.798360, 0.866816),
        *(0.826572, 0.819324, 0.564592, 0.853204, 0.646056, 0.717840, 0.606500),
    )
    subset: int = 200  # classes of ImageNet-A and of ImageNet-R
    batch_size: int = 256

    @property
    def corruptions(self) -> tuple[str, ...]:
        """All that the mean is taken over."""
        return self.standard + self.extra


@dataclass(frozen=True)
class TestFolders:
    """Where the sets lie; None leaves one out.

    Attributes:
        val: ImageNet's own validation images, ``CLASS/IMAGE``.
        c: ImageNet-C, ``CORRUPTION/SEVERITY/CLASS/IMAGE``.
        a, r, sketch: ImageNet-A, ImageNet-R and ImageNet-Sketch, ``CLASS/IMAGE``.
    """

    __test__ = False  # no tests, whatever pytest may think

    val: Path | None = None
    c: Path | None = None
    a: Path | None = None
    r: Path | None = None
    sketch: Path | None = None


@dataclass(frozen=True)
class Part:
    """One set of images to be measured.

    Attributes:
        dataset: ``imagenet_c`` and so on; ``setting`` names corruption and severity.
        path: its folder.
        subset: whether only the logits of its own classes count.
    """

    dataset: str
    path: Path
    subset: bool = False
    setting: str = ""
    name: str = field(init=False)

    def __post_init__(self):
        name = " ".join([self.dataset, self.setting]).strip().replace(" ", "-")
        object.__setattr__(self, "name", name)


def robustness(
    model: ImageClassifier,
    folders: TestFolders,
    runs: Path,
    *,
    classes: Sequence[str] | None = None,
    protocol: RobustnessProtocol | None = None,
    device: torch.device | str | None = None,
    num_workers: int = 0,
) -> pd.DataFrame:
    """Measure a classifier on all sets that are there.

    Args:
        model: a fine-tuned classifier.
        folders: where the sets lie.
        runs: a folder that keeps what is finished; other processes may work on it at the same time.
        classes: the names of the model's classes, which are those of folders; None takes the
            folders of a set that has all, or ImageNet's where there are 1,000.
        protocol: None takes the paper's.
        device: None takes a GPU where there is one.
        num_workers: processes that load images.

    Returns:
        One row per set, corruption, severity and metric, and the means: ``dataset``, ``setting``,
        ``metric``, ``value`` (a share; mCE in percent), ``n_test``.

    Raises:
        InputError: no set, a missing corruption or severity, folders that are no classes of the
            model, classes that lack images, or ``runs`` of another model.
    """
    protocol = protocol or RobustnessProtocol()
    count = model.linear.out_features
    parts = list(parts_of(folders, protocol))
    if not parts:
        raise InputError("give one or more test sets: val, ImageNet-C, -A, -R or -Sketch")
    names = class_names(parts, count) if classes is None else list(classes)
    if len(names) != count:
        raise InputError(f"the model has {count} classes, and {len(names)} names were given")
    for part in parts:
        check_part(part, names, protocol)
    device = device_of(device)
    home = next(model.parameters()).device
    settings = {"weights": sha256_of(model), "classes": names}
    entries = {part.name: Entry(runs / part.name, settings | {"set": part.name}) for part in parts}
    testing = Testing(batch_size=protocol.batch_size, num_workers=num_workers)

    def todo() -> Iterator[tuple[Entry, Callable[[], dict]]]:
        for part in parts:
            yield entries[part.name], partial(measured, model, part, names, testing)

    model.to(device)
    take_turns(todo)
    model.to(home)
    return summary(parts, {part.name: entries[part.name].facts() for part in parts}, protocol)


def parts_of(folders: TestFolders, protocol: RobustnessProtocol) -> Iterator[Part]:
    """All sets, ImageNet-C's corruptions and severities one by one."""
    for name in (entry.name for entry in fields(folders)):
        path = getattr(folders, name)
        if path is None:
            continue
        path, dataset = Path(path).expanduser(), "imagenet" if name == "val" else f"imagenet_{name}"
        if not path.is_dir():
            raise InputError(f"{path} does not exist: expected the folder of {dataset}")
        if name != "c":
            yield Part(dataset, path, name in ("a", "r"))
            continue
        for corruption in protocol.corruptions:
            for severity in protocol.severities:
                yield Part(
                    dataset, path / corruption / str(severity), False, f"{corruption} {severity}"
                )


def class_names(parts: Sequence[Part], count: int) -> list[str]:
    """The folders of the first set that has ``count`` of them, or ImageNet's 1,000 names.

    >>> class_names([], 1000)[:2]
    ['n01440764', 'n01443537']
    """
    for part in parts:
        if not part.subset and part.path.is_dir():
            found = class_folders(part.path)
            if len(found) == count:
                return found
    if count == IMAGENET_CLASSES:
        return ImageNetInfo("imagenet-1k").label_names()
    raise InputError(
        f"the model has {count} classes, and none of the test sets has as many folders: "
        "give a folder with one folder for each class of training (--classes)"
    )


def check_part(part: Part, names: Sequence[str], protocol: RobustnessProtocol) -> None:
    """InputError where a set, or a part of one, is missing."""
    if not part.path.is_dir():
        raise InputError(
            f"{part.path} does not exist: ImageNet-C needs all {len(protocol.corruptions)} "
            f"corruptions ({', '.join(protocol.extra)} are in extra.tar) and severities "
            f"{protocol.severities[0]} to {protocol.severities[-1]}"
        )
    found = set(class_folders(part.path))
    if unknown := sorted(found - set(names)):
        raise InputError(
            f"{part.path} has a folder {unknown[0]}, which is none of the model's {len(names)} "
            "classes: test sets need folders named as those of training"
        )
    expected = protocol.subset if part.subset and len(names) == IMAGENET_CLASSES else None
    expected = expected if part.subset else len(names)
    if expected is not None and len(found) != expected:
        missing = "" if part.subset else f"; {min(set(names) - found)} is missing"
        raise InputError(
            f"{part.path} has {len(found)} folders of classes, expected {expected}" + missing
        )


def measured(model: ImageClassifier, part: Part, names: Sequence[str], testing: Testing) -> dict:
    """How many images are right at the first and within the first five guesses."""
    images = read_classes(part.path, names)
    allowed = torch.from_numpy(images.labels).unique() if part.subset else None
    right, within = torch.zeros(2, dtype=torch.long)
    for logits, labels in logit_batches(model, images, testing):
        best = top(logits, allowed)
        hits = best == labels[:, None]
        right, within = right + hits[:, 0].sum(), within + hits.any(1).sum()
    return {
        "right": right.item(),
        "within 5": within.item(),
        "images": len(images),
        "data": data_hash(images),
    }


def top(logits: Tensor, allowed: Tensor | None = None, k: int = 5) -> Tensor:
    """The ``k`` best classes of every image, best first, (batch, k) or as many as there are.

    Args:
        logits: (batch, classes).
        allowed: the classes that count, (n,); None counts all.

    >>> top(torch.tensor([[3.0, 9.0, 5.0]]), torch.tensor([0, 2]))
    tensor([[2, 0]])
    """
    allowed = torch.arange(logits.shape[1]) if allowed is None else allowed
    return allowed[logits[:, allowed].topk(min(k, len(allowed))).indices]


def summary(
    parts: Sequence[Part], facts: dict[str, dict], protocol: RobustnessProtocol
) -> pd.DataFrame:
    """Rows of all sets, and the means of ImageNet-C."""
    rows = []
    for part in parts:
        fact = facts[part.name]
        row = {"dataset": part.dataset, "setting": part.setting, "n_test": fact["images"]}
        rows.append({**row, "metric": "accuracy", "value": fact["right"] / fact["images"]})
        if part.dataset == "imagenet":
            rows.append({**row, "metric": "top5", "value": fact["within 5"] / fact["images"]})
    corrupted = [row for row in rows if row["dataset"] == "imagenet_c"]
    if corrupted:
        values = {row["setting"]: row["value"] for row in corrupted}
        common = {"dataset": "imagenet_c", "n_test": sum(row["n_test"] for row in corrupted)}
        mean = sum(values.values()) / len(values)
        rows.append(
            {**common, "setting": f"mean of {len(values)}", "metric": "accuracy", "value": mean}
        )
        rows.append(
            {
                **common,
                "setting": f"{len(protocol.standard)} standard corruptions",
                "metric": "mCE",
                "value": mean_corruption_error(values, protocol),
            }
        )
    return pd.DataFrame(rows, columns=["dataset", "setting", "metric", "value", "n_test"])


def mean_corruption_error(accuracies: dict[str, float], protocol: RobustnessProtocol) -> float:
    """mCE in percent: the mean over standard corruptions of error / AlexNet's error.

    Both errors are means over the severities.

    Args:
        accuracies: "CORRUPTION SEVERITY" -> share of right answers.
        protocol: the corruptions and AlexNet's errors.

    >>> protocol = RobustnessProtocol(standard=("fog",), severities=(1, 2), alexnet=(0.5,))
    >>> round(mean_corruption_error({"fog 1": 0.9, "fog 2": 0.7}, protocol), 6)
    40.0
    """
    ratios = []
    for name, alexnet in zip(protocol.standard, protocol.alexnet, strict=True):
        errors = [1 - accuracies[f"{name} {severity}"] for severity in protocol.severities]
        ratios.append(sum(errors) / len(errors) / alexnet)
    return 100 * sum(ratios) / len(ratios)
