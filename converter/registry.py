"""The runtimes by name: where each is implemented, and which options of which command are its own.

The command line derives from the table what it offers, so nothing of a runtime is imported before that is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, cast

from converter.options import BuildOptions, named

if TYPE_CHECKING:
    from converter.runtimes.protocol import EngineRuntime, Runtime

Command = Literal["validate", "build", "evaluate"]
Options = tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """A runtime: its implementation as `module:object`, and its own options of each command that offers it.

    One that `nmsparse build` offers is an `EngineRuntime`, any other a `Runtime`.
    """

    name: str
    implementation: str
    validate: Options | None = None
    build: Options | None = None
    evaluate: Options | None = None


# In the order in which a command offers them.
TABLE = (
    Row("onnxruntime", "converter.served:ONNXRUNTIME", validate=("--text", "--model"), evaluate=()),
    Row("pytorch", "converter.served:PYTORCH", evaluate=()),
    Row(
        "tensorrt-rtx",
        "converter.runtimes.tensorrt_rtx:RUNTIME",
        validate=("--target", "--allow-host-code"),
        build=("--target", "--profile", "--workspace-mib"),
        evaluate=("--target", "--allow-host-code"),
    ),
    Row(
        "tensorrt",
        "converter.runtimes.tensorrt:RUNTIME",
        validate=("--plugin", "--allow-host-code"),
        build=tuple(named(BuildOptions())),
        evaluate=("--plugin", "--allow-host-code"),
    ),
)


def names(command: Command) -> Options:
    """Return the runtimes that the command offers."""
    return tuple(row.name for row in TABLE if getattr(row, command) is not None)


def own(name: str, command: Command) -> Options:
    """Return the options of the command that are for that runtime."""
    options: Options = getattr(_row(name), command)
    return options


def builds(name: str) -> bool:
    """Return whether the runtime runs engines, which `nmsparse build` makes."""
    return _row(name).build is not None


def runtime(name: str) -> Runtime:
    """Return the runtime of that name, one that runs OUT itself."""
    return cast("Runtime", _implementation(name))


def engine_runtime(name: str) -> EngineRuntime:
    """Return the runtime of that name, one that builds engines."""
    return cast("EngineRuntime", _implementation(name))


def _row(name: str) -> Row:
    return next(row for row in TABLE if row.name == name)


def _implementation(name: str) -> Any:
    module, _, attribute = _row(name).implementation.partition(":")
    return getattr(import_module(module), attribute)
