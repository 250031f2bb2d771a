"""Observers: they look at tensors and choose the scale and zero point to quantize them with."""

from zeropoint.numerics.observers.affine import AffineQuantizedObserverBase, AffineQuantizedPlaceholderObserver
from zeropoint.numerics.observers.affine_minmax import (
    AffineQuantizedMinMaxObserver,
    AffineQuantizedMovingAverageMinMaxObserver,
)
from zeropoint.numerics.observers.base import ObserverBase, PartialWrapper, UniformQuantizationObserverBase
from zeropoint.numerics.observers.fixed import FixedQParamsObserver
from zeropoint.numerics.observers.histogram import HistogramObserver
from zeropoint.numerics.observers.minmax import (
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    MovingAveragePerGroupMinMaxObserver,
    PerChannelMinMaxObserver,
    PerGroupMinMaxObserver,
)
from zeropoint.numerics.observers.mse import MSEObserver, PerChannelMSEObserver
from zeropoint.numerics.observers.percentile import PercentileObserver
from zeropoint.numerics.observers.placeholder import (
    NoopObserver,
    PlaceholderObserver,
    RecordingObserver,
    ReuseInputObserver,
)

__all__ = [
    "AffineQuantizedMinMaxObserver",
    "AffineQuantizedMovingAverageMinMaxObserver",
    "AffineQuantizedObserverBase",
    "AffineQuantizedPlaceholderObserver",
    "FixedQParamsObserver",
    "HistogramObserver",
    "MSEObserver",
    "MinMaxObserver",
    "MovingAverageMinMaxObserver",
    "MovingAveragePerChannelMinMaxObserver",
    "MovingAveragePerGroupMinMaxObserver",
    "NoopObserver",
    "ObserverBase",
    "PartialWrapper",
    "PerChannelMSEObserver",
    "PerChannelMinMaxObserver",
    "PerGroupMinMaxObserver",
    "PercentileObserver",
    "PlaceholderObserver",
    "RecordingObserver",
    "ReuseInputObserver",
    "UniformQuantizationObserverBase",
]
