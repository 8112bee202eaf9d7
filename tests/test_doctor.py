"""`nmsparse doctor`: what it says is so."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from conftest import WITH_RTX

from converter import doctor
from converter.doctor import HIGHWAY_HEADER, ORT_HEADER, TOOLCHAIN, TOOLS, examine

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
    table = nmsparse("doctor", env={**os.environ, "COLUMNS": "300"}).stdout
    assert "no  TensorRT plugin" in nmsparse("doctor", "--plugin", tmp_path / "no.so").stdout
    assert "function body" in table


def test_what_the_libraries_are_compiled_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    found = {finding.part: finding for finding in examine(Path("none"))}
    for part, what in (
        ("ONNX Runtime's headers", "none at build/onnxruntime/usr/include/onnxruntime"),
        ("Google Highway", "none at build/highway/hwy"),
        ("plugin's sources", "no nvidia-cuda-nvcc, nvidia-cutlass, kernel-lens at"),
    ):
        assert (found[part].works, found[part].found.startswith(what)) == (False, True), found[part]
        assert "run make" in found[part].advice
    for header, text in (
        (ORT_HEADER, "#define ORT_API_VERSION 23\n"),
        (HIGHWAY_HEADER, "#define HWY_MAJOR 1\n#define HWY_MINOR 2\n"),
    ):
        header.parent.mkdir(parents=True)
        header.write_text(text)
    for number, name in enumerate(TOOLS):
        info = TOOLCHAIN / f"{name.replace('-', '_')}-{number}.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}.0\n")
    found = {finding.part: finding for finding in examine(Path("none"))}
    assert found["ONNX Runtime's headers"].found.startswith("of 1.23, at build")
    assert found["Google Highway"].found == "of 1.2, at build/highway/hwy"
    assert found["plugin's sources"].found == "CUDA compiler 0.0, CUTLASS 1.0, TensorRT's headers of kernel-lens 2.0"


def test_the_plugin_says_what_it_was_made_for(
    nmsparse: Command, plugins: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(plugins.parents[1])
    parts = by_part(nmsparse("doctor", "--plugin", plugins / "libnmsparse_tensorrt.so", "--json"))
    assert parts["plugin's sources"]["works"], "make, which built the plugin, and doctor look in the same place"
    found = parts["TensorRT plugin"]
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
    log = "Driver Version                            : 570.1\\nCUDA Version                              : 12.8"
    gpus = "NVIDIA L4, 8.9, 570.1, 23034 MiB"
    tool.write_text(f"#!/bin/sh\nif [ \"$1\" = -q ]; then printf '{log}\\n'; else echo '{gpus}'; fi\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert next(f for f in examine(Path("none")) if f.part == "GPU").found == f"{gpus}; CUDA 12.8"
    tool.write_text("#!/bin/sh\nexit 9\n")
    found = next(f for f in examine(Path("none")) if f.part == "GPU")
    assert (found.works, "CalledProcessError" in found.found) == (False, True)


def test_huge_pages_are_what_the_system_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    there = tmp_path / "enabled"
    monkeypatch.setattr(doctor, "HUGE_PAGES", there)
    for text, works, said in (
        (None, False, "none"),
        ("always [madvise] never\n", True, "madvise"),
        ("[always] madvise never\n", True, "always"),
        ("always madvise [never]\n", False, "never"),
    ):
        if text:
            there.write_text(text)
        found = next(f for f in examine(Path("none")) if f.part == "huge pages")
        assert (found.works, found.found.split()[0]) == (works, said)
        assert "faster" in found.advice


def test_what_killed_runs_have_left_is_found_and_cleared(nmsparse: Command, tmp_path: Path) -> None:
    environment = os.environ | {"HF_HOME": str(tmp_path / "home")}
    (tmp_path / ".nmsparse-folder").mkdir()
    (tmp_path / ".nmsparse-folder" / "model.onnx").touch()
    (tmp_path / ".nmsparse-file").touch()
    (tmp_path / "mine").touch()
    found = by_part(nmsparse("doctor", tmp_path, "--json", env=environment))["left by killed runs"]
    assert {".nmsparse-folder", ".nmsparse-file"} == {Path(name).name for name in found["found"][14:].split(", ")}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "mine"]
    assert by_part(nmsparse("doctor", tmp_path, "--json", env=environment))["left by killed runs"]["found"] == "nothing"
