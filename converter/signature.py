"""The signature of the op `SparseLinear`: the one table of its inputs, from which every stage takes what it needs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from converter.names import BITS, Weights

DOMAIN = "nmsparse"
OP = "SparseLinear"
VERSION = 1
OPSET = 23
ATTRIBUTES = ("keep", "group", "shift_mode", "variance")
SHIFT_MODES = ("none", "static", "token_mean", "token_median")
VARIANCE_FLOOR = 1e-9


@dataclass(frozen=True)
class OpInput:
    """An input: `dims` has K channels in, N out, r of the residual and B blocks of integers; X and a scalar have none.

    `dtype` is "X" where it is that of X, and "W" where it is that of the stored weights. `neutral` changes nothing in a
    layer that has no such input where another layer has one: zeros, ones, or the channels in their own order. `probe`
    fills it where a node is asked which channels of X it keeps: W is the identity there, and nothing is added.
    """

    name: str
    dims: str
    dtype: Literal["X", "W", "float32", "int64", "bool"] = "float32"
    neutral: Literal["zeros", "ones", "order"] = "zeros"
    probe: float = 0.0

    @property
    def stored(self) -> bool:
        """Whether OUT stores one for each layer; the others are fed in each call."""
        return self.dims != ""

    @property
    def per_output(self) -> bool:
        """Whether it has a number for each output channel, so that those of several layers can lie side by side."""
        return self.dims.endswith("N")


# In the order of the op's signature; an input that a model has no use for is left empty in all its nodes.
TABLE = (
    OpInput("X", "", "X"),
    OpInput("W", "KN", "W"),
    OpInput("bias", "N"),
    OpInput("channel_scale", "K", neutral="ones"),
    OpInput("shift", "K"),
    OpInput("row_sum", "N"),
    OpInput("permutation", "K", "int64", neutral="order"),
    OpInput("residual_in", "Kr", "X"),
    OpInput("residual_out", "rN", "X"),
    OpInput("sparse", "", "bool"),
    OpInput("weight_scale", "BN", probe=1.0),
)
BY_NAME = {row.name: row for row in TABLE}
INPUTS = tuple(BY_NAME)


@dataclass(frozen=True)
class Form:
    """What the nodes of one model have in common; the body computes this and no more.

    `inputs` are the optional ones that the nodes have; those that follow from the other fields need not be given.
    """

    dtype: str
    shift_mode: str
    variance: bool
    inputs: frozenset[str] = frozenset()
    weights: Weights = "dtype"

    def __post_init__(self) -> None:
        """Add the inputs that follow from the kind of shift and from how weights are stored."""
        shift = {"none": [], "static": ["shift"]}.get(self.shift_mode, ["row_sum"])
        scale = ["weight_scale"] if self.quantized else []
        object.__setattr__(self, "inputs", self.inputs - {"X", "W"} | {*shift, *scale})

    def __contains__(self, name: str) -> bool:
        """Return whether the nodes have that optional input."""
        return name in self.inputs

    @property
    def quantized(self) -> bool:
        """Whether W is of integers."""
        return self.weights in BITS

    def stored(self) -> tuple[OpInput, ...]:
        """Return the inputs that OUT stores for a layer, in order: W and the optional ones."""
        return tuple(row for row in TABLE if row.stored and (row.name == "W" or row.name in self))


def header() -> str:
    """Return `plugins/op_spec.h`: the signature as the native libraries know it."""

    def listed(values: Iterable[str]) -> str:
        return ", ".join(values)

    def table(enum: str, array: str, names: Iterable[str]) -> str:
        names = tuple(names)
        quoted = [f'"{name}"' for name in names]
        return (
            f"enum class {enum} : int32_t {{ {listed([*map(str.upper, names), 'COUNT'])} }};\n"
            f"constexpr char const* {array}[] = {{{listed(quoted)}}};\n"
            f"static_assert(sizeof({array}) / sizeof(*{array}) == static_cast<int>({enum}::COUNT));\n"
        )

    return f"""// The op {OP} as the native libraries know it. Made by plugins/op_spec.py from converter/signature.py.
// clang-format off
#pragma once

#include <cstdint>

namespace nmsparse {{

constexpr char const* DOMAIN_NAME = "{DOMAIN}";
constexpr char const* OP_NAME = "{OP}";
constexpr char const* OP_VERSION = "{VERSION}";

// The inputs in the order of the op's signature; a node of a plugin has those whose bit is set in its field `inputs`.
{table("Input", "INPUT_NAMES", INPUTS)}
{table("ShiftMode", "SHIFT_MODE_NAMES", SHIFT_MODES)}
constexpr float VARIANCE_FLOOR = {VARIANCE_FLOOR:g}F;

}}  // namespace nmsparse
"""
