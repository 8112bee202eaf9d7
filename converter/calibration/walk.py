"""The walk: block after block, gather statistics on the sparse model's own inputs, fit, and go on with the result.

Hidden states wait on disk between two blocks, so memory does not grow with the number of calibration tokens.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from converter.calibration import file as calibration_file
from converter.calibration.by_block import train_block
from converter.calibration.refit import Sums, refit
from converter.errors import CalibrationError
from converter.plan import LayerPlan, Plan
from converter.recipe import Recipe
from converter.sparsity.criteria import criterion
from converter.sparsity.linear import Params, install
from converter.sparsity.mitigations import Layer
from converter.sparsity.statistics import LayerStats

Call = tuple[tuple[Any, ...], dict[str, Any]]


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

    `windows [count, window]` holds token ids, None when the recipe needs none; `scratch` is a folder for the hidden
    states. In the folder `state`, where given, every trained block is kept, so that an interrupted call can be made
    again and ends with the same bits. `progress` is called with the number of blocks done and their total.

    Raises:
        CalibrationError: when an activation is not finite, or there is no batch to hold out.
    """
    params: dict[str, Params] = {}
    blocks = model.get_submodule(plan.blocks)
    assert isinstance(blocks, nn.ModuleList)
    if windows is None:
        for layer in plan.sparse:
            params[layer.name] = fit(model, layer, recipe, None)
            install(model, layer.name, params[layer.name])
        return params
    with torch.no_grad(), tempfile.TemporaryDirectory(prefix="hidden-", dir=scratch) as folder:
        states = _States(Path(folder))
        batches = list(windows.split(recipe.calibration.batch))
        by_block = recipe.trains() and not recipe.distils()
        if (recipe.refits() or by_block) and len(batches) < 2:
            raise CalibrationError(
                f"calibration: must have at least two batches of windows, to hold one out, got {len(batches)}."
                " Give more --set calibration.tokens=N or a smaller --set calibration.batch=B."
            )
        calls = {len(batch): _calls(model, blocks, batch) for batch in batches}
        for number, batch in enumerate(batches):
            states.write(number, _first_hidden(model, blocks, batch))
        for index, block in enumerate(blocks):
            layers = [layer for layer in plan.sparse if layer.name.startswith(f"{plan.blocks}.{index}.")]

            def run(number: int, block: nn.Module = block, index: int = index) -> Tensor:
                return _run(block, states.read(number), calls[len(batches[number])][index])

            stats = _statistics(model, layers, recipe, run, len(batches))
            dense = {layer.name: _linear(model, layer.name) for layer in layers}
            for layer in layers:
                params[layer.name] = fit(model, layer, recipe, stats[layer.name])
                install(model, layer.name, params[layer.name])
            if recipe.refits():
                for name, weight in _refitted(model, params, dense, run, len(batches)).items():
                    params[name] = replace(params[name], weight=weight)
                    install(model, name, params[name], dense[name])
            if by_block:
                params |= _trained(model, params, dense, run, len(batches), recipe, state, index)
                for name in dense:
                    install(model, name, params[name], dense[name])
            for number in range(len(batches)):
                states.write(number, run(number))
            progress(index + 1, len(blocks))
    return params


def fit(model: nn.Module, layer: LayerPlan, recipe: Recipe, stats: LayerStats | None) -> Params:
    """Return what the recipe decides for one layer from its weight and statistics."""
    if stats is not None and stats.tokens == 0:
        raise CalibrationError(f"{layer.name}: must see the calibration text, got no token. Add it to --ignore.")
    weight = _linear(model, layer.name).weight.data
    chosen = criterion(recipe.criterion)
    if chosen.prune is not None:
        return Params(layer.group, layer.group, weight=chosen.prune(weight, stats, layer.keep, layer.group))
    scale = chosen.scale(weight, stats)
    params = Params(layer.keep, layer.group, channel_scale=scale, sequence_norm=chosen.sequence_norm)
    for method in recipe.methods():
        params = method.fit(params, Layer(weight, stats, recipe.rank))
    return params


