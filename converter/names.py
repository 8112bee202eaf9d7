"""Names that several layers share: what a user may choose from, and the files of a checkpoint and of OUT."""

from __future__ import annotations

from typing import Literal

Dtype = Literal["float32", "float16", "bfloat16"]
Phases = Literal["both", "prefill", "decode"]
Weights = Literal["dtype", "float16", "bfloat16", "int8", "int4"]
BITS = {"int8": 8, "int4": 4}  # of a stored weight

MODEL, DATA = "model.onnx", "model.onnx.data"
WANTED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]  # of a checkpoint
RTX_INSTALL = "Install nmsparse[tensorrt-rtx] (Linux, x86-64)."


def cache_names(prefix: str, index: int) -> list[str]:
    """Return the graph's names of a block's key and value, `prefix` being past_key_values or present."""
    return [f"{prefix}.{index}.{part}" for part in ("key", "value")]
