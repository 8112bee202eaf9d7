"""Engines of TensorRT-RTX, built on any machine for GPUs that it need not have.

TensorRT-RTX has no plugins: it compiles the op as the standard nodes that it stands for. So an engine of this runtime
computes what the sparse model means, but its GEMMs are dense.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import onnx

from converter.errors import BuildError, listing
from converter.graph.export import MODEL
from converter.graph.lower import lower
from converter.runtimes.profile import Profile

INSTALL = "Install nmsparse[tensorrt-rtx] (Linux, x86-64)."


def capabilities(targets: Sequence[str]) -> dict[str, Any]:
    """Return what TensorRT-RTX calls each of the targets, such as `sm_89`, each once.

    Raises:
        BuildError: when TensorRT-RTX is not installed or does not know a target.
    """
    trt = _tensorrt()
    known = {f"sm_{name[2:]}": value for name, value in trt.ComputeCapability.__members__.items() if name[:2] == "SM"}
    for target in targets:
        if target not in known:
            raise BuildError(
                f"--target: must be of {listing(known)} for TensorRT-RTX {trt.__version__}, got {target!r}."
            )
    return {target: known[target] for target in targets}


def build(
    folder: Path,
    targets: dict[str, Any],
    profiles: Sequence[Profile],
    workspace: int | None,
    engine: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Write the `engine` of the model in `folder` for all the targets, from `capabilities`; return what it is.

    The network is strongly typed: every dtype is that of the graph. `workspace` bounds a layer's scratch memory on
    the GPU, in bytes; None leaves that to TensorRT-RTX. `progress` is called with the steps of the build's longest
    phase.

    Raises:
        BuildError: when TensorRT-RTX cannot build the graph.
    """
    trt = _tensorrt()
    graph = lower(onnx.load(folder / MODEL, load_external_data=False))
    logger = _logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(graph.SerializeToString(), str(folder / MODEL)):
        reasons = [parser.get_error(number).desc() for number in range(parser.num_errors)]
        raise BuildError(f"{folder / MODEL}: TensorRT-RTX {trt.__version__} cannot read it: {'; '.join(reasons[:3])}")
    _allow_decomposition(trt, network)
    config = builder.create_builder_config()
    config.num_compute_capabilities = len(targets)
    for number, capability in enumerate(targets.values()):
        config.set_compute_capability(capability, number)
    if workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    monitor = _monitor(trt, progress)
    config.progress_monitor = monitor
    for profile in profiles:
        shapes = builder.create_optimization_profile()
        for value in graph.graph.input:
            shapes.set_shape(value.name, *profile.shapes(value))
        config.add_optimization_profile(shapes)
    # In a thread of its own: what is raised in a call back from TensorRT-RTX, which Ctrl-C may be, is lost.
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(builder.build_serialized_network, network, config)
        try:
            plan = work.result()
        except KeyboardInterrupt:
            monitor.go_on = False
            raise
    if plan is None:
        raise BuildError(
            f"{folder / MODEL}: TensorRT-RTX {trt.__version__} cannot build it: {'; '.join(logger.errors[-3:])}"
        )
    engine.write_bytes(plan)
    return {
        "runtime": "tensorrt-rtx",
        "version": trt.__version__,
        "targets": list(targets),
        "profiles": [str(profile) for profile in profiles],
        "workspace": workspace,
        "layers": network.num_layers,
        "bytes": engine.stat().st_size,
        "inputs": [_tensor(network.get_input(number)) for number in range(network.num_inputs)],
        "outputs": [_tensor(network.get_output(number)) for number in range(network.num_outputs)],
        "sparse_kernels": False,
    }


def _tensorrt() -> Any:
    try:
        import tensorrt_rtx_bindings
    except ImportError as error:
        raise BuildError(f"tensorrt-rtx: must be installed, got {error}. {INSTALL}") from error
    return tensorrt_rtx_bindings


def _allow_decomposition(trt: Any, network: Any) -> None:
    """Let attention be built from simpler layers where TensorRT-RTX has no kernel for its dtype, as for float32."""
    for number in range(network.num_layers):
        layer = network.get_layer(number)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # the bindings know the class of a layer only by its type
            layer.attention.decomposable = True


def _tensor(tensor: Any) -> dict[str, Any]:
    return {"name": tensor.name, "dtype": tensor.dtype.name.lower(), "shape": list(tensor.shape)}


def _logger(trt: Any) -> Any:
    class Errors(trt.ILogger):  # type: ignore[misc]
        """Keeps what goes wrong, for the error message."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in {trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR}:
                self.errors.append(message.strip())

    return Errors()


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
