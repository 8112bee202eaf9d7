"""Perplexity of criteria and mitigations side by side, with the share of the lost log-perplexity that each recovers.

Every row is calibrated on one text and measured in PyTorch on others. The intervals are paired 95 % bootstraps over
the windows: the same windows for all rows. Cells that the file of --json holds already are not measured again.
"""

from __future__ import annotations

import json
import re
import tempfile
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import record
import torch
from cyclopts import App, Parameter
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from scipy.stats import bootstrap

from converter import json_rows
from converter.calibration.fitting import Means, fit
from converter.checkpoint import Checkpoint, open_checkpoint
from converter.evaluation.perplexity import window_losses
from converter.pipeline import calibration_text
from converter.plan import plan
from converter.recipe import Recipe, parse_set
from converter.sources.texts import windows
from converter.sparsity.linear import install
from converter.stages import Stages

BASELINE = "magnitude none"
PUBLISHED = (
    BASELINE,
    "clact none",
    "clact_dynamic none",
    "amber none",
    "amber_trimmed none",
    "wina none",
    "weight_variance none",
    "magnitude d_pts",
    "magnitude d_pts d_pts=mean",
    "magnitude s_pts",
    "magnitude s_pts s_pts=scalar",
    "magnitude var",
    "magnitude pcs",
    "magnitude r_sparse",
    "wina var",
    "weight_magnitude none",
    "wanda none",
    "sparsegpt none",
    "magnitude l_pts training.learning_rate=3e-3",
    "magnitude ls training.learning_rate=1e-3",
    "magnitude l_pts+ls+var training.learning_rate=1e-3",
    "magnitude r_sparse r_sparse=trained",
)
OURS = (
    "magnitude permute",
    "wina permute+var",
    "wina permute+refit",
    "wina var allocation.budget=50%",
    "wina permute+var allocation.budget=50%",
    "wina permute+var+distill",
    "wina permute+var+distill allocation.budget=50%",
)
GOAL = 0.6  # of the gap, by the best row that costs nothing at run time
app = App(help_format="plaintext")


def _recipe(name: str, pattern: str, calibration: str) -> Recipe:
    """Return the recipe of a row."""
    criterion, mitigation, *settings = name.split()
    changes = {"pattern": pattern, "criterion": criterion, "mitigation": mitigation, "calibration.source": calibration}
    return Recipe().replace({**changes, **parse_set(settings)})


def measure(
    checkpoint: Checkpoint, recipe: Recipe, text: torch.Tensor, stages: Stages, tests: list[torch.Tensor]
) -> list[torch.Tensor]:
    """Return the loss of each window of each of the `tests` with the recipe calibrated on `text`."""
    layers = plan(checkpoint.skeleton(), recipe)
    with tempfile.TemporaryDirectory() as scratch:
        found = fit(checkpoint, layers, recipe, Means(text, Path(scratch)), stages)
    model = found.checkpoint.on(checkpoint.device).model()
    for name, layer in found.params.items():
        install(model, name, layer.on(model.device), phases=found.recipe.phases)
    with stages.stage("measure", "windows") as advance:
        return [window_losses(model, test, advance) for test in tests]


def recovered(dense: torch.Tensor, base: torch.Tensor, row: torch.Tensor) -> tuple[float, float, float]:
    """Return the share of the log-perplexity lost from `dense` to `base` that `row` recovers: low, value, high."""

    def share(d: Any, b: Any, r: Any, axis: int = -1) -> Any:
        return (b.mean(axis) - r.mean(axis)) / (b.mean(axis) - d.mean(axis))

    data = tuple(t.numpy() for t in (dense, base, row))
    interval = bootstrap(data, share, paired=True, vectorized=True, method="percentile", random_state=0)
    low, high = interval.confidence_interval
    return float(low), float(share(*data)), float(high)


