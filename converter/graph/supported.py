"""What cannot be converted yet, told by the model's skeleton and configuration, before anything is calibrated."""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from converter.errors import ExportError
from converter.graph.trace import check_blocks
from converter.plan import find_blocks

EXPERTS = re.compile(r"^(num_(local_|routed_)?experts|n_routed_experts|moe_num_experts)$")
# Of a configuration's layer_types; every other has a state of its own.
ATTENTION = re.compile(r"^(?!linear).*attention$")
STATEFUL = (nn.Conv1d,)


def check_supported(model: PreTrainedModel) -> None:
    """Refuse a model whose blocks cannot be converted.

    Raises:
        ExportError: naming what stands in the way.
    """
    _, blocks = find_blocks(model)
    config = model.config.get_text_config()
    for modules, what in (
        (_experts(blocks, config), "experts, of which each token goes through some (mixture of experts)"),
        (_latent(config), "keys and values compressed to a latent vector (MLA)"),
        (_stateful(blocks, config), "blocks with a state other than keys and values"),
    ):
        if modules:
            raise ExportError(
                f"{type(model).__name__}: must be a model whose blocks are attention and a feed-forward part, "
                f"got {what}: {modules}. Such models cannot be converted yet."
            )
    check_blocks(model)


def _experts(blocks: nn.ModuleList, config: Any) -> str:
    """Return the first parameter of experts: one tensor of three dimensions, or one of a list that config counts."""
    counts = any(EXPERTS.match(name) and (getattr(config, name, 0) or 0) > 1 for name in vars(config))
    lists = [name for name, module in blocks.named_modules() if isinstance(module, nn.ModuleList) and name]
    for name, parameter in blocks.named_parameters():
        if counts and (parameter.ndim == 3 or any(name.startswith(f"{inner}.") for inner in lists)):
            return name
    return ""


def _latent(config: Any) -> str:
    return "kv_lora_rank" if getattr(config, "kv_lora_rank", None) else ""


def _stateful(blocks: nn.ModuleList, config: Any) -> str:
    for layer_type in map(str, getattr(config, "layer_types", None) or ()):
        if not ATTENTION.search(layer_type):
            return layer_type
    return next((name for name, module in blocks.named_modules() if isinstance(module, STATEFUL)), "")
