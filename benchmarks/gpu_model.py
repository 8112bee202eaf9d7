"""PREDICTED speed of the TensorRT plugin's paths on GPUs that nobody has run it on: a roofline, not a measurement.

    python benchmarks/gpu_model.py [OUT] --json predicted.json

A kernel takes the larger of its bytes over the memory's bandwidth and its products over the tensor cores' rate, plus a
launch; a GEMM runs in whole waves of tiles, as many at once as its registers (plugins/resources.csv) and stages allow.
A layer's path is its kernels in turn. Both the dense layer and ours are modelled, with the same assumptions.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Annotated, Any

import onnx
import record
from cyclopts import App, Parameter
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from converter import json_rows
from converter.graph.costs import layer_costs

RESOURCES = Path(__file__).parents[1] / "plugins" / "resources.csv"
# Assumed, the same for all: the shares of the peaks that good kernels reach, and seconds of a launch in a CUDA graph.
BANDWIDTH_SHARE, PRODUCT_SHARE, LAUNCH = 0.85, 0.8, 2e-6
# Sparse tensor cores are twice as fast on paper. Measured with cuSPARSELt on an H100, 8192 cubed: arXiv 2603.05232.
SPARSE_RATE = 1.59
REGISTERS = 65536  # of an SM
TILES = {
    "wide": (128, 128, 3, 128),
    "tall": (128, 64, 3, 128),
    "small": (64, 64, 4, 128),
}  # rows, columns, stages, threads
# An H100's, by wgmma, one to an SM.
WGMMA_TILES = {
    "sparse": {"wide": (256, 128), "tall": (128, 128), "small": (64, 128)},
    "dense": {"wide": (128, 256), "tall": (64, 256), "small": (64, 128)},
}
SIZE = 2  # bytes of float16


@dataclass(frozen=True)
class Gpu:
    """A GPU by its vendor's data sheet: dense 16-bit operations a second (float32 sums), bytes a second, SMs."""

    name: str
    sm: str
    operations: float
    bandwidth: float
    sms: int
    shared: int  # bytes of an SM

    def seconds(self, moved: float, products: float = 0.0, rate: float = 1.0) -> float:
        """Return what a kernel takes that moves so many bytes and does so many products at `rate` times the peak."""
        memory = moved / (self.bandwidth * BANDWIDTH_SHARE)
        return max(memory, 2 * products / (self.operations * PRODUCT_SHARE * rate)) + LAUNCH


GPUS = (
    Gpu("A100 SXM", "sm_80", 312e12, 2039e9, 108, 164 << 10),
    Gpu("RTX 4090", "sm_89", 165e12, 1008e9, 128, 100 << 10),
    Gpu("H100 SXM", "sm_90", 989e12, 3352e9, 132, 228 << 10),
    Gpu("RTX 5090", "sm_120", 209e12, 1792e9, 170, 100 << 10),
)


