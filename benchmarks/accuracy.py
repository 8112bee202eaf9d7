"""Perplexity of criteria and mitigations side by side, with the share of the lost log-perplexity that each recovers.

Every row is calibrated on one text and measured in PyTorch on another. The intervals are paired bootstraps over the
windows: the same windows for all rows.
"""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from cyclopts import App, Parameter
from rich.console import Console
from rich.table import Table
from scipy.stats import bootstrap

from converter.calibration.distill import distill
from converter.calibration.texts import windows
from converter.calibration.walk import calibrate
from converter.checkpoint import Checkpoint, open_checkpoint
from converter.evaluation.perplexity import window_losses
from converter.plan import plan
from converter.recipe import Recipe, parse_set
from converter.sparsity.linear import install
from converter.stages import StageCost, Stages

BASELINE = "magnitude none"
PUBLISHED = (
    BASELINE,
    "clact none",
    "amber none",
    "amber_trimmed none",
    "wina none",
    "weight_variance none",
    "magnitude d_pts",
    "magnitude s_pts",
    "magnitude var",
    "magnitude pcs",
    "magnitude r_sparse",
    "magnitude r_sparse r_sparse=trained",
    "magnitude l_pts",
    "magnitude l_pts+var",
    "magnitude ls",
    "wina var",
)
OURS = (
    "magnitude permute",
    "magnitude refit",
    "wina permute+var",
    "wina permute+var+refit",
    "wina permute+var+distill",
    "wina permute+var+refit+distill",
)
GOAL = 0.6  # of the gap, by the best row that costs nothing at run time
app = App(help_format="plaintext")


@dataclass
class Row:
    """One recipe at one pattern: its loss on each window of the text, and what calibrating it took."""

    name: str
    pattern: str
    losses: torch.Tensor
    costs: list[StageCost] = field(default_factory=list)


def measure(checkpoint: Checkpoint, recipe: Recipe, text: torch.Tensor, stages: Stages, test: torch.Tensor) -> Any:
    """Return the loss of each window of `test` with the recipe calibrated on `text`."""
    layers = plan(checkpoint.skeleton(), recipe)
    model = checkpoint.model()
    with tempfile.TemporaryDirectory() as scratch, stages.stage("calibrate", "blocks") as advance:
        used = text[: recipe.calibration.count] if recipe.needs_statistics() else None
        params = calibrate(model, layers, recipe, used, Path(scratch), advance)
    if recipe.trains():
        with stages.stage("distill", "steps") as advance:
            params = distill(checkpoint.model(), params, text, recipe, advance)
        model = checkpoint.model()
        for name, layer in params.items():
            install(model, name, layer)
    with stages.stage("measure", "windows") as advance:
        return window_losses(model, test, advance)


def recovered(dense: torch.Tensor, base: torch.Tensor, row: torch.Tensor) -> tuple[float, float, float]:
    """Return the share of the log-perplexity lost from `dense` to `base` that `row` recovers: value, low, high."""

    def share(d: Any, b: Any, r: Any, axis: int = -1) -> Any:
        return (b.mean(axis) - r.mean(axis)) / (b.mean(axis) - d.mean(axis))

    data = tuple(t.numpy() for t in (dense, base, row))
    interval = bootstrap(data, share, paired=True, vectorized=True, method="percentile", random_state=0)
    return float(share(*data)), *map(float, interval.confidence_interval)


@app.default
def main(
    model: str,
    *,
    calibration: Path,
    text: Path,
    patterns: str = "2:4,4:8,8:16,16:32,50%",
    rows: Annotated[str, Parameter(help="CRITERION MITIGATION [KEY=VALUE ...], by commas")] = ",".join(
        (*PUBLISHED, *OURS)
    ),
    context: int = 1024,
    tokens: int = 16384,
    json_file: Annotated[Path | None, Parameter(name="--json")] = None,
) -> None:
    """Print the table for MODEL, calibrated on the one text and measured on the other."""
    stages = Stages(console=Console(stderr=True, quiet=True))
    checkpoint = open_checkpoint(model)
    tokenizer = checkpoint.tokenizer()
    test = windows(str(text), tokenizer, tokens // context, context)
    most = Recipe().replace({"mitigation": "distill"})
    found = windows(str(calibration), tokenizer, most.windows(), most.calibration.window)
    dense = window_losses(checkpoint.model(), test)
    results: list[dict[str, Any]] = []
    table = Table("pattern", "criterion and mitigation", "perplexity", "recovered (95 %)", "calibration", "peak")
    table.add_row("", "dense", f"{dense.mean().exp():.2f}", "", "", "")
    for pattern in patterns.split(","):
        base: torch.Tensor | None = None
        for name in dict.fromkeys((BASELINE, *rows.split(","))):
            criterion, mitigation, *settings = name.split()
            changes = {"pattern": pattern, "criterion": criterion, "mitigation": mitigation, **parse_set(settings)}
            recipe = Recipe().replace(changes)
            stages.costs.clear()
            losses = measure(checkpoint, recipe, found, stages, test)
            base = losses if base is None else base
            share = recovered(dense, base, losses) if losses is not base else (0.0, 0.0, 0.0)
            costs = [cost for cost in stages.costs if cost.stage != "measure"]
            seconds, peak = sum(c.seconds for c in costs), max(c.peak_bytes for c in costs)
            perplexity = math.exp(losses.mean().item())
            shown = f"{share[0]:.0%} ({share[1]:.0%} to {share[2]:.0%})"
            table.add_row(pattern, name, f"{perplexity:.2f}", shown, f"{seconds:.0f} s", f"{peak / 1e9:.2f} GB")
            print(f"{pattern} {name}: {perplexity:.2f}, {shown}, {seconds:.0f} s", flush=True)
            where = f"{pattern} {name}, context {context}, {text.name}"
            results.append({"name": f"{where}: perplexity", "value": perplexity, "unit": "", "goal": None, "met": None})
            goal = GOAL if name in OURS and pattern in {"2:4", "8:16"} else None
            met = None if goal is None else share[0] >= goal
            results.append(
                {"name": f"{where}: recovered", "value": share[0], "unit": "share", "goal": goal, "met": met}
            )
    Console(width=140).print(table)
    if json_file is not None:
        json_file.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    app()
