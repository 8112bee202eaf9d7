"""What the layers of an OUT are and cost, by its graph alone."""

from __future__ import annotations

from pathlib import Path

from converter.delivery.manifest import exported
from converter.graph import dispatch
from converter.graph.costs import LayerCost, layer_costs
from converter.graph.forms import form_of


def inspect(folder: Path, table: Path | None = None, target: str | None = None) -> list[tuple[LayerCost, str]]:
    """Return what each sparse layer of OUT costs and its paths in the TensorRT plugin, in the graph's order.

    The paths are those of the dispatch `table` for the compute capability `target`. The weights are not read.

    Raises:
        OutputError: when the folder holds no exported model of ours.
        BuildError: when the table cannot be read, or has no row for a layer.
    """
    graph, rows = exported(folder), dispatch.read(table)
    costs, costed = layer_costs(graph), []
    dtype = form_of(graph).dtype if costs else ""
    for cost in costs:
        shape = (cost.keep, cost.group, cost.in_features, cost.out_features)
        layer = dispatch.described(target or dispatch.ANY, dtype, *shape)
        costed.append((cost, dispatch.paths(dispatch.choose(rows, layer), layer)))
    return costed
