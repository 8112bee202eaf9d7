"""The walk: block after block, gather statistics on the sparse model's own inputs, fit, and go on with the result."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from converter.calibration import file as calibration_file
from converter.calibration.blocks import Blocks, statistics, watched
from converter.calibration.by_block import train_block
from converter.calibration.refit import Sums, refit
from converter.errors import CalibrationError
from converter.place import write_whole
from converter.plan import LayerPlan, Plan
from converter.recipe import Recipe
from converter.sparsity.criteria import criterion
from converter.sparsity.linear import Params, install
from converter.sparsity.mitigations import Layer
from converter.sparsity.statistics import LayerStats


def calibrate(
    model: PreTrainedModel,
    plan: Plan,
    recipe: Recipe,
    windows: Tensor | None,
    scratch: Path,
    state: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Params]:
    """Return the parameters of every sparse layer, and leave `model` sparse with them.

    `windows [count, ...]` holds token ids or images, None when the recipe needs none; `scratch` is a folder for hidden
    states. In the folder `state`, where given, every trained block is kept, so that an interrupted call can be made
    again and ends with the same bits. `progress` is called with the number of blocks done and their total.

    Raises:
        CalibrationError: when an activation is not finite, or there is no batch to hold out.
    """
    params: dict[str, Params] = {}
    if windows is None:
        params = {layer.name: fit(model, layer, recipe, None) for layer in plan.sparse}
        for name, layer_params in params.items():
            install(model, name, layer_params)
        return params
    with torch.no_grad(), tempfile.TemporaryDirectory(prefix="hidden-", dir=scratch) as folder:
        batches = list(windows.split(recipe.calibration.batch))
        by_block = recipe.trains() and not recipe.distils()
        if (recipe.refits() or by_block) and len(batches) < 2:
            raise CalibrationError(
                f"calibration: must have at least two batches of windows, to hold one out, got {len(batches)}."
                " Give more --set calibration.tokens=N or a smaller --set calibration.batch=B."
            )
        text = Blocks(model, plan.blocks, batches, Path(folder))
        for index in range(len(text.blocks)):
            layers = [layer for layer in plan.sparse if layer.name.startswith(f"{plan.blocks}.{index}.")]
            together = {layer.name for layer in layers if recipe.needs_together() and not layer.arranged}
            run = partial(text.run, index)
            stats = statistics(text, index, layers, together, gram=recipe.needs_gram())
            dense = {layer.name: _linear(model, layer.name) for layer in layers}
            for layer in layers:
                params[layer.name] = fit(model, layer, recipe, stats[layer.name])
            for name in dense:
                install(model, name, params[name])
            if recipe.refits():
                for name, weight in _refitted(model, params, dense, run, len(batches)).items():
                    params[name] = replace(params[name], weight=weight)
                    install(model, name, params[name], dense[name])
            if by_block:
                params |= _trained(model, params, dense, run, len(batches), recipe, state, index)
                for name in dense:
                    install(model, name, params[name], dense[name])
            text.advance(index)
            progress(index + 1, len(text.blocks))
    return params


def fit(model: nn.Module, layer: LayerPlan, recipe: Recipe, stats: LayerStats | None) -> Params:
    """Return what the recipe decides for one layer, dense as yet, from its weight and statistics."""
    if stats is not None and stats.tokens == 0:
        raise CalibrationError(f"{layer.name}: must see the calibration text, got no token. Add it to --ignore.")
    weight = _linear(model, layer.name).weight.data
    chosen = criterion(recipe.criterion)
    if chosen.prune is not None:
        return Params(layer.group, layer.group, weight=chosen.prune(weight, stats, layer.keep, layer.group))
    readers = readers_of(model, layer)
    scale = chosen.scale(readers, stats)
    params = Params(layer.keep, layer.group, channel_scale=scale, sequence_norm=chosen.sequence_norm)
    for method in recipe.methods():
        params = method.fit(params, Layer(weight, stats, recipe.rank, layer.arranged, readers))
    return params


def readers_of(model: nn.Module, layer: LayerPlan) -> Tensor:
    """Return the weights `[N', K]` of the layers, dense as yet, that choose their channels together with `layer`."""
    weights = [_linear(model, name).weight.data for name in layer.siblings or (layer.name,)]
    return weights[0] if len(weights) == 1 else torch.cat(weights)


def _refitted(
    model: nn.Module,
    params: dict[str, Params],
    dense: dict[str, nn.Linear],
    run: Callable[[int], Tensor],
    batches: int,
) -> dict[str, Tensor | None]:
    """Return the weight of each layer refitted to its pruned inputs; the last batch is held out."""
    sums = {
        name: [Sums.of(linear.in_features, linear.weight.device) for _ in range(2)] for name, linear in dense.items()
    }
    for number in range(batches):
        held_out = number == batches - 1
        chosen = {name: pair[held_out] for name, pair in sums.items()}
        with watched(model, {name: partial(s.update, params=params[name]) for name, s in chosen.items()}):
            run(number)
    return {name: refit(sums[name][0], sums[name][1], linear.weight.data) for name, linear in dense.items()}


def _trained(
    model: nn.Module,
    params: dict[str, Params],
    dense: dict[str, nn.Linear],
    run: Callable[[int], Tensor],
    batches: int,
    recipe: Recipe,
    state: Path | None,
    index: int,
) -> dict[str, Params]:
    """Return the trained parameters of block `index`, from `state` where an interrupted run has left them."""
    kept = None if state is None else state / f"block-{index}.safetensors"
    if kept is not None and kept.exists():
        device = next(iter(dense.values())).weight.device
        return {name: layer.on(device) for name, layer in calibration_file.read(kept).items()}
    found = train_block(model, dense, {name: params[name] for name in dense}, run, batches, recipe)
    if kept is not None:
        write_whole(kept, lambda path: calibration_file.write(path, found))
    return found


def _linear(model: nn.Module, name: str) -> nn.Linear:
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear
