"""Perplexity of criteria and mitigations side by side, with the share of the lost log-perplexity that each recovers.

Every row is calibrated on one text and measured in PyTorch on others. The intervals are paired 95 % bootstraps over
the windows: the same windows for all rows.
"""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
from cyclopts import App, Parameter
from rich.console import Console
from rich.table import Table
from scipy.stats import bootstrap

from converter.calibration.texts import windows
from converter.checkpoint import Checkpoint, open_checkpoint
from converter.evaluation.perplexity import window_losses
from converter.pipeline import calibration_text, fitted
from converter.plan import plan
from converter.recipe import Recipe, parse_set
from converter.sparsity.linear import install
from converter.stages import Stages

BASELINE = "magnitude none"
PUBLISHED = (
    BASELINE,
    "clact none",
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
    "magnitude l_pts training.learning_rate=3e-3",
    "magnitude ls training.learning_rate=1e-3",
    "magnitude l_pts+ls+var training.learning_rate=1e-3",
    "magnitude r_sparse r_sparse=trained",
)
OURS = (
    "magnitude permute",
    "wina permute+var",
    "wina permute+var+refit",
    "wina permute+var+distill",
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
        found = fitted(checkpoint, layers, recipe, text, Path(scratch), None, stages)
    model = found.checkpoint.model()
    for name, layer in found.params.items():
        install(model, name, layer, phases=found.recipe.phases)
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
    rows: Annotated[str, Parameter(help="CRITERION MITIGATION [KEY=VALUE ...], by commas")] = ",".join(
        (*PUBLISHED, *OURS)
    ),
    seeds: Annotated[str, Parameter(help="of the rows that are trained, by commas")] = "0",
    context: int = 1024,
    tokens: int = 8192,
    json_file: Annotated[Path | None, Parameter(name="--json")] = None,
) -> None:
    """Print the table for MODEL, calibrated on one text and measured on others."""
    stages = Stages(console=Console(stderr=True, quiet=True))
    checkpoint = open_checkpoint(model)
    tokenizer = checkpoint.tokenizer()
    tests = [windows(source, tokenizer, tokens // context, context) for source in text]
    dense = [window_losses(checkpoint.model(), test) for test in tests]
    results: list[dict[str, Any]] = []
    names = list(dict.fromkeys((BASELINE, *rows.split(","))))
    longest = max((_recipe(name, "8:16", calibration) for name in names), key=Recipe.windows)
    with tempfile.TemporaryDirectory() as scratch:
        written = calibration_text(checkpoint, longest, Path(scratch), stages) if longest.windows() else torch.empty(0)
    table = Table("pattern", "criterion and mitigation", *(Path(source).name for source in text), "calibration", "peak")
    table.add_row("", "dense", *(f"{losses.mean().exp():.2f}" for losses in dense), "", "")
    for pattern in patterns.split(","):
        base: list[torch.Tensor] = []
        for name in names:
            recipe = _recipe(name, pattern, calibration)
            for seed in seeds.split(",") if recipe.trains() else ["0"]:
                recipe = recipe.replace({"seed": int(seed)})
                shown = name if seed == "0" else f"{name}, seed {seed}"
                stages.costs.clear()
                losses = measure(checkpoint, recipe, written[: recipe.windows()], stages, tests)
                base = base or losses
                costs = [cost for cost in stages.costs if cost.stage != "measure"]
                seconds, peak = sum(c.seconds for c in costs), max(c.peak_bytes for c in costs)
                cells = []
                for source, d, b, row in zip(text, dense, base, losses, strict=True):
                    perplexity = math.exp(row.mean().item())
                    low, share, high = recovered(d, b, row) if row is not b else (0.0, 0.0, 0.0)
                    cells.append(f"{perplexity:.2f}, {share:.0%} ({low:.0%} to {high:.0%})")
                    where = f"{pattern} {shown}, context {context}, {Path(source).name}"
                    goal = GOAL if name in OURS and pattern in {"2:4", "8:16"} else None
                    met = None if goal is None else share >= goal
                    results += [
                        {"name": f"{where}: perplexity", "value": perplexity, "unit": "", "goal": None, "met": None},
                        {"name": f"{where}: recovered", "value": share, "unit": "share", "goal": goal, "met": met},
                    ]
                table.add_row(pattern, shown, *cells, f"{seconds:.0f} s", f"{peak / 1e9:.2f} GB")
                print(f"{pattern} | {shown} | {' | '.join(cells)} | {seconds:.0f} s | {peak / 1e9:.2f} GB", flush=True)
                if json_file is not None:
                    json_file.write_text(json.dumps(results, indent=2))
    Console(width=160).print(table)


if __name__ == "__main__":
    app()
