"""The rows of `--json FILE`, which `nmsparse bench` and every benchmark write: name, value, unit, goal, met.

A row of OUT's speed on a CPU says besides, in fields of its own, which call was measured on how many threads.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converter.errors import OutputError, shortened
from converter.place import write_whole

OURS, RATIO = "ours", "dense time / our time"  # of a row of speed: tokens a second; dense by ours
LOW, HIGH = f"{RATIO}, low", f"{RATIO}, high"  # and its quartiles


@dataclass(frozen=True)
class SpeedRow:
    """One figure, `what`, of a call of OUT on so many threads of a CPU."""

    call: str
    threads: int
    what: str
    value: float

    def row(self, unit: str) -> dict[str, Any]:
        """Return the row of `--json` for it."""
        named = row(f"CPU, {self.call}, {self.threads} threads: {self.what}", self.value, unit)
        return named | {"call": self.call, "threads": self.threads, "what": self.what}


def row(name: str, value: float, unit: str, goal: float | None = None, *, lower: bool = False) -> dict[str, Any]:
    """Return a row; a goal is met by a value of at least as much, or with `lower` of at most as much."""
    met = None if goal is None else value <= goal if lower else value >= goal
    return {"name": name, "value": value, "unit": unit, "goal": goal, "met": met}


def write(path: Path | None, rows: Iterable[dict[str, Any]]) -> None:
    """Write the rows to a file, where one is given."""
    if path is not None:
        text = json.dumps(list(rows), indent=2) + "\n"
        write_whole(path, lambda beside: beside.write_text(text))


def read_speed(path: Path) -> list[SpeedRow]:
    """Return the rows of a file that `nmsparse bench` wrote of OUT on a CPU.

    Raises:
        OutputError: when it cannot be read, or has something else in it.
    """
    try:
        rows = json.loads(path.read_text("utf-8"))
        figures = [(str(row["name"]), float(row["value"])) for row in rows]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise OutputError(f"{path}: must be a file that --json wrote, got {error!r}. Give another.") from error
    for (name, _), row in zip(figures, rows, strict=True):
        if not {"call", "threads", "what"} <= set(row):
            raise OutputError(
                f"{path}: each row must have call, threads and what, as nmsparse bench writes them without --tune, "
                f"got one without: {shortened(name)}. Run it again."
            )
    return [
        SpeedRow(str(row["call"]), row["threads"], str(row["what"]), value)
        for (_, value), row in zip(figures, rows, strict=True)
    ]
