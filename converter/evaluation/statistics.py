"""Dense against sparse on the same examples: means, intervals and tests, all of them SciPy's and statsmodels'."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import bootstrap, ttest_rel
from sklearn.metrics import f1_score
from statsmodels.stats.anova import AnovaRM
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from converter.records import Paired

Array = np.ndarray[Any, Any]
ACCURACIES = ("acc", "acc_norm")
PERPLEXITIES = ("word_perplexity", "byte_perplexity")


def paired(task: str, metric: str, dense: Array, sparse: Array, weight: Array, seed: int = 0) -> Paired:
    """Return the comparison of two models' values of the same examples, in the same order."""
    per_example = [values / weight for values in (dense, sparse)]
    differences = per_example[1] - per_example[0]
    binary = bool(np.isin([dense, sparse], (0, 1)).all()) and metric not in PERPLEXITIES
    count, changes = len(dense), not np.allclose(differences, differences[0])

    def gap(one: Array, other: Array, of: Array, axis: int = -1) -> Any:
        return _mean(metric, other, of, axis) - _mean(metric, one, of, axis)

    def share(one: Array, other: Array, axis: int = -1) -> Any:
        return other.sum(axis) / np.maximum(one.sum(axis), 1)  # a draw in which dense has nothing right says 0

    low, difference, high = _interval(gap, (dense, sparse, weight), changes, seed)
    kept = metric in ACCURACIES and dense.sum() > 0
    deviation = float(differences.std(ddof=1)) if changes else 0.0
    return Paired(
        task,
        metric,
        count,
        float(_mean(metric, dense, weight)),
        float(_mean(metric, sparse, weight)),
        difference,
        low,
        high,
        float(ttest_rel(sparse / weight, dense / weight).pvalue) if changes else 1.0,
        float(mcnemar(_table(dense, sparse), exact=True).pvalue) if binary else None,
        float(differences.mean()) / deviation if deviation else 0.0,
        _interval(share, (dense, sparse), changes, seed) if kept else None,
    )


def _interval(of: Callable[..., Any], data: tuple[Array, ...], changes: bool, seed: int) -> tuple[float, float, float]:
    """Return low, value and high of a statistic, by a paired bootstrap over the examples where they differ at all."""
    value = float(of(*data))
    if not changes:
        return value, value, value
    interval = bootstrap(data, of, paired=True, method="percentile", rng=seed).confidence_interval
    return float(interval.low), value, float(interval.high)


def _mean(metric: str, values: Array, weight: Array, axis: int = -1) -> Any:
    """Return the task's figure: a perplexity from log-likelihoods, else the weighted mean."""
    mean = values.sum(axis) / weight.sum(axis)
    if metric in PERPLEXITIES:
        return np.exp(-mean)
    return -mean / np.log(2) if metric == "bits_per_byte" else mean


def _table(dense: Array, sparse: Array) -> Array:
    """Return how many examples both, one, the other or none has right, `[2, 2]`."""
    return np.array([[np.sum((dense == one) & (sparse == other)) for other in (1, 0)] for one in (1, 0)])


def compare(dense: pd.DataFrame, sparse: pd.DataFrame, seed: int = 0) -> list[Paired]:
    """Return the comparison of every metric of every task; F1 of BoolQ's yes besides, without tests."""
    keys = ["task", "metric", "example"]
    both = dense.merge(sparse, on=keys, suffixes=("_dense", "_sparse"), validate="1:1").sort_values(keys)
    pairs = []
    for (task, metric), rows in both.groupby(["task", "metric"], sort=False):
        one, other, weight = (rows[name].to_numpy() for name in ("value_dense", "value_sparse", "weight_dense"))
        pairs.append(paired(str(task), str(metric), one, other, weight, seed))
    return pairs


def f1(rows: pd.DataFrame) -> float | None:
    """Return F1 of the answer yes in BoolQ, or None where it was not asked."""
    asked = rows[(rows.task == "boolq") & (rows.metric == "acc")]
    return None if asked.empty else float(f1_score(asked.target, asked.predicted, zero_division=0))


def recovery(pairs: Sequence[Paired]) -> float | None:
    """Return sparse / dense accuracy, the mean over tasks, or None where no task has an accuracy above 0."""
    shares = [one.recovery[1] for one in pairs if one.metric == "acc" and one.recovery]
    return float(np.mean(shares)) if shares else None


def anova(values: pd.DataFrame, factors: pd.DataFrame | None = None) -> tuple[dict[str, float], pd.DataFrame]:
    """Return the p of a repeated-measures ANOVA by factor, and every pair's paired t-test corrected by Holm.

    `values [examples, models]` has a column for each model, and the same examples in all; `factors [models, factors]`
    says what each model is, such as its pattern and its mitigation, every combination once. Without it the models are
    the one factor. Where no example differs p is 1.
    """
    if factors is None:
        factors = pd.DataFrame({"model": list(values.columns)}, index=values.columns)
    long = values.set_axis(range(len(values))).reset_index(names="example").melt("example", var_name="of")
    long = long.join(factors, on="of")
    names = list(values.columns)
    pairs = [(one, other) for number, one in enumerate(names) for other in names[number + 1 :]]
    with np.errstate(invalid="ignore", divide="ignore"):
        table = AnovaRM(long, "value", "example", within=list(factors.columns)).fit().anova_table
        each = [float(np.nan_to_num(ttest_rel(values[a], values[b]).pvalue, nan=1.0)) for a, b in pairs]
    effects = {str(name): float(np.nan_to_num(p, nan=1.0)) for name, p in table["Pr > F"].items()}
    frame = pd.DataFrame(pairs, columns=["model", "other"])
    frame["difference"] = [float((values[b] - values[a]).mean()) for a, b in pairs]
    frame["p_holm"] = multipletests(each, method="holm")[1]
    return effects, frame
