"""Sphinx builds these pages: `make docs`. Every page also reads as it is on a code host."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the reference describes this checkout, whatever is installed

project = "nmsparse"
author = "the nmsparse maintainers"
copyright = f"2026, {author}"  # noqa: A001 - Sphinx's name
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "cyclopts.ext.sphinx"]
source_suffix = {".md": "markdown", ".ipynb": "markdown"}
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "nmsparse"

myst_enable_extensions = ["colon_fence", "deflist", "fieldlist"]
myst_heading_anchors = 4
suppress_warnings = ["myst.strikethrough"]

autodoc_typehints = "signature"
# Classes of other projects: no inventory of theirs is read, so that the pages build without a network.
nitpick_ignore_regex = [("py:.*", r"(pathlib|transformers|pydantic|torch|collections|typing)\..*"), ("py:.*", r"Path")]

OUTSIDE = re.compile(r"\]\((?:\.\./)+(CHANGELOG|CONTRIBUTING|SECURITY)\.md")


def _read(app: Any, name: str, source: list[str]) -> None:
    """Make Markdown of a notebook, and let links to files of the repository's root end at their page here."""
    if app.env.doc2path(name).suffix == ".ipynb":
        source[0] = _markdown(json.loads(source[0])["cells"])
    source[0] = OUTSIDE.sub(lambda found: f"](/{found[1].lower()}.md", source[0])


def _markdown(cells: list[dict[str, Any]]) -> str:
    texts = (("".join(cell["source"]), cell["cell_type"]) for cell in cells)
    return "\n\n".join(f"```python\n{text}\n```" if kind == "code" else text for text, kind in texts)


def setup(app: Any) -> None:
    """Register what is read differently here."""
    app.connect("source-read", _read)
