"""What of nmsparse works on this machine, and what to do about the rest."""

from __future__ import annotations

import ctypes
import platform
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

import psutil
from onnxruntime import SessionOptions

from converter.delivery.manifest import versions
from converter.errors import ConverterError
from converter.names import RTX_INSTALL
from converter.place import clear_stale, private
from converter.runtimes.gpu import gpu
from converter.runtimes.kernel import LIBRARY, library

# What our libraries are compiled with, where make puts it.
TOOLCHAIN = Path("build/toolchain")
TOOLS = ("nvidia-cuda-nvcc", "nvidia-cutlass", "kernel-lens")
# Which memory the kernel gives huge pages: "always", "madvise" (that which asks for them) or "never", one in brackets.
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
# What says of what version it is.
ORT_HEADER = Path("build/onnxruntime/usr/include/onnxruntime/onnxruntime_c_api.h")
HIGHWAY_HEADER = Path("build/highway/hwy/base.h")


@dataclass(frozen=True)
class Finding:
    """One part: whether it is there, what was found, and what to do where it is not."""

    part: str
    works: bool
    found: str
    advice: str = ""


def examine(library: Path, folders: Sequence[Path] = ()) -> list[Finding]:
    """Return a finding for each part; `library` is that of the TensorRT plugin.

    What killed runs have left in `folders`, by default in the working folder, and in our cache is cleared away.

    Nothing here is needed to convert, validate and generate but what the package itself depends on.
    """
    return [
        *_machine(),
        _compiler(),
        _op_source("ONNX Runtime's headers", ORT_HEADER, r"#define ORT_API_VERSION (\d+)", "ORT_INCLUDE"),
        _op_source("Google Highway", HIGHWAY_HEADER, r"#define HWY_MINOR (\d+)", "HIGHWAY"),
        _plugin_sources(),
        _tensorrt_rtx(),
        _tensorrt(),
        _gpu(),
        _plugin(library),
        _cpu_op(),
        _huge_pages(),
        _left_behind(folders or [Path.cwd()]),
    ]


def _machine() -> Iterator[Finding]:
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(Path.cwd())
    packages = ", ".join(f"{name} {number}" for name, number in versions().items())
    yield Finding("packages", True, f"Python {platform.python_version()}, {packages}")
    yield Finding("memory", True, f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free")
    yield Finding("disk", True, f"{disk.free / 1e9:.1f} GB free here")


def _compiler() -> Finding:
    path = shutil.which("c++")
    advice = "Only for make cpu-op and make plugins: install g++ (Debian: apt-get install g++)."
    return Finding("C++ compiler", path is not None, path or "none", advice)


def _op_source(part: str, header: Path, minor_version: str, variable: str) -> Finding:
    try:
        release = re.search(minor_version, header.read_text("utf-8"))
    except OSError:
        release = None
    if release is None:
        advice = f"Only to build the op: run make cpu-op, or give it {variable}=FOLDER."
        return Finding(part, False, f"none at {header.parent}", advice)
    return Finding(part, True, f"of 1.{release[1]}, at {header.parent}")


def _plugin_sources() -> Finding:
    part, advice = "plugin's sources", "Only to build the plugin: run make plugins."
    there = {package.name: package.version for package in distributions(path=[str(TOOLCHAIN)])}
    missing = [name for name in TOOLS if name not in there]
    if missing:
        return Finding(part, False, f"no {', '.join(missing)} at {TOOLCHAIN}", advice)
    compiler, cutlass, headers = (there[name] for name in TOOLS)
    return Finding(
        part, True, f"CUDA compiler {compiler}, CUTLASS {cutlass}, TensorRT's headers of kernel-lens {headers}"
    )


def _tensorrt_rtx() -> Finding:
    # Importing it takes seconds: it reads half a gigabyte.
    try:
        return Finding("TensorRT-RTX", True, f"{version('tensorrt-rtx-cu13-bindings')}; builds engines without a GPU")
    except PackageNotFoundError:
        return Finding("TensorRT-RTX", False, "not installed", f"For nmsparse build: {RTX_INSTALL}")


def _tensorrt() -> Finding:
    try:
        return Finding("TensorRT", True, version("tensorrt"))
    except PackageNotFoundError:
        advice = "For the plugin, on a machine with a GPU: install TensorRT 10.7 or newer, from NVIDIA."
        return Finding("TensorRT", False, "not installed", advice)


def _gpu() -> Finding:
    works, what = gpu()
    advice = "None is needed to convert, validate or build for TensorRT-RTX; engines run on one."
    return Finding("GPU", works, what, advice)


def _plugin(library: Path) -> Finding:
    if not library.is_file():
        return Finding("TensorRT plugin", False, f"none at {library}", "Run make plugins, or give --plugin PATH.")
    try:
        build: Callable[[], bytes] = ctypes.CDLL(str(library.resolve())).nmsparseBuild
    except (OSError, AttributeError) as error:
        return Finding("TensorRT plugin", False, f"{library}: {error}", "Build it again: make plugins.")
    build.restype = ctypes.c_char_p  # type: ignore[attr-defined]
    return Finding("TensorRT plugin", True, build().decode())


def _cpu_op() -> Finding:
    part, otherwise = "ONNX Runtime op", "None is needed: the ONNX function body serves, slower."
    try:
        path = library()
        if path is None:
            return Finding(part, False, f"none at {LIBRARY}", f"Run make cpu-op. {otherwise}")
        SessionOptions().register_custom_ops_library(str(path.resolve()))
    except Exception as error:  # onnxruntime's own classes derive from Exception alone
        return Finding(part, False, str(error).splitlines()[0], "Build it again: make cpu-op.")
    otherwise = "else the ONNX function body serves, slower"
    return Finding(part, True, f"{path}; for float32, with weights in that or in fewer bits; {otherwise}")


def _huge_pages() -> Finding:
    part = "huge pages"
    try:
        setting = re.search(r"\[(\w+)\]", HUGE_PAGES.read_text("utf-8"))
    except OSError:
        setting = None
    if setting is None:
        return Finding(part, False, "none", "The ONNX Runtime op is up to a fifth faster on a Linux that has them.")
    advice = f"The ONNX Runtime op is up to a fifth faster with them; as root: echo madvise > {HUGE_PAGES}"
    return Finding(part, setting[1] != "never", f"{setting[1]} ({HUGE_PAGES})", advice)


def _left_behind(folders: Sequence[Path]) -> Finding:
    part = "left by killed runs"
    try:
        ours = [private(), *(path for path in private().iterdir() if path.is_dir())]
    except ConverterError as error:
        return Finding(part, False, str(error), "Without it nothing is resumed, and no GGUF file can be read.")
    cleared = [str(place / name) for place in [*folders, *ours] for name in clear_stale(place)]
    return Finding(part, True, f"cleared away: {', '.join(cleared)}" if cleared else "nothing")
