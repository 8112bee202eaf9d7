"""The graph for TensorRT with our plugin: each `SparseLinear` as the node that the plugin's creator reads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import torch

from converter.errors import BuildError
from converter.graph.dispatch import Row, choose, described
from converter.graph.forms import WIDENED
from converter.signature import DOMAIN, INPUTS, OP, SHIFT_MODES, VERSION
from converter.sparsity.permutation import stray

LARGEST_GROUP = 1024
UNKNOWN = {
    "residual_in": "mitigation r_sparse",
    "sparse": "phases prefill or decode",
}


def to_plugin(model: ir.Model, dispatch: Sequence[Row], sm: str) -> tuple[ir.Model, list[Row]]:
    """Return `model` with plugin nodes for the op's and without the op's function, and the rows of `dispatch` used.

    Where the paths of a node meet is what the table `dispatch` says for a compute capability `sm`. A node has the
    inputs that there are, with `inputs` to say which. The rows of its W are in the order of its permutation, which is
    32-bit.

    Raises:
        BuildError: naming the first node that the plugin has no kernel for.
    """
    body = model.functions.pop((DOMAIN, OP, ""))
    if any(value.name == WIDENED for node in body for value in node.outputs):
        raise BuildError(
            "weights: must be dtype for the TensorRT plugin, got fewer bits. Export the model again: --weights dtype."
        )
    used: list[Row] = []
    for node in model.graph:
        if (node.domain, node.op_type) != (DOMAIN, OP):
            continue
        given = {name: value for name, value in zip(INPUTS, node.inputs, strict=False) if value is not None}
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        _check(given, attributes["group"])
        if "permutation" in given:
            _arrange(given["W"], given["permutation"])
        weight = given["W"].const_value
        assert weight is not None
        k, n = weight.shape.numpy()
        layer = described(sm, weight.dtype.name.lower(), attributes["keep"], attributes["group"], k, n)
        row = choose(dispatch, layer)
        used.append(row)
        fields = {
            "keep": attributes["keep"],
            "group": attributes["group"],
            "shift_mode": SHIFT_MODES.index(attributes["shift_mode"]),
            "variance": attributes["variance"],
            "inputs": sum(1 << INPUTS.index(name) for name in given),
            "gemv_tokens": row.gemv_tokens,
            "sparse_tokens": row.sparse_tokens,
            "plugin_namespace": DOMAIN,
            "plugin_version": str(VERSION),
        }
        node.attributes.clear()
        node.attributes.update((a.name, a) for a in ir.convenience.convert_attributes(fields))
        for index, value in enumerate(given.values()):
            node.replace_input_with(index, value)
        node.resize_inputs(len(given))
    return model, list(dict.fromkeys(used))


def _check(given: dict[str, ir.Value], group: int) -> None:
    weight = given["W"]
    assert weight.name is not None
    assert weight.const_value is not None
    where, dtype = weight.name.removesuffix(".weight"), weight.const_value.dtype.name.lower()
    if dtype == "float":
        raise BuildError(
            f"{where}: dtype must be float16 or bfloat16 for the TensorRT plugin, got float32. "
            "Export the model again with --dtype."
        )
    for name, source in UNKNOWN.items():
        if name in given:
            raise BuildError(f"{where}: the TensorRT plugin has no kernel for {source}. Convert the model without it.")
    if group > LARGEST_GROUP:
        raise BuildError(
            f"{where}: group must be at most {LARGEST_GROUP} for the TensorRT plugin, got {group}. Choose an N:M."
        )
    shape = list(weight.const_value.shape.numpy())
    if any(size % 8 for size in shape):
        raise BuildError(
            f"{where}: channels must be divisible by 8 for the TensorRT plugin, got {shape}. Add the layer to --ignore."
        )


def _arrange(weight: ir.Value, permutation: ir.Value) -> None:
    """Put the rows of W into the order in which a kernel meets them, and make the permutation 32-bit."""
    assert weight.const_value is not None
    assert permutation.const_value is not None
    assert len(weight.uses()) == len(permutation.uses()) == 1, "W and permutation are a layer's own"
    order = permutation.const_value.numpy()
    if stray_entry := stray(torch.from_numpy(order.copy())):
        where = (weight.name or "").removesuffix(".weight")
        raise BuildError(
            f"{where}: permutation must hold every channel once, got {stray_entry}. Convert the model again."
        )
    weight.const_value = ir.tensor(weight.const_value.numpy()[order], name=weight.name)
    permutation.const_value = ir.tensor(order.astype(np.int32), name=permutation.name)
    permutation.dtype = ir.DataType.INT32
