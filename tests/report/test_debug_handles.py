"""Numbers that stay with the nodes of an exported program."""

import models
import pytest
import quantizers
import torch
from torch import nn

from zeropoint.core.errors import SpecError
from zeropoint.graph.trace import bfs_trace_with_node_process
from zeropoint.report.debug_handles import CUSTOM_KEY, NUMERIC_DEBUG_HANDLE_KEY, generate_numeric_debug_handle
from zeropoint.workflow import convert_pt2e, prepare_pt2e

theirs = pytest.importorskip("torchao.quantization.pt2e._numeric_debugger")


def program(build):
    module, inputs = build()
    with torch.no_grad():
        return torch.export.export(module, inputs)


def handles(model):
    found = []
    bfs_trace_with_node_process(model, lambda n: found.append(n.meta.get(CUSTOM_KEY, {}).get(NUMERIC_DEBUG_HANDLE_KEY)))
    return found


@pytest.mark.parametrize("build", [models.net, models.conditional, models.scanned])
def test_torchao_gives_the_same(build):
    ours, other = program(build), program(build)
    generate_numeric_debug_handle(ours)
    theirs.generate_numeric_debug_handle(other)
    assert handles(ours) == handles(other)
    assert sorted(handles(ours)) == list(range(1, len(handles(ours)) + 1))
    assert (CUSTOM_KEY, NUMERIC_DEBUG_HANDLE_KEY) == (theirs.CUSTOM_KEY, theirs.NUMERIC_DEBUG_HANDLE_KEY)


def test_nodes_keep_theirs():
    each = program(models.net)
    node = models.find(each.graph_module, "linear")
    node.meta[CUSTOM_KEY] = {"mine": 1, NUMERIC_DEBUG_HANDLE_KEY: 40}
    generate_numeric_debug_handle(each)
    before = handles(each)
    assert node.meta[CUSTOM_KEY] == {"mine": 1, NUMERIC_DEBUG_HANDLE_KEY: 40}
    assert min(handle for handle in before if handle != 40) == 41
    generate_numeric_debug_handle(each)
    assert handles(each) == before


def test_a_dictionary_that_nodes_share_is_not_written_to():
    each = program(models.net)
    shared = {"mine": 1}
    for node in each.graph.nodes:
        node.meta[CUSTOM_KEY] = shared
    generate_numeric_debug_handle(each)
    assert shared == {"mine": 1}
    assert len(set(handles(each))) == len(handles(each))


def test_prepare_and_convert_keep_them():
    each = program(models.net)
    generate_numeric_debug_handle(each)
    names = {
        node.name: node.meta[CUSTOM_KEY][NUMERIC_DEBUG_HANDLE_KEY]
        for node in each.graph.nodes
        if node.users and node.op == "call_function"
    }
    _, inputs = models.net()
    prepared = prepare_pt2e(each.module(), quantizers.STATIC)
    prepared(*inputs)
    converted = convert_pt2e(prepared)
    of_nodes = {n.name: n.meta[CUSTOM_KEY][NUMERIC_DEBUG_HANDLE_KEY] for n in converted.graph.nodes if n.name in names}
    assert {name: of_nodes[name] for name in ("relu", "add", "mean", "linear")} == {
        name: names[name] for name in ("relu", "add", "mean", "linear")
    }
    assert of_nodes["conv2d"] == names["batch_norm"]


def test_a_module_is_refused():
    words = r"^generate_numeric_debug_handle: got GraphModule\w*, not an exported program\. Give what torch\.export"
    for function, match in ((generate_numeric_debug_handle, words), (theirs.generate_numeric_debug_handle, "Expected")):
        with pytest.raises(ValueError, match=match):
            function(program(models.net).module())
    with pytest.raises(SpecError):
        generate_numeric_debug_handle(nn.Linear(2, 2))
