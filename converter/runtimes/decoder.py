"""The graph of a decoder, whatever runs it, behind the interface of a transformers model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.auto_factory import _get_model_class
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from converter.checkpoint import Checkpoint
from converter.kinds.decoder import sampling
from converter.runtimes import arguments

PAST = "past_key_values."
SERVED = ("input_ids", "attention_mask", "position_ids", "past_key_values", "labels", "logits_to_keep")
LOOPS = {"tokenizer", "assistant_tokenizer"}  # for stop strings and the like: transformers' loop hands them on


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
        """Keep them; `config` is that of the checkpoint, and tensors lie on `device`. No module is built."""
        PreTrainedModel.__init__(self, config)
        self.caches, self.run, self.place = caches, run, torch.device(device)

    @property
    def device(self) -> torch.device:
        """Where inputs are expected and outputs lie."""
        return self.place

    @property
    def dtype(self) -> torch.dtype:
        """What logits are given in, whatever the graph computes in."""
        return torch.float32

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Return what transformers' `generate` does, for a mask of as many tokens as the prompt has.

        Raises:
            ValueError: when the mask has another shape: transformers would cut it.
        """
        ids, seen = kwargs.get("input_ids", inputs), kwargs.get("attention_mask")
        if isinstance(ids, Tensor) and ids.ndim == 2 and seen is not None:
            arguments.mask(seen, (ids.shape[0], ids.shape[1]))
        return super().generate(inputs, *args, **kwargs)  # type: ignore[misc] # declared for another class

    def init_continuous_batching(self, *_args: Any, **_kwargs: Any) -> Any:
        """Refuse what transformers batches on paged attention.

        Raises:
            ValueError: always.
        """
        raise ValueError("cache_implementation: must be dynamic for a graph, got paged. Call generate without it.")

    def _prepare_cache_for_generation(  # type: ignore[override] # a bool is declared, and none returned
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *_args: Any, **_kwargs: Any
    ) -> None:
        """Put a cache that keeps every position into `model_kwargs`, or none where none is to be used.

        Raises:
            ValueError: when a cache is asked for that the graph cannot fill.
        """
        cache, given = generation_config.cache_implementation, model_kwargs.get("past_key_values")
        if cache not in {None, "dynamic"}:
            raise ValueError(
                f"cache_implementation: must be dynamic for a graph, got {cache}. Leave it out, or set "
                "generation_config.cache_implementation = None."
            )
        if generation_config.assistant_early_exit is not None:
            raise ValueError(
                f"assistant_early_exit: must be left out for a graph, got {generation_config.assistant_early_exit}. "
                "It has one output, behind the last block: give assistant_model, or prompt_lookup_num_tokens."
            )
        if generation_config.use_cache is False:
            if given is not None:
                raise ValueError("use_cache: must be True where past_key_values is given, got False. Leave out one.")
        elif given is None:
            model_kwargs["past_key_values"] = DynamicCache()
        else:
            self._check_cache(given)
            given._is_user_defined = True

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        token_type_ids: Tensor | None = None,
        **others: Any,
    ) -> Any:
        """Return logits `[B, S, V]` in float32 for token ids `[B, S]`, and the cache with their keys and values.

        Raises:
            ValueError: when an argument is given that the graph does not serve, or that does not fit.
        """
        arguments.refuse({name: value for name, value in others.items() if name not in LOOPS}, SERVED)
        config = self.config.get_text_config()
        ids = arguments.whole("input_ids", input_ids, (None, None), getattr(config, "vocab_size", None))
        batch, sequence = shape = (ids.shape[0], ids.shape[1])
        arguments.zeros("token_type_ids", token_type_ids, shape)
        cache: Any = DynamicCache() if past_key_values is None else past_key_values
        self._check_cache(cache, batch)
        past = cache.get_seq_length()
        if attention_mask is None:
            seen = torch.ones(batch, past + sequence, dtype=torch.int64, device=self.place)
        else:
            seen = arguments.mask(attention_mask, (batch, past + sequence)).to(self.place)
        if position_ids is None:
            positions = (seen.cumsum(-1) - 1).clamp_min(0)[:, -sequence:]
        else:
            rows = 1 if getattr(position_ids, "shape", [0])[0] == 1 else batch
            positions = arguments.whole("position_ids", position_ids, (rows, sequence)).expand(shape)
        feeds = {"input_ids": ids, "attention_mask": seen, "position_ids": positions}
        for number, value in enumerate(self.caches):
            layer, part = divmod(number, 2)
            if past:
                feeds[value.name] = cache.layers[layer].values if part else cache.layers[layer].keys
            else:
                size = (batch, value.heads, 0, value.width)
                feeds[value.name] = torch.zeros(size, dtype=value.dtype, device=self.place)
        kept, *present = self.run({name: tensor.to(self.place).contiguous() for name, tensor in feeds.items()})
        logits, loss = kept.float(), None
        if labels is not None:
            targets = arguments.whole("labels", labels, shape, logits.shape[-1], least=-100)
            loss = ForCausalLMLoss(logits, targets, logits.shape[-1])
        if isinstance(logits_to_keep, int):
            logits = logits[:, -logits_to_keep:] if logits_to_keep else logits
        else:
            logits = logits[:, logits_to_keep]
        wanted = getattr(config, "use_cache", True) if use_cache is None else use_cache
        if past_key_values is None and wanted is False:
            cache = None
        else:
            _fill(cache, present)
        out = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)
        return arguments.returned(self.config, out, return_dict)

    def _check_cache(self, cache: Any, batch: int | None = None) -> None:
        """Refuse a cache that the graph cannot read or fill; `batch` is the number of its sequences, where known.

        Raises:
            ValueError: when it is of another class, of another model or drops positions.
        """
        plain = type(cache) is DynamicCache and not cache.offloading
        if not plain or any(type(layer) is not DynamicLayer for layer in cache.layers):
            raise ValueError(
                f"past_key_values: must be a DynamicCache that keeps every position, got {type(cache).__name__}"
                f"{' of other layers' if plain else ''}. Give DynamicCache()."
            )
        past = cache.get_seq_length()
        if not past:
            return
        held = [part for layer in cache.layers for part in (layer.keys, layer.values)]
        rows = held[0].shape[0] if batch is None else batch
        wanted = [((rows, value.heads, past, value.width), value.dtype) for value in self.caches]
        shapes = [(tuple(part.shape), part.dtype) for part in held]
        if shapes != wanted:
            differing = next((pair for pair in zip(wanted, shapes, strict=False) if pair[0] != pair[1]), None)
            expected, got = differing or (f"{len(wanted) // 2} layers", f"{len(shapes) // 2}")
            raise ValueError(
                f"past_key_values: must hold {expected}, got {got}. Give what this model returned for as many rows."
            )


