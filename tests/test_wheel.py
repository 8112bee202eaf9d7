"""The wheel: with the op for ONNX Runtime where it can be compiled, and without it where not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import from_make
from onnxruntime import SessionOptions

ROOT = Path(__file__).parents[1]
LIBRARY = "converter/native/libnmsparse_onnxruntime.so"


def wheel(folder: Path, **variables: str) -> Path:
    """Return the wheel of a copy of what git tracks of this project, built with these environment variables."""
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    for name in ("converter", "plugins"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("native", "__pycache__"))
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(source),
    ]
    made = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **variables})
    assert made.returncode == 0, made.stderr
    (found,) = folder.glob("*.whl")
    return found


def test_with_the_op(tmp_path: Path) -> None:
    from_make("NMSPARSE_TEST_CPU_OP", "the op")
    places = {"ORT_INCLUDE": ROOT / "build/onnxruntime/usr/include", "HIGHWAY": ROOT / "build/highway"}
    found = wheel(tmp_path, **{name: os.environ.get(name, str(place)) for name, place in places.items()})
    assert "py3-none-linux" in found.name, found.name
    with zipfile.ZipFile(found) as file:
        file.extract(LIBRARY, tmp_path)
        assert {"converter/graph/dispatch.csv", "converter/native/LICENSE-highway"} <= set(file.namelist())
    SessionOptions().register_custom_ops_library(str(tmp_path / LIBRARY))


@pytest.mark.skipif(sys.platform != "linux", reason="what a compiler is told by CXX is tried on Linux")
def test_without_a_compiler(tmp_path: Path) -> None:
    found = wheel(tmp_path, CXX="/bin/false", ORT_INCLUDE="", HIGHWAY="")
    assert found.name.endswith("-py3-none-any.whl"), found.name
    with zipfile.ZipFile(found) as file:
        assert not any("native" in name for name in file.namelist())
        assert "converter/cli.py" in file.namelist()
