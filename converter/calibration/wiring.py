"""Wiring: which rows of which linear layers an input channel is made of, and what the residual stream runs through.

Nothing is read from names. A block is run on one token with the output of every linear layer replaced by numbers of
ours, so that each dependency is a direct one, and attention over one token is its value. Each row has a random code
of a few hundred bits, and each bit is one run (all in one batch) in which the rows with that bit have another number:
the channel of an input that is made of two rows changes in just the runs where a bit of either is set, and the two are
read off. Blocks that are alike are wired alike. What is found is then tried in every block, with random orders on real
text, and counts only where the output stays the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from converter.arrangement import Arrangement, Orders
from converter.calibration.blocks import Call, block_calls, first_hidden, run_block, watched
from converter.kinds import kind as kind_of_model
from converter.kinds import output
from converter.plan import Plan, find_blocks, signature

CODE = 256  # bits; a row that is not there is read off once in 1e8 blocks of 40,000 rows and 20,000 channels
TOLERANCE = 1e-4  # of the largest value


@dataclass(frozen=True)
class Feed:
    """What the channels of one layer's input are made of: `rows [K, n]` of `producers`, one after the other.

    Channels may change places within each `span` of consecutive ones.
    """

    producers: tuple[str, ...]
    rows: Tensor
    span: int

    def order(self, choose: Callable[[list[slice]], Tensor]) -> Tensor:
        """Return an order of the channels `[K]`; `choose` gives that of one span from those made of the same rows."""
        tied: dict[bytes, list[slice]] = {}
        for start in range(0, len(self.rows), self.span):
            span = slice(start, start + self.span)
            tied.setdefault(self.rows[span].numpy().tobytes(), []).append(span)
        order = torch.arange(len(self.rows))
        for spans in tied.values():
            chosen = choose(spans)
            for span in spans:
                order[span] = span.start + chosen
        return order

    def orders(self, model: nn.Module, layer: str, order: Tensor) -> Orders | None:
        """Return what reorders the input of `layer` by `order`; None when no order of the producers' rows does."""
        linears = [_linear(model, name) for name in self.producers]
        sizes = [linear.out_features for linear in linears]
        rows = torch.arange(sum(sizes))
        rows[self.rows] = self.rows[order]
        if not torch.equal(rows[self.rows], self.rows[order]):
            return None
        names = parameter_names(model)
        by_tensor: Orders = {names[id(_linear(model, layer).weight)]: {1: order}}
        start = 0
        for linear, size in zip(linears, sizes, strict=True):
            mine = rows[start : start + size] - start
            start += size
            if not torch.equal(mine.sort().values, torch.arange(size)):
                return None
            if not torch.equal(mine, torch.arange(size)):
                for parameter in (linear.weight, linear.bias):
                    if parameter is not None:
                        by_tensor.setdefault(names[id(parameter)], {})[0] = mine
        return by_tensor


@dataclass(frozen=True)
class Wiring:
    """What can be reordered: inputs made of other layers' rows, and the residual stream with the layers that read it.

    `stream` lists parameters and their dimension; it is empty where no one order can be given to all of them.
    """

    feeds: dict[str, Feed]
    stream: tuple[tuple[str, int], ...] = ()
    readers: frozenset[str] = frozenset()

    def stream_orders(self, order: Tensor) -> Orders:
        """Return what reorders the residual stream by `order [H]`."""
        by_tensor: Orders = {}
        for name, dim in self.stream:
            by_tensor.setdefault(name, {})[dim] = order
        return by_tensor


def wiring(model: PreTrainedModel, plan: Plan, ids: Tensor) -> Wiring:
    """Return what can be reordered of the inputs of the sparse layers, tried on the dense `model` on `ids [1, ...]`."""
    blocks_name, blocks = find_blocks(model)
    sparse = {layer.name: layer for layer in plan.sparse if layer.group < layer.in_features}
    names = parameter_names(model)
    generator = torch.Generator().manual_seed(0)
    feeds: dict[str, Feed] = {}
    taken: set[tuple[str, int]] = set()
    stream: set[tuple[str, int]] = set()
    readers: set[str] = set()
    known = True
    with torch.no_grad():
        hidden, calls = first_hidden(model, blocks, ids), block_calls(model, blocks, ids)
        width = hidden.shape[-1]
        block_wirings = _block_wirings(model, blocks, ids, width)
        for index, (block, block_wiring, call) in enumerate(zip(blocks, block_wirings, calls, strict=True)):
            prefix = f"{blocks_name}.{index}."
            known &= block_wiring is not None
            if block_wiring is not None:
                readers |= {prefix + name for name in block_wiring.readers}
                stream |= {(names[id(block.get_parameter(name))], dim) for name, dim in block_wiring.stream}
                producers = tuple(prefix + name for name in block_wiring.linears)
                for inner, rows in block_wiring.rows.items():
                    layer = sparse.get(prefix + inner)
                    for span in [] if layer is None else _spans(model, len(rows), layer.group):
                        name, feed = prefix + inner, Feed(producers, rows, span)
                        order = feed.order(partial(_random, generator))
                        orders = feed.orders(model, name, order)
                        places = {(p, dim) for p, dims in (orders or {}).items() for dim in dims}
                        if orders and not places & taken and holds(model, block, hidden, call, name, orders, order):
                            feeds[name] = feed
                            taken |= places
                            break
            hidden = run_block(block, hidden, call)
        stream |= {(names[id(p)], dim) for p, dim in _outside(model, blocks, width)}
        groups = {sparse[name].group for name in readers if name in sparse}
        wired = Wiring(feeds, tuple(sorted(stream)), frozenset(readers & set(sparse)))
        if known and len(groups) == 1 and not stream & taken:
            order = torch.randperm(width, generator=generator)
            if same_output(model, Arrangement(wired.stream_orders(order)), ids):
                return wired
    return Wiring(feeds)