def _fill(cache: Any, present: Sequence[Tensor]) -> None:
    """Put keys and values of every position, in turn for each layer, into the cache."""
    for layer in range(len(present) // 2):
        keys, values = present[2 * layer : 2 * layer + 2]
        if len(cache.layers) <= layer or not cache.layers[layer].is_initialized:
            cache.update(keys, values, layer)
        cache.layers[layer].keys, cache.layers[layer].values = keys, values


def graph_model(
    config: PreTrainedConfig,
    caches: Sequence[CacheInput],
    run: Callable[[dict[str, Tensor]], Sequence[Tensor]],
    device: str = "cpu",
) -> GraphCausalLM:
    """Return the model, which generates as its family does: what the family overrides of `generate` is kept."""
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        family = _get_model_class(config, MODEL_FOR_CAUSAL_LM_MAPPING)
        if family.config_class == config.sub_configs.get("text_config"):
            config = config.get_text_config()
        model: GraphCausalLM = _graph_class(family)(config, caches, run, device)
        return model
    return GraphCausalLM(config, caches, run, device)


@lru_cache
def _graph_class(family: type[PreTrainedModel]) -> Any:
    return type(family.__name__, (GraphCausalLM, family), {"__module__": __name__})


def generation_config(folder: Path) -> GenerationConfig:
    """Return how the model in `folder` wants to be sampled; one that asks for a cache of fixed size is warned of."""
    generation = sampling(folder, lambda: Checkpoint(str(folder), None, folder).config, str(folder))
    if generation.cache_implementation not in {None, "dynamic"}:
        logging.getLogger(__name__).warning(
            "%s: cache_implementation %s is left out: the graph keeps every position.",
            folder / "generation_config.json",
            generation.cache_implementation,
        )
        generation.cache_implementation = None
    return generation
