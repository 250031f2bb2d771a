"""What spells and repairs a graph is a pass: its errors name it, and it treats the bodies of control flow."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch.fx import GraphModule

import tests.models as models
from tests.backends.q_dq import Graph, exported, fake
from zeropoint.backends.xnnpack.repair import repair
from zeropoint.backends.xnnpack.transform import TO_ANNOTATE, spell
from zeropoint.core.errors import GraphError
from zeropoint.graph.graph_pass import bodies, recompile
from zeropoint.graph.no_ops import erase_no_ops

X = torch.randn(2, 4)


@pytest.mark.parametrize(
    ("run", "name", "function"),
    [
        (lambda model: spell(model, TO_ANNOTATE), "spell", lambda x: (x + 1).unsqueeze(0)),
        (repair, "repair", lambda x: F.relu(F.pad(fake(x), (1, 1)))),
        (erase_no_ops, "erase_no_ops", lambda x: (x + 1).float()),
    ],
)
def test_an_error_names_the_pass(run: Callable[[GraphModule], object], name: str, function: Callable[..., object]):
    model = exported(Graph(function), X)
    for node in model.graph.nodes:
        if models.name_of(node) != "unsqueeze":
            node.meta.pop("val", None)
    with pytest.raises(GraphError, match=f"^{name}: the pass failed: KeyError: 'val'"):
        run(model)


def test_bodies_are_spelled_too():
    model = models.exported(models.conditional)
    spell(model, TO_ANNOTATE)
    (product,) = [node for _, body in bodies(model) for node in body.graph.nodes if models.name_of(node) == "mul"]
    assert product.args[1].op == "get_attr"


def test_the_code_of_bodies_is_brought_up_to_date():
    model, (x,) = models.exported(models.conditional), models.conditional()[1]
    for _, body in bodies(model):
        for node in body.graph.nodes:
            if node.target is torch.ops.aten.mul.Tensor:
                node.args = (node.args[0], 3)
    recompile(model)
    torch.testing.assert_close(model(-x.abs()), -3 * x.abs())
