"""The rows of `--json FILE`, which `nmsparse bench` and every benchmark write: name, value, unit, goal, met."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from converter.errors import OutputError
from converter.place import write_whole


def row(name: str, value: float, unit: str, goal: float | None = None, *, lower: bool = False) -> dict[str, Any]:
    """Return a row; a goal is met by a value of at least as much, or with `lower` of at most as much."""
    met = None if goal is None else value <= goal if lower else value >= goal
    return {"name": name, "value": value, "unit": unit, "goal": goal, "met": met}


def write(path: Path | None, rows: Iterable[dict[str, Any]]) -> None:
    """Write the rows to a file, where one is given."""
    if path is not None:
        text = json.dumps(list(rows), indent=2) + "\n"
        write_whole(path, lambda beside: beside.write_text(text))


def read(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file.

    Raises:
        OutputError: when it cannot be read, or has something else in it.
    """
    try:
        rows = json.loads(path.read_text("utf-8"))
        return [{key: found[key] for key in ("name", "value", "unit", "goal", "met")} for found in rows]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise OutputError(f"{path}: must be a file that --json wrote, got {error!r}. Give another.") from error
