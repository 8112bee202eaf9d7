"""Run a bfloat16 graph where there are no bfloat16 kernels: the same weights and nodes, computed in float32."""

from __future__ import annotations

import onnx
import onnx.helper

BFLOAT16, FLOAT = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT


def is_bfloat16(model: onnx.ModelProto) -> bool:
    """Return whether any input of the model is bfloat16; a language model's key/value cache is one."""
    return any(value.type.tensor_type.elem_type == BFLOAT16 for value in model.graph.input)


def widen(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of the model in which every bfloat16 value is float32; the stored weights stay as they are.

    Weights are cast where they are read, so that they are still rounded to bfloat16; activations are not.
    """
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    graph = wide.graph
    narrow = {tensor.name: f"{tensor.name}.float32" for tensor in graph.initializer if tensor.data_type == BFLOAT16}
    for node in graph.node:
        for position, name in enumerate(node.input):
            node.input[position] = narrow.get(name, name)
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == BFLOAT16:
                attribute.i = FLOAT
    casts = [onnx.helper.make_node("Cast", [name], [new], to=FLOAT) for name, new in narrow.items()]
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]
    for value in [*graph.input, *graph.output]:
        if value.type.tensor_type.elem_type == BFLOAT16:
            value.type.tensor_type.elem_type = FLOAT
    return wide
