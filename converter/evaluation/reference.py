"""The PyTorch side of parity: the reference model, and the inputs that both sides are given, on real text."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from converter.graph.capture import PIXELS, capture_of
from converter.graph.merge import parts
from converter.graph.trace import cache_names
from converter.kinds import kind as kind_of_model
from converter.kinds import output
from converter.names import Phases
from converter.sparsity.linear import Params, SparseLinear, install
from converter.sparsity.quantize import Storage

Array = np.ndarray[Any, Any]


def round_weights(model: nn.Module, storage: Storage) -> None:
    """Round the weights as the export does, and go on computing in float32."""
    if storage.dtype != "float32":
        for parameter in model.parameters():
            parameter.data = parameter.data.to(getattr(torch, storage.dtype)).float()
    if storage.weights != "dtype":
        for module in model.modules():
            if isinstance(module, nn.Linear):  # whose weight is no longer that of another
                module.weight = nn.Parameter(storage.rounded(module.weight.data), requires_grad=False)


def use_fitted(model: nn.Module, params: dict[str, Params]) -> dict[str, nn.Module]:
    """Put dense layers with the fitted weight and output affine into `model`; return the layers that they replace."""
    replaced: dict[str, nn.Module] = {}
    for name, layer in params.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        weight = linear.weight.data if layer.weight is None else layer.weight
        bias = None if linear.bias is None else linear.bias.data
        if layer.output_scale is not None:
            weight = weight * layer.output_scale[:, None]
            bias = None if bias is None else bias * layer.output_scale
        if layer.output_shift is not None:
            bias = layer.output_shift if bias is None else bias + layer.output_shift
        fitted = nn.Linear(linear.in_features, linear.out_features, bias=bias is not None, device="meta")
        fitted.weight = nn.Parameter(weight, requires_grad=False)
        fitted.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        model.set_submodule(name, fitted)
        replaced[name] = linear
    return replaced


def round_params(params: Params, storage: Storage) -> Params:
    """Return the parameters with weight and low-rank residual rounded as the export does; the rest is float32."""
    kind = getattr(torch, storage.dtype)

    def rounded(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(kind).float()

    return replace(
        params,
        weight=None if params.weight is None else storage.rounded(params.weight),
        residual_in=rounded(params.residual_in),
        residual_out=rounded(params.residual_out),
    )


def round_model(model: nn.Module, params: dict[str, Params], storage: Storage) -> dict[str, Params]:
    """Round the weights of `model` as the export does; return the parameters of every layer that is a node, rounded."""
    rounded = {name: round_params(layer, storage) for name, layer in storage.every_layer(model, params).items()}
    round_weights(model, storage)
    return rounded


def make_sparse(model: nn.Module, params: dict[str, Params], storage: Storage, phases: Phases) -> None:
    """Make the dense `model` what OUT is: weights rounded as the export does, and its layers sparse."""
    with torch.no_grad():
        for name, layer in round_model(model, params, storage).items():
            install(model, name, layer, phases=phases)


def model_feeds(model: PreTrainedModel, ids: Tensor, kind: Any) -> list[Any]:
    """Return inputs of the whole graph: a prefill of two rows, one padded on the left, then one token more for both.

    `kind` is the numpy dtype of the cache. Without a cache it is one call, of two rows, one padded on the right, or of
    the images.
    """
    if kind_of_model(model).images:
        return [OrderedDict([(PIXELS, ids.numpy().astype(kind))])]
    pad, length = 3, min(ids.shape[1], 64)
    text = ids[0, :length]
    if not kind_of_model(model).cached:
        mask = torch.ones(2, length, dtype=torch.int64)
        mask[1, -pad:] = 0
        given = {"input_ids": text.expand(2, -1) * mask, "attention_mask": mask}
        given["token_type_ids"] = (torch.arange(length) >= length // 2).to(torch.int64).expand(2, -1)
        return [OrderedDict((name, given[name].contiguous().numpy()) for name in capture_of(model).inputs(model))]
    rows = torch.stack([text, torch.cat([text.new_zeros(pad), text[: length - pad]])])
    mask = torch.ones_like(rows)
    mask[1, :pad] = 0
    prefill, decode = slice(0, length - 1), slice(length - 1, length)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    out = model(
        input_ids=rows[:, prefill],
        attention_mask=mask[:, prefill],
        position_ids=positions[:, prefill],
        past_key_values=DynamicCache(),
        use_cache=True,
    )
    feeds = []
    for part, cache in ((prefill, None), (decode, out.past_key_values)):
        feed: OrderedDict[str, Array] = OrderedDict(
            input_ids=rows[:, part].numpy(),
            attention_mask=mask[:, : part.stop].contiguous().numpy(),
            position_ids=positions[:, part].contiguous().numpy(),
        )
        for index, layer in enumerate(out.past_key_values.layers):
            for name, tensor in zip(cache_names("past_key_values", index), (layer.keys, layer.values), strict=True):
                feed[name] = (tensor if cache else tensor[:, :, :0]).contiguous().numpy().astype(kind)
        feeds.append(feed)
    return feeds


def run_model(model: PreTrainedModel, feed: Any) -> dict[str, Array]:
    """Return logits (or states) and cache under the names of the graph's outputs, computed by torch."""
    found = kind_of_model(model)
    if not found.cached:
        given = {name: torch.from_numpy(array) for name, array in feed.items()}
        out = model(**{name: part.float() if part.is_floating_point() else part for name, part in given.items()})
        return {found.output: getattr(out, found.output).numpy()}
    cache = DynamicCache()
    count = sum(name.startswith("past_key_values.") for name in feed) // 2
    for index in range(count):
        key, value = (torch.from_numpy(feed[n]).float() for n in cache_names("past_key_values", index))
        if key.shape[2]:
            cache.update(key, value, index)
    out = model(
        input_ids=torch.from_numpy(feed["input_ids"]),
        attention_mask=torch.from_numpy(feed["attention_mask"]),
        position_ids=torch.from_numpy(feed["position_ids"]),
        past_key_values=cache,
        use_cache=True,
    )
    outputs = {"logits": out.logits.numpy()}
    for index, layer in enumerate(out.past_key_values.layers):
        for name, tensor in zip(cache_names("present", index), (layer.keys, layer.values), strict=True):
            outputs[name] = tensor.numpy()
    return outputs


def layer_inputs(model: PreTrainedModel, names: list[str], ids: Tensor, kind: Any) -> list[Any]:
    """Return the inputs `[T, K]` of nodes, called as their `parts` are, from the sparse model: of a prefill, a decode.

    Without a cache there is one call.
    """
    feeds: list[Any] = []
    cached = kind_of_model(model).cached
    cache = DynamicCache()
    for part in (ids[:, :-1], ids[:, -1:]) if cached else (ids,):
        seen: OrderedDict[str, Array] = OrderedDict()
        handles = []
        for name in names:

            def note(_module: nn.Module, args: Any, name: str = name, seen: Any = seen) -> None:
                seen[f"{name}.X"] = args[0].reshape(-1, args[0].shape[-1]).numpy().astype(kind)

            handles.append(model.get_submodule(parts(name)[0]).register_forward_pre_hook(note))
        if cached:
            model(input_ids=part, past_key_values=cache, use_cache=True)
        else:
            output(model, part)
        for handle in handles:
            handle.remove()
        feeds.append(seen)
    return feeds


def sparse_layer(model: nn.Module, name: str) -> SparseLinear:
    """Return the sparse layer of that name."""
    module = model.get_submodule(name)
    assert isinstance(module, SparseLinear)
    return module
