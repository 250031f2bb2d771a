"""Draws pictures in columns with a title each, to compare them by eye."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

MARGIN, TITLE_HEIGHT = 8, 34
BACKGROUND, INK = "white", "black"


def write_grid(columns: dict[str, torch.Tensor], path: Path, zoom: int = 2) -> None:
    """Writes a PNG with one titled column per entry and one row per picture.

    Args:
        columns: title -> pictures ``(rows, 3, height, width)`` in [0, 1], all of one shape.
        path: where to write; its folder is made.
        zoom: pixels of the PNG per pixel of a picture.
    """
    rows, _, height, width = next(iter(columns.values())).shape
    cell_width, cell_height = width * zoom + MARGIN, height * zoom + MARGIN
    size = (len(columns) * cell_width + MARGIN, rows * cell_height + MARGIN + TITLE_HEIGHT)
    sheet = Image.new("RGB", size, BACKGROUND)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=20)
    for column, (title, pictures) in enumerate(columns.items()):
        left = MARGIN + column * cell_width
        draw.text((left, MARGIN), title, INK, font)
        for row, picture in enumerate(pictures):
            sheet.paste(_image(picture, zoom), (left, TITLE_HEIGHT + MARGIN + row * cell_height))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _image(picture: torch.Tensor, zoom: int) -> Image.Image:
    pixels = (picture * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    image = Image.fromarray(pixels)
    return image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)
