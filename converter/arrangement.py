"""The arrangement of a checkpoint: which parameters are reordered along which dimension, and the file that says so.

It leaves the model's function as it is: what writes a channel and what reads it are reordered alike.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from converter import tensor_file
from converter.errors import CalibrationError

NAME = "arrangement.safetensors"
FORMAT = "nmsparse-arrangement-1"
Orders = dict[str, dict[int, Tensor]]  # parameter -> dimension -> [size] int64: place i holds what was at order[i]


@dataclass(frozen=True)
class Arrangement:
    """The order of each dimension that has one; `layers` are those whose input has its groups side by side by it."""

    orders: Orders
    layers: tuple[str, ...] = ()

    def of(self, name: str, tensor: Tensor) -> Tensor:
        """Return the parameter `name` reordered; the tensor itself where it has no order."""
        for dim, order in self.orders.get(name, {}).items():
            tensor = tensor.index_select(dim, order.to(tensor.device))
        return tensor

    def apply(self, model: nn.Module) -> None:
        """Reorder the parameters of `model` in place, one at a time; tied ones go by the first of their names."""
        for name, parameter in model.named_parameters():
            parameter.data = self.of(name, parameter.data)

    def inverse(self) -> Arrangement:
        """Return the arrangement that takes this one back."""
        return Arrangement({name: {dim: o.argsort() for dim, o in dims.items()} for name, dims in self.orders.items()})

    def write(self, path: Path) -> None:
        """Write each distinct order once, as `order.I`; who has which is JSON in the metadata."""
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
        CalibrationError: when the file is not an arrangement, or one of its orders leaves a place out.
    """
    tensors, metadata = tensor_file.read(path, FORMAT, "an arrangement")
    for name, order in tensors.items():
        if not torch.equal(order.sort().values, torch.arange(len(order))):
            raise CalibrationError(f"{path}: {name} must hold every place once. Run nmsparse calibrate.")
    orders = {
        name: {int(dim): tensors[f"order.{number}"] for dim, number in dims.items()}
        for name, dims in json.loads(metadata["orders"]).items()
    }
    return Arrangement(orders, tuple(json.loads(metadata["layers"])))
