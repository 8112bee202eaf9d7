"""Allocation: which pattern of a menu each layer gets, so that what is kept fits a budget and the harm is least.

The harm is measured on the dense model. With g_t the gradient of the text's loss to the layer's output at token t, and
e_t what a pattern changes of that output, the effect of the pattern is the sum over the tokens of (g_t . e_t)^2: the
second-order term of the loss, with the empirical Fisher information (gradients on the text itself, not on sampled
tokens) for the curvature, and no covariance between tokens or layers. Since e_t = (xhat_t - x_t) W^T, it is
((g_t W) . (nu_t zs_t - z_t))^2: no pattern costs a product, and one sort of a group's scores serves every N.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from converter.calibration.walk import readers_of
from converter.errors import CalibrationError
from converter.kinds import kind, output
from converter.plan import LayerPlan, Plan, kept_weights
from converter.recipe import Recipe
from converter.signature import VARIANCE_FLOOR
from converter.sparsity.criteria import criterion
from converter.sparsity.linear import Params, ranked
from converter.sparsity.mitigations import Given
from converter.sparsity.pattern import Pattern

Number = TypeVar("Number", int, float)
WITHOUT_STATISTICS = "wina"  # statistics are gathered only once the patterns are known
MEASURED = {"shift", "variance"}  # the roles of mitigations that what stands for x depends on


def allocate(
    model: PreTrainedModel,
    plan: Plan,
    recipe: Recipe,
    windows: Tensor,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, str]:
    """Return the pattern of `recipe.menu()` for each open layer of the plan.

    `model` is dense and stays as it is; of the windows or images `windows [count, ...]` those of the first
    `allocation.tokens` are used. `progress` is called with the number of windows done and their total.

    Raises:
        CalibrationError: when an effect is not finite, or a layer has no part in the loss.
    """
    menu, settings = recipe.menu(), recipe.allocation
    used = windows[: settings.tokens // recipe.calibration.window]
    effects = measure(model, plan.open, recipe, used, progress)
    kept = {
        layer.name: [kept_weights(layer, *Pattern.parse(text).at(layer.in_features, layer.name)) for text in menu]
        for layer in plan.open
    }
    limit = settings.limit(sum(kept_weights(layer, 1, 1) for layer in plan.open))
    # Siblings are one choice, whose effect and size are theirs together.
    leads = {layer.name: (layer.siblings or (layer.name,))[0] for layer in plan.open}
    chosen = choose(_by_lead(effects, leads), _by_lead(kept, leads), limit)
    return {name: menu[chosen[lead]] for name, lead in leads.items()}


def _by_lead(rows: dict[str, list[Number]], leads: dict[str, str]) -> dict[str, list[Number]]:
    """Return the sums of the rows that have one lead."""
    sums: dict[str, list[Number]] = {}
    for name, row in rows.items():
        before = sums.get(leads[name])
        sums[leads[name]] = row if before is None else [a + b for a, b in zip(before, row, strict=True)]
    return sums


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
    effects = {
        layer.name: torch.zeros(len(recipe.menu()), dtype=torch.float64, device=model.device) for layer in layers
    }
    menus = {layer.name: _menu(model, layer, recipe) for layer in layers}
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(requires_grad=False)
    generator = torch.Generator(model.device).manual_seed(recipe.seed)
    with torch.enable_grad(), _watched(model, {name: partial(_add, effects[name], menus[name]) for name in effects}):
        for number, window in enumerate(windows.to(model.device)):
            _loss(model, window, generator).backward()
            progress(number + 1, len(windows))
    for parameter in wanted:
        parameter.requires_grad_()
    for name, effect in effects.items():
        if not effect.isfinite().all():
            raise CalibrationError(
                f"{name}: effects of the patterns must be finite, got NaN or Inf on the calibration text. "
                "Check the checkpoint and its dtype."
            )
        if not effect.any() and any(min(keeps) < group for group, (_, keeps) in menus[name].groups.items()):
            raise CalibrationError(
                f"{name}: must have a part in the loss of the calibration text, got none. Add it to --ignore."
            )
    return {name: effect.tolist() for name, effect in effects.items()}


def _loss(model: PreTrainedModel, ids: Tensor, generator: torch.Generator) -> Tensor:
    """Return that of the tokens `ids [S]` whose gradients tell what an error anywhere in the model does to its output.

    A decoder is asked for the next token. A masked language model sees the text's own, so it is asked for one that it
    draws itself, as is a classifier of images, which have no labels here. An encoder has no loss: its states under
    random signs have gradients whose (g . e)^2 is, on average, the square of what the error does to them.
    """
    return kind(model).loss(output(model, ids[None])[0].float(), ids, generator)


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


@dataclass(frozen=True)
class _Menu:
    """What is ranked in a layer, and for each group size of the menu: which patterns have it, and what they keep."""

    params: Params
    groups: dict[int, tuple[list[int], list[int]]]


def measured_with(recipe: Recipe) -> str:
    """Return the criterion that effects are measured with: the recipe's, or one that needs no statistics."""
    return WITHOUT_STATISTICS if criterion(recipe.criterion).needs_statistics else recipe.criterion


def _menu(model: nn.Module, layer: LayerPlan, recipe: Recipe) -> _Menu:
    linear = model.get_submodule(layer.name)
    assert isinstance(linear, nn.Linear)
    weight = linear.weight.data
    chosen = criterion(measured_with(recipe))
    params = Params(layer.keep, layer.group, channel_scale=chosen.scale(readers_of(model, layer), None))
    for method in recipe.methods():
        if method.role in MEASURED and not method.needs_statistics and not method.trains:
            params = method.fit(params, Given(weight))
    groups: dict[int, tuple[list[int], list[int]]] = {}
    for number, text in enumerate(recipe.menu()):
        keep, group = Pattern.parse(text).at(layer.in_features, layer.name)
        numbers, keeps = groups.setdefault(group, ([], []))
        numbers.append(number)
        keeps.append(keep)
    return _Menu(params, groups)


def _add(effect: Tensor, menu: _Menu, x: Tensor, back: Tensor) -> None:
    """Add the tokens `x [T, K]`; `back [T, K]` is the gradient of the loss to x through this layer, g W."""
    z, scores, _ = ranked(x, menu.params)
    for group, (numbers, keeps) in menu.groups.items():
        order = scores.unflatten(-1, (-1, group)).argsort(-1, descending=True)

        def of_best(values: Tensor, order: Tensor = order, group: int = group) -> Tensor:
            """Return `[T, M]`: the sum over the n best of every group, for n = 1 to M."""
            best: Tensor = values.unflatten(-1, (-1, group)).gather(-1, order)
            return best.sum(-2, dtype=torch.float64).cumsum(-1)

        kept = of_best(back * z)
        whole = kept[:, -1:]
        if menu.params.variance:
            spread = of_best(z.square()) - of_best(z).square() / x.shape[-1]
            floor = VARIANCE_FLOOR * (x.shape[-1] - 1)
            kept = (spread[:, -1:] / spread.clamp_min(floor)).sqrt() * kept
        error = kept - whole
        effect[numbers] += error.square().sum(0)[[keep - 1 for keep in keeps]]


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
