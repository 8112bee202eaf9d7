"""The op's kernel for CPUs beside ONNX Runtime's dense product, on this machine.

    make cpu-op && python benchmarks/cpu.py --json cpu.json
    python benchmarks/cpu.py --select 4096

With `--weights int8` or `int4`, in blocks of 128, the dense product is ONNX Runtime's fastest with weights of as many
bits: MatMulNBits at accuracy level 4, for int8 DynamicQuantizeMatMul too. Both round activations to eight bits; ours do
not.

`--select K` measures what comes before a product: to choose the channels of a token of K, and to list them. It is told
from products with 64 and with 128 columns, whose difference is what 64 columns take. The peer is one read of the same
row, ONNX Runtime's ReduceSum. Each is many nodes of one graph, so that a call's own time is shared.

The sessions of a shape take turns, so that what else the machine does meets all of them; no thread spins while it
waits. A cell is dense time / our time: the median of the ratios of neighbours, and their quartiles. It prints a table
and asserts nothing.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import ml_dtypes  # noqa: F401 # gives numpy bfloat16 and int4 by name
import numpy as np
import onnx
import onnx.helper
import onnxruntime
import record
import torch
from cyclopts import App, Parameter
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from converter import json_rows
from converter.graph.dense import densify
from converter.names import BITS, MODEL, Weights
from converter.runtimes.kernel import library
from converter.runtimes.onnxruntime import ACCURACY
from converter.signature import DOMAIN, INPUTS, OP, OPSET, VERSION
from converter.sparsity.quantize import Storage

app = App(help_format="plaintext")
SECONDS = 1.0  # of dense time for a shape and number of tokens, within the rounds
ROUNDS = (7, 40)
# What is wanted of a token alone, and of many, dense time / our time.
HALF = ("2:4", "8:16", "16:32")
GOALS = {
    "dtype": dict.fromkeys(HALF, 1.95) | dict.fromkeys(("1:4", "4:16"), 3.5),
    "int8": dict.fromkeys(HALF, 1.4),
    "int4": dict.fromkeys(HALF, 1.2),
}
MANY = 0.93
BLOCK = 128
# Of `--select`: nodes of a graph, columns of W, calls, and calls that do not count.
NODES, COLUMNS, SELECTIONS, WARM = 64, 64, 400, 20
# The dense peers of integers. Of 16 bits ONNX Runtime has no product on every CPU: it widens the weights at load.
DENSE = {"int8": ("DynamicQuantizeMatMul", "MatMulNBits"), "int4": ("MatMulNBits",)}


def model(nodes: list[Any], stored: dict[str, np.ndarray], inputs: list[Any], outputs: list[Any]) -> onnx.ModelProto:
    """Return a model of `nodes`, with the initializers `stored`."""
    initializers = [onnx.numpy_helper.from_array(array, name) for name, array in stored.items()]
    graph = onnx.helper.make_graph(nodes, "layers", inputs, outputs, initializers)
    domains = [onnx.helper.make_opsetid(*d) for d in (("", OPSET), (DOMAIN, VERSION), ("com.microsoft", 1))]
    return onnx.helper.make_model(graph, opset_imports=domains, ir_version=11)


def session(made: onnx.ModelProto, kernel: Path, threads: int, optimized: bool = True) -> onnxruntime.InferenceSession:
    """Return a session whose threads do not spin; one that is not optimized keeps nodes that are alike.

    Its weights lie in a file, as those of an OUT do. It stays mapped when it has no name any more.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry(ACCURACY, "4")
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.register_custom_ops_library(str(kernel.resolve()))
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/{MODEL}"
        onnx.save_model(made, path, save_as_external_data=True)
        return onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])


def op(pattern: str, names: list[str], y: str) -> onnx.NodeProto:
    """Return a node of the op; a pattern without a colon keeps all."""
    keep, group = map(int, pattern.split(":")) if ":" in pattern else (1, 1)
    attributes = {"keep": keep, "group": group, "shift_mode": "none", "variance": 0}
    return onnx.helper.make_node(OP, names, [y], domain=DOMAIN, **attributes)


def one_product(w: np.ndarray, what: str, weights: Weights) -> onnx.ModelProto:
    """Return a model of one product: the op where `what` is a pattern, else ONNX Runtime's."""
    k, n = w.shape
    block = 0 if what == "DynamicQuantizeMatMul" else BLOCK
    stored = {"W": w}
    if weights in BITS:
        whole, scale = Storage(weights=weights, block=block).quantized(torch.from_numpy(w))
        stored = {"W": whole.numpy().astype(weights), "scale": scale.numpy()}
    elif weights != "dtype" and what != "MatMul":
        stored["W"] = w.astype(weights)
    value = onnx.helper.make_tensor_value_info
    x, y = value("X", 1, ["tokens", k]), value("Y", 1, ["tokens", n])
    if what == "DynamicQuantizeMatMul":
        stored["scale"] = stored["scale"].reshape(n)
        node = onnx.helper.make_node(what, ["X", "W", "scale"], ["Y"], domain="com.microsoft")
        return model([node], stored, [x], [y])
    names = [{"weight_scale": "scale"}.get(name, name) for name in INPUTS]
    made = model([op(what, [n if n in {"X", *stored} else "" for n in names], "Y")], stored, [x], [y])
    return densify(made) if what in {"MatMul", "MatMulNBits"} else made


