"""What the pages say of `nmsparse evaluate`: what is left of the dense model, task by task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converter import records
from converter.delivery.manifest import EVALUATION, EXAMPLES, RESULTS
from converter.delivery.page import Line, Section, bars, intervals
from converter.errors import OutputError, said
from converter.records import Paired, Results

PERPLEXITY = "word_perplexity"


@dataclass(frozen=True, eq=False)
class Evaluated:
    """What OUT/evaluation holds: the comparison with the dense model, and under which setting it was made."""

    folder: Path
    results: Results


def evaluated(out: Path) -> Evaluated | None:
    """Return what is known of the accuracy of OUT, or None where it was not evaluated.

    Raises:
        OutputError: when it is there and cannot be read.
    """
    path = out / EVALUATION / RESULTS
    if not path.exists():
        return None
    try:
        return Evaluated(path.parent, records.read(Results, path))
    except (OSError, ValueError) as error:
        raise OutputError(
            f"{path}: must be what nmsparse evaluate wrote, got {said(error)}. Evaluate {out} again."
        ) from error


def verdict(evaluated: Evaluated | None) -> Line:
    """Return the sentence about accuracy; it is good news where no task is shown to be worse."""
    if evaluated is None:
        return Line("How accurate it is was not measured: run nmsparse evaluate on it.", good=False)
    left = [one for one in evaluated.results.compared if one.metric == "acc"]
    worse = [one.task for one in left if one.high < 0]
    says = [
        f"perplexity {one.dense:.2f} dense, {one.sparse:.2f} sparse ({one.task})"
        for one in evaluated.results.compared
        if one.metric == PERPLEXITY
    ]
    if left:
        of = left[0].task if len(left) == 1 else f"the mean of {len(left)} tasks"
        recovery = evaluated.results.recovery  # None where the dense model has nothing right
        share = [] if recovery is None else [f"{recovery:.0%} of the dense model's accuracy is left ({of})"]
        examples = sum(one.examples for one in left)
        chance = (
            f"{' and '.join(worse)} worse beyond chance" if worse else f"{examples} examples show no task to be worse"
        )
        says = [*share, chance, *says]
    text = "; ".join(says) or "what it writes was compared with the dense model"
    return Line(f"{text[0].upper()}{text[1:]}.", good=not worse)


def sections(evaluated: Evaluated | None) -> Iterator[Section]:
    """Yield what the page of one OUT says of its accuracy."""
    if evaluated is None:
        return
    rows = evaluated.results.compared
    kept = [one for one in rows if one.recovery]
    charts = []
    if kept:
        chart = intervals(
            [f"{one.task} {one.metric}" for one in kept],
            [_percent(one) for one in kept],
            "percent of dense",
            "Accuracy by task, in percent of the dense model's on the same examples, with a paired 95 % bootstrap.",
        )
        charts.append(chart)
    setting = evaluated.results.setting
    limit = "all examples" if setting.limit is None else f"the first {setting.limit} examples of each task"
    shots = "as many shots as each task says" if setting.shots is None else f"{setting.shots} shots"
    head = ("task", "metric", "examples", "dense", "sparse", "difference", "95 %", "p of the t-test", "p of McNemar")
    table = [
        (
            one.task,
            one.metric,
            str(one.examples),
            *_figures(one),
            f"{one.t_test:.3f}",
            "" if one.mcnemar is None else f"{one.mcnemar:.3f}",
        )
        for one in rows
    ]
    yield Section("Accuracy", f"On {limit}, with {shots}.", charts, head, table)


@dataclass(frozen=True, eq=False)
class Side:
    """One of several OUTs: what it is called, what it is, and what is known of its accuracy."""

    name: str
    pattern: str
    mitigation: str
    evaluated: Evaluated | None


def side_by_side(sides: Sequence[Side]) -> Iterator[Section]:
    """Yield what the page of several OUTs says of their accuracy, or why it says nothing.

    They are compared where all were evaluated under one setting.
    """
    there = {side: side.evaluated for side in sides if side.evaluated is not None}
    if not there:
        return
    missing = [side.name for side in sides if side.evaluated is None]
    if missing or len({one.results.under() for one in there.values()}) > 1:
        why = f"not evaluated: {', '.join(missing)}" if missing else "evaluated under different settings or versions"
        yield Section("Accuracy", f"Not compared; {why}. Run nmsparse evaluate on each with the same options.")
        return
    yield from _tasks(there)
    yield from _perplexities(there)
    yield from _differences(there)


def _tasks(by_side: dict[Side, Evaluated]) -> Iterator[Section]:
    kept = [(side.name, one) for side, of in by_side.items() for one in of.results.compared if one.recovery]
    if not kept:
        return
    kept.sort(key=lambda pair: (pair[1].task, pair[1].metric))  # of equal ones the order of the OUTs stays
    chart = intervals(
        [f"{one.task} {one.metric}, {name}" for name, one in kept],
        [_percent(one) for _, one in kept],
        "percent of dense",
        "Accuracy by task and OUT, in percent of the dense model's on the same examples, with a paired 95 % bootstrap.",
    )
    head = ("task", "OUT", "metric", "dense", "sparse", "difference", "95 %")
    rows = [(one.task, name, one.metric, *_figures(one)) for name, one in kept]
    yield Section("Accuracy", "", [chart], head, rows)


def _perplexities(by_side: dict[Side, Evaluated]) -> Iterator[Section]:
    rows = [
        (one.task, side, one) for side, of in by_side.items() for one in of.results.compared if one.metric == PERPLEXITY
    ]
    for task in dict.fromkeys(name for name, _, _ in rows):
        here = [(side, one) for name, side, one in rows if name == task]
        chart = bars(
            [f"{side.pattern}, {side.name}" for side, _ in here],
            {"dense": [one.dense for _, one in here], "sparse": [one.sparse for _, one in here]},
            "perplexity of a word",
            f"Perplexity of {task} by pattern: lower is better.",
        )
        table = [(side.name, side.pattern, f"{one.dense:.2f}", f"{one.sparse:.2f}") for side, one in here]
        yield Section(f"Perplexity of {task}", "", [chart], ("OUT", "pattern", "dense", "sparse"), table)


def _differences(by_side: dict[Side, Evaluated]) -> Iterator[Section]:
    """Yield the analysis of variance: over patterns and mitigations where they are crossed, else over the models."""
    try:
        import pandas as pd

        from converter.evaluation.statistics import anova
    except ImportError as error:
        raise OutputError(
            f"compare: must have pandas and statsmodels, got {error}. Install nmsparse[evaluate]."
        ) from error
    tables = {side: pd.read_parquet(one.folder / EXAMPLES) for side, one in by_side.items()}
    cells = {(side.pattern, side.mitigation) for side in by_side}
    patterns, mitigations = ({cell[place] for cell in cells} for place in (0, 1))
    crossed = min(len(patterns), len(mitigations)) > 1 and len(patterns) * len(mitigations) == len(cells) == len(
        by_side
    )
    factors = None
    if crossed:
        names = [side.name for side in by_side]
        factors = pd.DataFrame(
            {name: [getattr(side, name) for side in by_side] for name in ("pattern", "mitigation")}, names
        )
    effects, pairs = [], []
    for task in dict.fromkeys(
        one.task for of in by_side.values() for one in of.results.compared if one.metric == "acc"
    ):
        columns = {} if crossed else {"dense": _right(next(iter(tables.values())), task, "dense")}
        columns |= {side.name: _right(table, task, "sparse") for side, table in tables.items()}
        of_factor, table = anova(pd.DataFrame(columns), factors)
        effects += [(task, name, f"{p:.3f}") for name, p in of_factor.items()]
        pairs += [
            (task, row.model, row.other, f"{row.difference:+.3f}", f"{row.p_holm:.3f}")
            for row in table.itertuples(index=False)
        ]
    if not effects:
        return
    what = "patterns, mitigations and both together" if crossed else "the models, the dense one among them"
    yield Section(
        "Differences beyond chance",
        f"Repeated-measures ANOVA over {what}, of accuracy on the same examples: p of no difference.",
        head=("task", "factor", "p"),
        rows=effects,
    )
    yield Section(
        "Pair by pair",
        "Paired t-tests of accuracy, their p corrected by Holm for the number of pairs of a task.",
        head=("task", "one", "other", "other - one", "p"),
        rows=pairs,
    )


def _right(table: Any, task: str, model: str) -> Any:
    """Return whether each example of the task was right, by example."""
    rows = table[(table.task == task) & (table.metric == "acc") & (table.model == model)]
    return rows.set_index("example").value.sort_index()


def _percent(one: Paired) -> tuple[float, float, float]:
    assert one.recovery is not None
    low, value, high = one.recovery
    return 100 * low, 100 * value, 100 * high


def _figures(one: Paired) -> tuple[str, str, str, str]:
    interval = f"{one.low:+.3f} to {one.high:+.3f}"
    return f"{one.dense:.3f}", f"{one.sparse:.3f}", f"{one.difference:+.3f}", interval
