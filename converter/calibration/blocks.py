"""A model on batches of text or images, a block at a time: hidden states wait on disk, so memory stays the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from converter.kinds import output
from converter.plan import LayerPlan
from converter.sparsity.statistics import LayerStats

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Blocks:
    """The blocks of `model`, called `name`, on batches of token ids or images; `folder` holds the hidden states."""

    def __init__(self, model: PreTrainedModel, name: str, batches: list[Tensor], folder: Path) -> None:
        """Write what the first block is given for every batch."""
        blocks = model.get_submodule(name)
        assert isinstance(blocks, nn.ModuleList)
        self.model, self.blocks, self.folder = model, blocks, folder
        self.sizes, self.length = [len(batch) for batch in batches], 0
        batches = [batch.to(model.device) for batch in batches]
        self.calls = {len(batch): block_calls(model, blocks, batch) for batch in batches}
        for number, batch in enumerate(batches):
            hidden = first_hidden(model, blocks, batch)
            self.length = hidden.shape[1]  # tokens of a window, or patches of an image
            self._write(number, hidden)

    def run(self, index: int, number: int) -> Tensor:
        """Return what block `index` makes of the hidden states of batch `number`."""
        hidden = load_file(self._path(number), str(self.model.device))["hidden"]
        return run_block(self.blocks[index], hidden, self.calls[self.sizes[number]][index])

    def advance(self, index: int) -> None:
        """Put what block `index` makes of every batch in the place of what it was given."""
        for number in range(len(self.sizes)):
            self._write(number, self.run(index, number))

    def _path(self, number: int) -> Path:
        return self.folder / f"{number}.safetensors"

    def _write(self, number: int, hidden: Tensor) -> None:
        save_file({"hidden": hidden.contiguous()}, self._path(number))


def statistics(
    text: Blocks, index: int, layers: list[LayerPlan], together: set[str], *, gram: bool = False
) -> dict[str, LayerStats]:
    """Return the statistics of the input of each of `layers`, all of block `index`, over all batches.

    Layers that read the very same tensor share them. Those in `together` have the moments that say which channels are
    large together, and with `gram` all have their Gram matrix.
    """
    seen: dict[str, Tensor] = {}
    with watched(text.model, {layer.name: partial(seen.__setitem__, layer.name) for layer in layers}):
        text.run(index, 0)
    readers = _readers(layers, seen)

    def update(stats: LayerStats, x: Tensor) -> None:
        # Without the first token of a window: it is an attention sink, whose activations are hundreds of times larger
        # than any other and would be the mean. (Of an image it stands for the whole.) Some families flatten windows and
        # tokens into one axis.
        stats.update(x.reshape(-1, text.length, x.shape[-1])[:, 1:])

    stats: dict[str, LayerStats] = {}
    watchers: dict[str, Callable[[Tensor], None]] = {}
    for mates in readers:
        wanted = any(layer.name in together for layer in mates)
        name, width, device = mates[0].name, mates[0].in_features, text.model.device
        shared = LayerStats.of(name, width, together=wanted, gram=gram, device=device)
        watchers[name] = partial(update, shared)
        stats |= {layer.name: shared for layer in mates}
        if name in seen:
            update(shared, seen[name])
    seen.clear()
    with watched(text.model, watchers):
        for number in range(1, len(text.sizes)):
            text.run(index, number)
    return stats


def siblings(model: PreTrainedModel, layers: list[LayerPlan], sample: Tensor) -> list[tuple[str, ...]]:
    """Return which of `layers` read the very same tensor and lie in one module, where these are several.

    `sample` is one short text, or one image.
    """
    modules: dict[str, list[LayerPlan]] = {}
    for layer in layers:
        modules.setdefault(layer.name.rpartition(".")[0], []).append(layer)
    seen: dict[str, Tensor] = {}
    with torch.no_grad(), watched(model, {layer.name: partial(seen.__setitem__, layer.name) for layer in layers}):
        output(model, sample.to(model.device))
    groups = (mates for inside in modules.values() for mates in _readers(inside, seen))
    return [tuple(layer.name for layer in mates) for mates in groups if len(mates) > 1]


def _readers(layers: list[LayerPlan], seen: dict[str, Tensor]) -> list[list[LayerPlan]]:
    """Return the layers by the tensor that they were seen to read; one that was not seen is by itself."""
    readers: list[list[LayerPlan]] = []
    for layer in layers:
        x = seen.get(layer.name)
        mates = next((known for known in readers if x is not None and seen.get(known[0].name) is x), None)
        if mates is None:
            readers.append([layer])
        else:
            mates.append(layer)
    return readers


def run_block(block: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    """Return the hidden states that the block makes of `hidden`."""
    out = block(hidden, *call[0], **call[1])
    result: Tensor = out[0] if isinstance(out, tuple) else out
    return result


class _Stop(Exception):  # noqa: N818 - no error: the forward has given what was wanted
    """Ends a forward."""


def first_hidden(model: PreTrainedModel, blocks: nn.ModuleList, ids: Tensor) -> Tensor:
    """Return what the first block is given for these ids, `[B, S, H]`."""
    seen: list[Tensor] = []

    def stop(_module: nn.Module, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
        seen.append(args[0])
        raise _Stop

    handle = blocks[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        output(model, ids)
    except _Stop:
        pass
    finally:
        handle.remove()
    return seen[0]


def block_calls(model: PreTrainedModel, blocks: nn.ModuleList, ids: Tensor) -> list[Call]:
    """Return what else each block is given (mask, positions), which the shape of the ids decides."""
    calls: list[Call] = []
    handles = []

    def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args[1:], kwargs))

    for block in blocks:
        handles.append(block.register_forward_pre_hook(note, with_kwargs=True))
    try:
        output(model, ids, last=True)
    finally:
        for handle in handles:
            handle.remove()
    return calls


@contextmanager
def watched(model: nn.Module, watchers: dict[str, Callable[[Tensor], None]]) -> Iterator[None]:
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
