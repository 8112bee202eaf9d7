"""A table of measurements as a JSON file of benchmarks/results, stamped with machine, date, commit and command."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
# A number, or the name of a path of the TensorRT plugin; what is between them is the column's format.
PARTS = re.compile(r"(?<![\w:.])[-+]?\d+(?:\.\d+)?(?![\w:])|\b(?:gemv|dense|sparse)\b")


def show(table: Table, result: str | None, note: str = "") -> None:
    """Print the table, and where `result` names one, write it to `results/RESULT.json`."""
    Console(width=250).print(table)
    if result is None:
        return
    heads = [str(column.header) for column in table.columns]
    rows = list(zip(*([str(cell) for cell in column.cells] for column in table.columns), strict=True))
    write(result, str(table.title or ""), heads, rows, note)


def write(result: str, title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], note: str = "") -> None:
    """Write cells as the numbers that they show, each column with the format that gives its cells again."""
    columns, cells = zip(*(_column(head, [row[at] for row in rows]) for at, head in enumerate(heads)), strict=True)
    data = {"title": title, **stamp(), "note": note, "columns": columns, "rows": list(zip(*cells, strict=True))}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{result}.json").write_text(dumped(data), "utf-8")


def dumped(data: dict[str, Any]) -> str:
    """Return the data as JSON, a row of the table a line."""
    rows = ",\n".join("    " + json.dumps(row, ensure_ascii=False) for row in data["rows"])
    text = json.dumps({**data, "rows": []}, indent=2, ensure_ascii=False)
    return text.replace('"rows": []', f'"rows": [\n{rows}\n  ]') + "\n"


def stamp() -> dict[str, str]:
    """Return the processor, today's date, the commit and the command."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    tree = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=False).stdout
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    return {
        "machine": f"{names[0] if names else 'not recorded'}, {len(names)} cores",
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "commit": commit.strip() + (" with changes" if tree else ""),
        "command": shlex.join(["python", *sys.argv]),
    }


def _column(head: str, cells: Sequence[str]) -> tuple[dict[str, Any], list[Any]]:
    """Return a column's name and formats, and its cells: numbers and names in lists, or text where there is none."""
    parsed = [_cell(cell) for cell in cells]
    formats = _signed({text for text, values in parsed if values})
    sizes = [text.count("{") for text in formats]
    if (
        not formats
        or len(set(sizes)) < len(sizes)
        or any(cell and not values for cell, (_, values) in zip(cells, parsed, strict=True))
    ):
        return {"name": head}, list(cells)
    return {"name": head, "formats": formats}, [values for _, values in parsed]


def _signed(formats: set[str]) -> list[str]:
    """Return the formats, those that differ by a plus alone as one: the others' numbers are negative there."""
    alike: dict[str, list[list[str]]] = {}
    for text in sorted(formats):
        alike.setdefault(text.replace("{:+", "{:"), []).append(text.split("{:"))
    return [
        "{:".join(
            next((part for part in parts if part.startswith("+")), parts[0]) for parts in zip(*texts, strict=True)
        )
        for texts in alike.values()
    ]


def _cell(cell: str) -> tuple[str, list[Any] | None]:
    values: list[Any] = []

    def taken(found: re.Match[str]) -> str:
        text = found[0]
        if text.isalpha():
            values.append(text)
            return "{}"
        whole, _, digits = text.partition(".")
        values.append(float(text) if digits else int(whole))
        return f"{{:{'+' if text[0] == '+' else ''}{f'.{len(digits)}f' if digits else 'd'}}}"

    return PARTS.sub(taken, cell), values or None
