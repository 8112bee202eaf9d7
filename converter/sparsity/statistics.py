"""Streaming statistics of a layer's input: their size depends on the layer's width, never on the number of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from converter.errors import CalibrationError


@dataclass
class LayerStats:
    """Sums over the calibration tokens of one layer's input `[T, K]`, in float64."""

    where: str
    channel_sum: Tensor  # [K]
    square_sum: Tensor  # [K]
    largest: Tensor  # [K] the largest |x|
    together: Tensor | None  # [K, K] sums of u u^T, u = |x| / ||x|| of a token: which channels are large together
    gram: Tensor | None  # [K, K] sums of x x^T
    median_sum: float = 0.0
    tokens: int = 0

    @classmethod
    def of(
        cls,
        where: str,
        in_features: int,
        *,
        together: bool = False,
        gram: bool = False,
        device: torch.device | None = None,
    ) -> LayerStats:
        """Return empty statistics, on `device`, for a layer called `where` with K = `in_features`."""
        zeros = torch.zeros(in_features, dtype=torch.float64, device=device)
        square = zeros.new_zeros(in_features, in_features) if together else None
        moments = zeros.new_zeros(in_features, in_features) if gram else None
        return cls(where, zeros, zeros.clone(), zeros.clone(), square, moments)

    def update(self, x: Tensor) -> None:
        """Add the tokens `x [..., K]`.

        Raises:
            CalibrationError: when an activation is NaN or infinite.
        """
        flat = x.detach().reshape(-1, x.shape[-1]).double()
        if not flat.isfinite().all():
            raise CalibrationError(
                f"{self.where}: activations must be finite, got NaN or Inf on the calibration text. "
                "Check the checkpoint and its dtype."
            )
        self.channel_sum += flat.sum(0)
        self.square_sum += flat.square().sum(0)
        self.largest = torch.maximum(self.largest, flat.abs().amax(0))
        if self.together is not None:
            share = flat.abs() / flat.norm(dim=-1, keepdim=True).clamp_min(1e-30)
            self.together += share.t() @ share
        if self.gram is not None:
            self.gram += flat.t() @ flat
        self.median_sum += flat.median(-1).values.sum().item()
        self.tokens += flat.shape[0]

    def channel_mean(self) -> Tensor:
        """Return the mean of each channel over the tokens, `[K]`."""
        return self.channel_sum / self.tokens

    def mean_of_medians(self) -> float:
        """Return the mean over the tokens of each token's median."""
        return self.median_sum / self.tokens
