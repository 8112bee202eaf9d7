"""Render the tables of README.md and docs/ from benchmarks/results: `make tables`, or with --check compare them.

A page has a table NAME between `<!-- table: NAME -->` and `<!-- /table -->`; it is that of `results/NAME.json`.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from chart import PLACE, chart

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MARKED = re.compile(r"<!-- table: (\S+) -->\n(.*?)<!-- /table -->", re.S)
BEGIN = re.compile(r"<!-- table: (\S+) -->")


def pages() -> list[Path]:
    """Return the pages that have tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def read(name: str) -> dict[str, Any]:
    """Return a result; one that is an extract has the columns and rows of another that it names.

    Raises:
        KeyError: when there is none, or it names what is not there.
    """
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        raise KeyError(f"{path.relative_to(ROOT)}: must exist for the table {name}, got none")
    data: dict[str, Any] = json.loads(path.read_text("utf-8"))
    if "of" not in data:
        return data
    whole = read(data["of"])
    heads = [column["name"] for column in whole["columns"]]
    at = [heads.index(head) for head in data["columns"]]
    by_first = {cell_text(whole["columns"][0], row[0]): row for row in whole["rows"]}
    return {
        **whole,
        **data,
        "columns": [whole["columns"][index] for index in at],
        "rows": [[by_first[label][index] for index in at] for label in data["rows"]],
    }


def cell_text(column: dict[str, Any], values: Any) -> str:
    """Return a cell as a page shows it."""
    if not isinstance(values, list):
        return "" if values is None else str(values)
    text = next(text for text in column["formats"] if text.count("{") == len(values))
    return text.format(*values)


def rendered(name: str) -> str:
    """Return the table NAME in Markdown, with a caption that says where it comes from."""
    data = read(name)
    lines = [[column["name"] for column in data["columns"]], ["---"] * len(data["columns"])]
    lines += [[cell_text(*pair) for pair in zip(data["columns"], row, strict=True)] for row in data["rows"]]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    known = [data["title"], data["machine"], data["date"]]
    if not data.get("short"):
        known += [re.sub(r"^(?=[0-9a-f]{7}\b)", "commit ", data["commit"]), f"`{data['command']}`"]
    caption = "; ".join(part for part in known if "not recorded" not in part)
    wanted = ("machine",) if data.get("short") else ("machine", "commit", "command")
    missing = [key for key in wanted if data[key] == "not recorded"]
    caption += f" ({' and '.join(missing)} not recorded)" if missing else ""
    return f"{table}\n\n*{caption}.{' ' + data['note'] if data['note'] else ''}*\n"


def replaced(text: str) -> str:
    """Return a page with its tables as the results have them."""
    return MARKED.sub(lambda found: f"<!-- table: {found[1]} -->\n{rendered(found[1])}<!-- /table -->", text)


def problems(check: bool) -> list[str]:
    """Return what is wrong; without `check` pages and chart are written first."""
    found, used = [], set()
    for page in pages():
        text, name = page.read_text("utf-8"), page.relative_to(ROOT)
        begun, closed = BEGIN.findall(text), [one for one, _ in MARKED.findall(text)]
        if begun != closed or text.count("<!-- /table -->") != len(begun):
            found.append(f"{name}: each table must end with <!-- /table -->, got {', '.join(begun) or 'an end alone'}")
            continue
        used.update(begun)
        try:
            new = replaced(text)
        except (KeyError, ValueError, StopIteration) as error:
            found.append(f"{name}: {error}")
            continue
        if check and new != text:
            tables = [one for one, old in MARKED.findall(text) if old != rendered(one)]
            found.append(f"{name}: {', '.join(tables)} must be as in benchmarks/results. Run make tables")
        elif new != text:
            page.write_text(new, "utf-8")
    used.add("chart")
    used.update(
        json.loads(path.read_text("utf-8")).get("of")
        for name in [*used]
        if (path := RESULTS / f"{name}.json").is_file()
    )
    found += [
        f"{path.name}: no page has this table" for path in sorted(RESULTS.glob("*.json")) if path.stem not in used
    ]
    drawn = chart(read)
    if check and (not PLACE.is_file() or PLACE.read_text("utf-8") != drawn):
        found.append(f"{PLACE.relative_to(ROOT)}: must be as in benchmarks/results. Run make tables")
    elif not check:
        PLACE.write_text(drawn, "utf-8")
    return found


if __name__ == "__main__":
    wrong = problems("--check" in sys.argv)
    print("\n".join(wrong))
    sys.exit(bool(wrong))
