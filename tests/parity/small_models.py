"""Small models, one for each form in which operators meet: a function gives the module and its inputs, seeded."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

Model = tuple[nn.Module, tuple[torch.Tensor, ...]]
PICTURE, ROWS, SOUND = (2, 3, 8, 8), (4, 8), (2, 3, 16)


class Calls(nn.Module):
    """A module whose forward is a function of its parts and inputs."""

    def __init__(self, function: Callable[..., object], **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, *inputs: torch.Tensor) -> object:
        return self.function(self, *inputs)


class Tied(nn.Module):
    """Two layers of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x).relu())


class Counts(nn.Module):
    """Writes to a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.add_(1)
        return self.linear(x)


def _lin(inputs: int = 8, outputs: int = 8, **settings: bool) -> nn.Linear:
    return nn.Linear(inputs, outputs, **settings)


def _conv(inputs: int = 3, outputs: int = 4, size: int = 3, **settings: object) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, **settings)  # type: ignore[arg-type]


def _attention(self: Calls, x: torch.Tensor) -> torch.Tensor:
    q, k, v = self.get_submodule("q")(x), self.get_submodule("k")(x), self.get_submodule("v")(x)
    return torch.matmul(torch.softmax(torch.matmul(q, k.transpose(-2, -1)) / 8**0.5, -1), v)


def _cell(self: Calls, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    gate = torch.sigmoid(self.get_submodule("a")(x) + self.get_submodule("b")(h))
    return gate * torch.tanh(self.get_submodule("c")(x)) + (1 - gate) * h


def _u_net(self: Calls, x: torch.Tensor) -> torch.Tensor:
    down = self.get_submodule("a")(x).relu()
    middle = self.get_submodule("b")(F.max_pool2d(down, 2, 2)).relu()
    return self.get_submodule("c")(torch.cat([down, F.interpolate(middle, scale_factor=2.0)], 1))


def _squeeze_excite(self: Calls, x: torch.Tensor) -> torch.Tensor:
    y = self.get_submodule("a")(x)
    return y * torch.sigmoid(self.get_submodule("b")(F.adaptive_avg_pool2d(y, 1)))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...]]] = {
    "linear": (lambda: _lin(), (ROWS,)),
    "linear_without_bias": (lambda: _lin(bias=False), (ROWS,)),
    "linear_of_sequences": (lambda: nn.Sequential(_lin(), nn.ReLU(), _lin(8, 3)), ((2, 5, 8),)),
    "mlp": (lambda: nn.Sequential(_lin(), nn.ReLU(), _lin(), nn.GELU(), _lin(8, 3)), (ROWS,)),
    "deep_mlp": (lambda: nn.Sequential(*(layer for _ in range(6) for layer in (_lin(), nn.Tanh()))), (ROWS,)),
    "linear_hardtanh": (lambda: nn.Sequential(_lin(), nn.Hardtanh(-0.3, 0.4)), (ROWS,)),
    "layer_norm_mlp": (lambda: nn.Sequential(nn.LayerNorm(8), _lin(), nn.SiLU(), _lin()), (ROWS,)),
    "linear_batch_norm": (lambda: nn.Sequential(_lin(), nn.BatchNorm1d(8), nn.ReLU()), (ROWS,)),
    "called_twice": (lambda: Calls(lambda s, x: s.a(s.a(x).relu()), a=_lin()), (ROWS,)),
    "tied": (Tied, (ROWS,)),
    "buffer_that_is_written": (Counts, (ROWS,)),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU(), nn.Conv1d(4, 2, 5, padding=2)), (SOUND,)),
    "conv2d": (lambda: _conv(), (PICTURE,)),
    "conv2d_relu": (lambda: nn.Sequential(_conv(), nn.ReLU()), (PICTURE,)),
    "conv2d_relu6": (lambda: nn.Sequential(_conv(), nn.ReLU6(), _conv(4, 2)), (PICTURE,)),
    "conv2d_strided": (lambda: _conv(stride=2, padding=1), (PICTURE,)),
    "conv2d_dilated": (lambda: _conv(dilation=2, bias=False), (PICTURE,)),
    "conv2d_same": (lambda: _conv(padding="same"), (PICTURE,)),
    "conv2d_groups": (lambda: nn.Sequential(_conv(3, 6), nn.ReLU(), _conv(6, 4, groups=2)), (PICTURE,)),
    "depthwise_separable": (
        lambda: nn.Sequential(_conv(3, 3, padding=1, groups=3), nn.ReLU(), _conv(3, 8, 1)), (PICTURE,),
    ),
    "conv_batch_norm": (lambda: nn.Sequential(_conv(), nn.BatchNorm2d(4)), (PICTURE,)),
    "conv_batch_norm_relu": (
        lambda: nn.Sequential(_conv(bias=False), nn.BatchNorm2d(4), nn.ReLU(), _conv(4, 2, 1)), (PICTURE,),
    ),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(2, 3, 3), nn.ReLU()), ((1, 2, 5, 5, 5),)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(3, 4, 4, stride=2), (SOUND,)),
    "conv_transpose2d": (lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 3, stride=2), nn.ReLU()), (PICTURE,)),
    "residual": (
        lambda: Calls(lambda s, x: (s.b(s.a(x).relu()) + x).relu(), a=_conv(3, 3, padding=1), b=_conv(3, 3, 1)),
        (PICTURE,),
    ),
    "inverted_residual": (
        lambda: Calls(
            lambda s, x: s.c(s.b(s.a(x))) + x,
            a=nn.Sequential(_conv(3, 12, 1), nn.BatchNorm2d(12), nn.ReLU6()),
            b=nn.Sequential(_conv(12, 12, padding=1, groups=12), nn.BatchNorm2d(12), nn.ReLU6()),
            c=nn.Sequential(_conv(12, 3, 1), nn.BatchNorm2d(3)),
        ),
        (PICTURE,),
    ),
    "add_in_place": (lambda: Calls(lambda s, x: s.a(x).add_(x).relu_(), a=_lin()), (ROWS,)),
    "add_itself": (lambda: Calls(lambda s, x: s.b(s.a(x) + s.a(x)), a=_lin(), b=_lin()), (ROWS,)),
    "numbers": (lambda: Calls(lambda s, x: s.a(x) * 0.5 + 1.0, a=_lin()), (ROWS,)),
    "product": (lambda: Calls(lambda s, x, y: s.a(x) * s.b(y), a=_lin(), b=_lin()), (ROWS, ROWS)),
    "two_outputs": (lambda: Calls(lambda s, x: (s.a(x), s.b(x).relu()), a=_lin(), b=_lin()), (ROWS,)),
    "concatenation": (
        lambda: Calls(lambda s, x: s.c(torch.cat([s.a(x), s.b(x), x], 1)), a=_lin(), b=_lin(), c=_lin(24)), (ROWS,),
    ),
    "chunks": (
        lambda: Calls(lambda s, x: torch.cat([part.relu() for part in s.a(x).chunk(2, 1)][::-1], 1), a=_lin()),
        (ROWS,),
    ),
    "slices": (lambda: Calls(lambda s, x: s.b(s.a(x)[:, 1:5]), a=_lin(), b=_lin(4)), (ROWS,)),
    "views": (
        lambda: Calls(lambda s, x: s.b(s.a(x).view(4, 2, 4).permute(0, 2, 1).reshape(4, 8)), a=_lin(), b=_lin()),
        (ROWS,),
    ),
    "classifier": (
        lambda: nn.Sequential(
            _conv(), nn.ReLU(), nn.MaxPool2d(2, 2), _conv(4, 6), nn.ReLU(), nn.Flatten(), _lin(6, 5)
        ),
        (PICTURE,),
    ),
    "average_pools": (
        lambda: nn.Sequential(_conv(), nn.AvgPool2d(2), _conv(4, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        (PICTURE,),
    ),
    "means": (lambda: Calls(lambda s, x: s.b(s.a(x).mean((2, 3))), a=_conv(), b=_lin(4)), (PICTURE,)),
    "attention": (lambda: Calls(_attention, q=_lin(), k=_lin(), v=_lin()), ((2, 5, 8),)),
    "fused_attention": (
        lambda: Calls(
            lambda s, x: F.scaled_dot_product_attention(s.q(x), s.k(x), s.v(x)), q=_lin(), k=_lin(), v=_lin()
        ),
        ((2, 1, 5, 8),),
    ),
    "recurrent_cell": (lambda: Calls(_cell, a=_lin(), b=_lin(), c=_lin()), (ROWS, ROWS)),
    "u_net": (lambda: Calls(_u_net, a=_conv(3, 4, padding=1), b=_conv(4, 4, padding=1), c=_conv(8, 2, 1)), (PICTURE,)),
    "squeeze_excite": (lambda: Calls(_squeeze_excite, a=_conv(), b=_conv(4, 4, 1)), (PICTURE,)),
    "pixel_shuffle": (lambda: nn.Sequential(_conv(3, 8), nn.PixelShuffle(2), _conv(2, 2, 1)), (PICTURE,)),
    "dropout": (lambda: nn.Sequential(_lin(), nn.Dropout(0.3), nn.ReLU(), _lin()), (ROWS,)),
    "clamped": (lambda: Calls(lambda s, x: s.b(s.a(x).clamp(-0.2, 0.3)), a=_lin(), b=_lin()), (ROWS,)),
}  # fmt: skip


def build(name: str) -> Model:
    """Returns a model in eval mode, with statistics of batch norm that are not the initial ones, and its inputs."""
    torch.manual_seed(len(name))
    make, shapes = MODELS[name]
    module = make().eval()
    for each in module.modules():
        if isinstance(each, nn.modules.batchnorm._BatchNorm) and each.running_mean is not None:
            each.running_mean.uniform_(-0.5, 0.5)
            assert each.running_var is not None
            each.running_var.uniform_(0.5, 2.0)
    return module, tuple(torch.randn(shape) for shape in shapes)
