"""Baselines that prune the weight: `keep` of every `group` inputs of each output's row; every activation is kept.

Papers on activation sparsity compare with them at the same pattern. They are measured in PyTorch and not exported.
Each takes the weight `[N, K]`, the statistics of the layer's input, keep and group, and returns a weight `[N, K]`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from converter.errors import CalibrationError
from converter.sparsity.pattern import mask
from converter.sparsity.statistics import LayerStats

DAMPING = 0.01  # of the mean of the Gram matrix's diagonal
BLOCK = 128  # columns that SparseGPT goes through before it updates the columns after them


def weight_magnitude(weight: Tensor, _stats: LayerStats | None, keep: int, group: int) -> Tensor:
    """Return the weight with the largest |W_ij| of every group of a row, `[N, K]`.

    Source: arXiv:2509.22166, WT.
    """
    return _kept(weight, mask(weight.abs(), keep, group))


def wanda(weight: Tensor, stats: LayerStats | None, keep: int, group: int) -> Tensor:
    """Return the weight with the largest |W_ij| ||X_j|| of every group of a row, `[N, K]`.

    Source: arXiv:2306.11695. Deviation: the norms leave out the first token of a window, as all statistics here.
    """
    assert stats is not None
    return _kept(weight, mask(weight.double().abs() * stats.square_sum.sqrt(), keep, group))


def sparsegpt(weight: Tensor, stats: LayerStats | None, keep: int, group: int) -> Tensor:
    """Return the weight `[N, K]`, pruned column by column; the columns after make up for what each column loses.

    With H = X^T X + 0.01 mean(diag) 1 and U upper triangular, U^T U = H^-1: when the columns before i are settled,
    w_i^2 / U_ii^2 is the least squared error of dropping w_i, and w_k - w_i U_ik / U_ii for k > i attains it. A group's
    mask is chosen when the pass reaches the group, from the weight as it is then.

    Source: arXiv:2301.00774, there with a factor 2 / T on H, which changes neither masks nor weights. Where one group
    is the whole row, the mask is chosen for 128 columns at a time at the same ratio, as there; but in each row, where
    the source ranks all rows of the block together. Deviations: float64; the first token of a window is left out; a
    channel that is never active is left to the damping.

    Raises:
        CalibrationError: when every input is zero, so that nothing can be factorised.
    """
    assert stats is not None
    assert stats.gram is not None
    factor = _factor(stats.gram, stats.where)
    in_features = weight.shape[1]
    span = group if group < in_features else min(BLOCK, in_features)
    width = max(span, BLOCK // span * span)
    result = weight.detach().double().clone()
    kept = torch.zeros_like(result, dtype=torch.bool)
    for start in range(0, in_features, width):
        stop = min(start + width, in_features)
        errors = result.new_zeros(len(result), stop - start)
        for i in range(start, stop):
            if (i - start) % span == 0:
                chosen = slice(i, min(i + span, stop))
                scores = (result[:, chosen] / factor.diagonal()[chosen]).square()
                count = keep * chosen.stop // group - keep * i // group  # `keep` in a group; in parts of a row, a share
                kept[:, chosen] = mask(scores, count, scores.shape[1]) if count else False
            error = torch.where(kept[:, i], 0, result[:, i]) / factor[i, i]
            result[:, i:stop] -= error[:, None] * factor[i, i:stop]
            errors[:, i - start] = error
        result[:, stop:] -= errors @ factor[start:stop, stop:]
    return _kept(result, kept)


def _factor(gram: Tensor, where: str) -> Tensor:
    """Return U `[K, K]`, upper triangular with U^T U = H^-1."""
    diagonal = gram.diagonal()
    if not diagonal.any():
        raise CalibrationError(
            f"{where}: activations must not all be zero on the calibration text for sparsegpt, got only zeros. "
            "Add the layer to --ignore, or use another text."
        )
    damped = gram + torch.diag(torch.full_like(diagonal, DAMPING * diagonal.mean().item()))
    upper: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    return upper


def _kept(weight: Tensor, kept: Tensor) -> Tensor:
    return torch.where(kept, weight, 0).float()
