"""`calibration.safetensors`: the parameters of every sparse layer, between calibrate and export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from converter import tensor_file
from converter.sparsity.linear import Params

NAME = "calibration.safetensors"
FORMAT = "nmsparse-calibration-1"
SETTINGS = ("keep", "group", "shift_mode", "variance")
TENSORS = (
    "channel_scale",
    "shift",
    "output_scale",
    "output_shift",
    "permutation",
    "residual_in",
    "residual_out",
    "weight",
)


def write(path: Path, params: dict[str, Params]) -> None:
    """Write the parameters: tensors as `LAYER.PART`, settings as JSON in the metadata under `layers`."""
    tensors: dict[str, Tensor] = {}
    for name, layer in params.items():
        for part in TENSORS:
            tensor = getattr(layer, part)
            if tensor is not None:
                tensors[f"{name}.{part}"] = (tensor.float() if tensor.is_floating_point() else tensor).contiguous()
    layers = {name: {key: getattr(layer, key) for key in SETTINGS} for name, layer in params.items()}
    save_file(tensors, path, metadata={"format": FORMAT, "layers": json.dumps(layers)})


def read(path: Path) -> dict[str, Params]:
    """Return what `write` wrote.

    Raises:
        CalibrationError: when the file is not a calibration.
    """
    tensors, metadata = tensor_file.read(path, FORMAT, "a calibration")
    params = {}
    for name, settings in json.loads(metadata["layers"]).items():
        parts: dict[str, Any] = {part: tensors.get(f"{name}.{part}") for part in TENSORS}
        params[name] = Params(**settings, **parts)
    return params
