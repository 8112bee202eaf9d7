"""What stands for a linear layer and for a block while a model is traced."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from converter.signature import DOMAIN, INPUTS, OP, VERSION, Form

BLOCK, ENTER, LEAVE = "Block", "Enter", "Leave"


@dataclass(frozen=True)
class LinearNode:
    """How a linear layer appears in the graph: as the op, or as a MatMul.

    Its pattern is no part of this: blocks that differ in nothing else are traced once.
    """

    sparse: bool
    bias: bool
    rank: int = 0  # of the low-rank residual
    blocks: int = 0  # of a weight of integers, each with its scale


class TracedLinear(nn.Module):
    """A linear layer as one ONNX node over a weight `[K, N]`; its parameters have a shape and no content."""

    def __init__(self, linear: nn.Linear, node: LinearNode, form: Form, dtype: torch.dtype) -> None:
        """Declare the parameters that the node takes."""
        super().__init__()
        self.node, self.form, self.out_features = node, form, linear.out_features
        sizes = {"K": linear.in_features, "N": linear.out_features, "r": node.rank, "B": node.blocks}
        dtypes = {"X": dtype, "int64": torch.int64, "float32": torch.float32}
        weight = dtype
        if node.sparse and form.weights != "dtype":
            weight = torch.int8 if form.quantized else getattr(torch, form.weights)
        self.weight = placeholder((linear.in_features, linear.out_features), weight)
        if node.sparse:
            rows = form.stored()[1:]
            self.names = tuple(row.name for row in rows)
            for row in rows:
                shape = tuple(sizes[letter] for letter in row.dims)
                self.register_parameter(row.name, placeholder(shape, dtypes[row.dtype]))
        else:
            self.names = ("bias",) if node.bias else ()
            self.register_parameter("bias", placeholder((linear.out_features,), dtype) if node.bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """Return the node's output, of which only the shape is known."""
        if not self.node.sparse:
            y = torch.matmul(x, self.weight)
            return y + self.bias if isinstance(self.bias, Tensor) else y
        given = dict(zip(self.names, (getattr(self, name) for name in self.names), strict=True))
        inputs = [x, self.weight, *(given.get(name) for name in INPUTS[2:])]
        while inputs[-1] is None:
            inputs.pop()
        attributes: dict[str, Any] = {
            "keep": 0,  # the patterns are set where the weights are
            "group": 0,
            "shift_mode": self.form.shift_mode,
            "variance": int(self.form.variance),
        }
        shape = (*x.shape[:-1], self.out_features)
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::{OP}", inputs, attributes, dtype=x.dtype, shape=shape, version=VERSION
        )


def placeholder(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    """Return a parameter of that shape whose storage is one number."""
    return nn.Parameter(torch.zeros(1, dtype=dtype).expand(shape), requires_grad=False)


class TracedBlock(nn.Module):
    """A block that leaves marks around its nodes, or, where it is like an earlier one, only a placeholder."""

    def __init__(self, block: nn.Module, index: int, like: TracedBlock | None) -> None:
        """Wrap `block`; with `like`, it is not run."""
        super().__init__()
        self.block, self.index = block, index
        self.__dict__["like"] = like  # not a child
        self.context: Any = ()
        self.is_tuple = False

    def __getattr__(self, name: str) -> Any:
        """Let the model's loop read what it reads of a block (such as its attention type)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return what the block returns; its cache layer is updated, a placeholder's is not."""
        self.context = (args, sorted(kwargs.items()))
        like: TracedBlock | None = self.__dict__["like"]
        if like is not None:
            out = _mark(BLOCK, hidden, {"index": self.index, "like": like.index})
            return (out,) if like.is_tuple else out
        result = self.block(_mark(ENTER, hidden, {"index": self.index}), *args, **kwargs)
        self.is_tuple = isinstance(result, tuple)
        out = result[0] if self.is_tuple else result
        out = _mark(LEAVE, out, {"index": self.index})
        return (out, *result[1:]) if self.is_tuple else out

    def differs(self) -> bool:
        """Return whether a placeholder was called with other things than the block it is like."""
        like: TracedBlock | None = self.__dict__["like"]
        return like is not None and not _same(self.context, like.context)


def _mark(name: str, hidden: Tensor, attributes: dict[str, Any]) -> Tensor:
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{name}", [hidden], attributes, dtype=hidden.dtype, shape=hidden.shape, version=VERSION
    )


def _same(left: Any, right: Any) -> bool:
    """Return whether two contexts of a block are the same: tensors and caches by identity, the rest by value."""
    if isinstance(left, tuple | list) and isinstance(right, tuple | list):
        return len(left) == len(right) and all(_same(a, b) for a, b in zip(left, right, strict=True))
    if isinstance(left, str | int | float | bool | None) and isinstance(right, str | int | float | bool | None):
        return left == right
    return left is right
