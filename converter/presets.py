"""Presets: published rules for which layers stay dense, by the projection's name and the number of its block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PretrainedConfig

from converter.errors import RecipeError, listing, lookup

AMBER_PRUNED = ("q_proj", "gate_proj", "down_proj")
AMBER_SKIPPED = ("q_proj", "gate_proj")
K_V_GATE_DOWN = ("k_proj", "v_proj", "gate_proj", "down_proj")


@dataclass(frozen=True)
class Skips:
    """The blocks whose q and gate Amber-Pruner leaves dense in one model, and what that model is known by."""

    model: str
    model_type: str
    blocks: int
    hidden_size: int
    vocab_size: int
    skipped: tuple[int, ...]

    def fits(self, config: PretrainedConfig) -> bool:
        """Return whether `config` has the type and the sizes of that model."""
        sizes = (
            getattr(config, name, None) for name in ("model_type", "num_hidden_layers", "hidden_size", "vocab_size")
        )
        return (self.model_type, self.blocks, self.hidden_size, self.vocab_size) == tuple(sizes)


# Source: arXiv:2508.02128. The number of blocks alone would take Qwen2-1.5B for Qwen2-7B, and Llama-2-7B for
# Llama-3.1-8B. Llama-3-8B and Qwen2.5-7B have every size of the models named here, and get their lists.
AMBER_SKIPS = (
    Skips("Llama-3.1-8B", "llama", 32, 4096, 128256, (19, 21, 28, 30, 31)),
    Skips("Qwen2-7B", "qwen2", 28, 3584, 152064, (0, 6, 23, 26, 27)),
    Skips("Qwen3-30B-A3B", "qwen3_moe", 48, 2048, 151936, (41, 46, 47)),
)

# Why a projection of a block stays dense in a model; "" lets it be sparse.
Preset = Callable[[str, int, PretrainedConfig], str]


def everything(_projection: str, _block: int, _config: PretrainedConfig) -> str:
    """Return "": no layer stays dense."""
    return ""


def amber(projection: str, block: int, config: PretrainedConfig) -> str:
    """Return why Amber-Pruner leaves the layer dense: all but q, gate and down, and q and gate of some blocks.

    The list of blocks comes from a measurement of each model; for a model without a published one only the rule of
    the projections is used, and the reason says so.

    Source: arXiv:2508.02128.
    """
    published = next((skips for skips in AMBER_SKIPS if skips.fits(config)), None)
    if projection not in AMBER_PRUNED:
        known = f"blocks as in {published.model}" if published else "no list of blocks is published for this model"
        return f"preset amber prunes {listing(AMBER_PRUNED)} only ({known})"
    if published and projection in AMBER_SKIPPED and block in published.skipped:
        return f"preset amber leaves {projection} of block {block} dense in {published.model}"
    return ""


def k_v_gate_down(projection: str, _block: int, _config: PretrainedConfig) -> str:
    """Return why the layer stays dense: all but k, v, gate and down.

    Source: arXiv:2509.22166 table 5, the best of its choices of layers.
    """
    return "" if projection in K_V_GATE_DOWN else f"preset k_v_gate_down prunes {listing(K_V_GATE_DOWN)} only"


PRESETS: dict[str, Preset] = {"all": everything, "amber": amber, "k_v_gate_down": k_v_gate_down}


def preset(name: str) -> Preset:
    """Return the preset of that name.

    Raises:
        RecipeError: when there is none.
    """
    return lookup(PRESETS, "preset", name, RecipeError)
