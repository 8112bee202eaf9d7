"""`nmsparse doctor`: what it says is so."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from conftest import WITH_RTX

from converter.doctor import examine

Command = Callable[..., subprocess.CompletedProcess[str]]


def by_part(found: subprocess.CompletedProcess[str]) -> dict[str, dict[str, Any]]:
    assert found.returncode == 0, found.stderr
    return {finding["part"]: finding for finding in json.loads(found.stdout)}


@WITH_RTX
def test_what_is_here_and_what_is_not(nmsparse: Command, tmp_path: Path) -> None:
    found = by_part(nmsparse("doctor", "--plugin", tmp_path / "no.so", "--json"))
    assert f"onnxruntime {version('onnxruntime')}" in found["packages"]["found"]
    assert (found["TensorRT-RTX"]["works"], "builds engines" in found["TensorRT-RTX"]["found"]) == (True, True)
    assert found["C++ compiler"]["works"] == (shutil.which("c++") is not None)
    assert found["TensorRT plugin"] == {
        "part": "TensorRT plugin",
        "works": False,
        "found": f"none at {tmp_path / 'no.so'}",
        "advice": "Run make plugins, or give --plugin PATH.",
    }
    table = nmsparse("doctor").stdout
    assert "what to do" in table
    assert "function body" in " ".join(table.split())


def test_the_plugin_says_what_it_was_made_for(nmsparse: Command, plugins: Path, tmp_path: Path) -> None:
    found = by_part(nmsparse("doctor", "--plugin", plugins / "libnmsparse_tensorrt.so", "--json"))["TensorRT plugin"]
    assert found["works"]
    assert found["found"].startswith(
        "SparseLinear version 1, compute capabilities 80 86 89 90 120, TensorRT headers 10."
    )
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    found = by_part(nmsparse("doctor", "--plugin", broken, "--json"))["TensorRT plugin"]
    assert (found["works"], "broken.so" in found["found"]) == (False, True)


def test_a_gpu_is_what_nvidia_smi_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA L4, 8.9, 570.1, 23034 MiB'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert next(f for f in examine(Path("none")) if f.part == "GPU").found == "NVIDIA L4, 8.9, 570.1, 23034 MiB"
    tool.write_text("#!/bin/sh\nexit 9\n")
    found = next(f for f in examine(Path("none")) if f.part == "GPU")
    assert (found.works, "CalledProcessError" in found.found) == (False, True)
