"""Wiring: which rows of which linear layers an input channel is made of, and what the residual stream runs through.

Nothing is read from names. A block is run on one token with the output of every linear layer replaced by numbers of
ours, so that each dependency is a direct one, and attention over one token is its value. Each row has a random code
of a few hundred bits, and each bit is one run (all in one batch) in which the rows with that bit have another number:
the channel of an input that is made of two rows changes in just the runs where a bit of either is set, and the two are
read off. What is found is then tried, with random orders on real text, and counts only where the output stays the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from converter.arrangement import Arrangement, Orders
from converter.calibration.blocks import Call, block_calls, first_hidden, run_block, watched
from converter.plan import Plan, find_blocks

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
        found: Orders = {names[id(_linear(model, layer).weight)]: {1: order}}
        start = 0
        for linear, size in zip(linears, sizes, strict=True):
            mine = rows[start : start + size] - start
            start += size
            if not torch.equal(mine.sort().values, torch.arange(size)):
                return None
            if not torch.equal(mine, torch.arange(size)):
                for parameter in (linear.weight, linear.bias):
                    if parameter is not None:
                        found.setdefault(names[id(parameter)], {})[0] = mine
        return found


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
        found: Orders = {}
        for name, dim in self.stream:
            found.setdefault(name, {})[dim] = order
        return found


def wiring(model: PreTrainedModel, plan: Plan, ids: Tensor) -> Wiring:
    """Return what can be reordered of the inputs of the sparse layers, tried on the dense `model` with `ids [1, S]`."""
    _, blocks = find_blocks(model)
    sparse = {layer.name: layer for layer in plan.sparse if layer.group < layer.in_features}
    generator = torch.Generator().manual_seed(0)
    feeds: dict[str, Feed] = {}
    taken: set[tuple[str, int]] = set()
    stream: set[tuple[str, int]] = set()
    readers: set[str] = set()
    known = True
    with torch.no_grad():
        names = parameter_names(model)
        prefixes = {module: name for name, module in model.named_modules()}
        linears = [{prefixes[m]: m for m in block.modules() if isinstance(m, nn.Linear)} for block in blocks]
        size = 2 + CODE + max(map(len, linears))
        alone = block_calls(model, blocks, ids[:, :1].expand(size, 1))
        calls = block_calls(model, blocks, ids)
        hidden = first_hidden(model, blocks, ids)
        width = hidden.shape[-1]
        for block, mine, probe_call, call in zip(blocks, linears, alone, calls, strict=True):
            probe = _Probe.of(block, mine, probe_call, size, width)
            if probe is None:
                known = False
            else:
                read = probe.readers()
                readers |= read
                stream |= {(names[id(p)], dim) for p, dim in probe.stream(block, probe_call, read)}
                for name in [name for name in mine if name in sparse and name not in read]:
                    for feed in _candidates(probe, name, model, sparse[name].group):
                        order = feed.order(lambda spans: _random(spans[0], generator))
                        orders = feed.orders(model, name, order)
                        places = {(p, dim) for p, dims in (orders or {}).items() for dim in dims}
                        if orders and not places & taken and holds(model, block, hidden, call, name, orders, order):
                            feeds[name] = feed
                            taken |= places
                            break
            hidden = run_block(block, hidden, call)
        stream |= {(names[id(p)], dim) for p, dim in _outside(model, blocks, width)}
        groups = {sparse[name].group for name in readers if name in sparse}
        found = Wiring(feeds, tuple(sorted(stream)), frozenset(readers & set(sparse)))
        if known and len(groups) == 1 and not stream & taken:
            order = torch.randperm(width, generator=generator)
            if same_logits(model, Arrangement(found.stream_orders(order)), ids):
                return found
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


def same_logits(model: PreTrainedModel, arrangement: Arrangement, ids: Tensor) -> bool:
    """Return whether `model` gives the same logits for `ids` when arranged; it is as it was afterwards."""
    before = model(input_ids=ids, use_cache=False).logits
    arrangement.apply(model)
    after = model(input_ids=ids, use_cache=False).logits
    arrangement.inverse().apply(model)
    return _same(after, before)


def _same(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= TOLERANCE * expected.abs().max())


def _linear(model: nn.Module, name: str) -> nn.Linear:
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear


def _random(span: slice, generator: torch.Generator) -> Tensor:
    return torch.randperm(span.stop - span.start, generator=generator)


def _candidates(probe: _Probe, name: str, model: PreTrainedModel, group: int) -> Iterator[Feed]:
    """Yield what may feed the layer: all channels may change places, or those of one attention head."""
    rows = probe.rows_of(name)
    if rows is None:
        return
    config = model.config.get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for span in (len(rows), head):
        if len(rows) % span == 0 and span % group == 0:
            yield Feed(tuple(probe.linears), rows, span)


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


class _Probe:
    """What the inputs of a block's linear layers and its output did in each run of the batch.

    Run 0 is the one that the others are compared with; then a run for each bit, one with another hidden state, and one
    for each linear layer with another output of it.
    """

    def __init__(self, linears: dict[str, nn.Linear], size: int, width: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.linears, self.width = linears, width
        rows = sum(linear.out_features for linear in linears.values())
        self.hidden = torch.randn(1, 1, width, generator=generator).repeat(size, 1, 1)
        self.hidden[1 + CODE] = torch.randn(1, width, generator=generator)
        self.codes = torch.rand(CODE, rows, generator=generator) < 1 / 3
        # Above zero, where no activation function is flat.
        self.outputs = (0.5 + torch.rand(rows, generator=generator)).repeat(size, 1)
        self.outputs[1 : 1 + CODE] += self.codes
        self.parts: dict[str, slice] = {}
        start = 0
        for number, (name, linear) in enumerate(linears.items()):
            self.parts[name] = slice(start, start + linear.out_features)
            self.outputs[2 + CODE + number, self.parts[name]] += 1
            start += linear.out_features
        self.seen: dict[str, Tensor] = {}
        self.out = torch.empty(0)
        self.whole = True

    @classmethod
    def of(cls, block: nn.Module, linears: dict[str, nn.Linear], call: Call, size: int, width: int) -> _Probe | None:
        """Return the probe of a block, run; None when a layer is not given each token once."""
        probe = cls(linears, size, width)
        probe.seen, probe.out = probe.run(block, call)
        return probe if probe.whole else None

    def run(self, block: nn.Module, call: Call) -> tuple[dict[str, Tensor], Tensor]:
        """Return the input of each linear layer and the block's output, each `[runs, channels]`."""
        seen: dict[str, Tensor] = {}
        handles = []
        for name, linear in self.linears.items():

            def cut(_module: nn.Module, args: tuple[Tensor, ...], out: Tensor, name: str = name) -> Tensor:
                ours = self.outputs[:, self.parts[name]]
                if name in seen or out.numel() != ours.numel():
                    self.whole = False
                    return out
                seen[name] = args[0].reshape(len(ours), -1)
                return ours.reshape(out.shape)

            handles.append(linear.register_forward_hook(cut))
        try:
            out = run_block(block, self.hidden, call)
        finally:
            for handle in handles:
                handle.remove()
        self.whole &= len(seen) == len(self.linears)
        return seen, out.reshape(len(self.hidden), -1)

    def readers(self) -> set[str]:
        """Return the layers whose input changes with the hidden state, whatever the other layers give."""
        return {name for name, x in self.seen.items() if _moved(x[1 + CODE], x[0]).any()}

    def stream(self, block: nn.Module, call: Call, readers: set[str]) -> Iterator[tuple[Tensor, int]]:
        """Yield the parameters that the residual stream runs through in this block, and which dimension it is."""
        for number, (name, linear) in enumerate(self.linears.items()):
            if name in readers:
                yield linear.weight, 1
            if _moved(self.out[2 + CODE + number], self.out[0]).any():
                yield linear.weight, 0
                if linear.bias is not None:
                    yield linear.bias, 0
        biases = {id(linear.bias) for linear in self.linears.values()}
        for parameter in block.parameters():
            if parameter.shape != (self.width,) or id(parameter) in biases:
                continue
            kept = parameter.data
            parameter.data = kept + 1
            seen, out = self.run(block, call)
            parameter.data = kept
            pairs = [(out[0], self.out[0]), *((seen[name][0], self.seen[name][0]) for name in readers)]
            if any(_moved(*pair).any() for pair in pairs):
                yield parameter, 0

    def rows_of(self, name: str) -> Tensor | None:
        """Return the rows `[K, n]` that each channel of the layer's input is made of, None where that is not so."""
        x = self.seen[name]
        signature = _moved(x[1 : 1 + CODE], x[0]).t()  # [K, CODE]
        if signature.all(-1).any() or not signature.any(-1).all():
            return None
        found = []
        for part in signature.split(256):
            inside = (~part).float() @ self.codes.float() == 0  # no bit of the row's code is outside the signature
            counts = inside.sum(-1)
            if counts[0] == 0 or (counts != counts[0]).any():
                return None
            found.append(inside.nonzero()[:, 1].reshape(len(part), -1))
        if len({part.shape[1] for part in found}) != 1:
            return None
        rows = torch.cat(found)
        return rows if torch.equal(self.codes[:, rows].any(-1).t(), signature) else None


def _moved(found: Tensor, base: Tensor) -> Tensor:
    """Return which channels differ by more than rounding."""
    return (found - base).abs() > TOLERANCE * base.abs()
