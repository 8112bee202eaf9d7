"""Which activations of a token are used: `keep` of every `group` consecutive channels."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from converter.errors import RecipeError, shortened

FORM = r"(?P<keep>[0-9]{1,6}):(?P<group>[0-9]{1,6})|(?P<share>[0-9]{1,3}(\.[0-9]{1,9})?)%|(?P<count>[0-9]{1,9})"
FORMS = "N:M (keep N of every M channels, such as 8:16), K (keep K channels of a token) or P% (keep P percent)"


@dataclass(frozen=True)
class Pattern:
    """A pattern as the user writes it, before it meets a layer.

    `group` 0 means all channels of a layer (unstructured per token); then `keep` counts channels, or, with
    `percent`, is a share of them.
    """

    keep: float
    group: int = 0
    percent: bool = False

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Return the pattern that `text` names.

        Raises:
            RecipeError: when the text has none of the three forms or keeps nothing.
        """
        form = re.fullmatch(FORM, text.strip())
        if form is None:
            raise RecipeError(f"pattern: must be {FORMS}, got {shortened(repr(text))}.")
        if form["group"] is not None:
            keep, group = int(form["keep"]), int(form["group"])
            if not 0 < keep <= group:
                raise RecipeError(f"pattern: N:M must have 0 < N <= M, got {text!r}. N is the number that is kept.")
            return cls(keep, group)
        if form["share"] is not None:
            share = float(form["share"])
            if not 0 < share <= 100:
                raise RecipeError(f"pattern: a percentage must be above 0 and at most 100, got {text!r}.")
            return cls(share, percent=True)
        if int(form["count"]) == 0:
            raise RecipeError("pattern: must keep at least one channel, got '0'.")
        return cls(int(form["count"]))

    def __str__(self) -> str:
        """Return the text that `parse` reads back."""
        if self.group:
            return f"{self.keep:.0f}:{self.group}"
        return f"{self.keep:g}%" if self.percent else f"{self.keep:.0f}"

    def at(self, in_features: int, where: str) -> tuple[int, int]:
        """Return `keep` and `group` for a layer with `in_features` input channels.

        Raises:
            RecipeError: naming the layer `where`, when the pattern does not fit its width.
        """
        if self.group:
            if in_features % self.group:
                raise RecipeError(
                    f"{where}: in_features must be divisible by {self.group} for pattern {self}, got {in_features}. "
                    f"Add the layer to --ignore or choose a pattern whose M divides {in_features}."
                )
            return int(self.keep), self.group
        if self.percent:
            return max(1, round(in_features * self.keep / 100)), in_features
        if self.keep > in_features:
            raise RecipeError(
                f"{where}: pattern {self} must keep at most in_features channels, got {in_features}. "
                "Use a smaller K, or a percentage."
            )
        return int(self.keep), in_features


NETWORK = 64  # groups up to this size are ranked by a sorting network, larger ones by numpy's partition


def mask(scores: Tensor, keep: int, group: int) -> Tensor:
    """Return the boolean mask `[..., K]` of the `keep` largest scores in every group of `group` channels.

    Ties go to the lower channel. NaN counts as the largest score, so that it is kept and stays visible.
    """
    grouped = scores.detach().reshape(-1, group).nan_to_num(nan=torch.inf, posinf=torch.inf)
    if grouped.is_cuda:
        return by_sorting(grouped, keep).reshape(scores.shape)
    threshold = _threshold(grouped, group - keep)
    kept = grouped >= threshold
    if int(torch.count_nonzero(kept)) != keep * len(kept):
        crowded = kept.sum(-1) != keep
        above = grouped[crowded] > threshold[crowded]
        tied = grouped[crowded] == threshold[crowded]
        kept[crowded] = above | (tied & (tied.cumsum(-1) <= keep - above.sum(-1, keepdim=True)))
    return kept.reshape(scores.shape)


def by_sorting(grouped: Tensor, keep: int) -> Tensor:
    """Return the mask of the `keep` largest of every row `[R, group]`, of equal ones those that come first.

    No step waits for the result of the one before, as the way of the CPU does where there are ties: on a GPU waiting
    costs more than sorting.
    """
    order = grouped.sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(grouped, dtype=torch.bool).scatter_(-1, order[:, :keep], value=True)


def _threshold(grouped: Tensor, rank: int) -> Tensor:
    """Return, of each row `[R, group]`, the value with `rank` smaller or equal ones before it, `[R, 1]`."""
    group = grouped.shape[1]
    if group > NETWORK:
        return torch.from_numpy(np.partition(grouped.numpy(), rank, axis=-1)[:, [rank]])
    # One vector operation a comparator over all rows at once: short rows are ranked several times faster than one by
    # one.
    columns = list(grouped.t().contiguous().unbind(0))
    for low, high, low_matters, high_matters in _comparators(group, rank):
        a, b = columns[low], columns[high]
        if low_matters:
            columns[low] = torch.minimum(a, b)
        if high_matters:
            columns[high] = torch.maximum(a, b)
    return columns[rank][:, None]


@cache
def _comparators(size: int, rank: int) -> tuple[tuple[int, int, bool, bool], ...]:
    """Return the comparators (low, high) that bring element `rank` of `size` into its sorted place, in order.

    The flags say which of the two results is read later. Source: K. E. Batcher, "Sorting networks and their
    applications", 1968 (odd-even merge), without what the one place does not need.
    """
    network = []
    length = 1  # of the sorted runs that are merged
    while length < size:
        distance = length
        while distance:
            for start in range(distance % length, size - distance, 2 * distance):
                for low in range(start, min(start + distance, size - distance)):
                    if low // (2 * length) == (low + distance) // (2 * length):
                        network.append((low, low + distance))
            distance //= 2
        length *= 2
    needed, live = [], {rank}
    for low, high in reversed(network):
        if live & {low, high}:
            needed.append((low, high, low in live, high in live))
            live |= {low, high}
    return tuple(reversed(needed))
