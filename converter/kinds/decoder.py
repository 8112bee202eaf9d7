"""Causal language models: calls that follow each other over a key/value cache."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, PreTrainedConfig, PreTrainedModel

from converter.hugging_face import from_saved
from converter.kinds import text
from converter.kinds.kind import BATCH, PAST, SEQUENCE, Array, Feed, Kind, Wrapped, of_logits, positions
from converter.names import cache_names
from converter.recipe import Recipe

INPUTS = ["input_ids", "attention_mask", "position_ids"]
WINDOWS = ("sliding_window", "attention_chunk_size")
SWITCH = "original_max_position_embeddings"


def _check(_name: str, recipe: Recipe, config: PreTrainedConfig) -> None:
    text.check_window(recipe, config)


def _call(model: PreTrainedModel, ids: Tensor, last: bool) -> Any:
    return model(input_ids=ids, use_cache=False, **({"logits_to_keep": 1} if last else {}))


def _loss(y: Tensor, ids: Tensor, _generator: torch.Generator) -> Tensor:
    """Return that of the next token."""
    return nn.functional.cross_entropy(y[:-1], ids[1:], reduction="sum")


class _Exported(nn.Module):
    """The model with the inputs and outputs of the ONNX graph, but the caches of the blocks in `own` only."""

    def __init__(self, model: PreTrainedModel, blocks: int, own: list[int]) -> None:
        super().__init__()
        self.model, self.blocks, self.own = model, blocks, own

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        cache: Any = DynamicCache()
        for index in range(self.blocks):
            # A placeholder's layer is asked for its length only, which is that of any other.
            key, value = past[self.own.index(index) if index in self.own else 0]
            cache.update(key[:, :, :0], value[:, :, :0], index)
            cache.layers[index].keys, cache.layers[index].values = key, value
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return out.logits, [(cache.layers[index].keys, cache.layers[index].values) for index in self.own]


def wrap(model: PreTrainedModel, blocks: int, own: list[int], _blank: Tensor, dtype: torch.dtype) -> Wrapped:
    """Return the model, of so many blocks, with a cache for those in `own`, as it is traced in `dtype`."""
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    kv = torch.zeros(BATCH, heads, PAST, head_dim, dtype=dtype)
    examples: dict[str, Any] = {
        "input_ids": torch.zeros(BATCH, SEQUENCE, dtype=torch.int64),
        "attention_mask": torch.ones(BATCH, PAST + SEQUENCE, dtype=torch.int64),
        "position_ids": torch.zeros(BATCH, SEQUENCE, dtype=torch.int64),
        "past": [(kv.clone(), kv.clone()) for _ in own],
    }
    batch, sequence, past = torch.export.Dim("batch"), torch.export.Dim("sequence"), torch.export.Dim("past")
    free: dict[str, Any] = {
        "input_ids": {0: batch, 1: sequence},
        "attention_mask": {0: batch, 1: torch.export.Dim.AUTO},
        "position_ids": {0: batch, 1: sequence},
        "past": [({0: batch, 2: past}, {0: batch, 2: past}) for _ in own],
    }
    before = [name for index in own for name in cache_names("past_key_values", index)]
    after = [name for index in own for name in cache_names("present", index)]
    return Wrapped(_Exported(model, blocks, own), examples, free, INPUTS + before, ["logits", *after], _dims)


def _dims(inputs: Sequence[Sequence[str]]) -> dict[str, str]:
    ids, mask, _, key = inputs[:4]
    total = "past_sequence_length + sequence_length"
    names = {ids[0]: "batch_size", ids[1]: "sequence_length", key[2]: "past_sequence_length"}
    return names | {mask[1]: total, f"{key[2]} + {ids[1]}": total, f"{ids[1]} + {key[2]}": total}


def _feeds(model: PreTrainedModel, ids: Tensor, dtype: Any) -> list[Feed]:
    """Return a prefill of two rows, one padded on the left, then one token more for both."""
    pad, length = 3, min(ids.shape[1], 64)
    words = ids[0, :length]
    rows = torch.stack([words, torch.cat([words.new_zeros(pad), words[: length - pad]])])
    mask = torch.ones_like(rows)
    mask[1, :pad] = 0
    prefill, decode = slice(0, length - 1), slice(length - 1, length)
    places = (mask.cumsum(-1) - 1).clamp_min(0)
    out = model(
        input_ids=rows[:, prefill],
        attention_mask=mask[:, prefill],
        position_ids=places[:, prefill],
        past_key_values=DynamicCache(),
        use_cache=True,
    )
    feeds = []
    for part, cache in ((prefill, None), (decode, out.past_key_values)):
        feed: Feed = OrderedDict(
            input_ids=rows[:, part].numpy(),
            attention_mask=mask[:, : part.stop].contiguous().numpy(),
            position_ids=places[:, part].contiguous().numpy(),
        )
        for index, layer in enumerate(out.past_key_values.layers):
            for name, tensor in zip(cache_names("past_key_values", index), (layer.keys, layer.values), strict=True):
                feed[name] = (tensor if cache else tensor[:, :, :0]).contiguous().numpy().astype(dtype)
        feeds.append(feed)
    return feeds


def _run(model: PreTrainedModel, feed: Feed) -> dict[str, Array]:
    cache = DynamicCache()
    count = sum(name.startswith("past_key_values.") for name in feed) // 2
    for index in range(count):
        key, value = (torch.from_numpy(feed[n]).float() for n in cache_names("past_key_values", index))
        if key.shape[2]:
            cache.update(key, value, index)
    given = {name: torch.from_numpy(feed[name]) for name in INPUTS}
    out = model(**given, past_key_values=cache, use_cache=True)
    outputs = {"logits": out.logits.numpy()}
    for index, layer in enumerate(out.past_key_values.layers):
        for name, tensor in zip(cache_names("present", index), (layer.keys, layer.values), strict=True):
            outputs[name] = tensor.numpy()
    return outputs


def _steps(model: PreTrainedModel, ids: Tensor) -> Iterator[None]:
    cache = DynamicCache()
    for part in (ids[:, :-1], ids[:, -1:]):
        model(input_ids=part, past_key_values=cache, use_cache=True)
        yield


def sampling(folder: Path, config: Callable[[], PreTrainedConfig], source: str) -> GenerationConfig:
    """Return how the model wants to be sampled; from the configuration where the checkpoint does not say.

    Raises:
        CheckpointError: when it cannot be read.
    """
    if not (folder / "generation_config.json").exists():
        return GenerationConfig.from_model_config(config())
    generation: GenerationConfig = from_saved(
        GenerationConfig, folder, source, "hold a generation_config.json that transformers can read"
    )
    return generation


def boundaries(config: PreTrainedConfig) -> dict[str, int]:
    """Return the lengths, by the name that the configuration has for each, that a text can cross.

    Rotary frequencies that are rescaled once and for all (yarn, llama3) switch nowhere. A length that is not below the
    model's positions is none.
    """
    settings = config.get_text_config()
    lengths = {name: getattr(settings, name, None) for name in (*WINDOWS, SWITCH)}
    ropes = getattr(settings, "rope_parameters", None) or {}
    for rope in (ropes, *(part for part in ropes.values() if isinstance(part, dict))):
        if rope.get("rope_type") == "longrope":
            lengths[SWITCH] = rope.get(SWITCH) or lengths[SWITCH]
    most = positions(config)
    return {name: at for name, at in lengths.items() if at and (most is None or at < most)}


DECODER = Kind(
    name="causal language model",
    auto=AutoModelForCausalLM,
    output="logits",
    calls=("prefill", "decode"),
    source="self",
    opened_by=text.OPENED_BY,
    blank=text.blank,
    read=partial(text.read, framed=False),
    cut=text.cut,
    pieces=text.pieces,
    validated=text.validated,
    check=_check,
    call=_call,
    distance=of_logits,
    loss=_loss,
    wrap=wrap,
    feeds=_feeds,
    run=_run,
    steps=_steps,
    sampling=sampling,
    boundaries=boundaries,
)
