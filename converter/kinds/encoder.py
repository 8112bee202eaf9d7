"""Encoders and masked language models: a text in one call."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel

from converter.errors import RecipeError
from converter.kinds import text
from converter.kinds.kind import (
    BATCH,
    SEQUENCE,
    Feed,
    Kind,
    Wrapped,
    check_phases,
    drawn,
    of_logits,
    of_states,
    once,
    run_once,
    signed,
)
from converter.recipe import Recipe


def takes_segments(model: PreTrainedModel) -> bool:
    """Return whether the model tells several texts in one call apart, by `token_type_ids`."""
    segments = getattr(model.config, "type_vocab_size", 0)
    return segments > 1 and "token_type_ids" in inspect.signature(model.forward).parameters


def _inputs(model: PreTrainedModel) -> list[str]:
    return ["input_ids", "attention_mask", *(["token_type_ids"] if takes_segments(model) else [])]


def _check(_name: str, recipe: Recipe, config: PreTrainedConfig) -> None:
    text.check_window(recipe, config)
    check_phases(recipe)
    if "self" in (recipe.calibration.source or "").split(","):
        raise RecipeError(
            "calibration.source: must be a text for an encoder, got self: it cannot write. "
            "Give --calibration FILE, or python."
        )


def _call(model: PreTrainedModel, ids: Tensor, _last: bool) -> Any:
    return model(input_ids=ids)


class _Exported(nn.Module):
    """The model with the inputs and the output of the ONNX graph."""

    def __init__(self, model: PreTrainedModel, output: str) -> None:
        super().__init__()
        self.model, self.output = model, output

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        torch._check(attention_mask.shape[1] == input_ids.shape[1])  # no other part of the model says so
        segments = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        result: Tensor = getattr(
            self.model(input_ids=input_ids, attention_mask=attention_mask, **segments), self.output
        )
        return result


def _wrap(
    model: PreTrainedModel, _blocks: int, _own: list[int], _blank: Tensor, _dtype: torch.dtype, *, output: str
) -> Wrapped:
    ids, names = torch.zeros(BATCH, SEQUENCE, dtype=torch.int64), _inputs(model)
    examples = {name: torch.ones_like(ids) if name == "attention_mask" else ids.clone() for name in names}
    # As long as the model has positions for; tracing finds out.
    free: dict[str, Any] = {name: {0: torch.export.Dim("batch"), 1: torch.export.Dim.AUTO} for name in names}
    return Wrapped(_Exported(model, output), examples, free, names, [output], _dims)


def _dims(inputs: Sequence[Sequence[str]]) -> dict[str, str]:
    return {inputs[0][0]: "batch_size", inputs[0][1]: "sequence_length"}


def _feeds(model: PreTrainedModel, ids: Tensor, _dtype: Any) -> list[Feed]:
    """Return a call of two rows, one padded on the right."""
    pad, length = 3, min(ids.shape[1], 64)
    mask = torch.ones(2, length, dtype=torch.int64)
    mask[1, -pad:] = 0
    given = {"input_ids": ids[0, :length].expand(2, -1) * mask, "attention_mask": mask}
    given["token_type_ids"] = (torch.arange(length) >= length // 2).to(torch.int64).expand(2, -1)
    return [OrderedDict((name, given[name].contiguous().numpy()) for name in _inputs(model))]


ENCODER = Kind(
    name="encoder",
    auto=AutoModel,
    output="last_hidden_state",
    calls=("text",),
    source="python",
    opened_by=text.OPENED_BY,
    blank=text.blank,
    read=partial(text.read, framed=True),
    cut=text.cut,
    pieces=text.pieces,
    validated=text.validated,
    check=_check,
    call=_call,
    distance=of_states,
    loss=signed,
    wrap=partial(_wrap, output="last_hidden_state"),
    feeds=_feeds,
    run=partial(run_once, output="last_hidden_state"),
    steps=partial(once, call=_call),
    interface=False,
)
MASKED = replace(
    ENCODER,
    name="masked language model",
    auto=AutoModelForMaskedLM,
    output="logits",
    distance=of_logits,
    loss=drawn,  # it sees the text's own tokens
    wrap=partial(_wrap, output="logits"),
    run=partial(run_once, output="logits"),
)
