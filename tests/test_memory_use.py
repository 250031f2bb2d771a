"""Models are freed, and memory does not grow with the calibration data."""

import gc
import tracemalloc
import weakref

import torch
from torch import nn

import zeropoint as zp
from zeropoint.backends.xnnpack import XNNPACKQuantizer, get_default_quantization_config, lower


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()


def test_nothing_keeps_a_model_alive():
    model = small()
    inputs = (torch.randn(1, 3, 8, 8),)
    graph = torch.export.export(model, inputs).module()
    prepared = zp.prepare_pt2e(graph, XNNPACKQuantizer().set_global(get_default_quantization_config()))
    prepared(*inputs)
    converted = zp.convert_pt2e(prepared)
    lower(converted, inputs)
    tensors = [*model.parameters(), *converted.buffers(), *converted.parameters()]
    held = [weakref.ref(tensor) for tensor in tensors] + [weakref.ref(m) for m in (model, graph, prepared, converted)]
    del tensors, model, graph, prepared, converted
    gc.collect()
    assert [ref() for ref in held if ref() is not None] == []


def test_quantizers_keep_no_model_alive():
    quantizer = zp.ComposableQuantizer([XNNPACKQuantizer().set_global(get_default_quantization_config())])
    graph = torch.export.export(small(), (torch.randn(1, 3, 8, 8),)).module()
    prepared = zp.prepare_pt2e(graph, quantizer)
    held = [weakref.ref(graph), weakref.ref(prepared), *(weakref.ref(p) for p in prepared.parameters())]
    del graph, prepared
    gc.collect()
    assert all(ref() is None for ref in held)


def peak_bytes(count: int) -> int:
    """Returns the most memory that calibration with ``count`` batches took: Python objects and what buffers grew."""
    graph = torch.export.export(small(), (torch.randn(1, 3, 64, 64),)).module()
    prepared = zp.prepare_pt2e(graph, XNNPACKQuantizer().set_global(get_default_quantization_config()))
    state_before = sum(buffer.numel() * buffer.element_size() for buffer in prepared.buffers())
    tracemalloc.start()
    with torch.no_grad():
        for seed in range(count):
            prepared(torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(seed)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak + sum(buffer.numel() * buffer.element_size() for buffer in prepared.buffers()) - state_before


def test_calibration_streams():
    peak_bytes(2)
    few, many = peak_bytes(4), peak_bytes(100)
    assert many < 1.5 * few + 20_000


def test_quantize_keeps_a_bounded_part_of_a_stream():
    from zeropoint.calibration import KEPT_SAMPLES, CalibrationData

    graph = torch.export.export(small(), (torch.randn(1, 3, 8, 8),)).module()
    alive: list[weakref.ref] = []

    def stream():
        for _ in range(200):
            batch = torch.randn(1, 3, 8, 8)
            alive.append(weakref.ref(batch))
            yield (batch,)

    data = CalibrationData(stream(), graph)
    assert len(data.kept) == KEPT_SAMPLES
    assert sum(1 for _ in data) == 200
    assert sum(ref() is not None for ref in alive) <= KEPT_SAMPLES + 2


def test_the_result_of_quantize_keeps_no_data_and_no_float_model():
    model, alive = small(), []

    def stream():
        for _ in range(4):
            batch = torch.randn(1, 3, 8, 8)
            alive.append(weakref.ref(batch))
            yield (batch,)

    result = zp.quantize(model, (torch.randn(1, 3, 8, 8),), stream())
    alive += [weakref.ref(model[0].weight), weakref.ref(model[3].weight)]
    del model
    gc.collect()
    assert result.verification is not None
    assert [ref() for ref in alive if ref() is not None] == []
