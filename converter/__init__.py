"""nmsparse: post-training N:M activation sparsity for Hugging Face language models, to ONNX."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from converter.pipeline import convert, load
    from converter.recipe import Recipe
    from converter.runtimes.genai import overlay as genai_overlay

__all__ = ["Recipe", "convert", "genai_overlay", "load"]


def __getattr__(name: str) -> Any:
    """Return what is asked for, imported only now: the imports take seconds, and `nmsparse --help` needs none."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "genai_overlay":
        from converter.runtimes.genai import overlay

        return overlay
    from converter import pipeline, recipe

    return getattr(recipe if name == "Recipe" else pipeline, name)
