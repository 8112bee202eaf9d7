"""The graph of a decoder, whatever runs it, behind the interface of a transformers model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

PAST = "past_key_values."


@dataclass(frozen=True)
class CacheInput:
    """A cache of keys or values as the graph takes it: `[B, heads, past, width]`."""

    name: str
    heads: int
    width: int
    dtype: torch.dtype


class GraphCausalLM(PreTrainedModel, GenerationMixin):
    """A language model whose forward is a graph: `run` returns its logits and caches for its inputs by name."""

    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(
        self,
        config: PreTrainedConfig,
        caches: Sequence[CacheInput],
        run: Callable[[dict[str, Tensor]], Sequence[Tensor]],
        device: str = "cpu",
    ) -> None:
        """Keep them; `config` is that of the checkpoint, and tensors lie on `device`."""
        super().__init__(config)
        self.caches, self.run, self.place = caches, run, torch.device(device)

    @property
    def device(self) -> torch.device:
        """Where inputs are expected and outputs lie."""
        return self.place

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Return what transformers' `generate` returns, with a cache that keeps every position."""
        kwargs.setdefault("past_key_values", DynamicCache())
        return super().generate(*args, **kwargs)  # type: ignore[misc] # transformers declares another self

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits `[B, S, V]` in float32 for token ids `[B, S]`, and the cache with their keys and values."""
        cache: Any = DynamicCache() if past_key_values is None else past_key_values
        past = cache.get_seq_length()
        batch, sequence = input_ids.shape
        if attention_mask is None:
            attention_mask = torch.ones(batch, past + sequence, dtype=torch.int64, device=self.place)
        attention_mask = attention_mask.to(torch.int64)
        if position_ids is None:
            position_ids = (attention_mask.cumsum(-1) - 1).clamp_min(0)[:, -sequence:]
        feeds = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids.expand(batch, sequence),
        }
        for number, value in enumerate(self.caches):
            layer, part = divmod(number, 2)
            if past:
                feeds[value.name] = cache.layers[layer].values if part else cache.layers[layer].keys
            else:
                shape = (batch, value.heads, 0, value.width)
                feeds[value.name] = torch.zeros(shape, dtype=value.dtype, device=self.place)
        logits, *present = self.run({name: tensor.contiguous() for name, tensor in feeds.items()})
        for layer in range(len(present) // 2):
            keys, values = present[2 * layer : 2 * layer + 2]
            if len(cache.layers) <= layer:
                cache.update(keys, values, layer)
            cache.layers[layer].keys, cache.layers[layer].values = keys, values
        return CausalLMOutputWithPast(logits=logits.float(), past_key_values=cache)
