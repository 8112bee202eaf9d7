"""Mitigations: what is done about the error of pruning. Each sets some `Params` of a layer from its statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from converter.errors import RecipeError, listing, lookup
from converter.sparsity.linear import Params
from converter.sparsity.permutation import decorrelate
from converter.sparsity.statistics import LayerStats

# When a mitigation does its work: it reorders the checkpoint before anything is fitted; it sets the `Params` of each
# layer; it goes over the layers of a block, once each has its `Params`; or over those of the whole model.
Phase = Literal["arrange", "layer", "block", "model"]


@dataclass(frozen=True)
class Given:
    """What a method may look at: the weight `[N, K]`, the statistics of the input, and the recipe's rank.

    `arranged` says that the channels of its groups lie side by side as they should. `readers [N', K]` holds the weights
    of all layers that choose their channels together with it.
    """

    weight: Tensor
    stats: LayerStats | None = None
    rank: int = 0
    arranged: bool = False
    readers: Tensor | None = None


@dataclass(frozen=True)
class Mitigation:
    """One method: `role` is the part of the op that it sets (two of one role exclude each other).

    `fit` sets what a layer starts with, whatever the phase. `trains` names the `Params` that are trained against the
    dense model in it. A method that is `own` gives a layer inputs that it cannot share with others.
    """

    role: str
    fit: Callable[[Params, Given], Params]
    phase: Phase = "layer"
    needs_statistics: bool = False
    needs_together: bool = False
    trains: tuple[str, ...] = ()
    own: bool = False


FLOOR = 1e-8  # of a maximum that is divided by


def _static(params: Params, shift: Tensor) -> Params:
    return replace(params, shift_mode="static", shift=shift.float())


def _channel_shift(params: Params, layer: Given) -> Params:
    assert layer.stats is not None
    return _static(params, layer.stats.channel_mean())


def _scalar_shift(params: Params, layer: Given) -> Params:
    assert layer.stats is not None
    return _static(params, torch.full_like(layer.stats.channel_sum, layer.stats.mean_of_medians()))


def _learned_shift(params: Params, layer: Given) -> Params:
    return _static(params, layer.weight.new_zeros(layer.weight.shape[1]))


def _learned_affine(params: Params, layer: Given) -> Params:
    out_features = layer.weight.shape[0]
    return replace(
        params, output_scale=layer.weight.new_ones(out_features), output_shift=layer.weight.new_zeros(out_features)
    )


def _channel_balance(params: Params, layer: Given) -> Params:
    """Divide the scores by s_j = sqrt(max|X_j| / max|W_j|): x / s is ranked, and s cancels in the product."""
    assert layer.stats is not None
    readers = layer.weight if layer.readers is None else layer.readers
    balance = (layer.stats.largest.clamp_min(FLOOR) / readers.double().abs().amax(0).clamp_min(FLOOR)).sqrt()
    scale = 1 if params.channel_scale is None else params.channel_scale.double()
    return replace(params, channel_scale=(scale / balance).float())


def _regroup(params: Params, layer: Given) -> Params:
    if layer.arranged or params.group == layer.weight.shape[1]:
        return params  # parted already, or there is one group only
    assert layer.stats is not None
    assert layer.stats.together is not None
    moments, scale = layer.stats.together, params.channel_scale
    if scale is not None:  # what is ranked is |x| * scale
        moments = moments * torch.outer(scale.double(), scale.double())
    return replace(params, permutation=decorrelate(moments, params.group))


def _low_rank(params: Params, layer: Given) -> Params:
    out_features, in_features = layer.weight.shape
    if not 0 < layer.rank < min(in_features, out_features):
        raise RecipeError(
            f"r_sparse: rank must be between 1 and {min(in_features, out_features) - 1} for a layer of {in_features} x "
            f"{out_features}, got {layer.rank}. Choose with --set rank=R."
        )
    u, s, v = torch.linalg.svd(layer.weight.double(), full_matrices=False)
    root = s[: layer.rank].sqrt()
    return replace(
        params,
        residual_in=(v[: layer.rank].t() * root).float().contiguous(),
        residual_out=(u[:, : layer.rank] * root).t().float().contiguous(),
    )


REPAIR = "repair of what is dropped"

# The variants of S-PTS, D-PTS and R-Sparse are different methods under one name (the paper's prose, its tables and its
# code disagree); the recipe keys `s_pts`, `d_pts`, `r_sparse` and `permute` choose, and this table says what each
# choice means.
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
    # Source: arXiv:2509.22166 sec. 3.3: a shift of each channel, trained from zero. Deviation: against the dense
    # model's logits, with all layers at once.
    "l_pts": {"": Mitigation("shift", _learned_shift, "model", trains=("shift",), own=True)},
    # Source: arXiv:2509.22166 table 5, which gives no formula; its code trains y * (1 + gamma) + beta from zero.
    "ls": {"": Mitigation("output affine", _learned_affine, "model", trains=("output_scale", "output_shift"))},
    # Source: arXiv:2509.22166 eq. (5).
    "var": {"": Mitigation("variance", lambda params, _: replace(params, variance=True))},
    # Source: arXiv:2509.22166 (PCS), with the maximum over the calibration tokens, not over the batch at run time.
    "pcs": {"": Mitigation("balance of channels", _channel_balance, needs_statistics=True)},
    # Ours: see converter/sparsity/permutation.py. `folded` reorders the checkpoint first, where that can be done (see
    # converter/calibration/arrange.py), and leaves an input of the op to the other layers.
    "permute": {
        "layer": Mitigation("permutation", _regroup, needs_statistics=True, needs_together=True),
        "folded": Mitigation("permutation", _regroup, "arrange", needs_statistics=True, needs_together=True),
    },
    # Source: arXiv:2509.22166 app. A (R-Sparse): what is dropped goes through the truncated SVD of W. `trained` goes on
    # from there; the authors' code trains from random factors.
    "r_sparse": {
        "svd": Mitigation(REPAIR, _low_rank, own=True),
        "trained": Mitigation(REPAIR, _low_rank, "model", trains=("residual_in", "residual_out"), own=True),
    },
    # Ours: the weight is fitted to what is kept of the inputs, see converter/calibration/refit.py.
    "refit": {"": Mitigation(REPAIR, lambda params, _: params, "block", needs_statistics=True)},
    # Ours: see converter/calibration/distill.py.
    "distill": {
        "full": Mitigation("trained weight", lambda params, _: params, "model", trains=("weight",)),
        "low_rank": Mitigation("trained weight", lambda params, _: params, "model", trains=("weight",)),
    },
}


def mitigations(names: Sequence[str], variants: dict[str, str]) -> list[Mitigation]:
    """Return the methods called `names`, each in the variant that `variants` gives it.

    Raises:
        RecipeError: for an unknown name or variant, or two methods that set the same part of the op.
    """
    chosen: dict[str, str] = {}
    methods = []
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
        methods.append(method)
    if "none" in names and len(names) > 1:
        raise RecipeError(f"mitigation: none cannot be combined, got {'+'.join(names)}. Leave out none.")
    return methods
