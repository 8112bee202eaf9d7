"""The graph with every `SparseLinear` dense, which is what the sparse one is timed against."""

from __future__ import annotations

import onnx
import onnx.helper

from converter.errors import BuildError
from converter.graph.forms import widens
from converter.signature import DOMAIN, INPUTS, OP

BLOCKS = (16, 32, 64, 128, 256)


def densify(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with each `SparseLinear` as a MatMul of all channels: what the op means where `sparse` is false.

    A token's own shift cancels, and what corrects for dropped channels is left out. Integers are dequantized by the
    operator that ONNX Runtime makes one with the MatMul, weights of 16 bits are cast, once, when the graph is loaded.

    Raises:
        BuildError: when integers are stored so that ONNX Runtime has no kernel for their product.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    stored, wide = {tensor.name: tensor for tensor in model.graph.initializer}, widens(model)
    del made.graph.node[:]
    for node in model.graph.node:
        made.graph.node.extend(_product(node, stored, wide) if (node.domain, node.op_type) == (DOMAIN, OP) else [node])
    others = [f for f in made.functions if (f.domain, f.name) != (DOMAIN, OP)]
    del made.functions[:]
    made.functions.extend(others)
    return made


def _product(node: onnx.NodeProto, stored: dict[str, onnx.TensorProto], wide: bool) -> list[onnx.NodeProto]:
    """Return the nodes that give `(x - shift) W + bias`, with what is stored in float32 cast to the dtype of W."""
    given = {part: name for part, name in zip(INPUTS, node.input, strict=False) if name}
    make, y, x, w = onnx.helper.make_node, node.output[0], given["X"], given["W"]
    element, dequantize = stored[w].data_type, []
    if "weight_scale" in given:
        scale, element = stored[given["weight_scale"]], onnx.TensorProto.FLOAT
        block = stored[w].dims[0] // scale.dims[0]
        if block not in BLOCKS:
            raise BuildError(
                f"{w}: must have a scale for each {', '.join(map(str, BLOCKS))} input channels to be timed beside ONNX "
                f"Runtime's kernel, got {block}. Convert the model again with one of these for block."
            )
        dequantize = [make("DequantizeLinear", [w, scale.name], [f"{y}.W"], axis=0, block_size=block)]
        w = f"{y}.W"
    elif wide:
        element = onnx.TensorProto.FLOAT
        dequantize, w = [make("Cast", [w], [f"{y}.W"], to=element)], f"{y}.W"
    nodes = dequantize + [
        make("Cast", [given[part]], [f"{y}.{part}"], to=element) for part in ("shift", "bias") if part in given
    ]
    if "shift" in given:
        nodes.append(make("Sub", [x, f"{y}.shift"], [f"{y}.z"]))
        x = f"{y}.z"
    product = f"{y}.product" if "bias" in given else y
    nodes.append(make("MatMul", [x, w], [product], name=node.name))
    if "bias" in given:
        nodes.append(make("Add", [product, f"{y}.bias"], [y]))
    return nodes
