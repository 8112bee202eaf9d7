"""The op's kernel for CPUs beside ONNX Runtime's dense MatMul, on this machine.

    make cpu-op && python benchmarks/cpu.py --json cpu.json

The sessions of a shape take turns, so that what else the machine does meets all of them; no thread spins while it
waits. A cell is dense time / our time: the median of the ratios of neighbours, and their quartiles. It prints a table
and asserts nothing.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import onnx.helper
import onnxruntime
from cyclopts import App, Parameter
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from converter import json_rows
from converter.graph.op import DOMAIN, OP, OPSET, VERSION
from converter.runtimes.onnxruntime import library

app = App(help_format="plaintext")
SECONDS = 1.0  # of dense time for a shape and number of tokens, within the rounds
ROUNDS = (7, 40)
# What is wanted of a token alone, and of many, dense time / our time.
ONE_TOKEN, MANY = {"2:4": 1.95, "8:16": 1.95, "1:4": 3.5}, 0.93


def made(w: np.ndarray, pattern: str, kernel: Path, threads: int) -> onnxruntime.InferenceSession:
    """Return a session of one node: the op, or MatMul where there is no pattern."""
    k, n = w.shape
    node = onnx.helper.make_node("MatMul", ["X", "W"], ["Y"])
    if pattern:
        keep, group = map(int, pattern.split(":"))
        attributes = {"keep": keep, "group": group, "shift_mode": "none", "variance": 0}
        node = onnx.helper.make_node(OP, ["X", "W"], ["Y"], domain=DOMAIN, **attributes)
    make = onnx.helper.make_tensor_value_info
    x, y = make("X", 1, ["tokens", k]), make("Y", 1, ["tokens", n])
    graph = onnx.helper.make_graph([node], "one", [x], [y], [onnx.numpy_helper.from_array(w, "W")])
    domains = [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(DOMAIN, VERSION)]
    model = onnx.helper.make_model(graph, opset_imports=domains, ir_version=11)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.register_custom_ops_library(str(kernel.resolve()))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


def seconds(session: onnxruntime.InferenceSession, x: np.ndarray) -> float:
    """Return the time of one call."""
    start = time.perf_counter()
    session.run(None, {"X": x})
    return time.perf_counter() - start


@app.default
def main(
    *,
    shapes: str = "2048x8192,8192x2048,4096x14336",
    tokens: str = "1,2,4,8,16,32,64,128,512",
    patterns: str = "2:4,8:16,1:4",
    threads: str = "1,2",
    json_file: Annotated[Path | None, Parameter(name="--json")] = None,
) -> None:
    """Measure layers of `shapes` (in x out), in float32."""
    kernel = library()
    if kernel is None:
        sys.exit("benchmarks/cpu.py: the op's library must be built, got none. Run make cpu-op.")
    names, generator = patterns.split(","), np.random.default_rng(0)
    lines: list[dict[str, Any]] = []
    table = Table("in x out", "threads", "tokens", "dense, ms", *names, box=MARKDOWN, title="dense time / our time")
    for size in shapes.split(","):
        k, n = map(int, size.split("x"))
        w = generator.standard_normal((k, n), np.float32)
        for cores in map(int, threads.split(",")):
            sessions = [made(w, pattern, kernel, cores) for pattern in ("", *names)]
            for count in map(int, tokens.split(",")):
                x = generator.standard_normal((count, k), np.float32)
                first = min(seconds(sessions[0], x) for _ in range(2))
                rounds = min(max(int(SECONDS / first), ROUNDS[0]), ROUNDS[1])
                for session in sessions:
                    seconds(session, x)
                times = np.array([[seconds(session, x) for session in sessions] for _ in range(rounds)])
                low, middle, high = np.quantile(times[:, :1] / times[:, 1:], (0.25, 0.5, 0.75), axis=0)
                cells = [f"{m:.2f} ({a:.2f} to {b:.2f})" for a, m, b in zip(low, middle, high, strict=True)]
                table.add_row(size, str(cores), str(count), f"{np.median(times[:, 0]) * 1e3:.2f}", *cells)
                for pattern, ratio in zip(names, middle, strict=True):
                    name = f"CPU, float32, {size}, {pattern}, {count} tokens, {cores} threads: dense time / our time"
                    goal = ONE_TOKEN.get(pattern) if count == 1 else MANY
                    lines.append(json_rows.row(name, float(ratio), "ratio", goal))
            del sessions
    Console(width=120).print(table)
    json_rows.write(json_file, lines)


if __name__ == "__main__":
    app()
