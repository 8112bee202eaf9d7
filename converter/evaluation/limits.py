"""The limits of parity: one table, for the product and for its tests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """How far ONNX Runtime may be from PyTorch computing in float32 on weights rounded to the model's dtype.

    margin: two channels whose scores differ by less, relative to the token's largest, may be ranked either way.
    flips: the share of channels that may be ranked differently at all.
    layer: largest error of a layer's output on the same input and mask, relative to its largest magnitude.
    model: the same for the logits and caches of the whole graph run dense (every layer with keep = group).
    """

    margin: float
    flips: float
    layer: float
    model: float


# Selection is in float32 in every dtype, so margin and flips do not depend on it. Layers in float32: ONNX Runtime's
# reductions were up to 8.5e-6 from float64 on SmolLM2-135M (PyTorch's 4e-7); the limit is about five times that. In
# float16 it is about four roundings of the output (2^-11). The model's limits are the measured errors times five or
# more. bfloat16 weights are run in float32 (converter/graph/widen.py), so its limits are those of float32.
LIMITS = {
    "float32": Limits(margin=1e-6, flips=1e-4, layer=4e-5, model=5e-5),
    "float16": Limits(margin=1e-6, flips=1e-4, layer=2e-3, model=5e-2),
    "bfloat16": Limits(margin=1e-6, flips=1e-4, layer=4e-5, model=5e-5),
}
