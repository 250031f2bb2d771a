"""Insert observers where the plan has sites."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from zeropoint.core.errors import AnnotationError, SpecError
from zeropoint.graph.attributes import Names, tensors_of
from zeropoint.graph.bind import Site, reads, replace_read, source_of
from zeropoint.graph.compat import created_from
from zeropoint.graph.constants import attributes_behind, constant_nodes
from zeropoint.graph.emit import inherit_place
from zeropoint.graph.graph_pass import graph_pass
from zeropoint.graph.layers import MOVES
from zeropoint.graph.memory import Memory, shares_memory_with, written_by
from zeropoint.graph.source import describe
from zeropoint.numerics.fake_quantize import FakeQuantizeBase
from zeropoint.numerics.observers.repeated import RepeatedObserver
from zeropoint.passes.affine_blocks import affine_of, check_layout
from zeropoint.passes.make_observers import Observers
from zeropoint.passes.qparams_of import group_size_of

PREFIX = "activation_post_process_"


@graph_pass
def insert_observers(model: GraphModule, observers: Observers, look_again: bool = True) -> None:
    """Adds a call of its observer after each tensor of the plan, and makes the sites read what it returns.

    A read whose observer is that of the producer's output, or of another read of the same tensor, uses the same call.
    ``look_again``: observe a tensor once more where it was only moved, as torchao does; a program may rely on the
    observer itself being there.

    Raises:
        AnnotationError: a tensor would be quantized whose memory is written to later, so that the write would be lost.
        SpecError: there are no operators that quantize a tensor as its observer says.
    """
    _Inserter(model, observers, look_again).run()


class _Inserter:
    def __init__(self, model: GraphModule, observers: Observers, look_again: bool) -> None:
        self.model, self.observers, self.look_again = model, observers, look_again
        self.names = Names(model)
        self.constants = constant_nodes(model)
        self.memory = Memory(model.graph)
        self.calls: dict[tuple[Node, int], Node] = {}
        """The call of an observer, by the tensor that it observes and the observer's id."""
        self.called: dict[Node, Any] = {}
        """The observer that each of those calls."""
        self.only_constants: dict[int, bool] = {}
        """Whether an observer, by id, has met constants only."""
        devices = {tensor.device for tensor in tensors_of(model).values()}
        self.device = devices.pop() if len(devices) == 1 else None

    def run(self) -> None:
        for site, observer in self.observers.items():
            if site.node.graph is self.model.graph:
                self._check(site, observer)
        for node in list(self.model.graph.nodes):
            for site, source in list(reads(node)):
                if site not in self.observers or _writes_to_buffer(site, source):
                    continue
                if self.memory.is_rewritten(source):
                    self._observe_now(site, source)
                else:
                    self._observe_read(site, source)
            if Site(node) in self.observers:
                self._observe_output(node)

    def _check(self, site: Site, observer: Any) -> None:
        """Raises where there are no operators that quantize a tensor as its observer says."""
        affine, group_size = affine_of(observer), group_size_of(observer)
        if affine is None and group_size is None:
            return
        source = site.node if site.is_output else source_of(site)
        place = describe(source) if site.is_output else f"{describe(source)}, read as {site}"
        is_constant = source in self.constants
        if affine is not None:
            check_layout(affine, source, place, is_constant=is_constant)
        elif group_size is not None:
            _check_groups(source, place, group_size, is_constant=is_constant)

    def _observe_read(self, site: Site, source: Node) -> None:
        observer = self.observers[site]
        if source.op == "call_module" and self.calls.get((source.args[0], id(observer))) is source:  # type: ignore[arg-type]
            return
        call = self.calls.get((source, id(observer))) or self._call(source, observer, str(site))
        replace_read(site, call)

    def _observe_now(self, site: Site, source: Node) -> None:
        """Observes memory that is written to just before it is read: that is the value which counts."""
        if source in written_by(site.node):
            _raise_lost_write(source, site.node)
        if source in shares_memory_with(site.node) and (writer := self.memory.write_after(site.node)) is not None:
            _raise_lost_write(source, writer)
        call = self._call(source, self.observers[site], str(site))
        site.node.prepend(call)
        del self.calls[source, id(self.observers[site])]
        replace_read(site, call)

    def _observe_output(self, node: Node) -> None:
        if (writer := self.memory.write_after(node)) is not None:
            _raise_lost_write(node, writer)
        readers = list(node.users)
        observer = self.observers[Site(node)]
        call = self._call(node, RepeatedObserver(observer) if self._was_seen(node, observer) else observer, "")
        self.calls[node, id(observer)] = call
        for reader in readers:
            reader.replace_input_with(node, call)

    def _was_seen(self, node: Node, observer: Any) -> bool:
        """True when a node only moves what its input's observer, the same one, looks at."""
        read = node.args[0] if node.target in MOVES and not self.look_again else None
        if read not in self.called or isinstance(observer, FakeQuantizeBase):
            return False
        of_input = self.called[read]
        return of_input is observer or getattr(of_input, "_answers", [None])[0] is observer

    def _call(self, source: Node, observer: Any, read_by: str) -> Node:
        name = self.names.new(PREFIX)
        if self.device is not None and any(tensor.device != self.device for tensor in _tensors(observer)):
            observer.to(self.device)
        self.model.add_module(name, observer)
        if not isinstance(observer, RepeatedObserver):
            self._tell(observer, source, read_by)
        with source.graph.inserting_after(source):
            call = source.graph.create_node("call_module", name, (source,))
        if "val" in source.meta:
            call.meta["val"] = source.meta["val"]
        call.meta["from_node"] = created_from(source, "insert_observers")
        inherit_place(call, source, "insert_observers")
        self.calls[source, id(observer)], self.called[call] = call, observer
        return call

    def _tell(self, observer: Any, source: Node, read_by: str) -> None:
        """Lets an observer of ours know where it is, for its messages, and whether it sees constants only."""
        if not getattr(observer, "site", None):
            place = f"{describe(source)}{f', read as {read_by}' if read_by else ''}"
            object.__setattr__(observer, "site", place)
        if hasattr(observer, "constant_input"):
            only_constants = self.only_constants.get(id(observer), True) and source in self.constants
            self.only_constants[id(observer)] = only_constants
            object.__setattr__(observer, "constant_input", only_constants)