def gemm(gpu: Gpu, registers: dict[tuple[str, str], int], kind: str, t: int, k: int, n: int) -> float:
    """Return the seconds of a `sparse` or `dense` GEMM of ours with its best tile: x[t, k] by w[k, n]."""
    sparse = kind == "sparse"
    moved = SIZE * (t * k / (2 if sparse else 1) + k * n + t * n) + (t * k / 8 if sparse else 0)
    best = float("inf")
    for tile, (rows, columns, stages, threads) in TILES.items():
        of_stage = 64 * (SIZE * rows / (2 if sparse else 1) + SIZE * columns + (rows / 8 if sparse else 0))
        used = registers[f"{kind}_gemm<float16, {tile}>", gpu.sm]
        resident = max(1, min(REGISTERS // (used * threads), int(gpu.shared // (stages * of_stage))))
        if gpu.sm == "sm_90":
            (rows, columns), resident = WGMMA_TILES[kind][tile], 1
        tiles = ceil(t / rows) * ceil(n / columns)
        waves = ceil(tiles / (gpu.sms * resident))
        products = waves * gpu.sms * resident * rows * columns * k
        # A tile of which fewer share an SM is not faster for it: with one wave, only the SMs that have a tile count.
        if waves == 1:
            products = ceil(tiles / gpu.sms) * gpu.sms * rows * columns * k
        best = min(best, gpu.seconds(moved, products, SPARSE_RATE if sparse else 1))
    return best


def vendor(gpu: Gpu, t: int, k: int, n: int) -> float:
    """Return the seconds of the dense layer without us: a GEMM at the full rate, or a GEMV that reads all of w."""
    return gpu.seconds(SIZE * (t * k + k * n + t * n), t * k * n)


def paths(
    gpu: Gpu, registers: dict[tuple[str, str], int], t: int, k: int, n: int, keep: int, group: int
) -> dict[str, float]:
    """Return the seconds of each path that the layer can take with the token's scale: its kernels in turn."""
    kept = k // group * keep
    scale = gpu.seconds(t * 64)
    found = {
        "dense": gpu.seconds(SIZE * 2 * t * k) + scale + gemm(gpu, registers, "dense", t, k, n),
        # Each token reads its own rows of w, and its sums of each 256 channels are added.
        "gemv": gpu.seconds(SIZE * t * k + SIZE * t * kept * n + 4 * t * n * k / 256)
        + gpu.seconds(4 * t * n * k / 256 + SIZE * t * n),
    }
    if group == 4 and keep <= 2 and k % 64 == 0:
        packed = gpu.seconds(SIZE * t * k * 1.5 + t * k / 8)
        found["sparse"] = packed + scale + gemm(gpu, registers, "sparse", t, k, n)
    return found


def read_registers() -> dict[tuple[str, str], int]:
    """Return the registers of a thread, by kernel and compute capability."""
    with RESOURCES.open() as file:
        return {(row["kernel"], row["sm"]): int(row["registers"]) for row in csv.DictReader(file)}


app = App(help_format="plaintext")


@app.default
def main(
    out: Path | None = None,
    *,
    tokens: str = "1,2,4,8,128,512,1024,4096,8192",
    patterns: str = "2:4,8:16",
    json_file: Annotated[Path | None, Parameter(name="--json")] = None,
    result: str | None = None,
) -> None:
    """Print the predicted ratio of the dense layers' time to ours, all linear layers of a block or of OUT together.

    Without OUT the shapes are those of Llama 3.1 8B.
    """
    if out is None:
        of, shapes = "Llama 3.1 8B", [(4096, 4096)] * 2 + [(4096, 1024)] * 2 + [(4096, 14336)] * 2 + [(14336, 4096)]
    else:
        graph = onnx.load(out / "model.onnx", load_external_data=False)
        of, shapes = out.name, [(cost.in_features, cost.out_features) for cost in layer_costs(graph)]
    registers, console = read_registers(), Console(width=200)
    lines: list[dict[str, Any]] = []
    for pattern in patterns.split(","):
        keep, group = map(int, pattern.split(":"))
        title = f"PREDICTED, not measured: dense time / our time, {of}, {pattern}, float16 (path)"
        table = Table("GPU", *(f"T={t}" for t in tokens.split(",")), title=title, box=MARKDOWN)
        for gpu in GPUS:
            cells = []
            for t in map(int, tokens.split(",")):
                of_path = [paths(gpu, registers, t, k, n, keep, group) for k, n in shapes]
                shared = [name for name in of_path[0] if all(name in seconds for seconds in of_path)]
                total = {name: sum(seconds[name] for seconds in of_path) for name in shared}
                path = min(total, key=total.__getitem__)
                ratio = sum(vendor(gpu, t, k, n) for k, n in shapes) / total[path]
                cells.append(f"{ratio:.2f} ({path})")
                name = f"predicted, {of}, {gpu.name}, {pattern}, {t} tokens: dense time / our time, {path}"
                lines.append(json_rows.row(name, ratio, "ratio"))
            table.add_row(gpu.name, *cells)
        record.show(table, result and f"{result}-{keep}-{group}")
    console.print(
        "Published, measured by others: 2:4 weights by cuSPARSELt on an H100, bfloat16: 1.59 at 8192 cubed, below 1 up "
        "to 512 tokens (arXiv 2603.05232).\nActivations pruned and multiplied by PyTorch's CUTLASS kernel, 14336 to "
        "4096, on a GPU without a name: 0.80 to 1.24 for 1024 to 16384 tokens (authors' notebook, arXiv 2509.22166)."
    )
    json_rows.write(json_file, lines)


if __name__ == "__main__":
    app()
