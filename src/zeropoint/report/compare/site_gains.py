"""What each site does to the output, to first order: one pass backward through the float model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node
from torch.utils import _pytree as pytree

from zeropoint.core.dtypes import is_float
from zeropoint.report.compare.compared_sites import Seen, Site, SiteWatch, power
from zeropoint.report.compare.lockstep import Lockstep
from zeropoint.report.compare.node_errors import NodeErrors, is_computed_anew


class NoiseAtOutput:
    """Predicts how much noise each site puts on the outputs, its power relative to the outputs'.

    What rounding a site does to the nodes that read it, all else in float, is computed by ``NodeErrors``; how that
    error ``e`` reaches the outputs is taken to be linear, ``J e``. The errors of two channels are taken as
    uncorrelated, those of one are not: so the power of ``J e`` is the expectation of the sum over channels of
    ``(v J e)^2``, for vectors ``v`` of random signs (Hutchinson's estimator); one such vector for each batch.
    Where a reader cannot be computed anew, it is the error of the site itself.
    """

    def __init__(self, run: Lockstep, sites: Sequence[Site], nodes: NodeErrors) -> None:
        self.run, self.sites, self.nodes = run, sites, nodes
        self.noise: dict[Site, float] = dict.fromkeys(sites, 0.0)
        self.failure = ""
        self._generator = torch.Generator().manual_seed(0)

    def study(self, inputs: tuple[Any, ...], look: Callable[[Site, Seen], None]) -> tuple[Any, Any]:
        """Returns the outputs of a batch, in float and quantized, and adds what its sites do; ``look`` sees each."""
        values: dict[Any, torch.Tensor] = {}
        rounded: dict[Site, torch.Tensor] = {}

        def see(site: Site, seen: Seen) -> None:
            look(site, seen)
            self.nodes.see_site(site, seen)
            if all(map(is_computed_anew, site.readers)):
                return
            if seen.rounded is not None and seen.reference.requires_grad:
                values[site], rounded[site] = seen.reference, seen.rounded

        watch = SiteWatch(self.sites, see, self.run.again)

        def see_node(node: Node, reference: Any, *others: Any) -> None:
            watch(node, reference, *others)
            self.nodes.see_node(node, reference, *others)
            if node in self.nodes.own and reference.requires_grad:
                values[node] = reference

        outputs, actual = self.run.run(inputs, see_node, with_gradients=True)
        try:
            self._add(pytree.tree_leaves(outputs), values, rounded)
        except (RuntimeError, NotImplementedError) as error:
            self.failure = str(error).strip().partition("\n")[0]
        self.nodes.forget()
        return pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, outputs), actual

    def _add(self, outputs: list[Any], values: dict[Any, torch.Tensor], rounded: dict[Site, torch.Tensor]) -> None:
        outputs = [each for each in outputs if is_float(each) and each.requires_grad]
        if not outputs or not values:
            self.failure = "no output depends on what is quantized in a way that has a gradient"
            return
        directions = [self._direction(each) for each in outputs]
        found = torch.autograd.grad(outputs, list(values.values()), directions, allow_unused=True)
        gradients = {each: g for each, g in zip(values, found, strict=True) if g is not None}
        for site in self.sites:
            if all(reader in self.nodes.own for reader in site.readers):
                owns = ((reader, own) for reader in site.readers for own in self.nodes.own[reader] if own.site is site)
                self.noise[site] += sum(
                    own.factor * _by_channel(gradients[reader], own.error)
                    for reader, own in owns
                    if reader in gradients
                )
            elif site in gradients:
                self.noise[site] += _by_channel(gradients[site], rounded[site] - values[site].detach())

    def _direction(self, output: torch.Tensor) -> torch.Tensor:
        signs = torch.randint(0, 2, output.shape, generator=self._generator).to(output.device) * 2 - 1
        return signs.to(output.dtype) / max(power(output), 1e-30) ** 0.5


def _by_channel(gradient: torch.Tensor, error: torch.Tensor) -> float:
    """Returns the sum over samples and channels of the squared product of a gradient with an error.

    Channels lie along the axis after the first one of images ``(batch, channels, ...)``.
    """
    gradient = gradient[: error.shape[0]] if error.dim() else gradient
    product = gradient * error
    if not math.isfinite(float(product.sum())):
        product = torch.nan_to_num(gradient) * error.masked_fill(~error.isfinite(), 0.0)
    if product.dim() < 3:
        return power(product)
    if product.dim() > 3:
        return power(product.flatten(2).sum(2))
    return max(power(product.sum(1)), power(product.sum(2)))  # Channels may be either axis: that which adds up more.
