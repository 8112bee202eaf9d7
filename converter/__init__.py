"""nmsparse: post-training N:M activation sparsity for Hugging Face language models, to ONNX."""

from converter.pipeline import convert, load
from converter.recipe import Recipe

__all__ = ["Recipe", "convert", "load"]
