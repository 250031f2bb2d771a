"""Photographs that ship inside scikit-image and foolbox, as 8-bit RGB."""

from __future__ import annotations

import re

from PIL import Image

from zoo.packages import folder

LABELLED_PHOTOS = {
    "chelsea.png": frozenset({281, 282, 285}),  # tabby, tiger cat, Egyptian cat
    "coffee.png": frozenset({504, 967, 968}),  # coffee mug, espresso, cup
    "rocket.jpg": frozenset({657, 744}),  # missile, projectile
}
"""Photographs of scikit-image that show one ImageNet class -> the class numbers that are right."""


def photo(name: str) -> Image.Image:
    """Returns the picture ``name`` of scikit-image, e.g. ``"astronaut.png"``; grey ones repeat their channel."""
    with Image.open(folder("skimage") / "data" / name) as image:
        return image.convert("RGB")


def labelled_photos() -> list[tuple[Image.Image, frozenset[int]]]:
    """Returns 23 photographs with the ImageNet-1k class numbers that are right for each.

    20 come from foolbox, whose file names end in the class number, and 3 from scikit-image.
    """
    pictures = []
    for path in sorted((folder("foolbox") / "data").glob("imagenet_*.jpg")):
        number = re.fullmatch(r"imagenet_\d+_(\d+)", path.stem)
        assert number is not None, path
        with Image.open(path) as image:
            pictures.append((image.convert("RGB"), frozenset({int(number[1])})))
    return pictures + [(photo(name), classes) for name, classes in LABELLED_PHOTOS.items()]
