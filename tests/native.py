"""The CUDA kernels as a CPU walks them (plugins/tests): called by name, with tensors where they have pointers."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_bool, c_int, c_void_p
from pathlib import Path

import torch
from torch import Tensor


def _args(pointers: Sequence[str], numbers: Sequence[str], flags: Sequence[str] = ()) -> type[ctypes.Structure]:
    fields = [(n, c_void_p) for n in pointers] + [(n, c_int) for n in numbers] + [(n, c_bool) for n in flags]
    return type("Args", (ctypes.Structure,), {"_fields_": fields})


COMMON = ("x", "channel_scale", "shift", "eta", "permutation")
ARGS = {
    "pack": _args((*COMMON, "values", "metadata", "nu"), ("tokens", "padded", "k", "keep", "order")),
    "select": _args((*COMMON, "rows", "values", "pruned", "z", "kept"), ("tokens", "k", "keep", "group")),
    "token_shift": _args(("x", "eta"), ("tokens", "k"), ("median",)),
    "token_scale": _args(("z", "kept", "nu"), ("tokens", "parts")),
    "gemv": _args(("rows", "values", "w", "partial"), ("tokens", "length", "n", "splits")),
    "gemv_sum": _args(("partial", "nu", "eta", "row_sum", "bias", "y"), ("tokens", "n", "splits")),
    "layer": _args((), ("k", "n", "keep", "group", "shift_mode", "variance", "gemv_tokens", "sparse_tokens", "sm")),
    "tensors": _args(("x", "w", "bias", "channel_scale", "shift", "row_sum", "permutation", "y"), ()),
}
GEMV, SPARSE, DENSE = range(3)  # the paths of a layer
MMA, WGMMA = range(2)  # the orders of metadata


class Native:
    """The library that `make test` builds."""

    def __init__(self, library: Path) -> None:
        """Load it."""
        self.library = ctypes.CDLL(str(library))
        self.library.layer_workspace.restype = ctypes.c_size_t

    def run(self, kernel: str, dtype: torch.dtype | None = None, **arguments: Tensor | int | None) -> None:
        """Run one kernel."""
        name = kernel if dtype is None else f"{kernel}_{str(dtype).removeprefix('torch.')}"
        getattr(self.library, name)(ctypes.byref(_pointing(kernel, arguments)))

    def uncompress(self, values: Tensor, metadata: Tensor, k: int, order: int = MMA) -> Tensor:
        """Return `[padded, k]` from what Pack wrote, as CUTLASS reads it."""
        pruned = torch.empty(len(values), k, dtype=values.dtype)
        read = self.library.pack_uncompressed_wgmma if order == WGMMA else self.library.pack_uncompressed
        read(*(c_void_p(t.data_ptr()) for t in (values, metadata, pruned)), len(values), k)
        return pruned

    def order(self, shape: dict[str, int]) -> int:
        """Return the order of the metadata of such a layer's sparse path."""
        found: int = self.library.layer_order(ctypes.byref(_pointing("layer", shape)))
        return found

    def layer(self, shape: dict[str, int], tensors: dict[str, Tensor | None]) -> int:
        """Run a layer as the plugin does, into `y`, and return its path."""
        x = tensors["x"]
        assert x is not None
        described, pointers = _pointing("layer", shape), _pointing("tensors", tensors)
        # Room for more tokens than there are, as in an engine.
        room = self.library.layer_workspace(ctypes.byref(described), len(x) + 9)
        workspace = torch.full((room,), 0x55, dtype=torch.uint8)
        call = getattr(self.library, f"layer_{str(x.dtype).removeprefix('torch.')}")
        assert call(ctypes.byref(described), ctypes.byref(pointers), len(x), c_void_p(workspace.data_ptr())) == 0
        path: int = self.library.layer_path(ctypes.byref(described), len(x))
        return path


def _pointing(
    name: str, arguments: dict[str, Tensor | int | None] | dict[str, int] | dict[str, Tensor | None]
) -> object:
    assert set(arguments) <= {field for field, *_ in ARGS[name]._fields_}
    assert all(a.is_contiguous() for a in arguments.values() if isinstance(a, Tensor))
    return ARGS[name](**{n: a.data_ptr() if isinstance(a, Tensor) else a for n, a in arguments.items()})
