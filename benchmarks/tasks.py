"""What is left of a model's accuracy at several patterns: `nmsparse convert`, then `nmsparse evaluate`, on each.

    python benchmarks/tasks.py MODEL --data-dir FOLDER --work build/tasks

FOLDER is laid out as `nmsparse evaluate --data-dir` has it. All models are asked the same examples, the first ones of
each task. Conversions that --work holds are not made again, and answers that the Hub cache holds are not asked again.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import record
from cyclopts import App, Parameter
from rich.box import MARKDOWN
from rich.table import Table

from converter import json_rows
from converter.delivery.manifest import is_bundle
from converter.evaluate import evaluate
from converter.options import EngineOptions, EvaluationOptions
from converter.pipeline import run
from converter.recipe import Recipe, parse_set
from converter.records import Paired, Setting
from converter.stages import Stages

CHOICES = ("piqa", "arc_easy", "boolq", "winogrande")
SHOWN = {"acc": ".3f", "word_perplexity": ".1f", "same_next": ".3f"}
CONTEXT = 2048
app = App(help_format="plaintext")


@app.default
def main(
    model: str,
    *,
    data_dir: Path,
    work: Annotated[Path, Parameter(help="where the conversions go")],
    patterns: str = "2:4,8:16,16:32",
    changes: Annotated[str, Parameter(help="of the default recipe: KEY=VALUE ...")] = "allocation.budget=50%",
    limit: Annotated[int, Parameter(help="examples of each task of choices")] = 100,
    documents: Annotated[int, Parameter(help="of WikiText-2")] = 2,
    prompts: Annotated[int, Parameter(help="that both models write on from")] = 16,
    batch: int = 8,
    json_file: Annotated[Path | None, Parameter(name="--json")] = None,
    result: str | None = None,
) -> None:
    """Print accuracy, perplexity and equal greedy tokens, dense and at each pattern, with the interval of each loss."""
    settings = [Setting(CHOICES, limit, shots=0, prompts=prompts), Setting(("wikitext",), documents)]
    rows: list[dict[str, object]] = []
    options = EvaluationOptions(data_dir=data_dir, context=CONTEXT, batch=batch)
    lines: dict[str, list[str]] = {}
    for pattern in patterns.split(","):
        stages = Stages()
        out = work / pattern.replace(":", "of")
        if not is_bundle(out):
            recipe = Recipe().replace({"pattern": pattern, **parse_set(changes.split())})
            run(model, out, recipe, None, "cpu", stages)
        found = [
            evaluate(str(out), setting, replace(options, out=work / f"{out.name}-{number}"), EngineOptions(), stages)
            for number, setting in enumerate(settings)
        ]
        compared = [one for of in found for one in of.compared if one.metric in SHOWN]
        heads = ["model", *(f"{one.task} {one.metric}" for one in compared), "recovery"]
        lines["dense"] = [*(format(one.dense, SHOWN[one.metric]) for one in compared), "1"]
        lines[pattern] = [*map(_cell, compared), f"{found[0].recovery:.3f}"]
        for one in compared:
            name = f"{pattern} {one.task} {one.metric}"
            values = {"dense": one.dense, "sparse": one.sparse, "low": one.low, "high": one.high}
            rows += [json_rows.row(f"{name}: {what}", value, "") for what, value in values.items()]
        rows += [json_rows.row(f"{pattern} {cost.stage}", cost.seconds, "s") for cost in stages.costs]
        json_rows.write(json_file, rows)
    table = Table(*heads, box=MARKDOWN)
    for name, cells in lines.items():
        table.add_row(name, *cells)
    record.show(table, result)


def _cell(one: Paired) -> str:
    """Return the sparse figure, and the interval of sparse - dense."""
    shape = SHOWN[one.metric]
    return f"{one.sparse:{shape}} ({one.low:+{shape}} to {one.high:+{shape}})"


if __name__ == "__main__":
    app()
