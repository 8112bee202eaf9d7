"""What form the nodes of a graph have, by the graph alone."""

from __future__ import annotations

from typing import cast

import onnx
import onnx.helper

from converter.names import Weights
from converter.signature import ATTRIBUTES, DOMAIN, INPUTS, OP, Form

WIDENED = "W_real"  # in the body: W in float32, where it is stored in fewer bits
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
    shift_mode, variance = attributes["shift_mode"].decode(), bool(attributes["variance"])
    return Form(dtype, shift_mode, variance, frozenset(given), cast(Weights, weights))


def widens(model: onnx.ModelProto) -> bool:
    """Return whether the model's weights are stored in fewer bits than its dtype."""
    bodies = (body for body in model.functions if (body.domain, body.name) == (DOMAIN, OP))
    return any(WIDENED in node.output for body in bodies for node in body.node)
