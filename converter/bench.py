"""The stage bench: how fast the layers of OUT are on this machine."""

from __future__ import annotations

from pathlib import Path

import onnx

from converter.delivery.bundle import manifest, versions
from converter.graph import dispatch
from converter.graph.costs import layer_costs
from converter.graph.export import MODEL
from converter.graph.lower import form_of
from converter.runtimes.layer import LayerLibrary
from converter.runtimes.tune import ROUNDS, TOKENS, Shape, Timing, capability, measured, require_gpu, table
from converter.stages import Stages


def tune(folder: Path, plugin: Path, to: Path, stages: Stages) -> list[Timing]:
    """Write the dispatch table of the layers of OUT on this GPU to the file `to`; return what was measured.

    Raises:
        OutputError: when the folder is not one of ours.
        DeviceError: when there is no GPU.
        BuildError: when the plugin's library cannot be loaded.
    """
    manifest(folder)
    device, library = require_gpu(), LayerLibrary(plugin, "cuda")
    graph = onnx.load(folder / MODEL, load_external_data=False)
    dtype, costs = form_of(graph).dtype, layer_costs(graph)
    shapes = sorted({Shape(c.in_features, c.out_features, c.keep, c.group, dtype) for c in costs})
    found: list[Timing] = []
    with stages.stage("tune", "shapes") as advance:
        for number, shape in enumerate(shapes):
            for tokens in TOKENS:
                found += measured(library, shape, tokens, ROUNDS)
            advance(number + 1, len(shapes))
    source = f"measured on {device} by nmsparse {versions()['nmsparse']}"
    dispatch.write(to, [*table(found, capability(), source), *dispatch.read(None)])
    return found
