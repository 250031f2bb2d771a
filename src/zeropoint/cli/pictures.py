"""A folder of pictures as the input of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from zeropoint.cli.exits import UsageError
from zeropoint.cli.settings import ImageSettings
from zeropoint.core.errors import CalibrationError, FileError
from zeropoint.core.extras import import_extra

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


class Pictures:
    """The pictures in a folder, or in folders in it, one for each class; each is read when it is asked for.

    Args:
        folder: where they are.
        inputs: the model's example inputs; the first says what a picture has to become.
        settings: how.

    Raises:
        UsageError: there is no picture, the model's input is none, or the settings do not fit it.
        MissingExtraError: Pillow is not installed.
    """

    def __init__(self, folder: Path, inputs: tuple[Any, ...], settings: ImageSettings) -> None:
        self._image = import_extra("PIL.Image", "cli")
        self.folder, self.settings = folder, settings
        found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        if not found:
            raise UsageError(
                "there is no picture in this folder", where=str(folder), remedy=f"Known: {', '.join(SUFFIXES)}."
            )
        self.paths = found
        parents = {path.parent for path in found}
        in_classes = folder not in parents and len(parents) > 1 and all(parent.parent == folder for parent in parents)
        self.class_names = tuple(sorted(parent.name for parent in parents)) if in_classes else ()
        numbers = {name: number for number, name in enumerate(self.class_names)}
        self.classes = [numbers[path.parent.name] for path in found] if in_classes else []
        self._dtype, self._channels, self._size = _wanted(inputs, settings, str(folder))
        self._mean, self._std = (self._per_channel(each, name) for each, name in self._normalization())

    def _normalization(self) -> tuple[tuple[tuple[float, ...], str], ...]:
        return (self.settings.mean or (0.0,), "mean"), (self.settings.std or (1.0,), "std")

    def _per_channel(self, values: tuple[float, ...], name: str) -> np.ndarray[Any, Any]:
        if len(values) not in (1, self._channels):
            what = f"data.image.{name} has {len(values)} values; pictures have {self._channels} channels"
            raise UsageError(what, where=str(self.folder))
        if name == "std" and 0 in values:
            raise UsageError("data.image.std holds 0", where=str(self.folder))
        return np.asarray(values, dtype=np.float32)

    def __getitem__(self, number: int) -> torch.Tensor:
        """Returns a picture as the model takes it, without the axis of the batch.

        Raises:
            FileError: it is no picture, or is damaged.
            CalibrationError: it has more than 8 bits a channel; or, with resize="none", another size.
        """
        path = self.paths[number]
        picture = self._opened(path)
        pixels = np.asarray(self._resized(picture, path), dtype=np.float32)
        pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
        pixels = pixels[:, :, ::-1] if self.settings.colors == "BGR" else pixels
        values = (pixels * np.float32(self.settings.scale) - self._mean) / self._std
        values = values if self.settings.layout == "NHWC" else values.transpose(2, 0, 1)
        return torch.from_numpy(np.ascontiguousarray(values)).to(self._dtype)

    def _opened(self, path: Path) -> Any:
        try:
            with self._image.open(path) as opened:
                mode, picture = opened.mode, opened.convert("L" if self.settings.colors == "L" else "RGB")
        except (OSError, SyntaxError, ValueError) as error:
            raise FileError(f"it is no picture that can be read: {error}", where=str(path)) from error
        if mode.startswith(("I", "F")):  # Converted, all beyond 255 would be white.
            what = f"its values are no bytes (mode {mode})"
            raise CalibrationError(what, where=str(path), remedy="Write it with 8 bits, or give an .npz file.")
        return picture

    def _resized(self, picture: Any, path: Path) -> Any:
        height, width = self._size
        if self.settings.resize == "none":
            if picture.size != (width, height):
                what = f"it is {picture.size[0]} x {picture.size[1]}; the model takes {width} x {height}"
                raise CalibrationError(what, where=str(path), remedy='Choose resize "stretch" or "crop".')
            return picture
        bilinear = self._image.Resampling.BILINEAR
        if self.settings.resize == "stretch":
            return picture.resize((width, height), bilinear)
        factor = max(width / picture.width, height / picture.height)
        large = max(width, round(picture.width * factor)), max(height, round(picture.height * factor))
        left, top = (large[0] - width) // 2, (large[1] - height) // 2
        return picture.resize(large, bilinear).crop((left, top, left + width, top + height))


def _wanted(inputs: tuple[Any, ...], settings: ImageSettings, where: str) -> tuple[torch.dtype, int, tuple[int, int]]:
    """Returns dtype, channels and (height, width) that pictures are to have."""
    shape = tuple(getattr(inputs[0], "shape", ())) if inputs else ()
    if len(inputs) != 1 or len(shape) != 4:
        shapes = ", ".join(str(tuple(getattr(each, "shape", ()))) for each in inputs)
        what = f"a folder of pictures is data of one input of 4 axes; this model takes {shapes}"
        raise UsageError(what, where=where, remedy="Give an .npz file, or package.module:callable.")
    channels, height, width = shape[1:] if settings.layout == "NCHW" else (shape[3], shape[1], shape[2])
    given = 1 if settings.colors == "L" else 3
    if channels != given:
        what = (
            f"with layout {settings.layout} the model takes {channels} channels; colors {settings.colors} gives {given}"
        )
        raise UsageError(what, where=where, remedy='Set data.image.layout, or colors: "RGB", "BGR", or "L" for grey.')
    if not inputs[0].is_floating_point():
        raise UsageError(f"the model takes {inputs[0].dtype}; pictures become floats", where=where)
    size = settings.size or (int(height), int(width))
    return inputs[0].dtype, channels, (size[0], size[-1])
