"""What each sparse layer of a graph would cost a kernel that reads only the rows of W that a token keeps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx
import onnx.helper

from converter.signature import DOMAIN, INPUTS, OP


@dataclass(frozen=True)
class LayerCost:
    """One `SparseLinear`: its shape and pattern, and what one token costs, dense and sparse.

    `products` are multiply-adds; `sparse_products` has the two thin ones of a residual in it, `sparse_bytes` their
    factors. Bytes are those of the weights and their scales: activations are small beside them for a few tokens.
    """

    name: str
    in_features: int
    out_features: int
    keep: int
    group: int
    bytes: int
    sparse_bytes: int
    products: int
    sparse_products: int


def layer_costs(model: onnx.ModelProto) -> list[LayerCost]:
    """Return the costs of every `SparseLinear` of `model`, whose weights need not be loaded, in the graph's order."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    costs = []
    for node in model.graph.node:
        if (node.domain, node.op_type) != (DOMAIN, OP):
            continue
        given = dict(zip(INPUTS, node.input, strict=False))
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        keep, group = attributes["keep"], attributes["group"]
        weight = stored[given["W"]]
        (k, n), rows = weight.dims, weight.dims[0] // group * keep
        row = n * _size(weight)
        if scale := given.get("weight_scale"):
            row += n * _size(stored[scale]) * stored[scale].dims[0] / k
        factors = [stored[given[name]] for name in ("residual_in", "residual_out") if given.get(name)]
        thin = sum(factor.dims[0] * factor.dims[1] for factor in factors)
        read = rows * row + sum(factor.dims[0] * factor.dims[1] * _size(factor) for factor in factors)
        name = weight.name.removesuffix(".weight")
        costs.append(LayerCost(name, k, n, keep, group, int(k * row), int(read), k * n, rows * n + thin))
    return costs


def span(costs: Iterable[LayerCost]) -> str:
    """Return the pattern of the layers, or the sparsest and the densest of theirs: `4:16 to 12:16`."""
    shares = sorted({(cost.keep / cost.group, f"{cost.keep}:{cost.group}") for cost in costs})
    return " to ".join(dict.fromkeys((shares[0][1], shares[-1][1])))


def _size(tensor: onnx.TensorProto) -> float:
    """Return the bytes of a number; those of four bits have half a one."""
    if tensor.data_type == onnx.TensorProto.INT4:
        return 0.5
    size: int = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return size
