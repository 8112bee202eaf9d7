"""The stage build, from OUT to an engine of TensorRT-RTX or TensorRT, and what tells whether the engine is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from torch import Tensor

from converter.calibration.texts import windows
from converter.checkpoint import Checkpoint
from converter.delivery.bundle import staged, write_manifest
from converter.delivery.manifest import ENGINES, check_files, context_length, manifest
from converter.errors import BuildError, DeviceError, UsageError, listing
from converter.graph import dispatch as dispatch_table
from converter.graph.plugin import to_plugin
from converter.names import DATA, MODEL
from converter.runtimes import tensorrt, tensorrt_rtx, trial
from converter.runtimes.engine import ENGINE, LAYERS, Built
from converter.runtimes.gpu import gpu
from converter.runtimes.profile import Profile, default_profiles
from converter.signature import DOMAIN, OP
from converter.stages import Stages

BUILD, TEXT = "build.sh", "python"


def build_tensorrt_rtx(
    folder: Path, targets: Sequence[str], profiles: Sequence[str], workspace: int | None, stages: Stages
) -> dict[str, Any]:
    """Write an engine of OUT for TensorRT-RTX to a folder of OUT's `engines`; return what its manifest says.

    Without `profiles` they are `default_profiles` of the model's context.
    """
    wanted, shapes = tensorrt_rtx.capabilities(targets), [Profile.parse(text) for text in profiles]
    with stages.stage("check"):
        check_files(folder)
        context = context_length(folder)
        shapes = shapes or [*default_profiles(context)]
    with staged(folder / ENGINES / f"tensorrt-rtx-{'+'.join(wanted)}", _bytes(folder)) as place:
        with stages.stage("build", "steps") as advance:
            built = tensorrt_rtx.build(folder, wanted, shapes, workspace, advance)
        about = {"targets": list(wanted), "workspace": workspace, "sparse_kernels": False}
        return _write(folder, place, "tensorrt-rtx", {"engine": _engine(place, built) | about}, shapes, stages)


def build_tensorrt(
    folder: Path,
    profiles: Sequence[str],
    target: str | None,
    table: Path | None,
    plugin: Path | None,
    options: tensorrt.Options,
    stages: Stages,
) -> dict[str, Any]:
    """Write the graph of OUT with plugin nodes, and its engine where `plugin` is given; return what the manifest says.

    The paths of the plugin's layers are those of the dispatch `table` for the compute capability `target`.
    """
    shapes, rows = [Profile.parse(text) for text in profiles], dispatch_table.read(table)
    with stages.stage("check"):
        check_files(folder)
        context = context_length(folder)
        shapes = shapes or [*default_profiles(context)]
    out = folder / ENGINES / "tensorrt"
    with staged(out, _bytes(folder)) as place:
        with stages.stage("lower"):
            graph = ir.load(folder / MODEL)
            used = to_plugin(graph, rows, target or dispatch_table.ANY)
            ir.save(graph, place / MODEL, external_data=DATA)
        inputs = onnx.load(place / MODEL, load_external_data=False).graph.input
        (place / BUILD).write_text(tensorrt.script(inputs, shapes, options), "utf-8")
        about: dict[str, Any] = {
            "profiles": [str(profile) for profile in shapes],
            "plugins": sum((node.domain, node.op_type) == (DOMAIN, OP) for node in graph.graph),
            "target": target,
            "dispatch": [row._asdict() for row in used],
        }
        found: dict[str, Any] = {"graph": about}
        if plugin is not None:
            cache = place / tensorrt.TIMING_CACHE
            if (out / tensorrt.TIMING_CACHE).exists():
                cache.write_bytes((out / tensorrt.TIMING_CACHE).read_bytes())
            with stages.stage("build", "steps") as advance:
                built = tensorrt.build(place, plugin, about["plugins"], shapes, options, cache, advance)
            found["engine"] = _engine(place, built) | asdict(options)
        return _write(folder, place, "tensorrt", found, shapes, stages)


def validate_engine(
    folder: Path, runtime: str, target: str | None, plugin: Path | None, stages: Stages, *, host_code: bool = False
) -> dict[str, Any]:
    """Return the manifest of an engine of OUT that has run on what `build` wrote, and came near ONNX Runtime on it.

    Raises:
        OutputError, BuildError, DeviceError: as `runnable`.
        UsageError: without `host_code`, which polygraphy lets every engine bring.
        ValidationError: when it computes something else.
    """
    with stages.stage("check"):
        place, about = runnable(folder, runtime, target)
    if not host_code:
        raise UsageError(
            "--allow-host-code: must be given, since polygraphy lets the engine run code on this CPU. "
            "Give it for an engine that you have built yourself."
        )
    with stages.stage("validate", "profiles") as advance:
        trial.run(place, runtime, len(about["engine"]["profiles"]), plugin, advance)
    return about


def runnable(folder: Path, runtime: str, target: str | None) -> tuple[Path, dict[str, Any]]:
    """Return the folder of an engine of OUT that can run here, and its manifest.

    Raises:
        OutputError: when a file of the engine or of OUT is not what `build` wrote.
        BuildError: when there is no such engine, or OUT is not what it was built of.
        DeviceError: when there is no GPU to run it on; what is known of it is in the message.
    """
    check_files(folder)
    place = _built(folder, runtime, target)
    check_files(place)
    about = manifest(place)
    if about["model_sha256"] != manifest(folder)["files"][MODEL]["sha256"]:
        raise BuildError(f"{place}: must be built of {folder / MODEL}, got another graph's. Build it again.")
    if "engine" not in about:
        raise BuildError(f"{place}: the engine must be of nmsparse build --plugin, got another. Run validate.sh on it.")
    engine = about["engine"]
    if not gpu()[0]:
        said = ", ".join(f"{count} {kind}" for kind, count in engine["layers"].items())
        size = f"{engine['version']}, {engine['bytes'] / 1e9:.2f} GB, layers by type and output: {said}"
        raise DeviceError(f"{place}: a GPU must be here to run it, got none. Its files are as they were built: {size}.")
    return place, about


def _built(folder: Path, runtime: str, target: str | None) -> Path:
    """Return the folder of an engine."""
    of_target = "*" if target is None else "+".join(target.split(","))
    name = f"{runtime}-{of_target}" if runtime == "tensorrt-rtx" else runtime
    found = sorted(path.parent for path in (folder / ENGINES).glob(f"{name}/{ENGINE}"))
    if len(found) != 1:
        there = listing(path.name for path in found) or "none"
        raise BuildError(f"{folder / ENGINES}: must have one engine {name}, got {there}. Build one, or say --target.")
    return found[0]


def _write(
    folder: Path, place: Path, runtime: str, found: dict[str, Any], shapes: Sequence[Profile], stages: Stages
) -> dict[str, Any]:
    """Write the trial of an engine and the manifest to `place`; return what the manifest says."""
    tokenizer = Checkpoint(str(folder), None, folder).tokenizer()

    def text(count: int, tokens: int) -> Tensor:
        return windows(TEXT, tokenizer, count, tokens)

    with stages.stage("trial"):
        trial.write(folder, shapes, text, place)
        (place / trial.SCRIPT).write_text(trial.script(runtime, len(shapes)), "utf-8")
    about = {"runtime": runtime, **found, "model_sha256": manifest(folder)["files"][MODEL]["sha256"]}
    about["stages"] = [asdict(cost) for cost in stages.costs]
    write_manifest(place, about)
    return about


def _engine(place: Path, built: Built) -> dict[str, Any]:
    (place / ENGINE).write_bytes(built.plan)
    (place / LAYERS).write_text(built.layers, "utf-8")
    return {**built.about, "bytes": (place / ENGINE).stat().st_size}


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob(f"{MODEL}*"))
