"""What the pages of `nmsparse report` and `nmsparse compare` say, all of it from files that other stages wrote."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from converter import records
from converter.delivery import accuracy
from converter.delivery.manifest import RECIPE, REPORT, about, exported
from converter.delivery.page import Chart, Line, Section, bars, heat, intervals, line, page
from converter.errors import OutputError, said
from converter.graph.costs import LayerCost, layer_costs, span
from converter.json_rows import HIGH, LOW, RATIO, SpeedRow
from converter.records import About, Choices, LayerParity, Report

BLOCK = re.compile(r"\.(\d+)\.")
Item = TypeVar("Item")


@dataclass(frozen=True)
class Out:
    """The files of one OUT that pages are made from."""

    folder: Path
    about: About
    report: Report
    choices: Choices
    recipe: str
    costs: list[LayerCost]
    evaluated: accuracy.Evaluated | None

    def used(self) -> float:
        """Return the share of the sparse layers' products that a token takes part in."""
        return _total(self.costs, "sparse_products") / _total(self.costs, "products")

    def patterns(self) -> str:
        """Return the pattern of all layers, or the two between which they are."""
        return span(self.costs)

    def mitigation(self) -> str:
        """Return the methods that it was calibrated with, as a recipe has them."""
        return "+".join(self.choices.mitigation)

    def source(self) -> str:
        """Return the checkpoint's name, without the folders that it lies in."""
        return self.about.source.text().rstrip("/").rpartition("/")[2]


def read(folder: Path) -> Out:
    """Return what is known of OUT.

    Raises:
        OutputError: when the folder holds no exported model of ours.
    """
    costs = layer_costs(exported(folder))
    try:
        made = records.read(Report, folder / REPORT)
        choices = records.parsed(Choices, made.recipe)
        recipe = (folder / RECIPE).read_text("utf-8")
    except (OSError, ValueError) as error:
        raise OutputError(
            f"{folder}: must hold {REPORT} and {RECIPE} as nmsparse wrote them, got {said(error)}. Convert again."
        ) from error
    return Out(folder, about(folder), made, choices, recipe, costs, accuracy.evaluated(folder))


def report(out: Out, bench: Sequence[SpeedRow]) -> str:
    """Return the page of one OUT; `bench` are the rows that `nmsparse bench --json` wrote, or none."""
    verdict = [
        Line(f"A token uses {out.used():.0%} of the weights of {len(out.costs)} layers ({out.patterns()})."),
        _parity_line(out),
        accuracy.verdict(out.evaluated),
        _speed_line(bench),
    ]
    sections = [
        *accuracy.sections(out.evaluated),
        *_layers(out),
        *_parity(out),
        *_training(out),
        *_bench(bench),
        *_about(out),
    ]
    return page(f"{out.source()}, N:M sparse", verdict, sections)


def compare(outs: Sequence[Out]) -> str:
    """Return the page that shows several OUTs side by side."""
    names = [out.folder.resolve().name for out in outs]
    if len(set(names)) < len(names):
        names = [str(out.folder) for out in outs]
    sources = {out.about.source.weights_sha256 for out in outs}
    verdict = [Line(f"{len(outs)} conversions of {outs[0].source()}.")]
    if len(sources) > 1:
        verdict = [
            Line("These are conversions of different checkpoints: " + ", ".join(o.source() for o in outs), False)
        ]
    for name, out in zip(names, outs, strict=True):
        parity = _parity_line(out)
        verdict.append(Line(f"{name}: {parity.text}", parity.good))
    size = bars(
        names,
        {
            "dense": [_total(out.costs, "bytes") / 1e6 for out in outs],
            "sparse": [_total(out.costs, "sparse_bytes") / 1e6 for out in outs],
        },
        "MB a token",
        "Megabytes of weights in the sparse layers, and how many of them one token reads.",
    )
    head = ("OUT", "pattern", "criterion", "mitigation", "weights", "used", "MB on disk", "calibration, s", "parity")
    rows = [
        (
            name,
            out.patterns(),
            out.choices.criterion,
            out.mitigation(),
            out.choices.weights,
            f"{out.used():.0%}",
            f"{out.report.bytes / 1e6:.0f}",
            f"{sum(s.seconds for s in out.report.stages if s.stage not in ('export', 'validate')):.0f}",
            "not validated" if out.report.parity is None else "passed" if out.report.parity.passed else "failed",
        )
        for name, out in zip(names, outs, strict=True)
    ]
    sections = [
        Section("Side by side", head=head, rows=rows),
        *accuracy.side_by_side(
            [
                accuracy.Side(name, out.patterns(), out.mitigation(), out.evaluated)
                for name, out in zip(names, outs, strict=True)
            ]
        ),
        Section("What a token reads", charts=[size]),
        *(Section(f"Recipe of {name}", verbatim=out.recipe) for name, out in zip(names, outs, strict=True)),
    ]
    return page(f"{len(outs)} conversions side by side", verdict, sections)


