"""Every measured table of the pages is that of a file in benchmarks/results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
DECIMAL = re.compile(r"^\|.*\d\.\d+.*\|$", re.M)
# Tables whose numbers are no measurements: versions, defaults, bounds.
OTHERS = {"clients.md", "tensorrt.md", "evidence.md", "format.md", "recipe.md", "cli.md", "release.md"}


@pytest.fixture
def tables() -> ModuleType:
    import tables

    return tables


def test_pages_show_what_the_files_hold(tables: ModuleType) -> None:
    assert tables.problems(check=True) == []


@pytest.mark.parametrize("name", ["models", "peers", "chart"])
def test_a_changed_number_is_noticed(
    tables: ModuleType, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in tables.RESULTS.glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    text = (tmp_path / f"{name}.json").read_text()
    data = json.loads(text)
    cell = data["rows"][0][1]
    data["rows"][0][1] = [cell[0] + 1] if isinstance(cell, list) else f"{cell}0"
    (tmp_path / f"{name}.json").write_text(json.dumps(data))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.problems(check=True)


def test_what_no_page_shows_and_what_no_file_has_is_noticed(
    tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in tables.RESULTS.glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    (tmp_path / "models.json").rename(tmp_path / "unseen.json")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(tables, "ROOT", ROOT)
    found = "\n".join(tables.problems(check=True))
    assert "unseen.json: no page has this table" in found
    assert "models.json" in found


def test_no_figures_are_typed_by_hand(tables: ModuleType) -> None:
    for page in tables.pages():
        if page.name not in OTHERS:
            rest = tables.MARKED.sub("", page.read_text())
            assert not DECIMAL.findall(rest), f"{page.relative_to(ROOT)}: a table of figures must be a file's"


def test_what_a_script_prints_is_what_a_page_shows(tables: ModuleType) -> None:
    import record

    rows = [
        ["1024x8", "1.95 (1.90 to 2.00)", "0.64, gemv", "+3.5 %", ""],
        ["8x8", "2.00 (1.00 to 3.25)", "1.00, dense", "-0.5 %", "4"],
    ]
    columns, cells = zip(*(record._column("head", [row[at] for row in rows]) for at in range(5)), strict=True)
    assert [column.get("formats", ["text"])[0] for column in columns[:2]] == ["text", "{:.2f} ({:.2f} to {:.2f})"]
    shown = [
        [tables.cell_text(column, values[at]) for column, values in zip(columns, cells, strict=True)] for at in (0, 1)
    ]
    assert shown == rows