def selections(k: int, n: int, pattern: str) -> onnx.ModelProto:
    """Return a model of NODES products of one row with n columns, or without columns, of its sums."""
    value, names = onnx.helper.make_tensor_value_info, [str(number) for number in range(NODES)]
    if n:
        nodes = [op(pattern, ["X", "W"], name) for name in names]
        stored = {"W": np.ones((k, n), np.float32)}
    else:
        nodes = [onnx.helper.make_node("ReduceSum", ["X", "axes"], [name]) for name in names]
        stored = {"axes": np.array([1])}
    return model(nodes, stored, [value("X", 1, [1, k])], [value(name, 1, [1, n or 1]) for name in names])


def measure_selection(k: int, patterns: list[str], kernel: Path) -> list[dict[str, Any]]:
    """Print what a choice takes beside one read of the row; return the rows of `--json`."""
    x, lines, cells = np.random.default_rng(0).standard_normal((1, k), np.float32), [], []
    for pattern in patterns:
        columns = (0, COLUMNS, 2 * COLUMNS)
        sessions = [session(selections(k, n, pattern), kernel, 1, optimized=False) for n in columns]
        times = np.array([[seconds(run, x) for run in sessions] for _ in range(SELECTIONS)])[WARM:]
        low, middle, high = np.quantile((2 * times[:, 1] - times[:, 2]) / times[:, 0], (0.25, 0.5, 0.75))
        cells.append(f"{middle:.1f} ({low:.1f} to {high:.1f})")
        name = f"CPU, select and list one token of {k}, {pattern}: our time / one read of the row"
        lines.append(json_rows.row(name, float(middle), "ratio"))
    table = Table(f"one token of {k}", *patterns, box=MARKDOWN, title="our time / one read of the row")
    table.add_row("select and list", *cells)
    Console(width=120).print(table)
    return lines


def seconds(run: onnxruntime.InferenceSession, x: np.ndarray) -> float:
    """Return the time of one call."""
    start = time.perf_counter()
    run.run(None, {"X": x})
    return time.perf_counter() - start


@app.default
def main(
    *,
    shapes: str = "2048x8192,8192x2048,4096x14336",
    tokens: str = "1,2,4,8,16,32,64,128,512",
    patterns: str = "2:4,8:16,1:4",
    weights: Weights = "dtype",
    threads: str = "1,2",
    select: int = 0,
    json_file: Annotated[Path | None, Parameter(name="--json")] = None,
    result: str | None = None,
) -> None:
    """Measure layers of `shapes` (in x out), weights in float32 or in fewer bits; or a choice of SELECT channels."""
    kernel = library()
    if kernel is None:
        sys.exit("benchmarks/cpu.py: the op's library must be built, got none. Run make cpu-op.")
    names, generator = patterns.split(","), np.random.default_rng(0)
    if select:
        json_rows.write(json_file, measure_selection(select, names, kernel))
        return
    lines: list[dict[str, Any]] = []
    table = Table("in x out", "threads", "tokens", "dense, ms", *names, box=MARKDOWN, title="dense time / our time")
    for size in shapes.split(","):
        k, n = map(int, size.split("x"))
        w = generator.standard_normal((k, n), np.float32)
        for cores in map(int, threads.split(",")):
            peers = DENSE.get(weights, ("MatMul",))
            sessions = [session(one_product(w, what, weights), kernel, cores) for what in (*names, *peers)]
            for count in map(int, tokens.split(",")):
                x = generator.standard_normal((count, k), np.float32)
                first = min(seconds(sessions[-1], x) for _ in range(2))
                rounds = min(max(int(SECONDS / first), ROUNDS[0]), ROUNDS[1])
                for run in sessions:
                    seconds(run, x)
                times = np.array([[seconds(run, x) for run in sessions] for _ in range(rounds)])
                ours, dense_ones = times[:, : len(names)], times[:, len(names) :]
                theirs = dense_ones[:, [np.median(dense_ones, axis=0).argmin()]]
                low, middle, high = np.quantile(theirs / ours, (0.25, 0.5, 0.75), axis=0)
                cells = [f"{m:.2f} ({a:.2f} to {b:.2f})" for a, m, b in zip(low, middle, high, strict=True)]
                table.add_row(size, str(cores), str(count), f"{np.median(theirs) * 1e3:.2f}", *cells)
                for pattern, ratio in zip(names, middle, strict=True):
                    call = f"{size}, {pattern}, {count} tokens, {cores} threads"
                    name = f"CPU, {'float32' if weights == 'dtype' else weights}, {call}: dense time / our time"
                    goal = GOALS.get(weights, {}).get(pattern) if count == 1 else MANY
                    lines.append(json_rows.row(name, float(ratio), "ratio", goal))
            del sessions
    record.show(table, result)
    json_rows.write(json_file, lines)


if __name__ == "__main__":
    app()
