"""Refit: the weight that serves best what is kept of a layer's inputs, in closed form.

With a_t what the sparse layer multiplies by W for the token t, and x_t its input, the sparse layer gives a_t W^T where
the dense one gives x_t W^T. Ridge regression of the difference on a_t, with D the change of W^T:

    D = argmin sum_t w_t ||x_t W^T - a_t (W^T + D)||^2 + lambda ||D||^2 = (A + lambda 1)^-1 C W^T
    A = sum_t w_t a_t^T a_t        C = sum_t w_t a_t^T (x_t - a_t)        w_t = 1 / ||x_t||^2

Both sums are [K, K], whatever the number of outputs or of tokens. The weights w_t keep the first token of a text, an
attention sink hundreds of times larger than the rest, from deciding alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from converter.sparsity.linear import Params, approximate

DAMPING = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # of the mean of A's diagonal


@dataclass
class Sums:
    """A and C over the tokens of one layer's input, in float64."""

    gram: Tensor  # [K, K]
    cross: Tensor  # [K, K]

    @classmethod
    def of(cls, in_features: int, device: torch.device | None = None) -> Sums:
        """Return empty sums for K = `in_features`, on `device`."""
        zeros = torch.zeros(in_features, in_features, dtype=torch.float64, device=device)
        return cls(zeros, zeros.clone())

    def update(self, x: Tensor, params: Params) -> None:
        """Add the tokens `x [..., K]` of a layer with these parameters."""
        flat = x.detach().reshape(-1, x.shape[-1])
        _, _, given = approximate(flat, params)
        length = flat.norm(dim=-1, keepdim=True).clamp_min(1e-30)
        given, missing = given / length, (flat - given) / length
        self.gram += given.t() @ given
        self.cross += given.t() @ missing


def solve(sums: Sums, weight: Tensor, damping: float) -> Tensor:
    """Return D `[K, N]` for weight `[N, K]` in float64; lambda is `damping` times the mean of A's diagonal."""
    diagonal = sums.gram.diagonal()
    ridge = sums.gram + torch.diag(torch.full_like(diagonal, damping * diagonal.mean().item()))
    change: Tensor = torch.linalg.solve(ridge, sums.cross @ weight.double().t())
    return change


def gain(sums: Sums, weight: Tensor, change: Tensor) -> float:
    """Return how much less the squared error over these tokens is with W^T + D than with W^T."""
    return (2 * (change * (sums.cross @ weight.double().t())).sum() - (change * (sums.gram @ change)).sum()).item()


def refit(fitting: Sums, held_out: Sums, weight: Tensor) -> Tensor | None:
    """Return the weight `[N, K]` with the damping that serves the held-out tokens best; None when none helps them."""
    best, least = None, 0.0
    for damping in DAMPING:
        change = solve(fitting, weight, damping)
        gained = gain(held_out, weight, change)
        if gained > least:
            best, least = change, gained
    return None if best is None else (weight.double() + best.t()).float()
