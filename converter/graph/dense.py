"""The graph with every `SparseLinear` dense, which is what the sparse one is timed against."""

from __future__ import annotations

import onnx
import onnx.helper

from converter.graph.op import DOMAIN, INPUTS, OP


def dense(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with each `SparseLinear` as a MatMul of all channels: what the op means where `sparse` is false.

    A token's own shift cancels, and what corrects for dropped channels is left out.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    del made.graph.node[:]
    for node in model.graph.node:
        made.graph.node.extend(_product(node, kinds) if (node.domain, node.op_type) == (DOMAIN, OP) else [node])
    others = [f for f in made.functions if (f.domain, f.name) != (DOMAIN, OP)]
    del made.functions[:]
    made.functions.extend(others)
    return made


def _product(node: onnx.NodeProto, kinds: dict[str, int]) -> list[onnx.NodeProto]:
    """Return the nodes that give `(x - shift) W + bias`, with what is stored in float32 cast to the dtype of W."""
    given = {part: name for part, name in zip(INPUTS, node.input, strict=False) if name}
    make, y, x, kind = onnx.helper.make_node, node.output[0], given["X"], kinds[given["W"]]
    nodes = [make("Cast", [given[part]], [f"{y}.{part}"], to=kind) for part in ("shift", "bias") if part in given]
    if "shift" in given:
        nodes.append(make("Sub", [x, f"{y}.shift"], [f"{y}.z"]))
        x = f"{y}.z"
    product = f"{y}.product" if "bias" in given else y
    nodes.append(make("MatMul", [x, given["W"]], [product], name=node.name))
    if "bias" in given:
        nodes.append(make("Add", [product, f"{y}.bias"], [y]))
    return nodes
