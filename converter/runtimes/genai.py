"""How onnxruntime-genai comes to our kernel: it loads the library that its configuration names."""

from __future__ import annotations

import json
from pathlib import Path

import onnx

from converter.errors import ExportError
from converter.runtimes.kernel import VARIABLE, has_kernel, library


def overlay() -> str:
    """Return what makes onnxruntime-genai load the kernel that is installed here, for its `Config.overlay`.

    Raises:
        ExportError: when there is none.
    """
    options = {"custom_ops_library": str(_kernel("onnxruntime-genai").resolve())}
    return json.dumps({"model": {"decoder": {"session_options": options}}})


def embedded(graph: onnx.ModelProto) -> Path:
    """Return the library that an OUT of this graph is to hold.

    Raises:
        ExportError: when there is none, or it is not for such a graph.
    """
    kernel = _kernel("--embed-kernel")
    if not has_kernel(graph):
        raise ExportError("--embed-kernel: dtype must be float32, as of the kernel, got another. Leave it out.")
    return kernel


def _kernel(where: str) -> Path:
    kernel = library()
    if kernel is None:
        raise ExportError(
            f"{where}: the op's library must be built, or named by {VARIABLE}, got none. Run make cpu-op."
        )
    return kernel
