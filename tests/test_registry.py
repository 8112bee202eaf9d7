"""The table of runtimes: each row is a runtime, and what the command line says of the options is what the row says."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import get_args

import pytest

from converter import registry
from converter.cli import app
from converter.registry import TABLE, Command, Row
from converter.runtimes.protocol import EngineRuntime, Runtime


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_every_row_is_a_runtime(row: Row) -> None:
    kind = EngineRuntime if registry.builds(row.name) else Runtime
    found = registry.engine_runtime(row.name) if registry.builds(row.name) else registry.runtime(row.name)
    assert not [name for name in vars(kind) if not name.startswith("_") and not hasattr(found, name)]


@pytest.mark.parametrize("command", get_args(Command))
def test_the_help_says_of_which_runtimes_an_option_is(command: Command) -> None:
    found = app[command].assemble_argument_collection(parse_docstring=True)
    arguments = {argument.names[0]: argument for argument in found}
    assert get_args(arguments["--runtime"].hint) == registry.names(command)
    own = {name: set(registry.own(name, command)) for name in registry.names(command)}
    assert set().union(*own.values()) <= set(arguments)
    for name, argument in arguments.items():
        said = set(re.findall(r"With ([a-z-]+)[^.:]*:", argument.parameter.help or ""))
        assert not said or said == {runtime for runtime, options in own.items() if name in options}, name


def test_a_row_is_all_that_the_command_line_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    before = registry.names("build")
    one = replace(next(row for row in TABLE if row.name == "tensorrt"), name="another", build=("--target",))
    monkeypatch.setattr(registry, "TABLE", (*TABLE, one))
    assert registry.names("build") == (*before, "another")
    assert registry.own("another", "build") == ("--target",)
    assert registry.engine_runtime("another") is registry.engine_runtime("tensorrt")
