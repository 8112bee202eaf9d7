"""Imports lead one way: from the commands down to the mathematics, and in no circle."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import converter

PACKAGE = Path(converter.__file__).parent
# Each may import those before it, and modules of its own folder.
LAYERS = ["sparsity", "sources", "kinds", "calibration", "graph", "runtimes", "evaluation", "delivery"]
# What sees everything, and is seen by none of the folders.
TOP = {"cli", "show", "pipeline", "build", "bench", "evaluate", "doctor", "registry", "served", "__main__"}


def imported(path: Path) -> set[str]:
    """Return the modules of ours that a file imports, those that it imports for types and late ones too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "converter":
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_imports_only_what_is_below_it(layer: str) -> None:
    above = {*LAYERS[LAYERS.index(layer) + 1 :], *TOP}
    if layer == "graph":
        above.add("calibration")  # graph and calibration know nothing of each other
    wrong = [
        f"{path.relative_to(PACKAGE)}: {module}"
        for path in (PACKAGE / layer).glob("*.py")
        for module in imported(path)
        if module.count(".") and module.split(".")[1] in above
    ]
    assert not wrong, "\n".join(wrong)


def test_there_is_no_circle() -> None:
    files = {
        "converter." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")
    }
    arrows = {name: imported(path) & set(files) for name, path in files.items() if not name.endswith("__init__")}
    done: set[str] = set()

    def walk(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for other in arrows.get(name, ()):
                walk(other, (*trail, name))
            done.add(name)

    for name in arrows:
        walk(name, ())


def test_there_are_layers_to_look_at() -> None:
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir()} - {"__pycache__", "native"} == set(LAYERS)
    assert {path.stem for path in PACKAGE.glob("*.py")} & TOP == TOP
