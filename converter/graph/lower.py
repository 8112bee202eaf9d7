"""The graph for a compiler that knows neither our op nor functions: standard nodes only, each in the main graph."""

from __future__ import annotations

from dataclasses import replace

import onnx
import onnx.inliner
import onnx_ir as ir

from converter.errors import BuildError
from converter.graph.forms import form_of
from converter.graph.op import function
from converter.signature import DOMAIN, OP


def lower(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with each `SparseLinear` as standard nodes; its GEMM is in the dtype of its weight.

    The body that OUT holds multiplies in float32 where the dtype is bfloat16, for ONNX Runtime's CPU provider.

    Raises:
        BuildError: when the weights are stored in fewer bits than the dtype.
    """
    lowered = onnx.ModelProto()
    lowered.CopyFrom(model)
    form = form_of(model)
    if form.weights != "dtype":
        raise BuildError(
            f"weights: must be dtype for TensorRT-RTX, got {form.weights}. Export the model again: --weights dtype."
        )
    if form.dtype == "bfloat16":
        # The lines for float16 name no dtype: they cast like X.
        body = ir.serde.serialize_function(function(replace(form, dtype="float16")))
        others = [f for f in lowered.functions if (f.domain, f.name) != (DOMAIN, OP)]
        del lowered.functions[:]
        lowered.functions.extend([*others, body])
    return onnx.inliner.inline_local_functions(lowered)