@app.default
def main(
    model: str,
    *,
    calibration: Annotated[str, Parameter(help="the recipe's calibration.source")],
    text: Annotated[list[str], Parameter(help="one or more texts to measure on, as for nmsparse perplexity")],
    patterns: str = "2:4,4:8,8:16,16:32,50%",
    row: Annotated[tuple[str, ...], Parameter(help="CRITERION MITIGATION [KEY=VALUE ...]; may be repeated")] = (
        *PUBLISHED,
        *OURS,
    ),
    seeds: Annotated[str, Parameter(help="of the rows that are trained, by commas")] = "0",
    contexts: Annotated[str, Parameter(help="lengths of the windows, by commas")] = "1024",
    tokens: int = 8192,
    device: Literal["cpu", "cuda"] = "cpu",
    json_file: Annotated[Path | None, Parameter(name="--json")] = None,
    result: str | None = None,
) -> None:
    """Print the tables for MODEL, calibrated on one text and measured on others."""
    stages = Stages(console=Console(stderr=True, quiet=True))
    checkpoint = open_checkpoint(model).on(device)
    tokenizer = checkpoint.tokenizer()
    lengths = [int(length) for length in contexts.split(",")]
    # All that decides a cell's value is in its name, or the cells of another command would pass for this one's.
    fit = ",".join(Path(source).name for source in calibration.split(","))
    where = [
        f"context {length}, {tokens} tokens of {Path(source).name}, calibrated on {fit}"
        for length, source in product(lengths, text)
    ]
    tests = [windows(source, tokenizer, tokens // length, length) for length, source in product(lengths, text)]
    dense_model = checkpoint.model()
    dense = [window_losses(dense_model, test) for test in tests]
    del dense_model
    names = list(dict.fromkeys((BASELINE, *row)))
    longest = max((_recipe(name, "8:16", calibration) for name in names), key=Recipe.windows)
    with tempfile.TemporaryDirectory() as scratch:
        written = calibration_text(checkpoint, longest, Path(scratch), stages) if longest.windows() else torch.empty(0)
    found: dict[str, dict[str, Any]] = {}
    if json_file is not None and json_file.exists():
        found = {line["name"]: line for line in json.loads(json_file.read_text())}
    shown: list[str] = []
    for pattern in patterns.split(","):
        base: list[torch.Tensor] = []
        for name in names:
            recipe = _recipe(name, pattern, calibration)
            for seed in seeds.split(",") if recipe.trains() else ["0"]:
                label = name if seed == "0" else f"{name}, seed {seed}"
                shown.append(label)
                if base and all(f"{pattern} {label}, {place}: perplexity" in found for place in where):
                    continue
                recipe = recipe.replace({"seed": int(seed)})
                stages.costs.clear()
                losses = measure(checkpoint, recipe, written[: recipe.windows()], stages, tests)
                base = base or losses
                goal = GOAL if name in OURS and pattern in {"2:4", "8:16"} else None
                costs = [cost for cost in stages.costs if cost.stage != "measure"]
                spent = (
                    sum(cost.seconds for cost in costs),
                    max(cost.gpu_peak_bytes or cost.peak_bytes for cost in costs),
                )
                lines = _lines(f"{pattern} {label}", where, dense, base, losses, goal, spent)
                found |= {line["name"]: line for line in lines}
                print(
                    f"{pattern} {label}: {' | '.join(_cell(found, pattern, label, place) for place in where)}",
                    flush=True,
                )
                json_rows.write(json_file, found.values())
    for place, losses in zip(where, dense, strict=True):
        title = f"{place}: perplexity, recovered (95 %); dense {losses.mean().exp():.2f}"
        table = _table(found, patterns.split(","), list(dict.fromkeys(shown)), place, title)
        record.show(table, result and f"{result}-{re.sub(r'[^a-z0-9]+', '-', place.lower())}")


def _lines(
    row: str,
    where: list[str],
    dense: list[torch.Tensor],
    base: list[torch.Tensor],
    losses: list[torch.Tensor],
    goal: float | None,
    spent: tuple[float, int],
) -> list[dict[str, Any]]:
    """Return what a row is worth on each text, and the seconds and bytes `spent` on its calibration."""
    lines = []
    for place, d, b, of_row in zip(where, dense, base, losses, strict=True):
        low, share, high = recovered(d, b, of_row) if of_row is not b else (0.0, 0.0, 0.0)
        lines += [
            json_rows.row(f"{row}, {place}: perplexity", of_row.mean().exp().item(), ""),
            json_rows.row(f"{row}, {place}: recovered", share, "share", goal),
            json_rows.row(f"{row}, {place}: recovered, low", low, "share"),
            json_rows.row(f"{row}, {place}: recovered, high", high, "share"),
            json_rows.row(f"{row}, {place}: calibration", spent[0], "s"),
            json_rows.row(f"{row}, {place}: peak memory", spent[1], "bytes"),
        ]
    return lines


def _cell(found: dict[str, dict[str, Any]], pattern: str, label: str, place: str) -> str:
    cell = f"{pattern} {label}, {place}"
    if f"{cell}: perplexity" not in found:
        return ""
    perplexity, share, low, high = (
        found[f"{cell}: {what}"]["value"] for what in ("perplexity", "recovered", "recovered, low", "recovered, high")
    )
    return f"{perplexity:.2f}, {100 * share:.0f} % ({100 * low:.0f} to {100 * high:.0f})"


def _table(found: dict[str, dict[str, Any]], patterns: list[str], labels: list[str], place: str, title: str) -> Table:
    """Return the rows `labels` by the `patterns`, and the dearest calibration of each row."""
    table = Table("criterion and mitigation", *patterns, "calibration", title=title, box=MARKDOWN)
    for label in labels:
        costs = [
            tuple(found[f"{pattern} {label}, {place}: {what}"]["value"] for what in ("calibration", "peak memory"))
            for pattern in patterns
            if f"{pattern} {label}, {place}: calibration" in found
        ]
        cost = f"{max(c[0] for c in costs):.0f} s, {max(c[1] for c in costs) / 1e9:.1f} GB" if costs else ""
        table.add_row(label, *(_cell(found, pattern, label, place) for pattern in patterns), cost)
    return table


if __name__ == "__main__":
    app()
