"""Times of OUT in ONNX Runtime on the CPU of this machine, beside the same OUT run dense.

The two sessions take turns, call by call, so that what else the machine does meets both.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import onnx
import onnxruntime
import torch

from converter.graph.dense import densify
from converter.runtimes.onnxruntime import call_feed, session

PAST = 128  # tokens in the cache of the token that is decoded
LEAST = 5  # rounds


class Speed(NamedTuple):
    """Seconds of each call of `tokens` tokens after `past` others, ours and dense, round by round."""

    threads: int
    tokens: int
    past: int
    ours: list[float]
    dense: list[float]

    def call(self) -> str:
        """Return what kind of call it is, in words."""
        return f"a token after {self.past}" if self.past else f"prefill of {self.tokens}"

    def per_second(self) -> float:
        """Return our tokens in a second."""
        return self.tokens / statistics.median(self.ours)

    def ratios(self) -> tuple[float, float, float]:
        """Return the quartiles of dense time / our time, the middle one second; above one ours is faster."""
        low, middle, high = statistics.quantiles(
            (theirs / ours for theirs, ours in zip(self.dense, self.ours, strict=True)), n=4, method="inclusive"
        )
        return low, middle, high


def measured(
    model: onnx.ModelProto, folder: Path, threads: int, prefill: Sequence[int], past: int, seconds: float
) -> Iterator[Speed]:
    """Yield the times of one token after `past` others, then of prefills of so many tokens, each taken for `seconds`.

    `model` is the graph of OUT, whose weights lie in `folder`. The tokens are random.
    """
    runs = [session(graph, folder, threads=threads) for graph in (model, densify(model))]
    vocabulary = next(v for v in model.graph.output if v.name == "logits").type.tensor_type.shape.dim[-1].dim_value
    ids = torch.randint(vocabulary, (1, max(past + 1, *prefill)), generator=torch.Generator().manual_seed(0))
    caches = runs[0].run(None, call_feed(runs[0], ids[:, :past], None))[1:]
    calls = {(1, past): call_feed(runs[0], ids[:, past : past + 1], caches)}
    calls |= {(tokens, 0): call_feed(runs[0], ids[:, :tokens], None) for tokens in prefill}
    for (tokens, before), feeds in calls.items():
        for run in runs:
            run.run(None, feeds)
        rounds: list[list[float]] = []
        start = time.perf_counter()
        while len(rounds) < LEAST or time.perf_counter() - start < seconds:
            rounds.append([_seconds(run, feeds) for run in runs])
        ours, theirs = map(list, zip(*rounds, strict=True))
        yield Speed(threads, tokens, before, ours, theirs)


def _seconds(run: onnxruntime.InferenceSession, feeds: dict[str, object]) -> float:
    start = time.perf_counter()
    run.run(None, feeds)
    return time.perf_counter() - start
