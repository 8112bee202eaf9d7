"""Files of tensors, read with the format that they must have."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from converter.errors import CalibrationError


def read(path: Path, wanted: str, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file.

    Raises:
        CalibrationError: when the file is not `what`, of the format `wanted`.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            if metadata.get("format") != wanted:
                raise CalibrationError(f"{path}: format must be {wanted}, got {metadata.get('format')!r}.")
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise CalibrationError(f"{path}: must be {what}, got {error}. Run nmsparse calibrate.") from error
