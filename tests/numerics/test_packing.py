"""4-bit packing: layout, exact round trip, refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zeropoint.core.errors import SpecError
from zeropoint.numerics.packing import nibble_range, pack_int4, unpack_int4


def test_the_first_value_is_in_the_low_nibble():
    assert pack_int4(torch.tensor([1, 2, 3, 4], dtype=torch.uint8)).tolist() == [0x21, 0x43]
    assert pack_int4(torch.tensor([-1, 0, 7, -8], dtype=torch.int8)).tolist() == [0x0F, 0x87]


def test_an_odd_length_ends_in_a_zero_nibble():
    assert pack_int4(torch.tensor([15, 1, 9], dtype=torch.uint8)).tolist() == [0x1F, 0x09]
    assert pack_int4(torch.tensor([[-1], [-8]], dtype=torch.int8)).tolist() == [[0x0F], [0x08]]


@given(data=st.data(), dtype=st.sampled_from([torch.int8, torch.uint8]))
@settings(max_examples=60, deadline=None)
def test_round_trip(data, dtype):
    low, high = nibble_range(dtype)
    rows, length = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 7))
    flat = data.draw(st.lists(st.integers(low, high), min_size=rows * length, max_size=rows * length))
    values = torch.tensor(flat, dtype=dtype).reshape(rows, length)
    packed = pack_int4(values)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, (length + 1) // 2)
    restored = unpack_int4(packed, length, dtype)
    assert restored.dtype == dtype
    assert torch.equal(restored, values)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_every_pair_of_values(dtype):
    low, high = nibble_range(dtype)
    values = torch.arange(low, high + 1).to(dtype)
    pairs = torch.cartesian_prod(values, values)
    packed = pack_int4(pairs)
    assert packed.flatten().unique().numel() == 256
    assert torch.equal(unpack_int4(packed, 2, dtype), pairs)


def test_a_transposed_tensor_packs_along_its_own_last_axis():
    values = torch.arange(12, dtype=torch.uint8).reshape(3, 4).t()
    assert torch.equal(unpack_int4(pack_int4(values), 3, torch.uint8), values)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (torch.tensor([8], dtype=torch.int8), r"value 8 does not fit -8\.\.7\. Quantize with quant_min=-8"),
        (torch.tensor([16], dtype=torch.uint8), r"value 16 does not fit 0\.\.15"),
        (torch.tensor([1], dtype=torch.int16), "4-bit values are not held in torch.int16. Use torch.int8"),
        (torch.tensor(1, dtype=torch.int8), "a scalar has no axis"),
    ],
)
def test_pack_refuses(values, words):
    with pytest.raises(SpecError, match=words):
        pack_int4(values)


@pytest.mark.parametrize(
    ("packed", "length", "words"),
    [
        (
            torch.zeros(2, dtype=torch.uint8),
            5,
            r"shape \(2,\) cannot hold 5 values in its last axis: needed are 3 bytes",
        ),
        (torch.zeros(2, dtype=torch.uint8), 2, "needed are 1 bytes"),
        (torch.zeros(2, dtype=torch.int8), 4, "packed values are torch.int8"),
    ],
)
def test_unpack_refuses(packed, length, words):
    with pytest.raises(SpecError, match=words):
        unpack_int4(packed, length, torch.uint8)
