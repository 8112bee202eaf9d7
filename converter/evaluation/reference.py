"""The PyTorch side of parity: the reference model, and the inputs of its layers on real text."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from converter.graph.merge import parts
from converter.kinds import kind
from converter.kinds.kind import Feed
from converter.names import Phases
from converter.sparsity.linear import Params, SparseLinear, install
from converter.sparsity.quantize import Storage


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
    rounded_to = getattr(torch, storage.dtype)

    def rounded(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(rounded_to).float()

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


def layer_inputs(model: PreTrainedModel, names: list[str], ids: Tensor, dtype: Any) -> list[Feed]:
    """Return the inputs `[T, K]` of nodes, called as their `parts` are, from the sparse model, in each call of it."""
    feeds: list[Feed] = []
    seen: Feed = OrderedDict()
    handles = []
    for name in names:

        def note(_module: nn.Module, args: Any, name: str = name) -> None:
            seen[f"{name}.X"] = args[0].reshape(-1, args[0].shape[-1]).numpy().astype(dtype)

        handles.append(model.get_submodule(parts(name)[0]).register_forward_pre_hook(note))
    for _ in kind(model).steps(model, ids):
        feeds.append(OrderedDict(seen))
        seen.clear()
    for handle in handles:
        handle.remove()
    return feeds


def sparse_layer(model: nn.Module, name: str) -> SparseLinear:
    """Return the sparse layer of that name."""
    module = model.get_submodule(name)
    assert isinstance(module, SparseLinear)
    return module
