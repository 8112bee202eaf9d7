"""What a runtime has to bring: `Runtime` for one that runs OUT itself, `EngineRuntime` for one that builds engines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from converter.options import BuildOptions
from converter.records import Manifest
from converter.runtimes.profile import Profile
from converter.stages import Stages

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class EngineRecord:
    """What a manifest says of an engine; `own` is what only its runtime says of one."""

    version: str
    profiles: list[str]
    network_layers: int
    layers: dict[str, int]
    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]
    bytes: int
    own: dict[str, Any] = field(default_factory=dict)

    def shapes(self) -> list[Profile]:
        """Return its profiles."""
        return [Profile.parse(text) for text in self.profiles]

    def to_json(self) -> dict[str, Any]:
        """Return it as it is in a manifest."""
        said = asdict(self)
        own: dict[str, Any] = said.pop("own")
        return said | own

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> EngineRecord:
        """Return what `to_json` returned.

        Raises:
            KeyError: when something is missing.
        """
        rest = dict(said)
        known = {name: rest.pop(name) for name in cls.__dataclass_fields__ if name != "own"}
        return cls(**known, own=rest)


@dataclass(frozen=True)
class Job:
    """A build: of OUT in `folder`, into the new folder `place`; `last` holds what an earlier build left, or nothing."""

    folder: Path
    place: Path
    last: Path
    profiles: Sequence[Profile]
    options: BuildOptions
    stages: Stages


@dataclass(frozen=True)
class Written:
    """What a build wrote, in words and for the manifest: an engine, the graph for one, or both.

    With `plugin`, who runs the engine has to give the plugin's library.
    """

    said: str
    plugin: bool
    engine: EngineRecord | None = None
    graph: dict[str, Any] | None = None


@dataclass(frozen=True)
class Runnable:
    """An engine in the folder `place` that can run here, and the manifest that lies there."""

    place: Path
    runtime: EngineRuntime
    engine: EngineRecord
    manifest: Manifest


@dataclass(frozen=True)
class Served:
    """What loads OUT in a runtime, and what tells all that runs it from everything else."""

    load: Callable[[], PreTrainedModel]
    runs: str


class Runtime(Protocol):
    """Runs OUT as it is."""

    def serve(self, folder: Path, source: str | None, /) -> Served:
        """Return OUT; its checkpoint is `source`, where that has moved."""


class EngineRuntime(Protocol):
    """Builds engines of OUT, and runs them."""

    @property
    def environment(self) -> Mapping[str, str]:
        """The variables by which polygraphy knows that an engine is of this runtime."""

    def folder(self, options: BuildOptions) -> str:
        """Return the name of the folder for what is to be built; options that cannot be served are refused here."""

    def folders(self, target: str | None) -> str:
        """Return the pattern of the names that `folder` gives to engines for that target, or for any."""

    def write(self, job: Job) -> Written:
        """Write an engine, or the graph for one."""

    def ready(self, place: Path, engine: EngineRecord, plugin: Path | None) -> Any:
        """Return the runtime's bindings, ready to load the engine in the folder `place`."""
