"""A layer of the TensorRT plugin, called without TensorRT: the library's own entry points, with torch's tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from ctypes import c_bool, c_int, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from converter.errors import BuildError

PATHS = ("gemv", "sparse", "dense")  # of a layer
TILES = ("wide", "tall", "small")  # of its GEMMs
Arguments = Mapping[str, Tensor | int | None]


def structure(pointers: Sequence[str], numbers: Sequence[str], flags: Sequence[str] = ()) -> type[ctypes.Structure]:
    """Return the C struct of so many pointers, then 32-bit integers, then booleans."""
    fields = [(n, c_void_p) for n in pointers] + [(n, c_int) for n in numbers] + [(n, c_bool) for n in flags]
    return type("Args", (ctypes.Structure,), {"_fields_": fields})


LAYER = structure((), ("k", "n", "keep", "group", "shift_mode", "variance", "gemv_tokens", "sparse_tokens", "sm"))
TENSORS = structure(("x", "w", "bias", "channel_scale", "shift", "row_sum", "permutation", "y"), ())


def filled(struct: type[ctypes.Structure], arguments: Arguments) -> Any:
    """Return a struct of that type, with addresses where there are tensors."""
    assert set(arguments) <= {field for field, *_ in struct._fields_}
    assert all(a.is_contiguous() for a in arguments.values() if isinstance(a, Tensor))
    return struct(**{name: a.data_ptr() if isinstance(a, Tensor) else a for name, a in arguments.items()})


class LayerLibrary:
    """A library with the entry points of plugins/kernels/cuda/calls.cpp, and where it wants its tensors.

    A layer runs on the GPU's own compute capability; a CPU walks that of the shape's `sm`, 0 where it has none.
    """

    def __init__(self, library: Path, device: str) -> None:
        """Load it.

        Raises:
            BuildError: when it cannot be loaded, or is of another version.
        """
        try:
            self.library = ctypes.CDLL(str(library.resolve()))
            self.library.nmsparse_layer_workspace.restype = ctypes.c_size_t
        except (OSError, AttributeError) as error:
            raise BuildError(f"{library}: must be our plugin's library, got {error}. Run make plugins.") from error
        self.device = device
        self.sm = int("{}{}".format(*torch.cuda.get_device_capability())) if device == "cuda" else 0

    def described(self, shape: Mapping[str, int]) -> Any:
        """Return a layer's C struct."""
        return filled(LAYER, {**shape, "sm": self.sm} if self.sm else shape)

    def path(self, shape: dict[str, int], tokens: int) -> str:
        """Return which of `PATHS` a layer of that shape takes."""
        return PATHS[self.library.nmsparse_layer_path(ctypes.byref(self.described(shape)), tokens)]

    def workspace(self, shape: dict[str, int], tokens: int) -> Tensor:
        """Return scratch memory for up to `tokens` tokens, with something in it."""
        room = self.library.nmsparse_layer_workspace(ctypes.byref(self.described(shape)), tokens)
        return torch.full((room,), 0x55, dtype=torch.uint8, device=self.device)

    def enqueue(self, shape: dict[str, int], tensors: Arguments, workspace: Tensor, tile: str, stream: int = 0) -> None:
        """Start a layer whose tensors are on the device, on a CUDA stream; a CPU is done when this returns.

        Raises:
            RuntimeError: with the number of the CUDA error.
        """
        x = tensors["x"]
        assert isinstance(x, Tensor)
        described, pointers = self.described(shape), filled(TENSORS, tensors)
        tile_number, room = TILES.index(tile), c_void_p(workspace.data_ptr())
        call = getattr(self.library, f"nmsparse_layer_{str(x.dtype).removeprefix('torch.')}")
        error = call(ctypes.byref(described), ctypes.byref(pointers), len(x), tile_number, room, c_void_p(stream))
        if error:
            raise RuntimeError(f"{described.k} x {described.n}, {len(x)} tokens: CUDA error {error}")
