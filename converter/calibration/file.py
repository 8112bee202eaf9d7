"""`calibration.safetensors`: the parameters of every sparse layer, between calibrate and export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from converter import tensor_file
from converter.errors import CalibrationError, said, shortened
from converter.signature import SHIFT_MODES
from converter.sparsity.linear import Params
from converter.sparsity.permutation import stray

NAME = "calibration.safetensors"
FORMAT = "nmsparse-calibration-1"
SETTINGS = {"keep": int, "group": int, "shift_mode": str, "variance": bool}
# The parts of a layer and their shapes, by the letters that they share: K channels in, N out, r of the residual.
TENSORS = {
    "channel_scale": "K",
    "shift": "K",
    "output_scale": "N",
    "output_shift": "N",
    "permutation": "K",
    "residual_in": "Kr",
    "residual_out": "rN",
    "weight": "NK",
}
AGAIN = "Run nmsparse calibrate."
Table = TypeVar("Table", dict[str, Any], list[Any])


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
        CalibrationError: when the file is not a calibration, or its parts do not agree.
    """
    tensors, metadata = tensor_file.read(path, FORMAT, "a calibration")
    layers = table(path, metadata, "layers", dict)
    for name in tensors:
        layer, _, part = name.rpartition(".")
        if layer not in layers or part not in TENSORS:
            raise CalibrationError(f"{path}: {name} must be a known part of a layer of the file, got another. {AGAIN}")
    params = {}
    for name, settings in layers.items():
        _check_settings(f"{path}: {name}", settings)
        parts: dict[str, Any] = {part: tensors[f"{name}.{part}"] for part in TENSORS if f"{name}.{part}" in tensors}
        _check_parts(f"{path}: {name}", settings, parts)
        params[name] = Params(**settings, **parts)
    return params


def table(path: Path, metadata: dict[str, str], key: str, of: type[Table]) -> Table:
    """Return what the metadata of a file hold under `key` as JSON.

    Raises:
        CalibrationError: when they hold nothing of that type.
    """
    try:
        value = json.loads(metadata[key])
    except (KeyError, ValueError, RecursionError) as error:
        raise CalibrationError(f"{path}: metadata must hold {key} as JSON, got {said(error)}. {AGAIN}") from error
    if not isinstance(value, of):
        what = {dict: "an object", list: "an array"}[of]
        raise CalibrationError(f"{path}: {key} must be {what}, got {shortened(repr(value))}. {AGAIN}")
    return value


def _check_settings(where: str, settings: Any) -> None:
    if not isinstance(settings, dict) or set(settings) != set(SETTINGS):
        wanted = ", ".join(SETTINGS)
        raise CalibrationError(f"{where}: settings must be {wanted}, got {shortened(repr(settings))}. {AGAIN}")
    for key, of in SETTINGS.items():
        if type(settings[key]) is not of:  # a bool is an int, too
            raise CalibrationError(f"{where}: {key} must be of type {of.__name__}, got {settings[key]!r}. {AGAIN}")
    keep, group, shift_mode = settings["keep"], settings["group"], settings["shift_mode"]
    if not 0 < keep <= group:
        raise CalibrationError(f"{where}: keep must be from 1 to group, got {keep}:{group}. {AGAIN}")
    if shift_mode not in SHIFT_MODES:
        raise CalibrationError(
            f"{where}: shift_mode must be one of {', '.join(SHIFT_MODES)}, got {shortened(repr(shift_mode))}. {AGAIN}"
        )


def _check_parts(where: str, settings: dict[str, Any], parts: dict[str, Tensor]) -> None:
    if ("shift" in parts) != (settings["shift_mode"] == "static"):
        got = f"{settings['shift_mode']} {'with' if 'shift' in parts else 'without'} one"
        raise CalibrationError(
            f"{where}: shift must be there with shift_mode static, and only then, got {got}. {AGAIN}"
        )
    if ("residual_in" in parts) != ("residual_out" in parts):
        got = next(part for part in parts if part.startswith("residual"))
        raise CalibrationError(f"{where}: residual_in and residual_out must be there together, got {got}. {AGAIN}")
    sizes: dict[str, int] = {}
    for part, tensor in parts.items():
        dtype, shape = torch.int64 if part == "permutation" else torch.float32, TENSORS[part]
        if tensor.dtype != dtype:
            raise CalibrationError(f"{where}: {part} must be of {dtype}, got {tensor.dtype}. {AGAIN}")
        wanted = [sizes.get(letter, letter) for letter in shape]
        if tensor.ndim != len(shape) or any(
            size < 1 or sizes.setdefault(letter, size) != size for letter, size in zip(shape, tensor.shape, strict=True)
        ):
            text = ", ".join(map(str, wanted))
            raise CalibrationError(f"{where}: {part} must be of shape [{text}], got {list(tensor.shape)}. {AGAIN}")
        if not tensor.isfinite().all():
            raise CalibrationError(f"{where}: {part} must hold finite numbers, got Inf or NaN. {AGAIN}")
    if sizes.get("K", 0) % settings["group"]:
        raise CalibrationError(
            f"{where}: group must divide the input channels, got {settings['group']} and {sizes['K']}. {AGAIN}"
        )
    if "permutation" in parts and (stray_entry := stray(parts["permutation"])):
        raise CalibrationError(f"{where}: permutation must hold every channel once, got {stray_entry}. {AGAIN}")
