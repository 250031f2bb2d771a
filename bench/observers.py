"""What do observers cost: the range of a histogram against torchao's search, and a forward against torch.aminmax?"""

from __future__ import annotations

import statistics
import warnings
from typing import Any

import torch
from torch.distributions import Cauchy, Laplace, StudentT

from bench._measure import alternate, median_ratio, parser, write_json
from zeropoint.numerics import observers

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torchao.quantization.pt2e import observer as torchao

SIZE = 200_000
SHAPE = (8, 64, 56, 56)


def distributions() -> dict[str, torch.Tensor]:
    """Returns one tensor for each kind of activation."""
    torch.manual_seed(0)
    normal = torch.randn(SIZE)
    return {
        "uniform": torch.rand(SIZE),
        "normal": normal,
        "laplace": Laplace(0.0, 1.0).sample((SIZE,)),
        "student t, 2": StudentT(2.0).sample((SIZE,)),
        "cauchy": Cauchy(0.0, 1.0).sample((SIZE,)),
        "relu": normal.relu(),
        "bimodal": normal + 4 * torch.randn(SIZE).sign(),
        "constant": torch.full((100,), 3.25),
        "tiny": normal * 1e-6,
        "one outlier": torch.cat([normal, torch.tensor([1000.0])]),
        "integers": torch.randint(-3, 4, (SIZE,)).float(),
        "8 values": normal[:8],
    }


def time_ranges(rounds: int) -> dict[str, dict[str, float]]:
    """Returns milliseconds of ``calculate_qparams`` for int8, torchao's and ours, and ours for 4 bits."""
    figures: dict[str, dict[str, float]] = {}
    for name, x in distributions().items():
        theirs = torchao.HistogramObserver(dtype=torch.int8)
        ours = observers.HistogramObserver(dtype=torch.int8)
        narrow = observers.HistogramObserver(dtype=torch.int8, quant_min=-8, quant_max=7)
        for observer in (theirs, ours, narrow):
            observer(x)
        calls = {"torchao": theirs.calculate_qparams, "zeropoint": anew(ours), "zeropoint, 4 bits": anew(narrow)}
        times = alternate(calls, rounds, warm_up=1)
        figures[name] = {key: 1e3 * statistics.median(value) for key, value in times.items()}
        figures[name]["torchao / zeropoint"] = 1 / median_ratio(times, "zeropoint", "torchao")
        figures[name]["equal"] = float(theirs.calculate_qparams()[0] == ours.calculate_qparams()[0])
    return figures


def anew(observer: Any) -> Any:
    """Returns ``calculate_qparams`` of an observer that does not remember its last result."""

    def calculate() -> Any:
        observer.eps.mul_(1)
        return observer.calculate_qparams()

    return calculate


def time_forwards(rounds: int) -> dict[str, dict[str, float]]:
    """Returns nanoseconds per element of a forward, and its ratio to ``torch.aminmax`` in the same round."""
    x, weight = torch.randn(SHAPE), torch.randn(512, 512, 3, 3)
    calls = {
        "torch.aminmax": lambda: torch.aminmax(x),
        "torch.histc": lambda: torch.histc(x, 2048, -6.0, 6.0),
        "MinMax": forward(observers.MinMaxObserver(), x),
        "MinMax, channels_last": forward(observers.MinMaxObserver(), x.to(memory_format=torch.channels_last)),
        "MinMax, torchao": forward(torchao.MinMaxObserver(), x),
        "MovingAverageMinMax": forward(observers.MovingAverageMinMaxObserver(), x),
        "Histogram": forward(observers.HistogramObserver(), x),
        "Histogram, torchao": forward(torchao.HistogramObserver(), x),
        "PerChannelMinMax": forward(observers.PerChannelMinMaxObserver(), weight),
        "PerChannelMinMax, torchao": forward(torchao.PerChannelMinMaxObserver(), weight),
        "PerChannelMinMax, axis 1": forward(observers.PerChannelMinMaxObserver(1), weight),
        "PerChannelMinMax, axis 1, torchao": forward(torchao.PerChannelMinMaxObserver(1), weight),
    }
    times = alternate(calls, rounds)
    sizes = {name: weight.numel() if "PerChannel" in name else x.numel() for name in calls}
    return {
        name: {
            "ns per element": 1e9 * statistics.median(value) / sizes[name],
            "/ aminmax": median_ratio(times, name, "torch.aminmax") * x.numel() / sizes[name],
        }
        for name, value in times.items()
    }


def forward(observer: Any, x: torch.Tensor) -> Any:
    """Returns a function that observes ``x``."""
    return lambda: observer(x)


def print_table(title: str, figures: dict[str, dict[str, float]]) -> None:
    """Prints one row for each name, one column for each figure."""
    columns = list(next(iter(figures.values())))
    print(f"\n{title}\n{'':34s}" + "".join(f"{column:>22s}" for column in columns))
    for name, row in figures.items():
        print(f"{name:34s}" + "".join(f"{row[column]:22.2f}" for column in columns))


def main() -> None:
    """Runs both and prints their tables."""
    options = parser(__doc__ or "")
    options.add_argument("--rounds", type=int, default=7)
    arguments = options.parse_args()
    torch.set_num_threads(1)
    ranges, forwards = time_ranges(arguments.rounds), time_forwards(arguments.rounds)
    print_table("calculate_qparams of a histogram of 2048 bins, ms", ranges)
    print_table(f"forward, {SHAPE} activations and (512, 512, 3, 3) weights", forwards)
    write_json(arguments.json, {"calculate_qparams_ms": ranges, "forward": forwards})


if __name__ == "__main__":
    main()
