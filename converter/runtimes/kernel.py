"""Where the op's kernel for ONNX Runtime on CPUs is, and which graphs it can run."""

from __future__ import annotations

import os
from pathlib import Path

import onnx

from converter.errors import ExportError
from converter.graph.forms import widens
from converter.signature import DOMAIN, OP

# Where `make cpu-op` puts the op's kernel; the variable names another, or none when it is empty.
LIBRARY = Path(__file__).parents[1] / "native" / "libnmsparse_onnxruntime.so"
VARIABLE = "NMSPARSE_ORT_LIBRARY"


def library() -> Path | None:
    """Return the library with the op's kernel for CPUs, or None where the function body has to serve.

    Raises:
        ExportError: when the variable names no file.
    """
    named = os.environ.get(VARIABLE)
    if named is None:
        return LIBRARY if LIBRARY.is_file() else None
    if named and not Path(named).is_file():
        raise ExportError(f"{VARIABLE}: must be a library, or empty for none, got {named!r}. Run make cpu-op.")
    return Path(named) if named else None


def has_kernel(model: onnx.ModelProto) -> bool:
    """Return whether the kernel knows the model's numbers: activations in float32, weights in that or in fewer bits."""
    elements = {value.type.tensor_type.elem_type for value in model.graph.input}
    widened: set[str] = set()
    if widens(model):
        widened = {node.input[1] for node in model.graph.node if (node.domain, node.op_type) == (DOMAIN, OP)}
    elements |= {tensor.data_type for tensor in model.graph.initializer if tensor.name not in widened}
    return not elements & {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
