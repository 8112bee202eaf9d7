"""Times of the TensorRT plugin's paths beside PyTorch's dense product, on the GPU of this machine.

Runs are interleaved: in each round every path runs once, as a CUDA graph of many calls that go through enough copies of
the weight not to find it in the cache.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from converter.errors import DeviceError
from converter.graph.dispatch import Row, fits_sparse, thresholds
from converter.runtimes.layer import TILES, LayerLibrary

CALLS, COLD_BYTES, MOST_GEMV_TOKENS = 16, 256 << 20, 64
TOKENS = (1, 2, 4, 8, 64, 512, 1024, 4096)
ROUNDS = 20


class Shape(NamedTuple):
    """A layer to measure."""

    k: int
    n: int
    keep: int
    group: int
    dtype: str


class Timing(NamedTuple):
    """Dense time / our time of one path and tile, by rounds."""

    shape: Shape
    tokens: int
    path: str
    tile: str
    ratios: list[float]

    def median(self) -> float:
        """Return the middle ratio; above one ours is faster."""
        return statistics.median(self.ratios)


def require_gpu() -> str:
    """Return the name of the GPU.

    Raises:
        DeviceError: when PyTorch finds none.
    """
    if not torch.cuda.is_available():
        raise DeviceError("GPU: must be here to be measured, got none. benchmarks/gpu_model.py predicts without one.")
    return torch.cuda.get_device_name()


def capability() -> str:
    """Return the compute capability of the GPU, such as `sm_89`."""
    return "sm_{}{}".format(*torch.cuda.get_device_capability())


def paths(shape: Shape, tokens: int) -> dict[str, dict[str, int]]:
    """Return the paths that a layer can take with so many tokens, and the thresholds that make it take each."""
    ways = {"dense": {"gemv_tokens": 0, "sparse_tokens": 0}}
    if tokens <= MOST_GEMV_TOKENS:
        ways["gemv"] = {"gemv_tokens": tokens, "sparse_tokens": 0}
    if fits_sparse(shape.keep, shape.group, shape.k):
        ways["sparse"] = {"gemv_tokens": 0, "sparse_tokens": 1}
    return ways


def measured(library: LayerLibrary, shape: Shape, tokens: int, rounds: int) -> Iterator[Timing]:
    """Yield the timings of each path and tile."""
    dtype = getattr(torch, shape.dtype)
    copies = min(CALLS, ceil(COLD_BYTES / (2 * shape.k * shape.n)))
    x = torch.randn(tokens, shape.k, dtype=dtype, device="cuda")
    weights = [torch.randn(shape.k, shape.n, dtype=dtype, device="cuda") / shape.k**0.5 for _ in range(copies)]
    scale = torch.rand(shape.k, device="cuda") + 0.5
    y = torch.empty(tokens, shape.n, dtype=dtype, device="cuda")
    graphs = {("", ""): _recorded(lambda i: torch.mm(x, weights[i % copies], out=y))}
    held: list[Tensor] = []
    about = {name: getattr(shape, name) for name in ("k", "n", "keep", "group")} | {"shift_mode": 0, "variance": 1}
    for path, limits in paths(shape, tokens).items():
        layer = about | limits
        held.append(library.workspace(layer, tokens))
        for tile in TILES if path != "gemv" else TILES[:1]:

            def call(i: int, layer: dict[str, int] = layer, room: Tensor = held[-1], tile: str = tile) -> None:
                tensors = {"x": x, "w": weights[i % copies], "channel_scale": scale, "y": y}
                library.enqueue(layer, tensors, room, tile, torch.cuda.current_stream().cuda_stream)

            graphs[path, tile] = _recorded(call)
    times: dict[tuple[str, str], list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            times[name].append(_seconds(graph))
    dense = times.pop(("", ""))
    for (path, tile), own in times.items():
        yield Timing(shape, tokens, path, tile, [d / o for d, o in zip(dense, own, strict=True)])


def table(timings: Sequence[Timing], sm: str, source: str) -> list[Row]:
    """Return the rows that the timings ask for, one for each shape."""
    best: dict[Shape, dict[int, str]] = {}
    for timing in sorted(timings, key=Timing.median):
        best.setdefault(timing.shape, {})[timing.tokens] = timing.path  # the last is the fastest
    return [_row(shape, fastest, sm, source) for shape, fastest in sorted(best.items())]


def _row(shape: Shape, best: Mapping[int, str], sm: str, source: str) -> Row:
    gemv, sparse = thresholds(best)
    pattern = f"{shape.keep}:{shape.group}"
    return Row(sm, shape.dtype, pattern, str(shape.k), str(shape.n), gemv, sparse, source)


def _recorded(call: Callable[[int], object]) -> torch.cuda.CUDAGraph:
    """Return a CUDA graph of `CALLS` calls, numbered."""
    call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(CALLS):
            call(number)
    graph.replay()
    return graph


def _seconds(graph: torch.cuda.CUDAGraph) -> float:
    """Return what one call of the graph takes."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return milliseconds / 1e3 / CALLS
