"""Tell the nodes of a traced graph in which phase they are sparse."""

from __future__ import annotations

from typing import Literal

import onnx_ir as ir

from converter.signature import DOMAIN, INPUTS, OP


def give_phase(model: ir.Model, phases: Literal["prefill", "decode"]) -> ir.Model:
    """Return `model` with one input `sparse` that all `SparseLinear` nodes share: is this call of that phase?

    A call with more than one token a sequence is a prefill. It is computed once, from the shape of `input_ids`.
    """
    graph = model.graph
    ids = next(value for value in graph.inputs if value.name == "input_ids")
    shape = ir.node("Shape", [ids], {"start": 1, "end": 2})
    first = ir.node("Constant", [], {"value_ints": [0]})
    length = ir.node("Squeeze", [shape.outputs[0], first.outputs[0]])
    one = ir.node("Constant", [], {"value_int": 1})
    sparse = ir.node("Greater" if phases == "prefill" else "Equal", [length.outputs[0], one.outputs[0]])
    sparse.outputs[0].name = "sparse"
    nodes = [node for node in graph if (node.domain, node.op_type) == (DOMAIN, OP)]
    graph.insert_before(graph[0], [shape, first, length, one, sparse])
    position = INPUTS.index("sparse")
    for node in nodes:
        node.resize_inputs(position + 1)
        node.replace_input_with(position, sparse.outputs[0])
    return model
