"""Which GPUs this machine has."""

from __future__ import annotations

import re
import subprocess


def gpu() -> tuple[bool, str]:
    """Return whether there is a GPU, and what nvidia-smi says of each and of the CUDA that their driver knows."""
    try:
        gpus = _nvidia_smi("--query-gpu=name,compute_cap,driver_version,memory.total", "--format=csv,noheader")
        cuda = re.search(r"CUDA Version\s*: (\S+)", _nvidia_smi("-q", "-d", "COMPUTE"))
    except (OSError, subprocess.SubprocessError) as error:
        return False, f"none that nvidia-smi tells of ({type(error).__name__})"
    return True, "; ".join([*gpus.strip().splitlines(), f"CUDA {cuda[1] if cuda else 'unknown'}"])


def _nvidia_smi(*options: str) -> str:
    return subprocess.run(["nvidia-smi", *options], capture_output=True, text=True, check=True, timeout=30).stdout
