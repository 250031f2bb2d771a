"""Tiny models as functions that return ``(module, inputs)``, seeded; and their exports, each made once per session."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import nn
from torch.fx import GraphModule, Node

from zeropoint.graph.copies import deep_copy

Model = tuple[nn.Module, tuple[torch.Tensor, ...]]


def seeded(function: Callable[..., Model]) -> Callable[..., Model]:
    """Builds a model from a fixed seed, in eval mode, with batch norm statistics and factors that are not 0 and 1."""

    @functools.wraps(function)
    def build(*args, **kwargs):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module, inputs = function(*args, **kwargs)
            randomize_norms(module)
        return module.eval(), inputs

    return build


def randomize_norms(module: nn.Module) -> None:
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            if norm.running_mean is not None:
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.3, 2.0)
            if norm.affine:
                nn.init.uniform_(norm.weight, 0.5, 1.5)
                nn.init.normal_(norm.bias)


class Applied(nn.Module):
    """Submodules, and a function of them and the inputs as ``forward``."""

    def __init__(self, function: Callable[..., object], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *inputs):
        return self.function(self, *inputs)


class Net(nn.Module):
    """Two blocks of convolution, batch norm and relu, a skip connection, and a linear layer: nested names."""

    class Block(nn.Module):
        def __init__(self, i, o):
            super().__init__()
            self.conv = nn.Conv2d(i, o, 3, padding=1, bias=False)
            self.norm = nn.BatchNorm2d(o)
            self.act = nn.ReLU()

        def forward(self, x):
            return self.act(self.norm(self.conv(x)))

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(self.Block(3, 4), self.Block(4, 4))
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        first = self.blocks[0](x)
        return self.head((first + self.blocks[1](first)).mean((2, 3)))


@seeded
def net() -> Model:
    return Net(), (torch.randn(2, 3, 6, 6),)


@seeded
def linear() -> Model:
    return nn.Linear(4, 3), (torch.randn(2, 4),)


@seeded
def mlp() -> Model:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), (torch.randn(2, 4),)


@seeded
def conv_relu() -> Model:
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU()), (torch.randn(1, 2, 5, 5),)


@seeded
def add_itself() -> Model:
    return Applied(lambda m, x: m.conv(x) + m.conv(x)[:1] + x + x, conv=nn.Conv2d(2, 2, 1)), (torch.randn(1, 2, 3, 3),)


@seeded
def branches() -> Model:
    """One tensor with three readers, and a concatenation."""

    def forward(m, x):
        a = m.a(x)
        return torch.cat([a, m.b(a), m.c(a)], 1)

    return Applied(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 4)), (torch.randn(2, 4),)


@seeded
def adds() -> Model:
    return Applied(lambda m, x, y: (x + y) + (x + x)), (torch.randn(3), torch.randn(3))


@seeded
def called_twice() -> Model:
    """One linear layer, called twice."""
    return Applied(lambda m, x: m.layer(m.layer(x)), layer=nn.Linear(4, 4)), (torch.randn(2, 4),)


@seeded
def counter() -> Model:
    """A buffer that the graph writes to through a view, and one that it only reads."""

    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("state", torch.zeros(2, 3))
            self.register_buffer("table", torch.arange(6.0).reshape(2, 3))

        def forward(self, x):
            self.state[0].add_(x)
            return self.state + self.table.t().t() * x

    return Counter(), (torch.randn(3),)


@seeded
def conditional() -> Model:
    """``cond`` with a linear layer in one branch."""

    class Conditional(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return torch.cond(x.sum() > 0, lambda x: self.layer(x), lambda x: x * 2, (x,))

    return Conditional(), (torch.randn(2, 4),)


@seeded
def looped() -> Model:
    """``while_loop`` whose body has a linear layer."""

    class Looped(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            from torch._higher_order_ops.while_loop import while_loop

            count = torch.tensor(0)
            return while_loop(lambda i, x: i < 3, lambda i, x: (i + 1, self.layer(x)), (count, x))[1]

    return Looped(), (torch.randn(2, 4),)


@seeded
def scanned() -> Model:
    """``scan`` whose body has a linear layer."""

    class Scanned(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            from torch._higher_order_ops.scan import scan

            def step(carry, x):
                carry = self.layer(carry) + x
                return carry, carry * 2

            return scan(step, torch.zeros(4), x)[1]

    return Scanned(), (torch.randn(3, 4),)


@functools.cache
def _export(build: Callable[..., Model], arguments: tuple[object, ...], strict: bool) -> GraphModule:
    module, inputs = build(*arguments)
    with torch.no_grad():
        return torch.export.export(module, inputs, strict=strict).module()


def exported(build: Callable[..., Model], *arguments: object, strict: bool = False) -> GraphModule:
    """Returns a fresh copy of the exported model; the export itself is made once per session."""
    return deep_copy(_export(build, arguments, strict))


def export(module: nn.Module, *inputs: torch.Tensor) -> GraphModule:
    """Returns an export of a model that no other test uses."""
    with torch.no_grad():
        return torch.export.export(module, inputs).module()


def find(model: GraphModule, operator: str, index: int = 0) -> Node:
    """Returns the nth node of the graph whose operator has this name, e.g. ``conv2d``."""
    return [node for node in model.graph.nodes if name_of(node) == operator][index]


def count(model: GraphModule, operator: str) -> int:
    """Returns how many nodes of the graph have this operator."""
    return sum(name_of(node) == operator for node in model.graph.nodes)


def name_of(node: Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return schema.name.rpartition("::")[2] if schema is not None else node.op