def _layers(out: Out) -> list[Section]:
    by_name: dict[str, list[LayerCost]] = {}
    for cost in out.costs:
        by_name.setdefault(cost.name.rpartition(".")[2], []).append(cost)
    charts = [
        _map(
            out.costs,
            lambda cost: cost.name,
            lambda cost: 100 * cost.sparse_products / cost.products,
            100,
            f"Percent of each layer's weights that a token uses, by block and projection: {out.patterns()}.",
        ),
        bars(
            list(by_name),
            {
                "dense": [2 * _total(costs, "products") / 1e6 for costs in by_name.values()],
                "sparse": [2 * _total(costs, "sparse_products") / 1e6 for costs in by_name.values()],
            },
            "MFLOP a token",
            "Millions of floating-point operations for a token, by projection: "
            f"{2 * _total(out.costs, 'products') / 1e6:.0f} dense, "
            f"{2 * _total(out.costs, 'sparse_products') / 1e6:.0f} sparse in all.",
        ),
    ]
    head = ("layer", "in x out", "pattern", "used", "MFLOP dense", "MFLOP sparse", "MB dense", "MB sparse")
    rows = [
        (
            cost.name,
            f"{cost.in_features} x {cost.out_features}",
            f"{cost.keep}:{cost.group}",
            f"{cost.sparse_products / cost.products:.0%}",
            *(f"{2 * products / 1e6:.2f}" for products in (cost.products, cost.sparse_products)),
            *(f"{size / 1e6:.2f}" for size in (cost.bytes, cost.sparse_bytes)),
        )
        for cost in out.costs
    ]
    text = (
        "What a kernel has to read and compute that skips the weights of dropped channels. Where no such kernel runs "
        "the model, all of them are read."
    )
    return [Section("Layers", text, charts, head, rows)]


def _parity_line(out: Out) -> Line:
    parity = out.report.parity
    if parity is None:
        return Line(
            "Not compared with PyTorch when it was written, as nmsparse export leaves that to validate.", good=False
        )
    if not parity.passed:
        return Line(f"ONNX Runtime does not compute what PyTorch does: {'; '.join(parity.failures)}", good=False)
    return Line(
        "ONNX Runtime computes what PyTorch does: the worst layer is off by "
        f"{parity.largest_layer_error:.1e} of its largest output, and {parity.largest_flip_share:.1%} of the "
        "channels are chosen otherwise."
    )


def _parity(out: Out) -> list[Section]:
    parity, layers = out.report.parity, out.report.parity_layers
    if parity is None:
        return []
    worst: dict[str, LayerParity] = {}
    for layer in layers:
        worst[layer.layer] = max(worst.get(layer.layer, layer), layer, key=lambda one: one.error)
    charts = [
        _map(
            worst.values(),
            lambda layer: layer.layer,
            lambda layer: 1e6 * layer.error,
            1e6 * parity.largest_layer_error,
            "Error of each layer on the same input, in millionths of its largest output: at most "
            f"{1e6 * parity.largest_layer_error:.1f}.",
        ),
        _map(
            worst.values(),
            lambda layer: layer.layer,
            lambda layer: 1e6 * layer.flips,
            1e6 * (parity.largest_flip_share or parity.limits.flips),
            "Channels that ONNX Runtime chooses otherwise than PyTorch on the same input, in millionths of all: "
            f"at most {1e6 * parity.largest_flip_share:.1f}.",
        ),
    ]
    head = ("layer", "call", "flips", "margin of flips", "error", "verdict")
    rows = [
        (
            layer.layer,
            layer.phase,
            *(f"{value:.1e}" for value in (layer.flips, layer.margin, layer.error)),
            "passed" if layer.passed else "failed",
        )
        for layer in layers
    ]
    return [Section("Parity", f"On {parity.tokens} tokens, in {parity.dtype}.", charts, head, rows)]


