"""Fake quantizers of affine observers: any mapping type and granularity."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import GraphModule, Node

from zeropoint.core.errors import CalibrationError, SpecError
from zeropoint.numerics.fake_quantize import FakeQuantize
from zeropoint.numerics.granularity import PerAxis, PerGroup, PerTensor, block_size, reduction
from zeropoint.numerics.mapping import MappingType
from zeropoint.numerics.observers.affine import AffineQuantizedObserverBase, AffineQuantizedPlaceholderObserver
from zeropoint.numerics.observers.affine_minmax import AffineQuantizedMinMaxObserver


class AffineFakeQuantize(FakeQuantize):
    """Rounds with the scales and zero points of an affine observer, one for each block of its granularity.

    The gradient passes where the value was not clamped.

    Args:
        observer: class or ``with_args`` constructor of an affine observer that measures.
        is_dynamic: for the observer.
        observer_kwargs: other arguments of the observer.

    Attributes:
        activation_post_process: the observer.
        scale, zero_point: buffers, float32 and int32, of the shape of the observer's.
        granularity, mapping_type, target_dtype, zero_point_domain: the observer's.
        block_size: of the last tensor observed; None before.

    Raises:
        SpecError: the observer is no affine one, or refuses its arguments.
    """

    def __init__(
        self, observer: Any = AffineQuantizedMinMaxObserver, is_dynamic: bool = False, **observer_kwargs: Any
    ) -> None:
        super().__init__(observer, is_dynamic=is_dynamic, **observer_kwargs)
        built = self.activation_post_process
        if not isinstance(built, AffineQuantizedObserverBase) or isinstance(built, AffineQuantizedPlaceholderObserver):
            what = f"observer={observer!r} is no affine observer that measures"
            raise SpecError(what, where=type(self).__name__, remedy="Use e.g. AffineQuantizedMinMaxObserver.")
        self.granularity, self.mapping_type = built.granularity, built.mapping_type
        self.target_dtype, self.zero_point_domain = built.target_dtype, built.zero_point_domain

    @property
    def block_size(self) -> tuple[int, ...] | None:
        """Returns the block size of the last tensor observed."""
        return self.activation_post_process.block_size

    def fake_quantize(self, x: torch.Tensor) -> torch.Tensor:
        """Returns ``x`` rounded with the scales and zero points as they are."""
        limits = (self.quant_min, self.quant_max)
        scale, zero_point = self.scale.flatten(), self.zero_point.flatten()
        if isinstance(self.granularity, PerTensor):
            return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, *limits)
        view, inside = reduction(block_size(self.granularity, x.shape), x.shape)
        axes = [axis for axis in range(len(view)) if axis not in inside] + inside
        blocks = x.reshape(view).permute(axes)
        count = math.prod(blocks.shape[: len(view) - len(inside)])
        if len(scale) != count:
            what = f"there are scales for {len(scale)} blocks, and a tensor of shape {tuple(x.shape)} has {count}"
            raise CalibrationError(what, where=self.site, remedy="Enable the observer, or keep the sizes as they were.")
        rows = blocks.reshape(count, -1)
        rounded = torch.fake_quantize_per_channel_affine(rows, scale, zero_point, 0, *limits).reshape(blocks.shape)
        back = [axes.index(axis) for axis in range(len(axes))]
        return rounded.permute(back).reshape(x.shape)

    def convert(self, model: GraphModule, observer_node: Node) -> None:
        """Makes a node that calls this module call its observer, which ``convert_pt2e`` replaces."""
        self.activation_post_process.convert(model, observer_node)


default_affine_fake_quant = AffineFakeQuantize.with_args(
    observer=AffineQuantizedMinMaxObserver,
    mapping_type=MappingType.ASYMMETRIC,
    target_dtype=torch.uint8,
    granularity=PerTensor(),
)
default_groupwise_fake_quant = AffineFakeQuantize.with_args(
    observer=AffineQuantizedMinMaxObserver,
    mapping_type=MappingType.SYMMETRIC,
    target_dtype=torch.int8,
    granularity=PerGroup(128),
)
default_affine_per_axis_fake_quant = AffineFakeQuantize.with_args(
    observer=AffineQuantizedMinMaxObserver,
    mapping_type=MappingType.SYMMETRIC,
    target_dtype=torch.int8,
    granularity=PerAxis(0),
)
