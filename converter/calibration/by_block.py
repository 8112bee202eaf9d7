"""Training by block: make a sparse block's output that of the dense block on the sparse model's own input.

Source: arXiv:2509.22166 (its code's training "by layers"). Deviation: each token's error is relative to its length, or
the first token of a text, an attention sink hundreds of times larger than the rest, would decide alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from converter.calibration.train import train
from converter.calibration.trained_linear import put_in_training, teacher
from converter.recipe import Recipe
from converter.sparsity.linear import Params


def train_block(
    model: nn.Module,
    dense: dict[str, nn.Linear],
    fitted: dict[str, Params],
    run: Callable[[int], Tensor],
    batches: int,
    recipe: Recipe,
) -> dict[str, Params]:
    """Return the parameters of a block's layers with `recipe.trains()` trained; the last batch is held out.

    `run` gives the block's output `[B, S, H]` on one of the batches of its inputs. Where training does not lower the
    error on the held-out batch, the parameters stay as fitted.
    """
    layers = put_in_training(model, dense, fitted, recipe)

    def error(number: int) -> Tensor:
        with teacher(layers.values()):
            wanted = run(number)
        lengths = wanted.square().sum(-1).clamp_min(1e-30)
        return ((run(number) - wanted).square().sum(-1) / lengths).mean()

    def on_held_out() -> float:
        with torch.no_grad():
            return error(batches - 1).item()

    parts = [part for layer in layers.values() for part in layer.parts.values()]
    with torch.enable_grad():
        train(
            parts,
            lambda numbers: torch.stack([error(number) for number in numbers]).mean(),
            on_held_out,
            batches - 1,
            recipe.training,
            recipe.seed,
        )
    return {name: layer.trained() for name, layer in layers.items()}
