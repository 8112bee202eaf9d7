"""Engines of TensorRT-RTX, built on any machine for GPUs that it need not have.

TensorRT-RTX has no plugins: it compiles the op as the standard nodes that it stands for. So an engine of this runtime
computes what the sparse model means, but its GEMMs are dense.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import onnx

from converter.errors import BuildError, UsageError, listing
from converter.graph.lower import lower
from converter.names import MODEL, RTX_INSTALL
from converter.options import BuildOptions
from converter.runtimes.engine import Built
from converter.runtimes.engine import build as build_engine
from converter.runtimes.profile import Profile
from converter.runtimes.protocol import EngineRecord, EngineRuntime, Job, Written

NAME = "tensorrt-rtx"


class TensorRTRTX:
    """Builds one engine for all the targets."""

    environment: Mapping[str, str] = MappingProxyType({"POLYGRAPHY_USE_TENSORRT_RTX": "1"})

    def folder(self, options: BuildOptions) -> str:
        """Return the name of the folder, which names the targets.

        Raises:
            UsageError: when there is no target.
            BuildError: when TensorRT-RTX is not installed or does not know a target.
        """
        return f"{NAME}-{'+'.join(_targets(options))}"

    def folders(self, target: str | None) -> str:
        """Return the pattern of the names of engines for these targets, or for any."""
        return f"{NAME}-{'*' if target is None else '+'.join(target.split(','))}"

    def write(self, job: Job) -> Written:
        """Write the engine.

        Raises:
            BuildError: when TensorRT-RTX cannot build the graph.
        """
        targets, workspace = _targets(job.options), job.options.workspace()
        with job.stages.stage("build", "steps") as advance:
            built = build(job.folder, targets, job.profiles, workspace, advance)
        own = {"targets": list(targets), "workspace": workspace, "sparse_kernels": False}
        engine = built.write(job.place, own)
        said = (
            f"{NAME} {engine.version} for {', '.join(targets)}: {engine.bytes / 1e9:.2f} GB\n"
            "its GEMMs are dense: this runtime has no plugins, it computes what the sparse model means"
        )
        return Written(said, plugin=False, engine=engine)

    def ready(self, place: Path, engine: EngineRecord, plugin: Path | None) -> Any:
        """Return the bindings, which know no plugin.

        Raises:
            BuildError: when TensorRT-RTX is not installed.
        """
        return bindings()


RUNTIME: EngineRuntime = TensorRTRTX()


def _targets(options: BuildOptions) -> dict[str, Any]:
    if options.target is None:
        raise UsageError("--target: must be given with --runtime tensorrt-rtx, such as sm_89. Say which GPUs.")
    return capabilities(options.target.split(","))


def capabilities(targets: Sequence[str]) -> dict[str, Any]:
    """Return what TensorRT-RTX calls each of the targets, such as `sm_89`, each once.

    Raises:
        BuildError: when TensorRT-RTX is not installed or does not know a target.
    """
    trt = bindings()
    known = {f"sm_{name[2:]}": value for name, value in trt.ComputeCapability.__members__.items() if name[:2] == "SM"}
    for target in targets:
        if target not in known:
            raise BuildError(
                f"--target: must be of {listing(known)} for TensorRT-RTX {trt.__version__}, got {target!r}."
            )
    return {target: known[target] for target in targets}


def bindings() -> Any:
    """Return TensorRT-RTX.

    Raises:
        BuildError: when it is not installed.
    """
    try:
        import tensorrt_rtx_bindings
    except ImportError as error:
        raise BuildError(f"tensorrt-rtx: must be installed, got {error}. {RTX_INSTALL}") from error
    return tensorrt_rtx_bindings


def build(
    folder: Path,
    targets: dict[str, Any],
    profiles: Sequence[Profile],
    workspace: int | None,
    progress: Callable[[int, int], None],
) -> Built:
    """Return the engine of OUT for all the targets, from `capabilities`.

    `workspace` bounds a layer's scratch memory on the GPU, in bytes; None leaves that to TensorRT-RTX. It has no timing
    cache to give: nothing is timed before an engine meets its GPU.

    Raises:
        BuildError: when TensorRT-RTX cannot build the graph.
    """
    trt = bindings()

    def configure(config: Any) -> None:
        config.num_compute_capabilities = len(targets)
        for number, capability in enumerate(targets.values()):
            config.set_compute_capability(capability, number)
        if workspace is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)

    graph = lower(onnx.load(folder / MODEL, load_external_data=False))
    return build_engine(trt, graph, folder / MODEL, profiles, configure, progress)
