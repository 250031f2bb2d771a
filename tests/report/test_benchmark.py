"""The words and figures of a benchmark, from figures that are given."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from zeropoint.core import processor
from zeropoint.report.speed.benchmark import Benchmark, FileFigures
from zeropoint.report.speed.borders import Borders, FloatGroup
from zeropoint.report.speed.work import NodeWork

FLOATS = FileFigures(4000, (0.010, 0.012, 0.011, 0.010, 0.030), 9_000_000, 1, ())
OURS = FileFigures(1100, (0.004, 0.006, 0.004, 0.005, 0.010), 3_000_000, 1, ())
WORK = (NodeWork("conv2d", "conv2d", "stem", 900_000, True), NodeWork("linear", "linear", "head", 100_000, False))
BORDERS = Borders(3, 1, 0, 1, ())
FASTER = Benchmark(FLOATS, OURS, 5, 2, "avx512_vnni", WORK, BORDERS)


@pytest.fixture(autouse=True)
def instructions(monkeypatch, tmp_path):
    """Returns a function that sets what the processor has; a dot product at first."""
    path = tmp_path / "cpuinfo"
    monkeypatch.setattr(processor, "FLAGS", path)
    path.write_text("flags : avx512_vnni")
    return path.write_text


def slower(**changes: object) -> Benchmark:
    return replace(FASTER, quantized_file=replace(OURS, seconds=FLOATS.seconds), **changes)


def test_figures():
    assert FASTER.ratio == pytest.approx(0.4)  # 0.4, 0.5, 0.364, 0.5, 0.333
    assert (FASTER.runs, FLOATS.median_ms, FLOATS.p90_ms) == (5, pytest.approx(11), pytest.approx(30))
    assert FileFigures(1, tuple(i / 1e3 for i in range(1, 11)), None, 1, ()).p90_ms == pytest.approx(9)
    assert (FASTER.integer_macs, FASTER.float_macs, FASTER.why) == (900_000, 100_000, ())


def test_text():
    assert str(FASTER).splitlines() == [
        "latency   float 11 ms, quantized 5 ms: 0.40 of the float time",
        "          medians of 5 alternating runs after 5, 2 threads",
        "          90th percentile: float 30 ms, quantized 10 ms",
        "file      4,000 -> 1,100 bytes (0.275)",
        "memory    float 9.0 MB, quantized 3.0 MB: growth of a process's peak as it reads, loads and runs it",
        "work      900,000 multiply-accumulates in integers (90.0%), 100,000 in float",
        "          in float, the most: linear (linear in head) 100,000",
        "borders   1 float value quantized, 1 dequantized; 0 requantizations; 0 float islands",
        "delegates float 1, quantized 1; left outside: nothing",
        "processor integer dot product: avx512_vnni",
    ]


def test_json_holds_the_figures():
    found = json.loads(FASTER.to_json())
    assert found["ratio"] == FASTER.ratio
    assert found["float"]["seconds"] == list(FLOATS.seconds)
    assert found["work"][1]["module"] == "head"
    assert found["borders"]["exits"] == 1


def test_memory_that_is_not_known():
    figures = replace(FASTER, float_file=replace(FLOATS, peak_bytes=None))
    assert "memory    not measured: this system does not tell the peak of a process" in str(figures)
    assert json.loads(figures.to_json())["float"]["peak_bytes"] is None


# -- why -------------------------------------------------------------------------------------------------------------


def test_nothing_explains_it():
    steady = replace(FLOATS, seconds=(0.01,) * 5)
    why = replace(FASTER, float_file=steady, quantized_file=steady).why
    assert len(why) == 1
    assert why[0].startswith("nothing in the graph or of the processor explains it")


def test_no_instruction_and_depthwise_convolutions(instructions):
    instructions("flags : avx2")
    work = (*WORK, NodeWork("conv2d_1", "conv2d", "", 1_000_000, True, True))
    assert slower(work=work).why[:2] == (
        "this processor has no integer dot product instruction, so int8 gains little over float",
        (
            "without one, XNNPACK's int8 depthwise convolutions (1 of 3 layers, 50% of the multiply-accumulates) are "
            "slower than float ones"
        ),
    )


def test_float_work():
    work = (WORK[0], replace(WORK[1], multiply_accumulates=600_000))
    assert slower(work=work).why[0] == "40% of the multiply-accumulates stay float (600,000 of 1,500,000)"
    none = "none of the 100,000 multiply-accumulates are in integers: int8 makes the file smaller, not faster"
    assert slower(work=WORK[1:]).why[0] == none
    assert slower(work=()).why[0] == "no operator multiplies and accumulates, which is where int8 gains"


def test_islands_and_requantizations():
    islands = (FloatGroup(("a", "b"), ("gelu", "mul"), 1, 1), FloatGroup(("c",), ("gelu",), 1, 1))
    assert slower(borders=Borders(9, 4, 1, 3, islands)).why[:2] == (
        (
            "2 groups of float operators stand between integer ones (gelu 2, mul 1): 4 values are quantized and 3 "
            "dequantized at a border, and each costs a pass over its values"
        ),
        "1 requantization: integers are brought to another scale, and each costs a pass over its values",
    )


def test_pieces_and_operators_outside():
    ours = replace(OURS, seconds=FLOATS.seconds, delegates=4, outside=(("aten.foo", 2),))
    assert replace(FASTER, quantized_file=ours).why[:2] == (
        "the file runs in 4 pieces on the delegate, the float file in 1",
        "operators run outside of the delegate, in slow portable kernels: aten.foo 2",
    )


def test_small_models_and_busy_machines():
    tiny = replace(FLOATS, seconds=(0.00005, 0.00005, 0.0001))
    assert replace(FASTER, float_file=tiny, quantized_file=tiny).why == (
        (
            "the model is small: float takes 0.05 ms for 1,000,000 multiply-accumulates, and much of that is the cost "
            "of a call, which int8 does not change"
        ),
        "the times vary: their 90th percentile is 2.0 times their median, so the machine was busy",
    )
