"""A layer in training: dense as the teacher and sparse, over trained parts of its parameters, as the pupil."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from converter.recipe import Recipe
from converter.sparsity.linear import Params, apply


class TrainedLinear(nn.Module):
    """A layer that is dense while `dense` is set, and sparse with the trained `parts` while not."""

    def __init__(self, linear: nn.Linear, params: Params, parts: Iterable[str], rank: int = 0, seed: int = 0) -> None:
        """Start from the fitted parts; from the dense weight where none is fitted.

        With `rank`, the weight is trained as W + up down, `[N, r]` from zero and `[r, K]` from random numbers.
        """
        super().__init__()
        weight = linear.weight.data if params.weight is None else params.weight
        self.linear, self.params, self.dense = linear, replace(params, weight=weight), False
        self.refitted = params.weight is not None
        self.parts = nn.ParameterDict()
        for part in parts:
            if part == "weight" and rank:
                generator = torch.Generator().manual_seed(seed)
                down = torch.randn(rank, weight.shape[1], generator=generator) * weight.shape[1] ** -0.5
                self.parts["down"] = nn.Parameter(down.to(weight.device))
                self.parts["up"] = nn.Parameter(weight.new_zeros(weight.shape[0], rank))
            else:
                self.parts[part] = nn.Parameter(getattr(self.params, part).clone())

    def current(self) -> Params:
        """Return the parameters as trained so far."""
        values = dict(self.parts.items())
        if "up" in values:
            assert self.params.weight is not None
            values["weight"] = self.params.weight + values.pop("up") @ values.pop("down")
        return replace(self.params, **values)

    def trained(self) -> Params:
        """Return the parameters without their gradients, and with a weight only where one was fitted or trained."""
        now = self.current()
        values: dict[str, Any] = dict(vars(now))
        for name, value in values.items():
            values[name] = value.detach() if isinstance(value, Tensor) else value
        if not (self.refitted or "weight" in self.parts or "up" in self.parts):
            values["weight"] = None
        return Params(**values)

    def forward(self, x: Tensor) -> Tensor:
        """Return y `[..., N]` for x `[..., K]`; the mask has no gradient."""
        if self.dense:
            y: Tensor = self.linear(x)
            return y
        params = self.current()
        assert params.weight is not None
        return apply(x, params.weight, self.linear.bias, params)


def put_in_training(
    model: nn.Module, dense: dict[str, nn.Linear], fitted: dict[str, Params], recipe: Recipe
) -> dict[str, TrainedLinear]:
    """Return the layers of `dense` in training from their `fitted` parameters, and put them into `model`."""
    layers = {}
    for number, (name, linear) in enumerate(dense.items()):
        layers[name] = TrainedLinear(linear, fitted[name], recipe.trains(), recipe.low_rank(), recipe.seed + number)
        model.set_submodule(name, layers[name])
    return layers


@contextmanager
def teacher(layers: Iterable[TrainedLinear]) -> Iterator[None]:
    """Make the layers dense, without gradients, inside the block."""
    layers = list(layers)
    for layer in layers:
        layer.dense = True
    try:
        with torch.no_grad():
            yield
    finally:
        for layer in layers:
            layer.dense = False
