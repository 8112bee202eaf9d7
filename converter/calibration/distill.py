"""Distillation: train what the recipe's methods leave open so that the sparse model's tokens are the dense one's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from converter.errors import CalibrationError
from converter.recipe import Recipe
from converter.sparsity.linear import Params, apply

CLIP = 1.0  # of the gradient's norm


class TrainedLinear(nn.Module):
    """A layer that is dense as the teacher and sparse, over trained `parts` of its parameters, as the pupil."""

    def __init__(self, linear: nn.Linear, params: Params, parts: tuple[str, ...]) -> None:
        """Start from the fitted parts; from the dense weight where none is fitted."""
        super().__init__()
        weight = linear.weight.data if params.weight is None else params.weight
        self.linear, self.params, self.dense = linear, replace(params, weight=weight), False
        self.parts = nn.ParameterDict({part: nn.Parameter(getattr(self.params, part).clone()) for part in parts})

    def forward(self, x: Tensor) -> Tensor:
        """Return y `[..., N]` for x `[..., K]`; the mask has no gradient."""
        if self.dense:
            y: Tensor = self.linear(x)
            return y
        params = replace(self.params, **dict(self.parts.items()))
        assert params.weight is not None
        return apply(x, params.weight, self.linear.bias, params)


def divergence(model: PreTrainedModel, layers: list[TrainedLinear], ids: Tensor) -> Tensor:
    """Return the mean over the tokens `ids [B, S]` of KL(dense || sparse), in nats."""
    for layer in layers:
        layer.dense = True
    with torch.no_grad():
        teacher = model(input_ids=ids, use_cache=False).logits.flatten(0, 1).log_softmax(-1)
    for layer in layers:
        layer.dense = False
    pupil = model(input_ids=ids, use_cache=False).logits.flatten(0, 1).log_softmax(-1)
    return nn.functional.kl_div(pupil, teacher, reduction="batchmean", log_target=True)


def distill(
    model: PreTrainedModel,
    params: dict[str, Params],
    windows: Tensor,
    recipe: Recipe,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Params]:
    """Return the parameters with `recipe.trains()` trained.

    `model` is dense and is used up; `windows [count, window]` holds token ids. The last batch of windows is held out.
    AdamW, linear warm-up and cosine decay, clipped gradients; the same seed gives the same weights.

    Raises:
        CalibrationError: when there is no window left to train on, the loss is not finite, or it does not fall
            on the held-out text.
    """
    settings = recipe.distillation
    held_out, text = windows[-settings.batch :], windows[: -settings.batch]
    if len(text) < settings.batch:
        raise CalibrationError(
            f"distill: distillation.tokens must give at least {2 * settings.batch} windows of {windows.shape[1]}, got "
            f"{len(windows)}. Ask for more tokens."
        )
    layers = {}
    model.requires_grad_(requires_grad=False)
    for name, layer in params.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        layers[name] = TrainedLinear(linear, layer, recipe.trains())
        model.set_submodule(name, layers[name])
    trained = list(layers.values())
    with torch.no_grad():
        before = divergence(model, trained, held_out)
    parts = [part for layer in trained for part in layer.parts.values()]
    optimizer = torch.optim.AdamW(parts, lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    warm_up = int(settings.warm_up * settings.steps)
    schedule = get_cosine_schedule_with_warmup(optimizer, warm_up, settings.steps)
    generator = torch.Generator().manual_seed(recipe.seed)
    order: list[int] = []
    for step in range(settings.steps):
        if len(order) < settings.batch:
            order += torch.randperm(len(text), generator=generator).tolist()
        batch, order = order[: settings.batch], order[settings.batch :]
        loss = divergence(model, trained, text[batch])
        if not loss.isfinite():
            raise CalibrationError(
                f"distill: loss must be finite, got {loss.item()} at step {step + 1}. "
                "Use a smaller --set distillation.learning_rate=R."
            )
        loss.backward()
        nn.utils.clip_grad_norm_(parts, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        progress(step + 1, settings.steps)
    with torch.no_grad():
        after = divergence(model, trained, held_out)
    if not after < before:
        raise CalibrationError(
            f"distill: divergence on held-out text must fall, got {before:.4f} before and {after:.4f} after. "
            "Use a smaller --set distillation.learning_rate=R or more calibration tokens."
        )
    return {
        name: replace(params[name], **{part: value.detach() for part, value in layer.parts.items()})
        for name, layer in layers.items()
    }
