"""The arrangement of a checkpoint: which parameters are reordered along which dimension, and the file that says so.

It leaves the model's function as it is: what writes a channel and what reads it are reordered alike.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from converter import tensor_file
from converter.calibration.file import AGAIN, table
from converter.errors import CalibrationError, shortened
from converter.sparsity.permutation import stray

NAME = "arrangement.safetensors"
FORMAT = "nmsparse-arrangement-1"
Orders = dict[str, dict[int, Tensor]]  # parameter -> dimension -> [size] int64: place i holds what was at order[i]


@dataclass(frozen=True)
class Arrangement:
    """The order of each dimension that has one; `layers` are those whose input has its groups side by side by it."""

    orders: Orders
    layers: tuple[str, ...] = ()

    def of(self, name: str, tensor: Tensor) -> Tensor:
        """Return the parameter `name` reordered; the tensor itself where it has no order.

        Raises:
            CalibrationError: when the order is one of another size.
        """
        for dim, order in self.orders.get(name, {}).items():
            if dim >= tensor.ndim or tensor.shape[dim] != len(order):
                raise CalibrationError(
                    f"{NAME}: {name} must have {len(order)} places in dimension {dim}, got shape "
                    f"{list(tensor.shape)}. {AGAIN}"
                )
            tensor = tensor.index_select(dim, order.to(tensor.device))
        return tensor

    def apply(self, model: nn.Module) -> None:
        """Reorder the parameters of `model` in place, one at a time; tied ones go by the first of their names.

        Raises:
            CalibrationError: when there is an order for what is no parameter of the model: half of it is no function.
        """
        if unknown := sorted(set(self.orders) - {name for name, _ in model.named_parameters()}):
            raise CalibrationError(f"{NAME}: orders must be of the model's parameters, got {unknown[0]}. {AGAIN}")
        for name, parameter in model.named_parameters():
            parameter.data = self.of(name, parameter.data)

    def inverse(self) -> Arrangement:
        """Return the arrangement that takes this one back."""
        return Arrangement({name: {dim: o.argsort() for dim, o in dims.items()} for name, dims in self.orders.items()})

    def write(self, path: Path) -> None:
        """Write each distinct order once, as `order.I`; which layer has which is JSON in the metadata."""
        distinct: dict[bytes, int] = {}
        tensors: dict[str, Tensor] = {}
        table: dict[str, dict[int, int]] = {}
        for name, dims in self.orders.items():
            table[name] = {}
            for dim, order in dims.items():
                number = distinct.setdefault(order.numpy().tobytes(), len(distinct))
                tensors[f"order.{number}"] = order.contiguous()
                table[name][dim] = number
        metadata = {"format": FORMAT, "orders": json.dumps(table), "layers": json.dumps(self.layers)}
        save_file(tensors, path, metadata=metadata)


def read(path: Path) -> Arrangement:
    """Return what `Arrangement.write` wrote.

    Raises:
        CalibrationError: when the file is not an arrangement, or its parts do not agree.
    """
    tensors, metadata = tensor_file.read(path, FORMAT, "an arrangement")
    for name, order in tensors.items():
        if order.dtype != torch.int64 or order.ndim != 1:
            raise CalibrationError(
                f"{path}: {name} must be a vector of torch.int64, got {list(order.shape)} of {order.dtype}. {AGAIN}"
            )
        if stray_entry := stray(order):
            raise CalibrationError(f"{path}: {name} must hold every place once, got {stray_entry}. {AGAIN}")
    orders: Orders = {}
    for name, dims in table(path, metadata, "orders", dict).items():
        if not isinstance(dims, dict):
            raise CalibrationError(f"{path}: orders of {name} must be an object, got {shortened(repr(dims))}. {AGAIN}")
        for dim, number in dims.items():
            if not re.fullmatch("[0-9]", dim):
                raise CalibrationError(f"{path}: a dimension of {name} must be from 0 to 9, got {dim!r}. {AGAIN}")
            if type(number) is not int or f"order.{number}" not in tensors:
                raise CalibrationError(f"{path}: {name} must have an order of the file, got {number!r}. {AGAIN}")
            orders.setdefault(name, {})[int(dim)] = tensors[f"order.{number}"]
    layers = table(path, metadata, "layers", list)
    if not all(isinstance(name, str) for name in layers):
        raise CalibrationError(f"{path}: layers must be names, got {shortened(repr(layers))}. {AGAIN}")
    return Arrangement(orders, tuple(layers))
