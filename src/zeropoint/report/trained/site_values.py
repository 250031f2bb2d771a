"""What a prepared and a converted model compute where fake quantizers are, and how many steps apart that is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node

from zeropoint.graph.observers import is_fake_quantizer, observer_of
from zeropoint.numerics.granularity import PerGroup, block_size
from zeropoint.numerics.sqnr import sqnr_db
from zeropoint.passes.affine_blocks import affine_of, blocks_of
from zeropoint.passes.convert import SITE_KEY
from zeropoint.passes.qparams_of import group_size_of, limits_of
from zeropoint.passes.trained_module import TrainedModule, as_run

OUTPUT_STEPS = 255
"""A float output is measured in steps of so many to its range: those of 8 bits."""


@dataclass(frozen=True, eq=False, slots=True)
class SiteValue:
    """What a fake quantizer gave, and its grid then.

    Args:
        value: the tensor.
        scale: of a shape that broadcasts with the tensor.
        ends: the values of the smallest and of the largest integer, ``(2, scales)``.
        limits: those integers.
        steps: one scale for each column of ``ends``.
        is_dynamic: the range is that of each tensor.
    """

    value: torch.Tensor
    scale: torch.Tensor
    ends: torch.Tensor
    limits: tuple[int, int]
    steps: torch.Tensor
    is_dynamic: bool

    @classmethod
    def of(cls, fake: Any, value: torch.Tensor) -> SiteValue:
        """Returns what a fake quantizer just gave, with its present scale and zero point."""
        limits, steps = limits_of(fake), fake.scale.detach().flatten().clone()
        zero_point = fake.zero_point.detach().round().clamp(*limits) if _is_rounded(fake) else fake.zero_point
        ends = ends_of_grid(steps, zero_point, limits)
        is_dynamic = bool(getattr(fake, "is_dynamic", False))
        return cls(value.detach().clone(), spread_scale(fake, value), ends, limits, steps, is_dynamic)


class PreparedRun(Interpreter):
    """Runs a prepared model and keeps what its fake quantizers give, by the name of the node that calls each."""

    def __init__(self, model: GraphModule) -> None:
        super().__init__(model, graph=as_run(model) if isinstance(model, TrainedModule) else None)
        self.model = model
        self.values: dict[str, SiteValue] = {}

    def run_node(self, n: Node) -> Any:
        """Returns what a node computes."""
        result = super().run_node(n)
        fake = observer_of(self.model, n)
        if is_fake_quantizer(fake):
            self.values[n.name] = SiteValue.of(fake, result)
        return result


class ConvertedRun(Interpreter):
    """Runs a converted model and measures each dequantize that stands where a fake quantizer was.

    Args:
        model: the converted model.
        values: those of the prepared model.
        in_their_place: go on with the value of the prepared model, so that no site sees differences of those before.
    """

    def __init__(self, model: GraphModule, values: dict[str, SiteValue], in_their_place: bool) -> None:
        super().__init__(model)
        self.values, self.in_their_place = values, in_their_place
        self.found: dict[str, tuple[str, float, float]] = {}
        """By the name in the prepared model: name of the node that is furthest, its distance in steps, its SQNR."""

    def run_node(self, n: Node) -> Any:
        """Returns what a node computes."""
        result = super().run_node(n)
        site = n.meta.get(SITE_KEY)
        if site not in self.values:
            return result
        expected = self.values[site]
        steps = steps_apart(expected.value, result, expected.scale)
        if self.in_their_place:
            steps = max(steps, self._grids_apart(n, expected))
        if site not in self.found or steps > self.found[site][1]:
            self.found[site] = (n.name, steps, sqnr_db(expected.value, result))
        return expected.value.clone() if self.in_their_place else result

    def _grids_apart(self, n: Node, expected: SiteValue) -> float:
        """Returns how far the ends of the two grids are apart, in steps: these inputs may not reach them."""
        if "dequantize" not in str(n.target):
            return 0.0
        args, _ = self.fetch_args_kwargs_from_env(n)
        first = 2 if "dequantize_affine" in str(n.target) else 1
        scale, zero_point = (torch.as_tensor(0 if each is None else each) for each in args[first : first + 2])
        ends = ends_of_grid(scale.detach().to(expected.ends.device), zero_point, expected.limits)
        if expected.is_dynamic and ends.shape != expected.ends.shape:
            return 0.0  # One scale per token where the fake quantizer has one: the values show it.
        return steps_apart(expected.ends, ends, expected.steps)


def ends_of_grid(scale: torch.Tensor, zero_point: torch.Tensor, limits: tuple[int, int]) -> torch.Tensor:
    """Returns the values of the smallest and of the largest integer, ``(2, scales)``, as float32."""
    integers = torch.tensor(limits, dtype=torch.float64, device=scale.device).unsqueeze(1)
    shift = zero_point.detach().to(scale.device).flatten().double()
    return ((integers - shift) * scale.flatten().double()).float()


def _is_rounded(fake: Any) -> bool:
    return fake.zero_point.is_floating_point() and fake.qscheme != torch.per_channel_affine_float_qparams


def steps_apart(reference: torch.Tensor, actual: torch.Tensor, scale: torch.Tensor) -> float:
    """Returns the largest ``|reference - actual| / scale``; infinite where shapes differ or one alone is not finite.

    Two units in the last place of the reference's type are left out: a scale of an int32 bias is smaller than that.
    """
    if reference.shape != actual.shape:
        return math.inf
    if reference.numel() == 0:
        return 0.0
    expected, found = reference.detach().double(), actual.detach().double()
    same = (expected == found) | (expected.isnan() & found.isnan())
    rounding = 2 * torch.finfo(reference.dtype).eps if reference.dtype.is_floating_point else 0.0
    apart = ((expected - found).abs() - rounding * expected.abs()).clamp(min=0) / scale.double()
    return float(apart.masked_fill(same, 0.0).nan_to_num(nan=math.inf, posinf=math.inf).max())


def output_scale(reference: torch.Tensor) -> torch.Tensor:
    """Returns the step of an output that is not quantized: its finite range in 255 parts; of a constant, its size."""
    finite = reference.detach().double()
    finite = finite[finite.isfinite()]
    if finite.numel() == 0:
        return torch.ones(())
    width = finite.max() - finite.min()
    size = width if bool(width > 0) else finite.abs().max()
    return size / OUTPUT_STEPS if bool(size > 0) else torch.ones(())


def spread_scale(fake: Any, value: torch.Tensor) -> torch.Tensor:
    """Returns a fake quantizer's present scale, of a shape that broadcasts with the tensor that it gave."""
    scale = fake.scale.detach().clone()
    if scale.numel() == 1:
        return scale.reshape(())
    affine, group_size = affine_of(fake), group_size_of(fake)
    if affine is not None:
        blocks = blocks_of(affine, tuple(value.shape))
    elif group_size is not None:
        blocks = block_size(PerGroup(group_size), value.shape)
    else:
        return scale.reshape([-1 if axis == fake.ch_axis % value.dim() else 1 for axis in range(value.dim())])
    spread = scale.reshape([size // block for size, block in zip(value.shape, blocks, strict=True)])
    for axis, block in enumerate(blocks):
        spread = spread.repeat_interleave(block, axis)
    return spread
