"""Memory that is used again, and memory that another thread makes ready."""

import threading

import pytest
import torch

from zeropoint.numerics.scratch import WORTH_A_THREAD, scratch, touching


def test_scratch_is_the_same_memory_until_more_is_asked_for():
    first = scratch(100, torch.float32)
    assert scratch(50, torch.float32).data_ptr() == first.data_ptr()
    assert len(scratch(10_000_000, torch.float32)) == 10_000_000
    assert scratch(100, torch.int16).dtype == torch.int16


def test_scratch_made_in_inference_mode_can_be_written_to_outside():
    with torch.inference_mode():
        inside = scratch(20_000_000, torch.int32)
    inside.zero_()
    assert torch.equal(scratch(8, torch.int32), torch.zeros(8, dtype=torch.int32))


def test_each_thread_has_its_own():
    places: list[int] = []
    threads = [threading.Thread(target=lambda: places.append(scratch(9, torch.uint8).data_ptr())) for _ in range(2)]
    keep = scratch(9, torch.uint8)
    for thread in threads:
        thread.start()
        thread.join()
    assert keep.data_ptr() not in places


@pytest.mark.parametrize("size", [100, WORTH_A_THREAD])
def test_touched_memory_is_there_at_the_end_of_the_block(size):
    tensors = [torch.full((size,), 7, dtype=torch.int8), torch.full((3,), 7, dtype=torch.int8)]
    threads = threading.active_count()
    with touching(tensors):
        pass
    touched = size >= WORTH_A_THREAD
    assert all(bool((tensor == (0 if touched else 7)).all()) for tensor in tensors)
    assert threading.active_count() == threads