def _training(out: Out) -> list[Section]:
    curve = out.report.training
    sections = []
    if curve:
        (_, first), (_, last) = curve[0], min(curve, key=lambda point: point[1])
        says = f"Divergence from the dense model on held-out text: {first:.3f} before training, {last:.3f} at best."
        sections.append(
            Section(
                "Training",
                charts=[line([step for step, _ in curve], [loss for _, loss in curve], "step", "divergence", says)],
                head=("step", "divergence"),
                rows=[(str(step), f"{loss:.4f}") for step, loss in curve],
            )
        )
    rows = [(s.stage, f"{s.seconds:.1f}", f"{s.peak_bytes / 1e9:.2f}") for s in out.report.stages]
    return [*sections, Section("What it took", head=("stage", "seconds", "peak memory, GB"), rows=rows)]


def _speeds(bench: Sequence[SpeedRow]) -> dict[tuple[str, int], dict[str, float]]:
    """Return the measurements by call and threads: tokens a second, and the quartiles of dense time by ours."""
    figures: dict[tuple[str, int], dict[str, float]] = {}
    for row in bench:
        figures.setdefault((row.call, row.threads), {})[row.what] = row.value
    return figures


def _speed_line(bench: Sequence[SpeedRow]) -> Line:
    ratio = {key: figures[RATIO] for key, figures in _speeds(bench).items()}
    if not ratio:
        return Line(
            "How fast it is was not measured: run nmsparse bench with --json, and give the file here.", good=False
        )
    (call, threads), value = max(ratio.items(), key=lambda item: item[1])
    (worst, by), least = min(ratio.items(), key=lambda item: item[1])
    return Line(
        f"Beside the same model run dense: {value:.2f} times as fast at best ({call}, {_on(threads)}), "
        f"{least:.2f} at worst ({worst}, {_on(by)}).",
        good=least >= 1,
    )


def _on(threads: int) -> str:
    return "one thread" if threads == 1 else f"{threads} threads"


def _bench(bench: Sequence[SpeedRow]) -> list[Section]:
    speeds = _speeds(bench)
    if not speeds:
        return []
    rows = [
        (call, str(threads), *(f"{value:.2f}" for value in of_row.values()))
        for (call, threads), of_row in speeds.items()
    ]
    chart = intervals(
        [f"{call}, {_on(threads)}" for call, threads in speeds],
        [(s[LOW], s[RATIO], s[HIGH]) for s in speeds.values()],
        "times as fast as dense",
        "Time of the same model run dense by ours: median and quartiles of interleaved runs. Above 1 is faster.",
    )
    return [Section("Speed", charts=[chart], head=("call", "threads", *next(iter(speeds.values()))), rows=rows)]


def _about(out: Out) -> list[Section]:
    source = out.about.source
    rows = [
        *(("version of " + name, number) for name, number in out.about.versions.items()),
        ("checkpoint", source.text()),
        ("revision", source.revision or "none"),
        ("SHA-256 of its weights", source.weights_sha256),
        ("bytes on disk", f"{out.report.bytes:,}"),
    ]
    return [Section("Recipe", verbatim=out.recipe), Section("Made from", head=("what", "value"), rows=rows)]


def _map(
    items: Iterable[Item], name: Callable[[Item], str], value: Callable[[Item], float], most: float, says: str
) -> Chart:
    """Return a map of the items by projection and block; what lies in no block is in a column of its own."""
    rows: dict[str, dict[str, float]] = {}
    for item in items:
        block = BLOCK.search(name(item))
        which = name(item)[block.end() :] if block else name(item)
        rows.setdefault(which, {})[block[1] if block else "-"] = value(item)
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    return heat(list(rows), columns, [[row.get(column) for column in columns] for row in rows.values()], most, says)


def _total(costs: Iterable[LayerCost], what: str) -> float:
    return sum(float(getattr(cost, what)) for cost in costs)
