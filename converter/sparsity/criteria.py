"""Criteria: which channels of a token count most. Each is a `channel_scale [K]`; the score is |z| * channel_scale.

What papers compare with is here too, and runs in PyTorch only: `reference` says why it is not exported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from converter.errors import RecipeError, lookup
from converter.sparsity.statistics import LayerStats
from converter.sparsity.weights import sparsegpt, wanda, weight_magnitude

OUTLIERS = 0.005  # the share at either end that Amber-Pruner leaves out


@dataclass(frozen=True)
class Criterion:
    """`scale` gives `channel_scale [K]`, or None for ones, from weight `[N, K]` and statistics.

    `sequence_norm` multiplies the scores by the channels' norms over the sequence that is pruned. `prune` gives a
    pruned weight `[N, K]` from weight, statistics, keep and group; then every activation is kept.
    """

    scale: Callable[[Tensor, LayerStats | None], Tensor | None] = lambda _weight, _stats: None
    needs_statistics: bool = False
    needs_gram: bool = False
    sequence_norm: bool = False
    prune: Callable[[Tensor, LayerStats | None, int, int], Tensor] | None = None
    reference: str = ""


def clact(_weight: Tensor, stats: LayerStats | None) -> Tensor:
    """Return the norm of each input channel over the calibration tokens, `[K]`.

    Source: arXiv:2509.22166 eq. (4), without the token's norm, which is constant within a token. There the norm runs
    over the sequence that is pruned, later tokens included; calibrated, it is causal and can be served.
    """
    assert stats is not None
    return stats.square_sum.sqrt().float()


def amber(weight: Tensor, _stats: LayerStats | None) -> Tensor:
    """Return the norm of each column of the standardised weight, `[K]`; mean and deviation are taken without outliers.

    Source: arXiv:2508.02128 as the code of arXiv:2509.22166 reads it, but with exact quantiles, not those of a random
    sample, and not divided by the smallest norm, which changes no mask.
    """
    return _standardised(weight, trim=False)


def amber_trimmed(weight: Tensor, _stats: LayerStats | None) -> Tensor:
    """Return as `amber`, but with the outliers left out of the norm too, as the text of arXiv:2509.22166 reads."""
    return _standardised(weight, trim=True)


def _standardised(weight: Tensor, *, trim: bool) -> Tensor:
    values = weight.detach().double()
    low, high = np.quantile(values.cpu().numpy(), [OUTLIERS, 1 - OUTLIERS])
    inside = (values >= low) & (values <= high)
    standard = (values - values[inside].mean()) / values[inside].std(correction=0)
    return _norm(standard * inside if trim else standard)


def _norm(values: Tensor) -> Tensor:
    """Return the norm of each column in float32."""
    return values.square().sum(0).sqrt().float()


def wina(weight: Tensor, _stats: LayerStats | None) -> Tensor:
    """Return the norm of each column of the weight, `[K]`.

    Source: arXiv:2505.19427; there some projections go without, here none.
    """
    return _norm(weight.detach().double())


def weight_variance(weight: Tensor, _stats: LayerStats | None) -> Tensor:
    """Return the standard deviation of each column of the weight over the outputs, `[K]`.

    x_j^2 Var(W_:j) is what channel j adds to the variance over the outputs, so scores rank by its root.
    """
    return weight.detach().double().std(dim=0, correction=0).float()


NOT_CAUSAL = "it looks at later tokens of the sequence, which a model that is served has not seen. Use clact"
OF_WEIGHTS = "it prunes the weight, where the op prunes activations. Use magnitude or wina"

CRITERIA: dict[str, Criterion] = {
    # Source: arXiv:2509.22166, ACT: the score is |z|.
    "magnitude": Criterion(),
    "clact": Criterion(clact, needs_statistics=True),
    "amber": Criterion(amber),
    "amber_trimmed": Criterion(amber_trimmed),
    "wina": Criterion(wina),
    "weight_variance": Criterion(weight_variance),
    # Source: arXiv:2509.22166 eq. (4), without the token's norm. Deviation: the norms are over each sequence, padding
    # included; in the authors' code they are over the batch, so that a sequence's mask depends on its neighbours.
    "clact_dynamic": Criterion(sequence_norm=True, reference=NOT_CAUSAL),
    "weight_magnitude": Criterion(prune=weight_magnitude, reference=OF_WEIGHTS),
    "wanda": Criterion(prune=wanda, needs_statistics=True, reference=OF_WEIGHTS),
    "sparsegpt": Criterion(prune=sparsegpt, needs_statistics=True, needs_gram=True, reference=OF_WEIGHTS),
}


def criterion(name: str) -> Criterion:
    """Return the criterion of that name.

    Raises:
        RecipeError: when there is none.
    """
    return lookup(CRITERIA, "criterion", name, RecipeError)
