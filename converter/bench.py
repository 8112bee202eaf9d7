"""The stage bench: how fast OUT is on the CPU of this machine, or its layers on the GPU."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx

from converter import json_rows
from converter.delivery.manifest import context_length, exported, versions
from converter.errors import BuildError
from converter.graph import dispatch
from converter.graph.costs import layer_costs
from converter.graph.forms import form_of
from converter.json_rows import HIGH, LOW, OURS, RATIO, SpeedRow
from converter.runtimes.kernel import has_kernel, library
from converter.runtimes.layer import LayerLibrary
from converter.runtimes.speed import PAST, Speed
from converter.runtimes.speed import measured as timed
from converter.runtimes.tune import ROUNDS, TOKENS, Shape, Timing, capability, measured, require_gpu, table
from converter.stages import Stages

PREFILL = (128, 512)
SECONDS = 10.0


def speed(
    folder: Path, threads: Sequence[int] | None, prefill: Sequence[int] | None, seconds: float | None, stages: Stages
) -> tuple[str, list[Speed]]:
    """Return how OUT ran on this CPU, in words, and its times beside those of the same OUT run dense.

    By default on one thread and on one thread per core, for prefills of `PREFILL` tokens, each for `SECONDS`.

    Raises:
        OutputError: when the folder holds no exported model of ours.
        BuildError: when OUT is no decoder, or a prefill is longer than its context.
        ExportError: when ONNX Runtime cannot run the graph.
    """
    graph = exported(folder)
    context = context_length(folder)
    lengths = prefill or [tokens for tokens in PREFILL if tokens <= context]
    if max(lengths, default=0) > context:
        raise BuildError(
            f"--prefill: must be at most {context}, the context of {folder}, got {max(lengths)}. Give less."
        )
    counts = threads or sorted({1, os.cpu_count() or 1})
    times: list[Speed] = []
    with stages.stage("bench", "measurements") as advance:
        for count in counts:
            for time in timed(graph, folder, count, lengths, min(PAST, context - 1), seconds or SECONDS):
                times.append(time)
                advance(len(times), len(counts) * (len(lengths) + 1))
    return _how(graph), times


def speed_rows(times: Sequence[Speed]) -> list[dict[str, Any]]:
    """Return the rows of `--json` for what `speed` measured."""
    rows = []
    for time in times:
        figures = dict(zip((LOW, RATIO, HIGH), time.ratios(), strict=True))
        rows.append(SpeedRow(time.call(), time.threads, OURS, time.per_second()).row("tokens/s"))
        rows += [SpeedRow(time.call(), time.threads, what, value).row("ratio") for what, value in figures.items()]
    return rows


def tune_rows(timings: Sequence[Timing]) -> list[dict[str, Any]]:
    """Return the rows of `--json` for what `tune` measured."""
    return [
        json_rows.row(
            f"GPU, {timing.shape.dtype}, {timing.shape.k}x{timing.shape.n}, {timing.shape.keep}:{timing.shape.group}, "
            f"{timing.tokens} tokens, {timing.path} {timing.tile}: {RATIO}",
            timing.median(),
            "ratio",
        )
        for timing in timings
    ]


def _how(graph: onnx.ModelProto) -> str:
    if not has_kernel(graph):
        return "the function body of the op: our kernel is for float32 alone"
    kernel = library()
    return f"our kernel, {kernel}" if kernel else "the function body of the op: our kernel is not built (make cpu-op)"


def tune(folder: Path, plugin: Path, to: Path, stages: Stages) -> list[Timing]:
    """Write the dispatch table of the layers of OUT on this GPU to the file `to`; return what was measured.

    Raises:
        OutputError: when the folder holds no exported model of ours.
        DeviceError: when there is no GPU.
        BuildError: when the plugin has no kernels for the dtype of OUT, or its library cannot be loaded.
    """
    graph = exported(folder)
    dtype, costs = form_of(graph).dtype, layer_costs(graph)
    if dtype == "float32":
        raise BuildError(
            f"{folder}: dtype must be float16 or bfloat16, as of the TensorRT plugin's kernels, got float32. "
            "Run nmsparse export on it with --dtype."
        )
    device, layer = require_gpu(), LayerLibrary(plugin, "cuda")
    shapes = sorted({Shape(c.in_features, c.out_features, c.keep, c.group, dtype) for c in costs})
    timings: list[Timing] = []
    with stages.stage("tune", "shapes") as advance:
        for number, shape in enumerate(shapes):
            for tokens in TOKENS:
                timings += measured(layer, shape, tokens, ROUNDS)
            advance(number + 1, len(shapes))
    source = f"measured on {device} by nmsparse {versions()['nmsparse']}"
    dispatch.write(to, [*table(timings, capability(), source), *dispatch.read(None)])
    return timings
