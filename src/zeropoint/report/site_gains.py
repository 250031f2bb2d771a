"""What each site does to the output, to first order: one pass backward through the float model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node
from torch.utils import _pytree as pytree

from zeropoint.report.compared_sites import Seen, Site, SiteWatch, difference, is_float, power
from zeropoint.report.lockstep import Lockstep, Look


class NoiseAtOutput:
    """Predicts how much noise each site puts on the outputs, its power relative to the outputs'.

    The error ``e`` that rounding its float value makes at a site reaches the outputs as ``J e``, to first order. Such
    errors are taken as
    uncorrelated, so the power of ``J e`` is the expectation of ``sum((v J)^2 e^2)`` over vectors ``v`` of random signs
    (Hutchinson's estimator); one such vector for each batch. Of a weight, the gradient is that of the whole batch.
    """

    def __init__(self, run: Lockstep, sites: Sequence[Site]) -> None:
        self.run, self.sites = run, sites
        self.noise: dict[Site, float] = dict.fromkeys(sites, 0.0)
        self.failure = ""
        self._generator = torch.Generator().manual_seed(0)

    def study(self, inputs: tuple[Any, ...], look: Callable[[Site, Seen], None], look_at: Look) -> tuple[Any, Any]:
        """Returns the outputs of a batch, in float and quantized, and adds what its sites do.

        ``look`` sees each site, ``look_at`` each node after the sites that it reads.
        """
        values: dict[Site, torch.Tensor] = {}
        errors: dict[Site, torch.Tensor] = {}

        def see(site: Site, seen: Seen) -> None:
            look(site, seen)
            if seen.rounded is not None and seen.reference.requires_grad:
                values[site], errors[site] = seen.reference, difference(seen.rounded, seen.reference)

        watch = SiteWatch(self.sites, see, rounds_floats=True)

        def see_node(node: Node, *values: Any) -> None:
            watch(node, *values)
            look_at(node, *values)

        known = {site: self.run.constants[site.source] for site in self.sites if site.source in self.run.constants}
        for site, value in known.items():
            values[site] = self.run.constants[site.source] = value.detach().requires_grad_()
            errors[site] = self.run.known[site.dequantizes[0]] - value
        try:
            outputs, actual = self.run.run(inputs, see_node, with_gradients=True)
        finally:
            self.run.constants |= {site.source: value for site, value in known.items()}
        self._add(pytree.tree_leaves(outputs), values, errors)
        return pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, outputs), actual

    def _add(self, outputs: list[Any], values: dict[Site, torch.Tensor], errors: dict[Site, torch.Tensor]) -> None:
        outputs = [each for each in outputs if is_float(each) and each.requires_grad]
        directions = [self._direction(each) for each in outputs]
        sites = list(values)
        if not outputs or not sites:
            return
        found = torch.autograd.grad(outputs, [values[site] for site in sites], directions, allow_unused=True)
        for site, gradient in zip(sites, found, strict=True):
            if gradient is not None:
                self.noise[site] += power(torch.nan_to_num(gradient) * errors[site])

    def _direction(self, output: torch.Tensor) -> torch.Tensor:
        signs = torch.randint(0, 2, output.shape, generator=self._generator).to(output.device) * 2 - 1
        return signs.to(output.dtype) / max(power(output), 1e-30) ** 0.5
