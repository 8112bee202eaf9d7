"""The limits of parity: one table, for the product and for its tests."""

from __future__ import annotations

from converter.records import Limits

# Selection is in float32 in every dtype, so margin and flips do not depend on it. Layers in float32: ONNX Runtime's
# reductions were up to 8.5e-6 from float64 on SmolLM2-135M (PyTorch's 4e-7); the limit is about five times that. In
# float16 it is about four roundings of the output (2^-11). The model's limits are the measured errors times five or
# more. bfloat16 weights are run in float32 (converter/graph/widen.py), so its limits are those of float32.
LIMITS = {
    "float32": Limits(margin=1e-6, flips=1e-4, layer=4e-5, model=5e-5),
    "float16": Limits(margin=1e-6, flips=1e-4, layer=2e-3, model=5e-2),
    "bfloat16": Limits(margin=1e-6, flips=1e-4, layer=4e-5, model=5e-5),
}
