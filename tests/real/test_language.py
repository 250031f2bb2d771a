"""MiniLM with activations quantized at run time, on the ExecuTorch runtime: what the README promises of it."""

import pytest

import zeropoint as zp
from bench.dynamic import BATCH, TOKENS, dynamic_int8, dynamic_int8_and_table
from zeropoint.backends import xnnpack
from zeropoint.runtime.executorch import Program
from zoo import minilm

NEWS = 320


@pytest.fixture(scope="module")
def encoder():
    return minilm.load(BATCH, TOKENS)


@pytest.fixture(scope="module")
def probe(encoder):
    return minilm.Probe(encoder[0], BATCH, TOKENS, train=600, test=NEWS)


@pytest.fixture(scope="module")
def float_bytes(encoder):
    return len(xnnpack.lower_float(*encoder).pte)


@pytest.mark.parametrize(
    ("quantizer", "ratio"), [(dynamic_int8, 0.4), (dynamic_int8_and_table, 0.3)], ids=["layers", "tables too"]
)
def test_topics_are_found_as_before(encoder, probe, float_bytes, quantizer, ratio):
    model, inputs = encoder
    result = zp.quantize(model, inputs, quantizer=quantizer())
    program = Program(result.pte)
    accuracy = probe.accuracy(lambda *chunk: program(*chunk)[0])
    assert accuracy >= probe.accuracy(model) - 0.005
    assert len(result.pte) <= ratio * float_bytes
    assert all(row.is_quantized for row in result.coverage if row.operator == "linear")
