"""Replace each placeholder block of a traced graph by a copy of the nodes of the block that it equals."""

from __future__ import annotations

import onnx_ir as ir

from converter.graph.placeholders import BLOCK, ENTER, LEAVE
from converter.names import cache_names
from converter.signature import DOMAIN


def stamp(model: ir.Model, blocks: str) -> ir.Model:
    """Return `model` with every placeholder expanded and without marks; `blocks` is the name of the list of blocks.

    A node of the first block is copied when it depends on the block's input, its cache or its parameters; what does
    not (shapes, the mask, rotary tables) is shared, as it was in the model.
    """
    graph = model.graph
    marks = {
        (node.op_type, node.attributes["index"].as_int()): node
        for node in graph
        if node.domain == DOMAIN and node.op_type in {BLOCK, ENTER, LEAVE}
    }
    bodies = {index: _Body(graph, marks, index, blocks) for op, index in marks if op == ENTER}
    for (op, index), node in marks.items():
        if op == BLOCK:
            _expand(graph, node, bodies[node.attributes["like"].as_int()], index, f"{blocks}.{index}.")
    for (op, _), node in marks.items():
        if op in {ENTER, LEAVE}:
            _bypass(graph, node)
    _sort_caches(graph, len(marks) - len(bodies))
    return model


class _Body:
    """The nodes of a traced block, in order, and the values through which it meets the rest of the graph."""

    def __init__(self, graph: ir.Graph, marks: dict[tuple[str, int], ir.Node], index: int, blocks: str) -> None:
        named = {value.name: value for value in [*graph.inputs, *graph.outputs]}
        self.prefix = f"{blocks}.{index}."
        # An encoder has none of either.
        self.past = [named[name] for name in cache_names("past_key_values", index) if name in named]
        self.present = [named[name] for name in cache_names("present", index) if name in named]
        self.hidden = marks[ENTER, index].outputs[0]
        leave = marks[LEAVE, index].inputs[0]
        assert leave is not None
        self.out = leave
        own = {self.hidden, *self.past}
        needed = _ancestors([self.out, *self.present], own)
        self.nodes = []
        for node in graph:
            # Sizes are the same in every block, and asking for them copies nothing.
            if node in needed and node.op_type != "Shape" and any(v in own or self.owns(v) for v in node.inputs):
                self.nodes.append(node)
                own.update(node.outputs)

    def owns(self, value: ir.Value | None) -> bool:
        """Return whether the value is a parameter of the block."""
        return value is not None and (value.name or "").startswith(self.prefix)


def _ancestors(values: list[ir.Value], stop: set[ir.Value]) -> set[ir.Node]:
    nodes: set[ir.Node] = set()
    stack = list(values)
    while stack:
        value = stack.pop()
        node = None if value in stop else value.producer()
        if node is not None and node not in nodes:
            nodes.add(node)
            stack.extend(v for v in node.inputs if v is not None)
    return nodes


def _expand(graph: ir.Graph, placeholder: ir.Node, body: _Body, index: int, prefix: str) -> None:
    hidden = placeholder.inputs[0]
    assert hidden is not None
    mapped = {body.hidden: hidden}
    for past, name in zip(body.past, cache_names("past_key_values", index), strict=bool(body.past)):
        mapped[past] = ir.Value(name=name, type=past.type, shape=past.shape)
        graph.inputs.append(mapped[past])
    for node in body.nodes:
        for value in node.inputs:
            if value is not None and value not in mapped and body.owns(value):
                mapped[value] = _sibling(graph, value, prefix + (value.name or "").removeprefix(body.prefix))
        copy = ir.Node(
            node.domain,
            node.op_type,
            [mapped.get(v, v) if v is not None else None for v in node.inputs],
            list(node.attributes.values()),
            num_outputs=len(node.outputs),
            version=node.version,
        )
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            new.type, new.shape = old.type, old.shape
            mapped[old] = new
        graph.insert_before(placeholder, copy)
    for present, name in zip(body.present, cache_names("present", index), strict=bool(body.present)):
        mapped[present].name = name
        graph.outputs.append(mapped[present])
    _replace(placeholder.outputs[0], mapped[body.out])
    graph.remove(placeholder, safe=True)


def _sibling(graph: ir.Graph, value: ir.Value, name: str) -> ir.Value:
    if name not in graph.initializers:
        graph.initializers.add(ir.Value(name=name, type=value.type, shape=value.shape))
    return graph.initializers[name]


def _bypass(graph: ir.Graph, node: ir.Node) -> None:
    source = node.inputs[0]
    assert source is not None
    _replace(node.outputs[0], source)
    graph.remove(node, safe=True)


def _replace(old: ir.Value, new: ir.Value) -> None:
    """Put `new` in the place of `old`, under its name where that is an output of the graph."""
    if old.is_graph_output():
        name, old.name = old.name, f"{old.name}.traced"
        new.name, new.shape = name, old.shape
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def _sort_caches(graph: ir.Graph, blocks: int) -> None:
    """Put the caches into the order of the blocks, behind the other inputs and outputs."""
    for values, prefix in ((graph.inputs, "past_key_values"), (graph.outputs, "present")):
        order = [name for index in range(blocks) for name in cache_names(prefix, index)]
        by_name = {value.name: value for value in values}
        others = [value for value in values if value.name not in order]
        values[:] = [*others, *(by_name[name] for name in order if name in by_name)]
