"""Mitigations: what is done about the error of pruning. Each sets some `Params` of a layer from its statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from converter.errors import RecipeError, listing, lookup
from converter.sparsity.linear import Params
from converter.sparsity.statistics import LayerStats


@dataclass(frozen=True)
class Mitigation:
    """One method: `role` is the part of the op that it sets (two of one role exclude each other)."""

    role: str
    fit: Callable[[Params, LayerStats | None], Params]
    needs_statistics: bool = False


def _static(params: Params, shift: torch.Tensor) -> Params:
    return replace(params, shift_mode="static", shift=shift.float())


def _channel_shift(params: Params, stats: LayerStats | None) -> Params:
    assert stats is not None
    return _static(params, stats.channel_mean())


def _scalar_shift(params: Params, stats: LayerStats | None) -> Params:
    assert stats is not None
    return _static(params, torch.full_like(stats.channel_sum, stats.mean_of_medians()))


# The variants of S-PTS and D-PTS are different methods under one name (S1's prose, its table and its code disagree);
# the recipe keys `s_pts` and `d_pts` choose, and this table says what each choice means.
MITIGATIONS: dict[str, dict[str, Mitigation]] = {
    "none": {"": Mitigation("nothing", lambda params, _: params)},
    # Source: arXiv:2509.22166 sec. 3.3 ("a single per-channel bias vector"): eta_j = mean over tokens of x_j.
    # The scalar is what the authors' code computes: the mean over tokens of the tokens' medians.
    "s_pts": {
        "channel": Mitigation("shift", _channel_shift, needs_statistics=True),
        "scalar": Mitigation("shift", _scalar_shift, needs_statistics=True),
    },
    # Source: arXiv:2509.22166 sec. 3.3: eta_t from the token itself, at run time.
    "d_pts": {
        "median": Mitigation("shift", lambda params, _: replace(params, shift_mode="token_median")),
        "mean": Mitigation("shift", lambda params, _: replace(params, shift_mode="token_mean")),
    },
    # Source: arXiv:2509.22166 eq. (5).
    "var": {"": Mitigation("variance", lambda params, _: replace(params, variance=True))},
}


def mitigations(names: Sequence[str], variants: dict[str, str]) -> list[Mitigation]:
    """Return the methods called `names`, each in the variant that `variants` gives it.

    Raises:
        RecipeError: for an unknown name or variant, or two methods that set the same part of the op.
    """
    chosen: dict[str, str] = {}
    found = []
    for name in names:
        table = lookup(MITIGATIONS, "mitigation", name, RecipeError)
        variant = variants.get(name, "")
        if variant not in table:
            raise RecipeError(f"{name}: must be one of {listing(table)}, got {variant!r}.")
        method = table[variant]
        if method.role in chosen:
            raise RecipeError(
                f"mitigation: {chosen[method.role]} and {name} cannot be combined, both set the {method.role}. "
                "Choose one."
            )
        chosen[method.role] = name
        found.append(method)
    if "none" in names and len(names) > 1:
        raise RecipeError(f"mitigation: none cannot be combined, got {'+'.join(names)}. Leave out none.")
    return found
