"""The stage build, from OUT to an engine of one of the runtimes, and what tells whether the engine is right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from converter import registry
from converter.checkpoint import Checkpoint
from converter.delivery.bundle import staged, write_manifest
from converter.delivery.manifest import ENGINES, MANIFEST, check_files, context_length
from converter.errors import BuildError, DeviceError, OutputError, UsageError, listing
from converter.names import MODEL
from converter.options import BuildOptions, EngineOptions
from converter.records import StageCost
from converter.runtimes import trial
from converter.runtimes.engine import ENGINE
from converter.runtimes.gpu import gpu
from converter.runtimes.profile import Profile, default_profiles
from converter.runtimes.protocol import EngineRecord, Job, Runnable, Written
from converter.sources.texts import windows
from converter.stages import Stages

TEXT = "python"


@dataclass(frozen=True)
class BuildReport:
    """What a build wrote of which graph, what each stage took, and for which profiles."""

    runtime: str
    written: Written
    profiles: list[Profile]
    model_sha256: str
    stages: list[StageCost]

    def to_json(self) -> dict[str, Any]:
        """Return what the manifest says of it."""
        graph, engine = self.written.graph, self.written.engine
        return {
            "runtime": self.runtime,
            **({} if graph is None else {"graph": graph}),
            **({} if engine is None else {"engine": engine.to_json()}),
            "model_sha256": self.model_sha256,
            "stages": [asdict(cost) for cost in self.stages],
        }


def build(folder: Path, runtime: str, options: BuildOptions, stages: Stages) -> BuildReport:
    """Write an engine of OUT, or the graph for one, to a folder of OUT's `engines`; return what was written.

    Without profiles among the options they are `default_profiles` of the model's context.

    Raises:
        UsageError, BuildError: when the runtime cannot serve the options, is not here or cannot build the graph.
        OutputError: when the folder holds no exported model of ours.
    """
    builder = registry.engine_runtime(runtime)
    out = folder / ENGINES / builder.folder(options)
    profiles = [Profile.parse(text) for text in options.profile or []]
    with stages.stage("check"):
        files = check_files(folder).files
        context = context_length(folder)
        profiles = profiles or [*default_profiles(context)]
    with staged(out, _bytes(folder)) as place:
        written = builder.write(Job(folder, place, out, profiles, options, stages))
        with stages.stage("trial"):
            trial.write(folder, profiles, _text(folder), place)
            script = trial.script(builder.environment, len(profiles), plugin=written.plugin)
            (place / trial.SCRIPT).write_text(script, "utf-8")
        report = BuildReport(runtime, written, profiles, files[MODEL].sha256, stages.costs)
        write_manifest(place, report.to_json())
    return report


def validate_engine(folder: Path, runtime: str, options: EngineOptions, stages: Stages) -> dict[str, Any]:
    """Return what the manifest says of an engine of OUT that has run, and came near ONNX Runtime on what `build` wrote.

    Raises:
        OutputError, BuildError, DeviceError: as `runnable`.
        UsageError: where the options do not allow host code, which polygraphy lets every engine bring.
        ValidationError: when it computes something else.
    """
    with stages.stage("check"):
        ready = runnable(folder, runtime, options.target)
    if not options.allow_host_code:
        raise UsageError(
            "--allow-host-code: must be given, since polygraphy lets the engine run code on this CPU. "
            "Give it for an engine that you have built yourself."
        )
    with stages.stage("validate", "profiles") as advance:
        environment, profiles = ready.runtime.environment, len(ready.engine.profiles)
        trial.run(ready.place, environment, profiles, options.plugin, advance)
    return ready.manifest.more


def runnable(folder: Path, runtime: str, target: str | None) -> Runnable:
    """Return an engine of OUT that can run here.

    Raises:
        OutputError: when a file of the engine or of OUT is not what `build` wrote.
        BuildError: when there is no such engine, or OUT is not what it was built of.
        DeviceError: when there is no GPU to run it on; what is known of it is in the message.
    """
    files = check_files(folder).files
    builder = registry.engine_runtime(runtime)
    place = _built(folder, builder.folders(target))
    record = check_files(place)
    about = record.more
    if about.get("model_sha256") != files[MODEL].sha256:
        raise BuildError(f"{place}: must be built of {folder / MODEL}, got another graph's. Build it again.")
    if "engine" not in about:
        raise BuildError(f"{place}: the engine must be of nmsparse build --plugin, got another. Run validate.sh on it.")
    try:
        engine = EngineRecord.from_json(about["engine"])
    except (KeyError, TypeError, ValueError) as error:
        raise OutputError(f"{place / MANIFEST}: must say what build wrote, got {error!r}. Build it again.") from error
    if not gpu()[0]:
        said = ", ".join(f"{count} {name}" for name, count in engine.layers.items())
        size = f"{engine.version}, {engine.bytes / 1e9:.2f} GB, layers by type and output: {said}"
        raise DeviceError(f"{place}: a GPU must be here to run it, got none. Its files are as they were built: {size}.")
    return Runnable(place, builder, engine, record)


def _built(folder: Path, name: str) -> Path:
    """Return the one folder of that name, which may be a pattern, with an engine in it."""
    places = sorted(path.parent for path in (folder / ENGINES).glob(f"{name}/{ENGINE}"))
    if len(places) != 1:
        there = listing(path.name for path in places) or "none"
        raise BuildError(f"{folder / ENGINES}: must have one engine {name}, got {there}. Build one, or say --target.")
    return places[0]


def _text(folder: Path) -> Callable[[int, int], Tensor]:
    tokenizer = Checkpoint(str(folder), None, folder).tokenizer()
    return lambda count, tokens: windows(TEXT, tokenizer, count, tokens)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob(f"{MODEL}*"))
