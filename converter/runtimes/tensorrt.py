"""TensorRT, which runs our plugin: engines where it and a GPU are, and the script that builds one with polygraphy.

None of this has run on a GPU. What it shares with TensorRT-RTX (engine.py) builds engines in the tests.
"""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from converter.errors import BuildError
from converter.names import MODEL
from converter.runtimes.engine import ENGINE, Built
from converter.runtimes.engine import build as build_engine
from converter.runtimes.profile import Profile

TIMING_CACHE, HARDWARE = "timing.cache", "AMPERE_PLUS"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What an engine may do besides: run on later TensorRTs, on other GPUs from Ampere on, or carry the plugin in it.

    `workspace` bounds a layer's scratch memory on the GPU, in bytes; None leaves that to TensorRT.
    """

    workspace: int | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    embed_plugin: bool = False


def build(
    folder: Path,
    library: Path,
    plugins: int,
    profiles: Sequence[Profile],
    options: Options,
    cache: Path,
    progress: Callable[[int, int], None],
) -> Built:
    """Return the engine of the graph with so many `plugins` in `folder`; the timing cache at `cache` is renewed.

    Raises:
        BuildError: when TensorRT, a GPU or the plugin's library is missing, when TensorRT cannot build the graph, or
            when the engine has not as many plugin layers.
    """
    trt = bindings()
    load_plugin(trt, library)
    timing: list[Any] = []

    def configure(config: Any) -> None:
        timing.append(config.create_timing_cache(cache.read_bytes() if cache.exists() else b""))
        config.set_timing_cache(timing[0], False)
        if options.workspace is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
        if options.version_compatible:
            config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        if options.hardware_compatible:
            config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, HARDWARE)
        if options.embed_plugin:
            config.plugins_to_serialize = [str(library.resolve())]

    graph = onnx.load(folder / MODEL, load_external_data=False)
    built = build_engine(trt, graph, folder / MODEL, profiles, configure, progress)
    cache.write_bytes(bytes(timing[0].serialize()))
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    runtime.engine_host_code_allowed = True  # of our own engine: a version-compatible one brings its runtime along
    inspector = runtime.deserialize_cuda_engine(built.plan).create_engine_inspector()
    layers = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    kinds = layer_kinds(layers)
    found = sum(count for kind, count in kinds.items() if kind.startswith("Plugin"))
    if found != plugins:
        raise BuildError(f"{folder / MODEL}: the engine must have {plugins} plugin layers, got {found}.")
    return Built(built.plan, built.about | {"layers": kinds}, layers)


def layer_kinds(information: str) -> dict[str, int]:
    """Return how many layers of each type an engine has by its inspector's JSON, which lists one for each profile."""
    layers = [layer for layer in json.loads(information)["Layers"] if isinstance(layer, dict)]
    names = {(re.sub(r" \[profile \d+\]$", "", layer["Name"]), layer["LayerType"]) for layer in layers}
    return dict(Counter(kind for _, kind in sorted(names)))


def script(inputs: Sequence[onnx.ValueInfoProto], profiles: Sequence[Profile], options: Options) -> str:
    """Return a shell script that builds the engine of the graph beside it with polygraphy and lists its layers.

    Its argument is the plugin's library. TensorRT takes an ONNX function for a plugin that it does not find, in
    silence; the graph has none, so that a missing plugin is an error.
    """
    convert = ["polygraphy", "convert", MODEL, "--convert-to", "trt", "--output", ENGINE, "--strongly-typed"]
    convert += ["--profiling-verbosity", "detailed"]
    convert += ["--load-timing-cache", TIMING_CACHE, "--save-timing-cache", TIMING_CACHE]
    if options.workspace is not None:
        convert += ["--pool-limit", f"workspace:{options.workspace}"]
    if options.version_compatible:
        convert += ["--version-compatible"]
    if options.hardware_compatible:
        convert += ["--hardware-compatibility-level", HARDWARE]
    for profile in profiles:
        for number, bound in enumerate(("min", "opt", "max")):
            shapes = (f"{value.name}:[{','.join(map(str, profile.shapes(value)[number]))}]" for value in inputs)
            convert += [f"--trt-{bound}-shapes", *shapes]
    inspect = ["polygraphy", "inspect", "model", ENGINE, "--model-type", "engine", "--show", "layers"]
    lines = [
        "#!/bin/sh",
        "# Builds the engine where TensorRT and a GPU are: sh build.sh path/to/libnmsparse_tensorrt.so",
        "# nmsparse build --runtime tensorrt --plugin does the same, and counts the plugin layers.",
        "set -eu",
        'plugin=$(realpath "$1")',
        'cd "$(dirname "$0")"',
        f'{shlex.join(convert)} --plugins "$plugin"',
        f'{shlex.join(inspect)} --plugins "$plugin"',
    ]
    return "\n".join(lines) + "\n"


def load_plugin(trt: Any, library: Path) -> None:
    """Make the plugin known to TensorRT.

    Raises:
        BuildError: when the library cannot be loaded.
    """
    if trt.get_plugin_registry().load_library(str(library.resolve())) is None:
        raise BuildError(f"--plugin: must be a library that TensorRT {trt.__version__} can load, got {library}.")


def bindings() -> Any:
    """Return TensorRT.

    Raises:
        BuildError: when it is not installed.
    """
    try:
        import tensorrt
    except ImportError as error:
        raise BuildError(
            f"tensorrt: must be installed, got {error}. Install TensorRT 10.7 or newer, or leave out --plugin."
        ) from error
    if not hasattr(tensorrt, "Builder"):
        raise BuildError(
            "tensorrt: must be installed, got a folder of that name. Run elsewhere, or leave out --plugin."
        )
    return tensorrt
