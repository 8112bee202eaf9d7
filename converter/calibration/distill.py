"""Distillation: train what the recipe's methods leave open so that the sparse model gives what the dense one gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from converter.calibration.train import Curve, train
from converter.calibration.trained_linear import TrainedLinear, put_in_training, teacher
from converter.errors import CalibrationError
from converter.kinds import kind, output
from converter.recipe import Recipe
from converter.sparsity.linear import Params


def divergence(model: PreTrainedModel, layers: list[TrainedLinear], ids: Tensor) -> Tensor:
    """Return how far the sparse model is from the dense one on tokens or images `[B, ...]`, as its kind measures."""
    with teacher(layers):
        wanted = output(model, ids)
    return kind(model).distance(output(model, ids), wanted)


def distill(
    model: PreTrainedModel,
    params: dict[str, Params],
    windows: Tensor,
    recipe: Recipe,
    state: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[dict[str, Params], Curve]:
    """Return the parameters with `recipe.trains()` trained, and the divergence on held-out text as that went.

    `model` is dense and is used up; `windows [count, ...]` holds images, or token ids, which are cut to pieces of
    `training.window`, of which the last `training.held_out` are held out. The same seed gives the same weights;
    `state` is as `train` has it.

    Raises:
        CalibrationError: when there is no text left to train on, too little memory, or training fails.
    """
    settings = recipe.training
    pieces, what = kind(model).pieces(windows.to(model.device), settings.window)
    held_out, text = pieces[-settings.held_out :], pieces[: -settings.held_out]
    if len(text) < settings.batch:
        raise CalibrationError(
            f"training: training.tokens must give at least {settings.batch + settings.held_out} {what}, "
            f"got {len(pieces)}. Ask for more tokens."
        )
    model.requires_grad_(requires_grad=False)
    dense: dict[str, nn.Linear] = {}
    for name in params:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        dense[name] = linear
    layers = put_in_training(model, dense, params, recipe)
    trained = list(layers.values())
    parts = [part for layer in trained for part in layer.parts.values()]
    _check_memory(parts)

    def on_held_out() -> float:
        with torch.no_grad():
            return float(torch.stack([divergence(model, trained, window[None]) for window in held_out]).mean())

    curve = train(
        parts,
        lambda batch: divergence(model, trained, text[batch]),
        on_held_out,
        len(text),
        settings,
        recipe.seed,
        state,
        progress,
    )
    before, after = curve[0][1], min(value for _, value in curve[1:])
    if not after < before:
        raise CalibrationError(
            f"training: divergence on held-out text must fall, got {before:.4f} before and {after:.4f} at best. "
            "Use a smaller --set training.learning_rate=R or more --set training.tokens=N."
        )
    return {name: layer.trained() for name, layer in layers.items()}, curve


def _check_memory(parts: list[nn.Parameter]) -> None:
    # Gradient, two moments and the best so far, beside the parts themselves.
    device = parts[0].device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    needed = 4 * sum(4 * part.numel() for part in parts)
    if free < needed:
        raise CalibrationError(
            f"training: memory must be at least {needed / 1e9:.1f} GB beyond the model, got {free / 1e9:.1f} GB. "
            "Train with --set distill=low_rank, or choose a mitigation without distill."
        )
