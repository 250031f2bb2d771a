"""Short walks along the graph."""

from __future__ import annotations

from torch.fx import Node


def sole_reader(node: Node) -> Node | None:
    """Returns the only node that reads this one; None when there are none or several."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def ancestors(node: Node) -> set[Node]:
    """Returns every node that this one depends on."""
    seen: set[Node] = set()
    waiting = list(node.all_input_nodes)
    while waiting:
        current = waiting.pop()
        if current not in seen:
            seen.add(current)
            waiting.extend(current.all_input_nodes)
    return seen


def collect_producer_nodes(node: Node) -> list[Node] | None:
    """Returns the node and every node that it depends on, itself first; None where an input of the graph is one."""
    found, waiting = {node: None}, [node]
    while waiting:
        current = waiting.pop()
        for read in current.all_input_nodes:
            if read.op == "placeholder":
                return None
            if read not in found:
                found[read] = None
                waiting.append(read)
    return list(found)