def parameter_names(model: nn.Module) -> dict[int, str]:
    """Return the name of each parameter by its identity: of tied ones the first, which is what is stored."""
    return {id(parameter): name for name, parameter in model.named_parameters()}


def holds(
    model: nn.Module, block: nn.Module, hidden: Tensor, call: Call, layer: str, orders: Orders, order: Tensor
) -> bool:
    """Return whether the block, its parameters reordered, gives the same, and `layer` is given its input reordered."""
    arrangement = Arrangement(orders)
    inputs: list[Tensor] = []
    with watched(model, {layer: inputs.append}):
        before = run_block(block, hidden, call)
        arrangement.apply(model)
        after = run_block(block, hidden, call)
        arrangement.inverse().apply(model)
    return _same(after, before) and _same(inputs[1], inputs[0][..., order])


def same_output(model: PreTrainedModel, arrangement: Arrangement, ids: Tensor) -> bool:
    """Return whether `model` gives the same for `ids` when arranged; it is as it was afterwards."""
    before = output(model, ids)
    arrangement.apply(model)
    after = output(model, ids)
    arrangement.inverse().apply(model)
    return _same(after, before)


def _same(value: Tensor, expected: Tensor) -> bool:
    return bool((value - expected).abs().max() <= TOLERANCE * expected.abs().max())


def _linear(model: nn.Module, name: str) -> nn.Linear:
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear


def _random(generator: torch.Generator, spans: list[slice]) -> Tensor:
    return torch.randperm(spans[0].stop - spans[0].start, generator=generator)


def _spans(model: PreTrainedModel, channels: int, group: int) -> list[int]:
    """Return within how many channels order may be free: all of them, else those of one attention head."""
    config = model.config.get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return [span for span in (channels, head) if channels % span == 0 and span % group == 0]


def _outside(model: nn.Module, blocks: nn.ModuleList, width: int) -> Iterator[tuple[Tensor, int]]:
    """Yield the parameters outside the blocks that have the residual stream's width, and which dimension it is."""
    inside = set(blocks.modules())
    for module in model.modules():
        if module in inside:
            continue
        if isinstance(module, nn.Embedding):
            if module.embedding_dim == width:
                yield module.weight, 1
        elif isinstance(module, nn.Linear):
            if module.in_features == width:
                yield module.weight, 1
        else:
            for parameter in module.parameters(recurse=False):
                if parameter.shape == (width,):
                    yield parameter, 0
                elif parameter.ndim == 3 and parameter.shape[-1] == width:  # what is added to each patch of an image
                    yield parameter, 2
                elif isinstance(module, nn.Conv2d) and module.out_channels == width:  # makes the patches
                    yield parameter, 0


@dataclass(frozen=True)
class _BlockWiring:
    """How the blocks that are alike are wired; names are those inside the block."""

    linears: tuple[str, ...]
    readers: frozenset[str]  # layers whose input changes with the hidden state, whatever the other layers give
    stream: tuple[tuple[str, int], ...]  # parameters that the residual stream runs through, and their dimension
    rows: dict[str, Tensor]  # the rows `[K, n]` of `linears` that each channel of a layer's input is made of


def _block_wirings(model: PreTrainedModel, blocks: nn.ModuleList, ids: Tensor, width: int) -> list[_BlockWiring | None]:
    """Return the wiring of each block; None for one with a layer that is not given each token once."""
    most = max(sum(isinstance(m, nn.Linear) for m in block.modules()) for block in blocks)
    runs = 2 + CODE + most
    # What else a block is given depends on how many rows and tokens there are; of an image model it is nothing.
    calls = block_calls(model, blocks, kind_of_model(model).cut(ids, runs, 1))
    by_name: dict[str, _BlockWiring | None] = {}
    wirings = []
    for block, call in zip(blocks, calls, strict=True):
        text = signature(block)
        if text not in by_name:
            by_name[text] = _Probe(block, call, runs, width).wiring()
        wirings.append(by_name[text])
    return wirings


