"""Make one node of the sparse layers that read one tensor and choose the same of its channels: q, k and v; gate and up.

Their weights lie side by side in one `[K, N]`, so channels are selected once, and a kept channel is one long row.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
import torch
from torch import Tensor

from converter.signature import DOMAIN, OP, TABLE, VERSION
from converter.sparsity.linear import Params


def parts(name: str) -> list[str]:
    """Return the layers of a node, from the name of its weight without `.weight`: those of `a.b+c` are a.b and a.c."""
    module, dot, names = name.rpartition(".")
    return [f"{module}{dot}{part}" for part in names.split("+")]


def merge(model: ir.Model, params: Mapping[str, Params]) -> ir.Model:
    """Return `model` with nodes of one module merged, whose weights have no content and are named for their `parts`.

    A Split, which every runtime knows, parts its output again.
    """
    graph = model.graph
    nodes: dict[tuple[ir.Value, str], list[tuple[str, ir.Node]]] = {}
    for node in graph:
        x, weight = node.inputs[:2] if (node.domain, node.op_type) == (DOMAIN, OP) else (None, None)
        if x is not None and weight is not None:
            name = (weight.name or "").removesuffix(".weight")
            nodes.setdefault((x, name.rpartition(".")[0]), []).append((name, node))
    for mates in nodes.values():
        while mates:
            first = params[mates[0][0]]
            alike = {name: node for name, node in mates if _choose_alike(first, params[name])}
            mates = [(name, node) for name, node in mates if name not in alike]
            if len(alike) > 1 and first.residual_in is None:
                _merged(graph, list(alike), list(alike.values()))
    return model


def _choose_alike(one: Params, other: Params) -> bool:
    """Return whether two layers keep the same channels of whatever they both read, and correct them alike."""

    def same(a: Tensor | None, b: Tensor | None) -> bool:
        return a is b or (a is not None and b is not None and torch.equal(a, b))

    settings, tensors = (
        [(p.keep, p.group, p.shift_mode, p.variance) for p in (one, other)],
        [(p.channel_scale, p.shift, p.permutation) for p in (one, other)],
    )
    return settings[0] == settings[1] and all(map(same, *tensors))


def _merged(graph: ir.Graph, names: list[str], nodes: list[ir.Node]) -> None:
    """Put one node, and one that splits its output, in the place of `nodes`."""
    joined = "+".join([names[0], *(name.rpartition(".")[2] for name in names[1:])])
    inputs: list[ir.Value | None] = []
    sizes = [_shape(node.inputs[1])[-1] for node in nodes]
    for position, given in enumerate(nodes[0].inputs):
        if given is None or given.name not in graph.initializers:  # X, and the phase
            inputs.append(given)
            continue
        shape = _shape(given)
        if TABLE[position].per_output:
            shape = (*shape[:-1], sum(sizes))
        name = f"{joined}.{(given.name or '').rpartition('.')[2]}"
        stored = ir.Value(name=name, type=given.type, shape=ir.Shape(shape))
        graph.initializers.add(stored)
        inputs.append(stored)
    node = ir.Node(DOMAIN, OP, inputs, list(nodes[0].attributes.values()), num_outputs=1, version=VERSION)
    split = ir.Value(
        name=f"{joined}.sizes",
        type=ir.TensorType(ir.DataType.INT64),
        const_value=ir.tensor(torch.tensor(sizes).numpy()),
    )
    graph.initializers.add(split)
    cut = ir.Node("", "Split", [node.outputs[0], split], [ir.AttrInt64("axis", -1)], num_outputs=len(nodes))
    graph.insert_before(nodes[0], [node, cut])
    first = nodes[0].outputs[0]
    node.outputs[0].type = first.type
    node.outputs[0].shape = None if first.shape is None else ir.Shape([*first.shape[:-1], sum(sizes)])
    for old, new in zip(nodes, cut.outputs, strict=True):
        new.type, new.shape = old.outputs[0].type, old.outputs[0].shape
        old.outputs[0].replace_all_uses_with(new)
        own = [value for value in old.inputs if value is not None and value.name in graph.initializers]
        graph.remove(old, safe=True)
        for value in own:
            del graph.initializers[value.name or ""]


def _shape(value: ir.Value | None) -> tuple[int, ...]:
    assert value is not None
    assert value.shape is not None
    return value.shape.numpy()
