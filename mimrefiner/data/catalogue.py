"""The table of data sets: what can be named."""

DOWNLOADED = {  # name -> the class of torchvision.datasets
    "fashion_mnist": "FashionMNIST",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "stl10": "STL10",
}
CATALOGUE = {
    "digits": "scikit-learn's digits, 1,797 images, 10 classes; embedded, no download",
    "fruit64": "photos of fruit at 64 px, 1,393 images, 14 classes; embedded, no download",
    **dict.fromkeys(DOWNLOADED, "downloaded by torchvision when asked for"),
    "imagefolder:PATH": "PATH/train/CLASS/IMAGE and PATH/val/CLASS/IMAGE (ImageNet's layout), "
    "or PATH/CLASS/IMAGE",
    "parquet:PATH": "files of the Hugging Face hub: train-*.parquet and so on; "
    ",column=NAME and ,label=NAME choose columns",
    "hf:NAME": "downloaded from the Hugging Face hub: pip install 'mimrefiner[hub]'",
    "cifar10:PATH": "torchvision's files where they lie, also cifar100, stl10 and fashion_mnist",
}


def table() -> str:
    """The table as text, one line for each data set."""
    return "\n".join(f"{name:18s} {what}" for name, what in CATALOGUE.items())