class _Probe:
    """A batch of runs of one block on one token, with the outputs of its linear layers replaced.

    Run 0 is the one that the others are compared with; then a run for each bit, one with another hidden state, and one
    for each linear layer with another output of it.
    """

    def __init__(self, block: nn.Module, call: Call, runs: int, width: int) -> None:
        """Draw the hidden states and the outputs."""
        generator = torch.Generator().manual_seed(0)
        self.block, self.call, self.width = block, call, width
        self.linears = {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear)}
        hidden = torch.randn(1, 1, width, generator=generator).repeat(runs, 1, 1)
        hidden[1 + CODE] = torch.randn(1, width, generator=generator)
        rows = sum(linear.out_features for linear in self.linears.values())
        codes = torch.rand(CODE, rows, generator=generator) < 1 / 3
        # Above zero, where no activation function is flat.
        outputs = (0.5 + torch.rand(rows, generator=generator)).repeat(runs, 1)
        outputs[1 : 1 + CODE] += codes
        self.parts: dict[str, slice] = {}
        start = 0
        for number, (name, linear) in enumerate(self.linears.items()):
            self.parts[name] = slice(start, start + linear.out_features)
            outputs[2 + CODE + number, self.parts[name]] += 1
            start += linear.out_features
        device = next(block.parameters()).device
        self.hidden, self.codes, self.outputs = hidden.to(device), codes.to(device), outputs.to(device)

    def wiring(self) -> _BlockWiring | None:
        """Return what the runs show."""
        inputs, out = self._run()
        if len(inputs) < len(self.linears):
            return None
        readers = frozenset(name for name, x in inputs.items() if _moved(x[1 + CODE], x[0]).any())
        rows = {name: self._rows(x) for name, x in inputs.items() if name not in readers}
        return _BlockWiring(
            tuple(self.linears),
            readers,
            tuple(self._stream(inputs, out, readers)),
            {name: row for name, row in rows.items() if row is not None},
        )

    def _run(self) -> tuple[dict[str, Tensor], Tensor]:
        """Return the input of each linear layer that is given each token once, and the output: `[runs, channels]`."""
        inputs: dict[str, Tensor] = {}
        handles = []
        for name, linear in self.linears.items():

            def cut(_module: nn.Module, args: tuple[Tensor, ...], out: Tensor, name: str = name) -> Tensor:
                ours = self.outputs[:, self.parts[name]]
                if out.numel() != ours.numel():
                    return out
                inputs[name] = args[0].reshape(len(ours), -1)
                return ours.reshape(out.shape)

            handles.append(linear.register_forward_hook(cut))
        try:
            out = run_block(self.block, self.hidden, self.call)
        finally:
            for handle in handles:
                handle.remove()
        return inputs, out.reshape(len(self.hidden), -1)

    def _stream(self, inputs: dict[str, Tensor], out: Tensor, readers: frozenset[str]) -> Iterator[tuple[str, int]]:
        for number, (name, linear) in enumerate(self.linears.items()):
            if name in readers:
                yield f"{name}.weight", 1
            if _moved(out[2 + CODE + number], out[0]).any():
                yield f"{name}.weight", 0
                if linear.bias is not None:
                    yield f"{name}.bias", 0
        for name, parameter in self.block.named_parameters():
            if parameter.shape != (self.width,) or name.rpartition(".")[0] in self.linears:
                continue
            kept = parameter.data
            parameter.data = kept + 1
            inputs_then, out_then = self._run()
            parameter.data = kept
            pairs = [(out_then[0], out[0]), *((inputs_then[reader][0], inputs[reader][0]) for reader in readers)]
            if any(_moved(*pair).any() for pair in pairs):
                yield name, 0

    def _rows(self, x: Tensor) -> Tensor | None:
        """Return the rows `[K, n]` that each channel of the input `x [runs, K]` is made of, None where it is not so."""
        changed = _moved(x[1 : 1 + CODE], x[0]).t()  # [K, CODE]
        if changed.all(-1).any() or not changed.any(-1).all():
            return None
        codes = self.codes.float()
        result = []
        for part in changed.split(256):
            inside = (~part).float() @ codes == 0  # no bit of the row's code is outside of what changed
            counts = inside.sum(-1)
            if counts[0] == 0 or (counts != counts[0]).any():
                return None
            result.append(inside.nonzero()[:, 1].reshape(len(part), -1))
        if len({part.shape[1] for part in result}) != 1:
            return None
        rows = torch.cat(result)
        return rows.cpu() if torch.equal(self.codes[:, rows].any(-1).t(), changed) else None


def _moved(value: Tensor, base: Tensor) -> Tensor:
    """Return which channels differ by more than rounding."""
    return (value - base).abs() > TOLERANCE * base.abs()
