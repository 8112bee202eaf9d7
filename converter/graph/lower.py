"""The graph for a compiler that knows neither our op nor functions: standard nodes only, each in the main graph."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import onnx
import onnx.helper
import onnx.inliner
import onnx_ir as ir

from converter.errors import BuildError
from converter.graph.op import ATTRIBUTES, DOMAIN, INPUTS, OP, Form, function, widens
from converter.names import Weights

DTYPES = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.BFLOAT16: "bfloat16",
}


def form_of(model: onnx.ModelProto) -> Form:
    """Return what the nodes of `model` have in common; every node has the same inputs and the same kind of shift."""
    node = next(node for node in model.graph.node if (node.domain, node.op_type) == (DOMAIN, OP))
    given = {name for name, value in zip(INPUTS, node.input, strict=False) if value}
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert set(attributes) == set(ATTRIBUTES)
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == node.input[1])
    dtype, weights = DTYPES.get(weight.data_type, ""), "dtype"
    if widens(model):
        dtype, weights = "float32", onnx.TensorProto.DataType.Name(weight.data_type).lower()
    return Form(
        dtype=dtype,
        shift_mode=attributes["shift_mode"].decode(),
        variance=bool(attributes["variance"]),
        bias="bias" in given,
        channel_scale="channel_scale" in given,
        permutation="permutation" in given,
        residual="residual_in" in given,
        phased="sparse" in given,
        weights=cast(Weights, weights),
    )


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
