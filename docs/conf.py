"""Sphinx builds these pages: `make docs`. Every page also reads as it is on a code host."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the reference describes this checkout, whatever is installed

project = "nmsparse"
author = "the nmsparse maintainers"
copyright = f"2026, {author}"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown", ".ipynb": "markdown"}
html_theme = "furo"
html_title = "nmsparse"
html_show_sphinx = False

myst_heading_anchors = 4
# No inventory of another project is read, so that the pages build without a network: its names are no links. Our errors
# are described in reference/exit-codes.md.
OTHERS = r"(annotated_types|collections|pathlib|transformers|converter\.recipe)\..*|\w+Error"
nitpick_ignore_regex = [("py:.*", OTHERS)]

OF_ROOT = ("changelog", "contributing", "security")  # pages whose text is a file of the repository's root
LINK = re.compile(rf"\]\((?:\.\./)*({'|'.join(OF_ROOT).upper()})\.md")
COMMANDS = "`make docs` puts the help of each command here."


def _read(app: Any, name: str, source: list[str]) -> None:
    """Complete a page: put in what comes from elsewhere, and let links to files of the root end at their page here."""
    text = source[0]
    if name in OF_ROOT:
        file = ROOT / f"{name.upper()}.md"
        app.env.note_dependency(str(file))
        text = file.read_text("utf-8").replace("](docs/", "](")
    if app.env.doc2path(name).suffix == ".ipynb":
        text = "\n\n".join(_cells(json.loads(text)))
    if COMMANDS in text:
        text = text.replace(COMMANDS, _commands())
    source[0] = LINK.sub(lambda found: f"](/{found[1].lower()}.md", text)


def _cells(notebook: dict[str, Any]) -> Iterator[str]:
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        yield f"```python\n{text}\n```" if cell["cell_type"] == "code" else text


def _commands() -> str:
    """Return the help of each command as Markdown, under headings of the second level."""
    from converter.cli import app

    whole = app.generate_docs(output_format="markdown", flatten_commands=True)
    first = re.search(r"^# nmsparse .*", whole, re.M)
    assert first is not None
    text = re.sub(r"^# ", "## ", whole[first.start() :], flags=re.M)
    return re.sub(r"^(\* `.*`): *$", r"\1", text, flags=re.M)  # an option without a word on it


def setup(app: Any) -> None:
    """Register what is read differently here."""
    app.connect("source-read", _read)
