"""How the weights of OUT are stored: numbers of its dtype or of 16 bits, or integers with a scale for each block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from converter.errors import RecipeError
from converter.names import BITS, Weights
from converter.sparsity.linear import Params


@dataclass(frozen=True)
class Storage:
    """Linear layers are stored as `weights`, all else in `dtype`; `block` input channels share a scale, 0: all."""

    dtype: str = "float32"
    weights: Weights = "dtype"
    block: int = 0

    @property
    def bits(self) -> int:
        """The bits of a weight's integers, 0 where it is stored as numbers."""
        return BITS.get(self.weights, 0)

    def blocks(self, name: str, in_features: int, out_features: int) -> int:
        """Return how many scales each output channel of the layer called `name` has.

        Raises:
            RecipeError: when its input channels are no whole number of blocks, or int4 does not fill its bytes.
        """
        if self.bits == 4 and out_features % 2:
            raise RecipeError(
                f"{name}: its output channels must be an even number for weights int4, got {out_features}. Use int8."
            )
        block = self.block or in_features
        if in_features % block:
            raise RecipeError(
                f"{name}: its {in_features} input channels must be divisible by block, got {block}. "
                "Set another block, or 0 for one scale for each output channel."
            )
        return in_features // block

    def quantized(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return integers int8 `[K, N]` and scales `[K / block, N]` for a weight `[K, N]`; it is about their product.

        The largest number of a block becomes the lowest integer, so that all are used; what is at the other end is
        clipped. The product, quantized again, gives the same.
        """
        lowest = -(2 ** (self.bits - 1))
        parts = weight.unflatten(0, (-1, self.block or len(weight)))
        largest = parts.gather(1, parts.abs().argmax(1, keepdim=True))
        scale = largest / lowest
        whole = (parts / torch.where(scale == 0, 1, scale)).round().clamp(lowest, -lowest - 1)
        return whole.to(torch.int8).flatten(0, 1), scale.squeeze(1)

    def rounded(self, weight: Tensor) -> Tensor:
        """Return the weight `[N, K]` in float32 as OUT has it.

        Raises:
            RecipeError: when a weight is too large for float16.
        """
        if not self.bits:
            stored = self.dtype if self.weights == "dtype" else self.weights
            rounded_weight = weight.to(getattr(torch, stored)).float()
            if stored == "float16" and not rounded_weight.isfinite().all():
                raise RecipeError(
                    f"weights: must be at most 65504 for float16, got {weight.abs().max():g}. Use bfloat16."
                )
            return rounded_weight
        weight = weight.to(getattr(torch, self.dtype)).float()
        whole, scale = self.quantized(weight.t())
        parts: Tensor = whole.unflatten(0, (len(scale), -1)) * scale[:, None]
        return parts.flatten(0, 1).t()

    def every_layer(self, model: nn.Module, params: dict[str, Params]) -> dict[str, Params]:
        """Return the parameters of all nodes of the op, by the linear layers of a dense `model`.

        Where weights have fewer bits than `dtype` these are all, the output head too; those that are dense keep every
        channel.
        """
        if self.weights == "dtype":
            return params
        first = next(iter(params.values()))
        dense = Params(1, 1, shift_mode=first.shift_mode, variance=first.variance)
        linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        return {name: params.get(name, dense) for name in linears}
