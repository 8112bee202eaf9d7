"""Each path of the TensorRT plugin's layer beside PyTorch's dense product, on the GPU of this machine.

    make test-gpu      # the tests of the kernels on the GPU, then this

Prints a table and asserts nothing; how it is measured is said in converter/runtimes/tune.py. A cell is dense time / our
time, its median over the rounds and its range.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import record
from cyclopts import App, Parameter
from rich.box import MARKDOWN
from rich.table import Table

from converter import json_rows
from converter.errors import ConverterError
from converter.runtimes.layer import LayerLibrary
from converter.runtimes.tune import ROUNDS, TOKENS, Shape, Timing, measured, require_gpu

app = App(help_format="plaintext")


@app.default
def main(
    library: Path = Path("build/plugins/libnmsparse_tensorrt.so"),
    *,
    shapes: str = "4096x4096,4096x14336,14336x4096",
    tokens: str = ",".join(map(str, TOKENS)),
    patterns: str = "2:4,8:16",
    dtype: str = "float16",
    rounds: int = ROUNDS,
    json_file: Annotated[Path | None, Parameter(name="--json")] = None,
    result: str | None = None,
) -> None:
    """Measure LIBRARY on the GPU, layers of `shapes` (in x out)."""
    try:
        device, plugin = require_gpu(), LayerLibrary(library, "cuda")
    except ConverterError as error:
        sys.exit(f"benchmarks/gpu.py: {error}")
    lines: list[dict[str, Any]] = []
    columns = ("in x out", "pattern", "tokens", "path", "dense time / our time")
    table = Table(*columns, box=MARKDOWN, title=f"{device}, {dtype}")
    for size in shapes.split(","):
        k, n = map(int, size.split("x"))
        for pattern in patterns.split(","):
            keep, group = map(int, pattern.split(":"))
            for count in map(int, tokens.split(",")):
                found = measured(plugin, Shape(k, n, keep, group, dtype), count, rounds)
                for timing in sorted(found, key=Timing.median, reverse=True):
                    path = timing.path if timing.path == "gemv" else f"{timing.path} {timing.tile}"
                    cell = f"{timing.median():.2f} ({min(timing.ratios):.2f} to {max(timing.ratios):.2f})"
                    table.add_row(size, pattern, str(count), path, cell)
                    name = f"{device}, {dtype}, {size}, {pattern}, {count} tokens, {path}: dense time / our time"
                    lines.append(json_rows.row(name, timing.median(), "ratio"))
    record.show(table, result)
    json_rows.write(json_file, lines)


if __name__ == "__main__":
    app()