def _check_groups(source: Node, where: str, group_size: int, *, is_constant: bool) -> None:
    """Raises where ``quantize_per_channel_group`` does not take a tensor: it cuts the rows of a matrix."""
    if not is_constant:
        remedy = "Use an observer of the whole tensor, e.g. MinMaxObserver."
        raise SpecError("it is no constant, and only constants are quantized per group", where=where, remedy=remedy)
    shape = tuple(source.meta["val"].shape)
    if len(shape) != 2:
        what = f"its shape is {shape}, and only matrices are quantized per group"
        raise SpecError(what, where=where, remedy="Use PerChannelMinMaxObserver for it.")
    if group_size < 2 or shape[1] % group_size:
        what = f"group_size={group_size} does not cut its rows of {shape[1]}"
        raise SpecError(what, where=where, remedy=f"Choose a group_size of at least 2 that divides {shape[1]}.")


def _tensors(observer: Any) -> Iterator[torch.Tensor]:
    """Yields an observer's own parameters and buffers: ``named_buffers()`` takes 8 us."""
    for module in observer.modules() if isinstance(observer, nn.Module) else ():
        yield from (t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None)


def _writes_to_buffer(site: Site, source: Node) -> bool:
    """True for what an operator writes to, when that is a buffer: observing it would cut the write off."""
    return source in written_by(site.node) and bool(attributes_behind(source))


def _raise_lost_write(node: Node, writer: Node) -> None:
    what = f"it cannot be quantized: {describe(writer)} writes to its memory, and that change would be lost"
    remedy = "Leave it float, write the model without the in-place operation, or take it out of the export: "
    remedy += "exported_program.run_decompositions({}).module()."
    raise AnnotationError(what, where=describe(node), remedy=remedy)
