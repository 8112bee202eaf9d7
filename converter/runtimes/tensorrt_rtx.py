"""Engines of TensorRT-RTX, built on any machine for GPUs that it need not have.

TensorRT-RTX has no plugins: it compiles the op as the standard nodes that it stands for. So an engine of this runtime
computes what the sparse model means, but its GEMMs are dense.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from converter.errors import BuildError, listing
from converter.graph.export import MODEL
from converter.graph.lower import lower

INSTALL = "Install nmsparse[tensorrt-rtx] (Linux, x86-64)."
AXES = ("batch", "tokens", "past")
DIMS = dict(zip(("batch_size", "sequence_length", "past_sequence_length"), AXES, strict=True))
TOTAL = "past_sequence_length + sequence_length"
LONGEST = 2048  # tokens of a default profile
Range = tuple[int, int, int]  # at least, tuned for, at most


@dataclass(frozen=True)
class Profile:
    """The shapes that an engine takes: sequences, new tokens of each, and tokens in its cache before them."""

    batch: Range
    tokens: Range
    past: Range

    @classmethod
    def parse(cls, text: str) -> Profile:
        """Return the profile of a text such as `batch=1,tokens=1:128:512,past=0:256:1023`.

        Raises:
            BuildError: when an axis is missing, unknown or no range.
        """
        found: dict[str, Range] = {}
        for part in text.split(","):
            match = re.fullmatch(r"\s*(\w+)=(\d+)(?::(\d+):(\d+))?\s*", part)
            if match is None or match[1] not in AXES:
                raise BuildError(
                    f"--profile: each part must be one of {', '.join(AXES)} with =N or =MIN:OPT:MAX, got {part!r}."
                )
            low = int(match[2])
            middle, high = (low, low) if match[3] is None else (int(match[3]), int(match[4]))
            if not (0 if match[1] == "past" else 1) <= low <= middle <= high:
                raise BuildError(
                    f"--profile: {match[1]} must have MIN <= OPT <= MAX from {int(match[1] != 'past')}, got {part!r}."
                )
            found[match[1]] = (low, middle, high)
        if set(found) != set(AXES):
            raise BuildError(f"--profile: must have {', '.join(AXES)}, got {listing(found)}.")
        return cls(**found)

    def __str__(self) -> str:
        """Return the text that `parse` reads back."""
        return ",".join(f"{axis}={':'.join(str(n) for n in getattr(self, axis))}" for axis in AXES)

    def shapes(self, value: onnx.ValueInfoProto) -> list[tuple[int, ...]]:
        """Return the least, the tuned and the largest shape of an input of the model."""

        def size(dim: onnx.TensorShapeProto.Dimension, at: int) -> int:
            if not dim.dim_param:
                return dim.dim_value
            if dim.dim_param == TOTAL:
                return self.tokens[at] + self.past[at]
            length: int = getattr(self, DIMS[dim.dim_param])[at]
            return length

        return [tuple(size(dim, at) for dim in value.type.tensor_type.shape.dim) for at in range(3)]


def default_profiles(context: int) -> tuple[Profile, Profile]:
    """Return one profile for decoding and one for prefill, of a sequence of `context` tokens but no more than 2048.

    More takes minutes and gigabytes to build, and scratch memory on the GPU: who needs it gives a profile.
    """
    context = min(context, LONGEST)
    half = context // 2
    return (
        Profile((1, 1, 1), (1, 1, 1), (0, half, context - 1)),
        Profile((1, 1, 1), (1, half, context), (0, 0, context - 1)),
    )


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
