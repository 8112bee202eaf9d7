"""Allocation: which pattern of a menu each layer gets, so that what is kept fits a budget and the harm is least.

The harm is measured on the dense model. With g_t the gradient of the text's loss to the layer's output at token t, and
e_t what a pattern changes of that output, the effect of the pattern is the sum over the tokens of (g_t . e_t)^2: the
second-order term of the loss, with the empirical Fisher information (gradients on the text itself, not on sampled
tokens) for the curvature, and no covariance between tokens or layers. Since e_t = (xhat_t - x_t) W^T, it is
((g_t W) . (xhat_t - x_t))^2, and no pattern costs a product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from converter.errors import CalibrationError
from converter.plan import LayerPlan, Plan, kept_weights
from converter.recipe import Recipe
from converter.sparsity.criteria import criterion
from converter.sparsity.linear import Params, approximate
from converter.sparsity.mitigations import Layer
from converter.sparsity.pattern import Pattern

STAND_IN = "wina"  # for a criterion that needs statistics, which are gathered only once the patterns are known
MEASURED = {"shift", "variance"}  # the roles of mitigations that `approximate` computes


def allocate(
    model: PreTrainedModel,
    plan: Plan,
    recipe: Recipe,
    windows: Tensor,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, str]:
    """Return the pattern of `recipe.allocation.menu` for each open layer of the plan.

    `model` is dense and stays as it is; of the token ids `windows [count, window]` the first `allocation.tokens` are
    used. `progress` is called with the number of windows done and their total.

    Raises:
        CalibrationError: when an effect is not finite, or a layer has no part in the loss.
    """
    menu, settings = recipe.allocation.menu, recipe.allocation
    used = windows[: settings.tokens // windows.shape[1]]
    effects = measure(model, plan.open, recipe, used, progress)
    kept = {
        layer.name: [kept_weights(layer, *Pattern.parse(text).at(layer.in_features, layer.name)) for text in menu]
        for layer in plan.open
    }
    limit = settings.limit(sum(kept_weights(layer, 1, 1) for layer in plan.open))
    return {name: menu[choice] for name, choice in choose(effects, kept, limit).items()}


def measure(
    model: PreTrainedModel,
    layers: list[LayerPlan],
    recipe: Recipe,
    windows: Tensor,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, list[float]]:
    """Return, for each layer, the effect of each pattern of the menu on the loss of `windows [count, window]`.

    The errors are those of the recipe's criterion, shift of a token and variance; `wina` stands in for a criterion
    that needs statistics, and what else needs statistics or training is left out. Memory: one window's activations.

    Raises:
        CalibrationError: when an effect is not finite, or a layer has no part in the loss.
    """
    effects = {layer.name: torch.zeros(len(recipe.allocation.menu), dtype=torch.float64) for layer in layers}
    forms = {layer.name: _forms(model, layer, recipe) for layer in layers}
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(requires_grad=False)
    with torch.enable_grad(), _watched(model, {name: partial(_add, effects[name], forms[name]) for name in effects}):
        for number, window in enumerate(windows):
            logits = model(input_ids=window[None], use_cache=False).logits[0, :-1]
            nn.functional.cross_entropy(logits.float(), window[1:], reduction="sum").backward()
            progress(number + 1, len(windows))
    for parameter in wanted:
        parameter.requires_grad_()
    for name, effect in effects.items():
        if not effect.isfinite().all():
            raise CalibrationError(
                f"{name}: effects of the patterns must be finite, got NaN or Inf on the calibration text. "
                "Check the checkpoint and its dtype."
            )
        if not effect.any() and any(form.keep < form.group for form in forms[name]):
            raise CalibrationError(
                f"{name}: must have a part in the loss of the calibration text, got none. Add it to --ignore."
            )
    return {name: effect.tolist() for name, effect in effects.items()}


def choose(effects: dict[str, list[float]], kept: dict[str, list[int]], limit: int) -> dict[str, int]:
    """Return the choice of each layer with the least sum of effects while the sum of `kept` is at most `limit`.

    A layer takes what is least in effect + price * kept; the price is bisected. So the sum of effects is the least for
    what the result keeps, which may be a little less than `limit`, by a step of one layer (Everett 1963).
    """

    def at(price: float) -> dict[str, int]:
        return {
            name: min(range(len(row)), key=lambda i: (row[i] + price * kept[name][i], kept[name][i]))
            for name, row in effects.items()
        }

    def fits(choice: dict[str, int]) -> bool:
        return sum(kept[name][i] for name, i in choice.items()) <= limit

    sparsest = {name: min(range(len(row)), key=row.__getitem__) for name, row in kept.items()}
    assert fits(sparsest)
    low, high, best = 0.0, 1.0, at(0.0)
    if fits(best):
        return best
    while not fits(best := at(high)):
        low, high = high, 2 * high
    while low < (middle := (low + high) / 2) < high:
        choice = at(middle)
        if fits(choice):
            high, best = middle, choice
        else:
            low = middle
    return best


def _forms(model: nn.Module, layer: LayerPlan, recipe: Recipe) -> tuple[Params, ...]:
    """Return what each pattern of the menu makes of the layer, as far as no statistics are needed."""
    linear = model.get_submodule(layer.name)
    assert isinstance(linear, nn.Linear)
    weight = linear.weight.data
    name = STAND_IN if criterion(recipe.criterion).needs_statistics else recipe.criterion
    params = Params(layer.keep, layer.group, channel_scale=criterion(name).scale(weight, None))
    for method in recipe.methods():
        if method.role in MEASURED and not method.needs_statistics and not method.trains:
            params = method.fit(params, Layer(weight))
    patterns = [Pattern.parse(text).at(layer.in_features, layer.name) for text in recipe.allocation.menu]
    return tuple(replace(params, keep=keep, group=group) for keep, group in patterns)


def _add(effect: Tensor, forms: tuple[Params, ...], x: Tensor, back: Tensor) -> None:
    """Add the tokens `x [T, K]`; `back [T, K]` is the gradient of the loss to x through this layer, g W."""
    for number, params in enumerate(forms):
        if params.keep < params.group:
            _, _, xhat = approximate(x, params)
            effect[number] += (back * (xhat - x)).sum(-1).double().square().sum()


@contextmanager
def _watched(model: nn.Module, watchers: dict[str, Callable[[Tensor, Tensor], None]]) -> Iterator[None]:
    """Show each watcher the input of its layer and the gradient to it, whenever a loss goes backward."""
    handles = []
    for name, watch in watchers.items():

        def note(
            linear: nn.Module, args: tuple[Any, ...], y: Tensor, watch: Callable[[Tensor, Tensor], None] = watch
        ) -> Tensor:
            assert isinstance(linear, nn.Linear)
            x, weight = args[0].detach().flatten(0, -2), linear.weight.detach()
            # The parameters have no gradient: the first layers are where the graph begins.
            y = y if y.requires_grad else y.requires_grad_()
            y.register_hook(lambda g: watch(x, g.flatten(0, -2) @ weight))
            return y

        handles.append(model.get_submodule(name).register_forward_hook(note))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
