"""The runtimes that run OUT itself: ONNX Runtime, and PyTorch with the sparse model that validate compares it with."""

from __future__ import annotations

from pathlib import Path

from converter.delivery.manifest import sha256
from converter.pipeline import load, reference
from converter.runtimes.kernel import library
from converter.runtimes.protocol import Runtime, Served


class OnnxRuntime:
    """Runs the graph of OUT."""

    def serve(self, folder: Path, _source: str | None) -> Served:
        """Return OUT, which needs no checkpoint."""
        kernel = library()
        return Served(lambda: load(folder), "function body" if kernel is None else sha256(kernel))


class PyTorch:
    """Runs what the graph of OUT was made of."""

    def serve(self, folder: Path, source: str | None) -> Served:
        """Return the sparse model of OUT, of the checkpoint `source` where that has moved."""
        return Served(lambda: reference(folder, source), "PyTorch")


ONNXRUNTIME: Runtime = OnnxRuntime()
PYTORCH: Runtime = PyTorch()
