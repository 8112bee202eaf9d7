"""The CUDA kernels and their layer, by name: libnmsparse_host.so walks them on a CPU, _device.so is for a GPU."""

from __future__ import annotations

import ctypes
from ctypes import c_void_p
from typing import Any

import torch
from torch import Tensor

from converter.runtimes.layer import PATHS, Arguments, LayerLibrary, filled, structure

GEMV, SPARSE, DENSE = PATHS
COMMON = ("x", "channel_scale", "shift", "eta", "permutation")
ARGS: dict[str, Any] = {
    "pack": structure((*COMMON, "values", "metadata", "z", "kept"), ("tokens", "padded", "k", "keep", "order")),
    "select": structure((*COMMON, "zs", "z", "kept"), ("tokens", "k", "keep", "group")),
    "token_shift": structure(("x", "eta"), ("tokens", "k"), ("median",)),
    "token_scale": structure(("z", "kept", "nu"), ("tokens", "parts")),
    "gemv": structure(("x", "w", *COMMON[1:], "partial", "z", "kept"), ("tokens", "k", "n", "keep", "group")),
    "gemv_sum": structure(("partial", "z", "kept", "eta", "row_sum", "bias", "y"), ("tokens", "n", "splits", "parts")),
}
MMA, WGMMA = range(2)  # the orders of metadata


class Native(LayerLibrary):
    """Takes tensors from where they are to the device, and back."""

    def run(self, kernel: str, dtype: torch.dtype | None = None, **arguments: Tensor | int | None) -> None:
        """Run one kernel."""
        name = kernel if dtype is None else f"{kernel}_{str(dtype).removeprefix('torch.')}"
        there = self._on_device(arguments)
        assert getattr(self.library, name)(ctypes.byref(filled(ARGS[kernel], there))) == 0
        _copy_back(there, arguments)

    def uncompress(self, values: Tensor, metadata: Tensor, k: int, order: int = MMA) -> Tensor:
        """Return `[padded, k]` from what Pack wrote, as CUTLASS reads it, on the CPU."""
        zs = torch.empty(len(values), k, dtype=values.dtype)
        read = self.library.pack_uncompressed_wgmma if order == WGMMA else self.library.pack_uncompressed
        read(*(c_void_p(t.data_ptr()) for t in (values, metadata, zs)), len(values), k)
        return zs

    def order(self, shape: dict[str, int]) -> int:
        """Return the order of the metadata of such a layer's sparse path."""
        found: int = self.library.layer_order(ctypes.byref(self.described(shape)))
        return found

    def layer(self, shape: dict[str, int], tensors: dict[str, Tensor | None], tile: str = "wide") -> str:
        """Run a layer as the plugin does, into `y`, and return its path."""
        there = self._on_device(tensors)
        x = there["x"]
        assert isinstance(x, Tensor)
        # Room for more tokens than there are, as in an engine.
        self.enqueue(shape, there, self.workspace(shape, len(x) + 9), tile)
        _copy_back(there, tensors)
        return self.path(shape, len(x))

    def _on_device(self, arguments: Arguments) -> dict[str, Tensor | int | None]:
        return {name: a.to(self.device) if isinstance(a, Tensor) else a for name, a in arguments.items()}


def _copy_back(there: Arguments, here: Arguments) -> None:
    for name, tensor in here.items():
        moved = there[name]
        if isinstance(tensor, Tensor) and isinstance(moved, Tensor) and moved is not tensor:
            tensor.copy_(moved)
