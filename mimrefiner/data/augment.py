"""How images are augmented: the recipes of views, from the paper's to those for digits."""

from dataclasses import replace

from mimrefiner.config import Crop, Views


def paper_views(size: int = 224, local_size: int = 96, n_local: int = 10) -> Views:
    """The paper's recipe: BYOL's two global crops, and local ones.

    ``train_byolaug_localviews.yaml`` of the released code; sizes are in pixels.

    >>> len(paper_views().crops)
    12
    """
    return Views(
        global_crops=(
            Crop(size, (0.25, 1.0), blur_p=1.0),
            Crop(size, (0.25, 1.0), blur_p=0.1, solarize_p=0.2),
        ),
        local_crop=Crop(local_size, (0.05, 0.25), blur_p=0.5),
        n_local=n_local,
    )


def small_views(size: int, patch_size: int, n_local: int = 10) -> Views:
    """The paper's recipe for images of 28 to 96 px.

    Local crops have about 3/7 of the side, and the blur shrinks with the image.
    """
    local_size = max(2, round(size * 96 / 224 / patch_size)) * patch_size
    views = paper_views(size, local_size, n_local)

    def shrink(crop: Crop) -> Crop:
        return replace(crop, blur_sigma=(0.1, max(0.1, 2.0 * size / 224)))

    return Views(
        tuple(shrink(crop) for crop in views.global_crops), shrink(views.local_crop), n_local
    )


def digit_views(size: int, patch_size: int, n_local: int = 10) -> Views:
    """Views that keep a digit what it is: no flip, hue, grey or solarisation.

    Local crops show half of the digit.
    """
    local_size = max(2, round(size / 2 / patch_size)) * patch_size
    crop = Crop(size, (0.4, 1.0), flip_p=0.0, saturation=0.0, hue=0.0, grey_p=0.0)
    return Views((crop, crop), replace(crop, size=local_size, scale=(0.2, 0.5)), n_local)


def plain_views(size: int, scale: tuple[float, float], flip: bool = True) -> Views:
    """One view of an image: a random resized crop, mirrored in half of the cases if ``flip``.

    >>> crop, = plain_views(32, (0.08, 1.0)).crops
    >>> crop.size, crop.flip_p, crop.jitter_p
    (32, 0.5, 0.0)
    """
    crop = Crop(size, scale, flip_p=0.5 * flip, jitter_p=0.0, grey_p=0.0)
    return Views((crop,), crop, n_local=0)
