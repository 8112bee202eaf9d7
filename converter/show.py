"""What the commands print for people: tables that can be read at 80 columns."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from converter.doctor import Finding
    from converter.evaluate import Evaluation
    from converter.graph.costs import LayerCost
    from converter.plan import LayerPlan
    from converter.records import ParitySummary, Report
    from converter.runtimes.speed import Speed
    from converter.runtimes.tune import Timing


def _table(*columns: str) -> Table:
    return Table(*columns, box=None, padding=(0, 2, 0, 0), pad_edge=False)


def layers(costed: Sequence[tuple[LayerCost, str]]) -> None:
    """Print a row for the layers of each name and shape, then the paths that they take on TensorRT."""
    from converter.graph.costs import span

    rows: dict[tuple[str, int, int], list[LayerCost]] = {}
    paths: dict[str, list[str]] = {}
    for cost, path in costed:
        name = cost.name.rpartition(".")[2]
        rows.setdefault((name, cost.in_features, cost.out_features), []).append(cost)
        if name not in paths.setdefault(path, []):
            paths[path].append(name)
    table = _table("layers", "count", "in x out", "pattern", "used", "MFLOP", "MB")
    for (name, k, n), costs in [*rows.items(), (("all", 0, 0), [cost for cost, _ in costed])]:
        products, kept, size, read = (
            sum(getattr(cost, what) for cost in costs)
            for what in ("products", "sparse_products", "bytes", "sparse_bytes")
        )
        pairs = ((2 * products, 2 * kept), (size, read))
        figures = (f"{_millions(dense)} -> {_millions(sparse)}" for dense, sparse in pairs)
        table.add_row(name, str(len(costs)), f"{k} x {n}" if k else "", span(costs), f"{kept / products:.0%}", *figures)
    console = Console(emoji=False, highlight=False)
    console.print(table)
    console.print(
        "MFLOP and MB of weights for one token: dense -> sparse, by a kernel that reads only the rows it uses."
    )
    for path, names in paths.items():
        console.print(f"on TensorRT, by tokens of a call: {path} ({', '.join(names) if len(paths) > 1 else 'all'})")


def _millions(number: float) -> str:
    size = number / 1e6
    return f"{size:.0f}" if size >= 100 else f"{size:.1f}" if size >= 1 else f"{size:.2f}"


def findings(rows: Sequence[Finding]) -> None:
    """Print what works and what does not, each with what to do about it."""
    console = Console(emoji=False, highlight=False)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for one in rows:
        table.add_row("ok" if one.works else "no", one.part, one.found if one.works else f"{one.found}. {one.advice}")
    console.print(table)


def plan(rows: Sequence[LayerPlan]) -> None:
    """Print each layer, its shape and pattern, and why it stays dense where it does."""
    table = _table("layer", "in x out", "pattern", "why dense")
    for layer in rows:
        pattern = "by budget" if layer.open else f"{layer.keep}:{layer.group}" if layer.sparse else "dense"
        table.add_row(layer.name, f"{layer.in_features} x {layer.out_features}", pattern, layer.reason)
    Console(emoji=False).print(table)


def speed(how: str, times: Sequence[Speed]) -> None:
    """Print how fast OUT is beside itself run dense."""
    table = _table("call", "threads", "dense, ms", "ours, ms", "ours, tokens/s", "dense time / our time")
    for time in times:
        low, middle, high = time.ratios()
        both = [f"{statistics.median(seconds) * 1e3:.2f}" for seconds in (time.dense, time.ours)]
        ratio = f"{middle:.2f} ({low:.2f} to {high:.2f})"
        table.add_row(time.call(), str(time.threads), *both, f"{time.per_second():.1f}", ratio)
    console = Console(emoji=False)
    console.print(table)
    console.print(f"the op ran in {how}")


def timings(timings: Sequence[Timing]) -> None:
    """Print how fast each path of the plugin is on this GPU."""
    table = _table("in x out", "pattern", "tokens", "path", "dense time / our time")
    for timing in timings:
        shape, span = timing.shape, f"{min(timing.ratios):.2f} to {max(timing.ratios):.2f}"
        row = (f"{shape.k} x {shape.n}", f"{shape.keep}:{shape.group}", str(timing.tokens))
        table.add_row(*row, f"{timing.path} {timing.tile}", f"{timing.median():.2f} ({span})")
    Console(emoji=False).print(table)


def evaluation(evaluated: Evaluation) -> None:
    """Print each task's figures, and what is left of the dense model's accuracy."""
    alone = evaluated.recovery is None and set(evaluated.examples.model) == {"dense"}
    columns = ("dense",) if alone else ("dense", "sparse", "sparse - dense (95 %)", "p")
    table = _table("task", "examples", *columns)
    for one in evaluated.compared:
        row = [f"{one.task} {one.metric}", str(one.examples), f"{one.dense:.3f}"]
        if not alone:
            p = one.t_test if one.mcnemar is None else one.mcnemar
            row += [f"{one.sparse:.3f}", f"{one.difference:+.3f} ({one.low:+.3f} to {one.high:+.3f})", f"{p:.3f}"]
        table.add_row(*row)
    if evaluated.f1:
        table.add_row(
            "boolq F1 of yes", "", *(f"{evaluated.f1[name]:.3f}" for name in ("dense", "sparse")[: len(evaluated.f1)])
        )
    console = Console(emoji=False)
    console.print(table)
    if evaluated.recovery is not None:
        console.print(f"sparse / dense accuracy, mean over the tasks: {evaluated.recovery:.3f}")
        console.print("p: of McNemar's exact test where all is right or wrong, else of the paired t-test")


def report(about: Report) -> None:
    """Print what a conversion took, its parity, and what OUT is."""
    table = _table("stage", "seconds", "peak memory")
    for cost in about.stages:
        table.add_row(cost.stage, f"{cost.seconds:.1f}", f"{cost.peak_bytes / 1e9:.2f} GB")
    console = Console(emoji=False)
    console.print(table)
    if about.parity is not None:
        parity(about.parity)
    if about.recipe["dtype"] == "bfloat16":
        console.print("ONNX Runtime's CPU provider has no bfloat16 kernels: nmsparse runs it in float32 there")
    console.print(f"{about.layers.sparse} layers sparse, {about.layers.dense} dense, {about.bytes / 1e9:.2f} GB")
    if about.permutations.folded or about.permutations.inputs:
        console.print(
            f"permutations: {about.permutations.folded} folded into the weights, {about.permutations.inputs} op inputs"
        )
    console.print(
        "Without our kernels it runs as ONNX functions of standard ops: correct everywhere, slower than dense."
    )


def parity(summary: ParitySummary) -> None:
    """Print how far ONNX Runtime is from PyTorch, beside what is allowed."""
    limits = summary.limits
    table = _table(f"parity, {summary.dtype}, {summary.tokens} tokens", "worst", "limit")
    table.add_row("mask: share of flips", f"{summary.largest_flip_share:.2g}", f"{limits.flips:g}")
    table.add_row("mask: margin of a flip", f"{summary.largest_flip_margin:.2g}", f"{limits.margin:g}")
    table.add_row(f"value, {summary.layers} layers", f"{summary.largest_layer_error:.2g}", f"{limits.layer:g}")
    for phase, error in summary.dense_error.items():
        table.add_row(f"whole graph run dense, {phase}", f"{error:.2g}", f"{limits.model:g}")
    for boundary, tokens in summary.generated.items():
        table.add_row(f"written across {boundary}", f"{tokens} tokens equal", "all")
    for boundary, why in summary.not_tried.items():
        table.add_row(f"written across {boundary}", "not tried", why)
    for name, value in summary.sparse_not_judged.items():
        table.add_row(f"whole graph, {name.replace('_', ' ')}", f"{value:.3g}", "not judged")
    Console(emoji=False).print(table)
