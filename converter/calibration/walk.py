"""The walk: block after block, gather statistics on the sparse model's own inputs, fit, and go on with the result."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
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
from converter.sparsity.mitigations import Given
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
        steps = block_steps(recipe)
        if steps and len(batches) < 2:
            raise CalibrationError(
                f"calibration: must have at least two batches of windows, to hold one out, got {len(batches)}."
                " Give more --set calibration.tokens=N or a smaller --set calibration.batch=B."
            )
        text = Blocks(model, plan.blocks, batches, Path(folder))
        for index in range(len(text.blocks)):
            layers = [layer for layer in plan.sparse if layer.name.startswith(f"{plan.blocks}.{index}.")]
            together = {layer.name for layer in layers if recipe.needs_together() and not layer.arranged}
            stats = statistics(text, index, layers, together, gram=recipe.needs_gram())
            dense = {layer.name: _linear(model, layer.name) for layer in layers}
            for layer in layers:
                params[layer.name] = fit(model, layer, recipe, stats[layer.name])
            for name in dense:
                install(model, name, params[name])
            block = Block(model, dense, partial(text.run, index), len(batches), recipe, state, index)
            for step in steps:
                params |= step(block, {name: params[name] for name in dense})
                for name in dense:
                    install(model, name, params[name], dense[name])
            text.advance(index)
            progress(index + 1, len(text.blocks))
    return params


@dataclass(frozen=True)
class Block:
    """Block `index` of a model, sparse by now: its `dense` layers, and `run`, which gives its output on a batch.

    The last of the `batches` is held out.
    """

    model: nn.Module
    dense: dict[str, nn.Linear]
    run: Callable[[int], Tensor]
    batches: int
    recipe: Recipe
    state: Path | None
    index: int


BlockStep = Callable[[Block, dict[str, Params]], dict[str, Params]]


def block_steps(recipe: Recipe) -> list[BlockStep]:
    """Return what the mitigations of the phase `block` do, in order, once every layer of a block has its `Params`."""
    methods = recipe.at("block")
    fits = [_refitted] if any(not method.trains for method in methods) else []
    return [*fits, *([_trained] if any(method.trains for method in methods) else [])]


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
        params = method.fit(params, Given(weight, stats, recipe.rank, layer.arranged, readers))
    return params


def readers_of(model: nn.Module, layer: LayerPlan) -> Tensor:
    """Return the weights `[N', K]` of the layers, dense as yet, that choose their channels together with `layer`."""
    weights = [_linear(model, name).weight.data for name in layer.siblings or (layer.name,)]
    return weights[0] if len(weights) == 1 else torch.cat(weights)


def _refitted(block: Block, params: dict[str, Params]) -> dict[str, Params]:
    """Return the parameters with each weight that gains by it refitted to what is kept of its layer's inputs."""
    sums = {
        name: [Sums.of(linear.in_features, linear.weight.device) for _ in range(2)]
        for name, linear in block.dense.items()
    }
    for number in range(block.batches):
        held_out = number == block.batches - 1
        chosen = {name: pair[held_out] for name, pair in sums.items()}
        with watched(block.model, {name: partial(s.update, params=params[name]) for name, s in chosen.items()}):
            block.run(number)
    weights = {name: refit(sums[name][0], sums[name][1], linear.weight.data) for name, linear in block.dense.items()}
    return {name: replace(params[name], weight=weight) for name, weight in weights.items()}


def _trained(block: Block, params: dict[str, Params]) -> dict[str, Params]:
    """Return the trained parameters, from `state` where an interrupted run has left them."""
    kept = None if block.state is None else block.state / f"block-{block.index}.safetensors"
    if kept is not None and kept.exists():
        device = next(iter(block.dense.values())).weight.device
        return {name: layer.on(device) for name, layer in calibration_file.read(kept).items()}
    trained = train_block(block.model, block.dense, params, block.run, block.batches, block.recipe)
    if kept is not None:
        write_whole(kept, lambda path: calibration_file.write(path, trained))
    return trained


def _linear(model: nn.Module, name: str) -> nn.Linear:
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear
