"""Criteria: which channels of a token count most. Each is a `channel_scale [K]`; the score is |z| * channel_scale."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from converter.errors import RecipeError, lookup

Criterion = Callable[[Tensor], Tensor | None]


def magnitude(weight: Tensor) -> Tensor | None:
    """Return None, that is a scale of one for every channel: the score is |z|.

    Source: arXiv:2509.22166, ACT.
    """
    del weight
    return None


CRITERIA: dict[str, Criterion] = {"magnitude": magnitude}


def criterion(name: str) -> Criterion:
    """Return the criterion of that name.

    Raises:
        RecipeError: when there is none.
    """
    return lookup(CRITERIA, "criterion", name, RecipeError)
