"""Memory that is used again, and memory that another thread makes ready."""

import threading

import pytest
import torch

from zeropoint.numerics.scratch import WORTH_A_THREAD, LateWrites, scratch


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
def test_late_writes_find_memory_that_another_thread_zeroed(size):
    seen: list[int] = []
    with LateWrites() as writes:
        tensor = writes.empty((size,), torch.int8).fill_(7)
        writes.touch()
        writes.write(lambda: seen.append(int(tensor[0])))
        writes.write(lambda: tensor.fill_(3))
        assert not seen
    assert seen == [0 if size >= WORTH_A_THREAD else 7]
    assert bool((tensor == 3).all())


def test_nothing_is_written_after_an_error():
    tensors: list[torch.Tensor] = []

    def fail() -> None:
        with LateWrites() as writes:
            tensors.append(writes.empty((WORTH_A_THREAD,), torch.int8))
            writes.touch()
            writes.write(lambda: tensors[0].fill_(3))
            raise ValueError("stop")

    before = threading.active_count()
    with pytest.raises(ValueError, match="stop"):
        fail()
    assert threading.active_count() == before
    assert not bool(tensors[0].any())
