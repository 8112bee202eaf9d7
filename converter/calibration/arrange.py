"""Arrange: reorder a checkpoint so that the channels of a group lie side by side, and the op needs no permutation.

Two kinds of inputs can be reordered for nothing. One that is made channel by channel of other layers' outputs (down of
gate and up; o of v, within a head) goes by the rows of those layers. All that read the residual stream share one
order, in which everything that writes and reads the stream is reordered. See `converter.calibration.wiring` for how
the two are found, and `converter.sparsity.permutation` for the order.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from converter.arrangement import Arrangement, Orders
from converter.calibration.blocks import Blocks, statistics
from converter.calibration.wiring import same_output, wiring
from converter.kinds import kind
from converter.plan import Plan
from converter.sparsity.permutation import decorrelate

SAMPLE = 32  # tokens that a reordered model is tried on


def arrange(
    model: PreTrainedModel,
    plan: Plan,
    windows: Tensor,
    batch: int,
    scratch: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Arrangement:
    """Return the arrangement of the dense `model` for the groups of `plan`, and leave `model` arranged.

    `windows [count, ...]` holds token ids or images, taken `batch` at a time; `scratch` is a folder for hidden states.
    What does not leave the model's output as it is, up to rounding, is no part of the result.

    Raises:
        CalibrationError: when an activation is not finite.
    """
    sample = kind(model).cut(windows[:1], 1, SAMPLE).to(model.device)
    wired = wiring(model, plan, sample)
    wanted = {layer.name for layer in plan.sparse if layer.name in wired.feeds or layer.name in wired.readers}
    if not wanted:
        return Arrangement({})
    inside: Orders = {}
    fed: list[str] = []
    stream: Tensor | None = None
    group = 0
    with torch.no_grad(), tempfile.TemporaryDirectory(prefix="hidden-", dir=scratch) as folder:
        batches = list(windows.split(batch))
        text = Blocks(model, plan.blocks, batches, Path(folder))
        for index in range(len(text.blocks)):
            layers = [
                layer
                for layer in plan.sparse
                if layer.name in wanted and layer.name.startswith(f"{plan.blocks}.{index}.")
            ]
            stats = statistics(text, index, layers, wanted)
            for layer in layers:
                moments = stats[layer.name].together
                assert moments is not None
                if layer.name in wired.readers:
                    group, stream = layer.group, moments.clone() if stream is None else stream.add_(moments)
                    continue
                feed = wired.feeds[layer.name]
                order = feed.order(partial(_shared, moments, layer.group))
                orders = feed.orders(model, layer.name, order)
                if orders is None:
                    continue
                fed.append(layer.name)
                for name, dims in orders.items():
                    inside.setdefault(name, {}).update(dims)
            text.advance(index)
            progress(index + 1, len(text.blocks))
        arrangements = [Arrangement(inside, tuple(fed)), Arrangement({})]
        if stream is not None:
            both = {name: dict(dims) for name, dims in inside.items()}
            for name, dims in wired.stream_orders(decorrelate(stream, group).cpu()).items():
                both.setdefault(name, {}).update(dims)
            arrangements.insert(0, Arrangement(both, (*fed, *sorted(wired.readers))))
        accepted = next(a for a in arrangements if same_output(model, a, sample))
        accepted.apply(model)
    return accepted


def _shared(moments: Tensor, group: int, spans: list[slice]) -> Tensor:
    """Return the order of one span that serves all `spans`: their channels share rows, so they share an order."""
    return decorrelate(torch.stack([moments[span, span] for span in spans]).sum(0), group)
