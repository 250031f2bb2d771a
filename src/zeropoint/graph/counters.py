"""The counters of batches, ``num_batches_tracked``, beside the running statistics of batch norm.

``nn.BatchNorm`` counts in train mode only. Nothing of an exported graph depends on them, but state dictionaries do.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch.fx import GraphModule, Node

from zeropoint.graph.attributes import attribute_reads, tensors_of
from zeropoint.graph.batch_norms import COUNTER
from zeropoint.graph.bind import argument
from zeropoint.graph.compat import fake_mode_of
from zeropoint.graph.emit import inherit
from zeropoint.graph.memory import written_by

aten = torch.ops.aten
STATISTIC = "running_mean"


class Counters:
    """The counters of a model, by the batch norm that they belong to.

    Args:
        model: its graph is changed; a counter that it does not hold, or no longer holds, is not made.
    """

    def __init__(self, model: GraphModule) -> None:
        self._model = model
        self._reads: dict[str, list[Node]] = defaultdict(list)
        for node in attribute_reads(model.graph):
            self._reads[str(node.target)].append(node)
        self._tensors = tensors_of(model)
        self._counted_before = {path for path in self._reads if path.endswith(COUNTER) and self._is_written(path)}

    def stop(self, norm: Node) -> bool:
        """Erases what counts the batches of a batch norm; True where there was something."""
        counting = [(read, node) for read in self._reads.get(_path(norm), ()) for node in _increments(read)]
        for counter, node in counting:
            node.replace_all_uses_with(counter)
            norm.graph.erase_node(node)
        return bool(counting)

    def start(self, norm: Node) -> None:
        """Adds what counts the batches of a batch norm before it, where the model holds the counter."""
        path = _path(norm)
        if path in self._tensors and path not in self._counted_before:
            counter = self._read(path, norm)
            with norm.graph.inserting_before(norm):
                increment = norm.graph.create_node("call_function", aten.add_.Tensor, (counter, 1), name="add_")
            self._describe(increment, path, norm)

    def _read(self, path: str, norm: Node) -> Node:
        if not self._reads[path]:
            with norm.graph.inserting_before(next(iter(norm.graph.nodes))):
                self._reads[path].append(norm.graph.get_attr(path))
            self._describe(self._reads[path][0], path, norm)
        return self._reads[path][0]

    def _describe(self, node: Node, path: str, norm: Node) -> None:
        mode, tensor = fake_mode_of(norm.graph), self._tensors[path]
        node.meta["val"] = mode.from_tensor(tensor, static_shapes=True) if mode else tensor
        inherit(node, norm, "count_batches")

    def _is_written(self, path: str) -> bool:
        return any(read in written_by(user) for read in self._reads[path] for user in read.users)


def _path(norm: Node) -> str:
    """Returns the path of the counter beside a batch norm's statistics; empty where those are no buffers."""
    mean = argument(norm, STATISTIC)
    path = str(mean.target) if isinstance(mean, Node) and mean.op == "get_attr" else ""
    return path.removesuffix(STATISTIC) + COUNTER if path.endswith(STATISTIC) else ""


def _increments(counter: Node) -> list[Node]:
    """Returns the nodes that add 1 to a counter, in place, or apart and then copied to it; readers come first."""
    found: list[Node] = []
    for user in counter.users:
        if user.target is aten.add_.Tensor and user.args == (counter, 1):
            found.append(user)
        elif user.target is aten.copy_.default and user.args[0] is counter:
            sums = _sums(user.args[1])
            if sums and sums[-1].args[0] is counter:
                found.extend((user, *sums))
    return found


def _sums(node: Any) -> list[Node]:
    """Returns the additions of 1, one after the other, that a value is the result of; the last comes first."""
    found: list[Node] = []
    while isinstance(node, Node) and node.target is aten.add.Tensor and node.args[1:] == (1,):
        found.append(node)
        node = node.args[0]
    return found
