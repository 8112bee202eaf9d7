"""Stages ask a kind of models for what they need, and never which kind it is."""

from __future__ import annotations

import ast
from pathlib import Path

import converter
from converter.kinds import KINDS
from converter.runtimes.onnxruntime import MODELS

PACKAGE = Path(converter.__file__).parent
ROWS = {"DECODER", "MASKED", "ENCODER", "CLASSIFIER", "IMAGE_ENCODER"}
# Why a module outside of the kinds' own has to know one of them.
KNOWN = {
    "checkpoint.py": {"DECODER"},  # a GGUF file is one, and has no head to spare
    "pipeline.py": {"DECODER"},  # `generate`, `perplexity`, `bench` and `build` are for no other
    "evaluate.py": {"CLASSIFIER"},  # `evaluate` has images for these, and tasks of lm-eval for decoders
    "runtimes/onnxruntime.py": ROWS,  # the model of each
}


def asked(text: str) -> set[str]:
    """Return what a module asks of which kind a model is; `images` of the options of `evaluate` is a folder."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and node.attr in {"cached", "images"}:
            if not (isinstance(node.value, ast.Name) and node.value.id in {"options", "setting"}):
                found.add(f".{node.attr}")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("converter.kinds"):
            found |= {alias.name for alias in node.names} & ROWS
    return found


def test_only_those_that_must_ask_for_a_kind() -> None:
    outside = [path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE / "kinds"]
    found = {str(path.relative_to(PACKAGE)): asked(path.read_text()) for path in outside}
    assert {name: what for name, what in found.items() if what} == KNOWN


def test_a_question_is_noticed() -> None:
    assert asked("if checkpoint.kind.cached or kind(model).images: pass") == {".cached", ".images"}
    assert asked("from converter.kinds import DECODER, positions") == {"DECODER"}
    assert asked("from converter.sources.images import images\nif options.images: pass") == set()


def test_every_kind_has_a_model_in_onnx_runtime() -> None:
    assert set(MODELS) == {kind.name for kind in KINDS}
    assert len(KINDS) == len(ROWS)
