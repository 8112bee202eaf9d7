"""Which combinations of settings a run of the tests tries: every pair, or every value; with NMSPARSE_TEST_FULL all."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from typing import Any


def pairs(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Return combinations of a value of each axis in which every two values of two axes meet at least once.

    Faults come from one setting or from two that meet, seldom from three; `make test-all` tries the whole product.
    Each combination is the one of the product that has the most pairs which none before it has. A value that is a tuple
    is several arguments.
    """
    product = list(itertools.product(*(range(len(axis)) for axis in axes)))
    if not os.environ.get("NMSPARSE_TEST_FULL"):
        missing = {pair for row in product for pair in _pairs(row)}
        chosen = []
        while missing:
            chosen.append(max(product, key=lambda row: len(missing.intersection(_pairs(row)))))
            missing.difference_update(_pairs(chosen[-1]))
        product = sorted(chosen)
    rows = ([axis[index] for axis, index in zip(axes, row, strict=True)] for row in product)
    return [tuple(part for value in row for part in (value if isinstance(value, tuple) else [value])) for row in rows]


def each(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Return combinations in which every value of every axis is tried, for tests that take seconds each.

    The values of the axes go round side by side, so that the longest axis decides how many there are; `make test-all`
    tries the whole product.
    """
    if os.environ.get("NMSPARSE_TEST_FULL"):
        return list(itertools.product(*axes))
    return [tuple(axis[turn % len(axis)] for axis in axes) for turn in range(max(map(len, axes)))]


def _pairs(row: tuple[int, ...]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    return list(itertools.combinations(enumerate(row), 2))
