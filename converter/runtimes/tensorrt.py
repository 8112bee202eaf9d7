"""TensorRT, which runs our plugin: engines where it and a GPU are, and the script that builds one with polygraphy.

None of this has run on a GPU. What it shares with TensorRT-RTX (engine.py) builds engines in the tests.
"""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import onnx
import onnx_ir as ir

from converter.errors import BuildError
from converter.graph import dispatch as dispatch_table
from converter.graph.plugin import to_plugin
from converter.names import DATA, MODEL
from converter.options import BuildOptions
from converter.runtimes.engine import ENGINE, Built, load_plugin
from converter.runtimes.engine import build as build_engine
from converter.runtimes.profile import Profile
from converter.runtimes.protocol import EngineRecord, EngineRuntime, Job, Written
from converter.signature import DOMAIN, OP

TIMING_CACHE, HARDWARE, BUILD = "timing.cache", "AMPERE_PLUS", "build.sh"


class TensorRT:
    """Writes the graph with plugin nodes, and its engine where the plugin is given."""

    environment: Mapping[str, str] = MappingProxyType({})

    def folder(self, options: BuildOptions) -> str:
        """Return the name of the folder.

        Raises:
            BuildError: when the dispatch table cannot be read.
        """
        dispatch_table.read(options.dispatch)
        return self.folders(None)

    def folders(self, _target: str | None) -> str:
        """Return the same name: there is one engine."""
        return "tensorrt"

    def write(self, job: Job) -> Written:
        """Write the graph, whose layers take the paths of the dispatch table for the target; and perhaps the engine.

        Raises:
            BuildError: when the plugin has no kernel for a layer, or as `build`.
        """
        options = job.options
        with job.stages.stage("lower"):
            rows, target = dispatch_table.read(options.dispatch), options.target or dispatch_table.ANY
            graph, used = to_plugin(ir.load(job.folder / MODEL), rows, target)
            ir.save(graph, job.place / MODEL, external_data=DATA)
        inputs = onnx.load(job.place / MODEL, load_external_data=False).graph.input
        (job.place / BUILD).write_text(script(inputs, job.profiles, options), "utf-8")
        plugins = sum((node.domain, node.op_type) == (DOMAIN, OP) for node in graph.graph)
        about = {
            "profiles": [str(profile) for profile in job.profiles],
            "plugins": plugins,
            "target": options.target,
            "dispatch": [row._asdict() for row in used],
        }
        said = f"{plugins} plugin nodes; "
        if options.plugin is None:
            return Written(f"{said}run {BUILD} where TensorRT and a GPU are", plugin=True, graph=about)
        if (job.last / TIMING_CACHE).exists():
            (job.place / TIMING_CACHE).write_bytes((job.last / TIMING_CACHE).read_bytes())
        with job.stages.stage("build", "steps") as advance:
            built = build(job, options.plugin, plugins, advance)
        own = {
            "workspace": options.workspace(),
            "version_compatible": options.version_compatible,
            "hardware_compatible": options.hardware_compatible,
            "embed_plugin": options.embed_plugin,
        }
        engine = built.write(job.place, own)
        return Written(f"{said}as many plugin layers in the engine", plugin=True, engine=engine, graph=about)

    def ready(self, place: Path, engine: EngineRecord, plugin: Path | None) -> Any:
        """Return the bindings, with the plugin loaded where it is given.

        Raises:
            BuildError: when TensorRT or the plugin's library is missing.
        """
        trt = bindings()
        if plugin is not None:
            load_plugin(trt, plugin)
        elif not engine.own["embed_plugin"]:
            raise BuildError(f"--plugin: must be given for {place}, whose engine has not embedded it, got none.")
        return trt


RUNTIME: EngineRuntime = TensorRT()


def build(job: Job, library: Path, plugins: int, progress: Callable[[int, int], None]) -> Built:
    """Return the engine of the graph with so many `plugins` that lies in the job's place; the timing cache is renewed.

    Raises:
        BuildError: when TensorRT, a GPU or the plugin's library is missing, when TensorRT cannot build the graph, or
            when the engine has not as many plugin layers.
    """
    trt = bindings()
    load_plugin(trt, library)
    path, cache, options = job.place / MODEL, job.place / TIMING_CACHE, job.options
    timing: list[Any] = []

    def configure(config: Any) -> None:
        timing.append(config.create_timing_cache(cache.read_bytes() if cache.exists() else b""))
        config.set_timing_cache(timing[0], False)
        workspace = options.workspace()
        if workspace is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
        if options.version_compatible:
            config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        if options.hardware_compatible:
            config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, HARDWARE)
        if options.embed_plugin:
            config.plugins_to_serialize = [str(library.resolve())]

    graph = onnx.load(path, load_external_data=False)
    built = build_engine(trt, graph, path, job.profiles, configure, progress)
    cache.write_bytes(bytes(timing[0].serialize()))
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    runtime.engine_host_code_allowed = True  # of our own engine: a version-compatible one brings its runtime along
    inspector = runtime.deserialize_cuda_engine(built.plan).create_engine_inspector()
    layers = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    counts = layers_by_type(layers)
    plugin_layers = sum(count for kind, count in counts.items() if kind.startswith("Plugin"))
    if plugin_layers != plugins:
        raise BuildError(f"{path}: the engine must have {plugins} plugin layers, got {plugin_layers}.")
    return Built(built.plan, replace(built.about, layers=counts), layers)


def layers_by_type(information: str) -> dict[str, int]:
    """Return how many layers of each type an engine has by its inspector's JSON, which lists one for each profile."""
    layers = [layer for layer in json.loads(information)["Layers"] if isinstance(layer, dict)]
    names = {(re.sub(r" \[profile \d+\]$", "", layer["Name"]), layer["LayerType"]) for layer in layers}
    return dict(Counter(name for _, name in sorted(names)))


def script(inputs: Sequence[onnx.ValueInfoProto], profiles: Sequence[Profile], options: BuildOptions) -> str:
    """Return a shell script that builds the engine of the graph beside it with polygraphy and lists its layers.

    Its argument is the plugin's library. TensorRT takes an ONNX function for a plugin that it does not find, in
    silence; the graph has none, so that a missing plugin is an error.
    """
    convert = ["polygraphy", "convert", MODEL, "--convert-to", "trt", "--output", ENGINE, "--strongly-typed"]
    convert += ["--profiling-verbosity", "detailed"]
    convert += ["--load-timing-cache", TIMING_CACHE, "--save-timing-cache", TIMING_CACHE]
    if (workspace := options.workspace()) is not None:
        convert += ["--pool-limit", f"workspace:{workspace}"]
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
