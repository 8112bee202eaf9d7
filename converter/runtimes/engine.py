"""From a graph to the bytes of an engine: what the builders of TensorRT and TensorRT-RTX have in common."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx

from converter.errors import BuildError
from converter.runtimes.profile import Profile
from converter.runtimes.protocol import EngineRecord

ENGINE, LAYERS = "model.engine", "layers.txt"


@dataclass(frozen=True)
class Built:
    """An engine: its bytes, what is known of it, and the list of its layers that its builder logged."""

    plan: Any
    about: EngineRecord
    layers: str

    def write(self, place: Path, own: dict[str, Any]) -> EngineRecord:
        """Write engine and list into the folder; return what is known of it, and what its runtime says besides."""
        (place / ENGINE).write_bytes(self.plan)
        (place / LAYERS).write_text(self.layers, "utf-8")
        return replace(self.about, own=own)


def build(
    trt: Any,
    graph: onnx.ModelProto,
    path: Path,
    profiles: Sequence[Profile],
    configure: Callable[[Any], None],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Built:
    """Return the engine of a graph that lies, or whose weights lie, at `path`, built by the bindings `trt`.

    The network is strongly typed: every dtype is that of the graph. `configure` is given the builder's configuration.
    `progress` is called with the steps of the build's longest phase.

    Raises:
        BuildError: when the graph cannot be read or built.
    """
    product = f"{trt.__name__.partition('_bindings')[0]} {trt.__version__}"
    logger = log(trt)
    builder = _builder(trt, logger, product)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(graph.SerializeToString(), str(path)):
        reasons = [parser.get_error(number).desc() for number in range(parser.num_errors)]
        raise BuildError(f"{path}: {product} cannot read it: {'; '.join(reasons[:3])}")
    _allow_decomposition(trt, network)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    configure(config)
    monitor = _monitor(trt, progress)
    config.progress_monitor = monitor
    for profile in profiles:
        shapes = builder.create_optimization_profile()
        for value in graph.graph.input:
            shapes.set_shape(value.name, *profile.shapes(value))
        config.add_optimization_profile(shapes)
    # In a thread of its own: what is raised in a call back from TensorRT, which Ctrl-C may be, is lost.
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(builder.build_serialized_network, network, config)
        try:
            plan = work.result()
        except KeyboardInterrupt:
            monitor.go_on = False
            raise
    if plan is None:
        raise BuildError(f"{path}: {product} cannot build it: {'; '.join(logger.errors[-3:])}")
    about = EngineRecord(
        version=trt.__version__,
        profiles=[str(profile) for profile in profiles],
        network_layers=network.num_layers,
        layers=layer_counts(logger.layers),
        inputs=[_tensor(network.get_input(number)) for number in range(network.num_inputs)],
        outputs=[_tensor(network.get_output(number)) for number in range(network.num_outputs)],
        bytes=plan.nbytes,
    )
    return Built(plan, about, logger.layers)


def load_plugin(trt: Any, library: Path) -> None:
    """Make the plugin known to the bindings `trt`.

    Raises:
        BuildError: when the library cannot be loaded.
    """
    if trt.get_plugin_registry().load_library(str(library.resolve())) is None:
        raise BuildError(f"--plugin: must be a library that TensorRT {trt.__version__} can load, got {library}.")


def layer_counts(layers: str) -> dict[str, int]:
    """Return how many layers of each type and output dtype the list of a builder holds."""
    counts: Counter[str] = Counter()
    for line in layers.splitlines():
        if name := re.match(r"Name: .*?, LayerType: ([^,]+),", line):
            outputs = line.partition("Outputs: [")[2].partition("]}]")[0]
            dtypes = re.findall(r"(?:Datatype|Format/Datatype): (\w+)", outputs)
            counts[f"{name[1]} {dtypes[0].lower()}" if dtypes else name[1]] += 1
    return dict(sorted(counts.items()))


def _builder(trt: Any, logger: Any, product: str) -> Any:
    try:
        return trt.Builder(logger)
    except TypeError as error:  # what pybind says when the factory returns null
        reasons = "; ".join(logger.errors[-3:]) or str(error)
        raise BuildError(f"{product}: cannot start, got {reasons}. TensorRT builds only where a GPU is.") from error


def _allow_decomposition(trt: Any, network: Any) -> None:
    """Let attention be built from simpler layers where there is no kernel for its dtype, as for float32."""
    attention = getattr(trt.LayerType, "ATTENTION_INPUT", None)  # TensorRT before 10.14 has none
    for number in range(network.num_layers):
        layer = network.get_layer(number)
        if attention is not None and layer.type == attention:
            layer.__class__ = trt.IAttentionInputLayer  # the bindings know the class of a layer only by its type
            layer.attention.decomposable = True


def _tensor(tensor: Any) -> dict[str, Any]:
    return {"name": tensor.name, "dtype": tensor.dtype.name.lower(), "shape": list(tensor.shape)}


def log(trt: Any) -> Any:
    """Return a logger for the bindings `trt` that keeps `errors`, and the list of an engine's `layers`."""

    class Log(trt.ILogger):  # type: ignore[misc]
        """Keeps what goes wrong, for the error message, and the list of the engine's layers."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.layers = ""

        def log(self, severity: Any, message: str) -> None:
            if severity in {trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR}:
                self.errors.append(message.strip())
            elif message.startswith("Layers:\n"):
                self.layers = message

    return Log()


def _monitor(trt: Any, progress: Callable[[int, int], None]) -> Any:
    class Steps(trt.IProgressMonitor):  # type: ignore[misc]
        """Passes on the steps of the longest phase; the build ends at the next step once `go_on` is false."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.totals: dict[str, int] = {}
            self.go_on = True

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self.totals[name] = steps

        def step_complete(self, name: str, step: int) -> bool:
            if self.totals[name] == max(self.totals.values()):
                progress(step + 1, self.totals[name])
            return self.go_on

        def phase_finish(self, name: str) -> None:
            self.totals.pop(name)

    return Steps()
