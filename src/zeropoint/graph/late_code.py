"""A graph module that generates its code when that is wanted.

Code of a graph of a thousand nodes takes 50 ms to write and to compile, twice as long as most passes. A model that goes
on to the next stage, is copied or is given another graph before it runs pays for none of it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.fx import Graph, GraphModule

from zeropoint.graph.compat import structures

_generating = threading.RLock()
"""Held while code is generated: torch writes to the nodes meanwhile, and first calls may come from several threads."""


class _Forward:
    """Stands for ``forward`` until it is looked at: by a call, ``inspect.signature``, a tracer."""

    def __get__(self, module: LateCode | None, kind: type[LateCode]) -> Callable[..., Any]:
        if module is None:  # Tracers look at the class: torch makes one for each module.
            made = vars(kind)["_made"]() if "_made" in vars(kind) else None
            return nn.Module.forward if made is None else vars(type(made.with_code()))["forward"]
        return module.with_code().forward


class LateCode(GraphModule):
    """Has the code of its graph from when it is first called, or looked at, on; ``recompile`` generates it at once.

    A change of the graph in between is part of the code.
    """

    forward: Any = _Forward()

    @property
    def graph(self) -> Graph:
        """The graph; assigning another one lets go of the code."""
        return self._graph

    @graph.setter
    def graph(self, g: Graph) -> None:
        assert isinstance(g, Graph)
        self._graph = g
        g.owning_module = self
        if (found := structures(g)) is not None:
            self._in_spec, self._out_spec = found
        own: Any = type(self)
        own._made = weakref.ref(self)
        if "forward" in vars(own):
            del own.forward

    def with_code(self) -> LateCode:
        """Returns the module, its code generated."""
        if "forward" not in vars(type(self)):
            with _generating:
                if "forward" not in vars(type(self)):
                    self.recompile()
        return self

    @property
    def code(self) -> str:
        """The Python code of the graph."""
        self.with_code()
        return super().code

    def __str__(self) -> str:
        self.with_code()
        return super().__str__()

    def __reduce__(self) -> tuple[Any, ...]:
        self.with_code()
        return super().__reduce__()

    def __reduce_package__(self, exporter: Any) -> tuple[Any, ...]:
        self.with_code()
        return super().__reduce_package__(exporter)