def _statistics(
    model: nn.Module, layers: list[LayerPlan], recipe: Recipe, run: Callable[[int], Tensor], batches: int
) -> dict[str, LayerStats]:
    """Return the statistics of each layer's input over all batches; layers that read one tensor share them."""
    seen: dict[str, Tensor] = {}
    with _watched(model, {layer.name: partial(seen.__setitem__, layer.name) for layer in layers}):
        run(0)
    stats: dict[str, LayerStats] = {}
    watched: dict[str, LayerStats] = {}
    for layer in layers:
        reader = next((name for name in watched if name in seen and seen[name] is seen.get(layer.name)), None)
        if reader is None:
            wanted = {"together": recipe.needs_together(), "gram": recipe.needs_gram()}
            found = LayerStats.of(layer.name, layer.in_features, **wanted)
            stats[layer.name] = watched[layer.name] = found
        else:
            stats[layer.name] = watched[reader]
    seen.clear()
    # Without the first token of a window: it is an attention sink, whose activations are hundreds of times larger than
    # any other and would be the mean.
    with _watched(model, {name: partial(_but_first, s) for name, s in watched.items()}):
        for number in range(batches):
            run(number)
    return stats


def _refitted(
    model: nn.Module,
    params: dict[str, Params],
    dense: dict[str, nn.Linear],
    run: Callable[[int], Tensor],
    batches: int,
) -> dict[str, Tensor | None]:
    """Return the weight of each layer refitted to its pruned inputs; the last batch is held out."""
    sums = {name: [Sums.of(linear.in_features) for _ in range(2)] for name, linear in dense.items()}
    for number in range(batches):
        held_out = number == batches - 1
        chosen = {name: pair[held_out] for name, pair in sums.items()}
        with _watched(model, {name: partial(s.update, params=params[name]) for name, s in chosen.items()}):
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
        return calibration_file.read(kept)
    found = train_block(model, dense, {name: params[name] for name in dense}, run, batches, recipe)
    if kept is not None:
        calibration_file.write(kept, found)
    return found


def _linear(model: nn.Module, name: str) -> nn.Linear:
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear


class _States:
    """The hidden states of every batch, one file each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, number: int) -> Tensor:
        return load_file(self.folder / f"{number}.safetensors")["hidden"]

    def write(self, number: int, hidden: Tensor) -> None:
        save_file({"hidden": hidden.contiguous()}, self.folder / f"{number}.safetensors")


def _run(block: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    out = block(hidden, *call[0], **call[1])
    result: Tensor = out[0] if isinstance(out, tuple) else out
    return result


class _Stop(Exception):  # noqa: N818 - no error: the forward has given what was wanted
    """Ends a forward."""


def _first_hidden(model: PreTrainedModel, blocks: nn.ModuleList, ids: Tensor) -> Tensor:
    """Return what the first block is given for these ids."""
    seen: list[Tensor] = []

    def stop(_module: nn.Module, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
        seen.append(args[0])
        raise _Stop

    handle = blocks[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(input_ids=ids, use_cache=False)
    except _Stop:
        pass
    finally:
        handle.remove()
    return seen[0]


def _calls(model: PreTrainedModel, blocks: nn.ModuleList, ids: Tensor) -> list[Call]:
    """Return what else each block is given (mask, positions), which the shape of the ids decides."""
    calls: list[Call] = []
    handles = []

    def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args[1:], kwargs))

    for block in blocks:
        handles.append(block.register_forward_pre_hook(note, with_kwargs=True))
    try:
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _but_first(stats: LayerStats, x: Tensor) -> None:
    stats.update(x[:, 1:])


@contextmanager
def _watched(model: nn.Module, watchers: dict[str, Callable[[Tensor], None]]) -> Iterator[None]:
    """Show each watcher the input of its layer."""
    handles = []
    for name, watch in watchers.items():

        def update(_module: nn.Module, args: tuple[Any, ...], watch: Callable[[Tensor], None] = watch) -> None:
            watch(args[0])

        handles.append(model.get_submodule(name).register_forward_pre_hook(update))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
