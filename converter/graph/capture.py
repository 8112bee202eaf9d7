"""How a model of each kind is captured: its inputs and outputs in the graph, and the example that it is traced with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from converter.graph.attention import use_onnx_attention
from converter.kinds import CLASSIFIER, DECODER, ENCODER, IMAGE_ENCODER, MASKED, kind, output, takes_segments

PIXELS = "pixel_values"
# Sizes of the example inputs: all different, none 0 or 1, which torch.export would take for constants.
BATCH, SEQUENCE, PAST = 2, 3, 5


@dataclass(frozen=True)
class Capture:
    """A way to trace: the names of the inputs besides the caches, and the program.

    The program is made of the model, the number of its blocks, those of them that are traced, the shape of an image,
    and the dtype. `caches` says whether traced blocks have keys and values; `interface` whether the model must have
    transformers' attention interface, or its own attention is traced where it has none.
    """

    inputs: Callable[[PreTrainedModel], list[str]]
    program: Callable[[PreTrainedModel, int, list[int], tuple[int, ...], torch.dtype], torch.export.ExportedProgram]
    caches: bool = False
    interface: bool = True


def capture_of(model: PreTrainedModel) -> Capture:
    """Return how a model of its kind is captured."""
    return CAPTURES[kind(model).name]


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


class _ExportedEncoder(nn.Module):
    """The model with the inputs and the output of the ONNX graph, without a cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        torch._check(attention_mask.shape[1] == input_ids.shape[1])  # no other part of the model says so
        segments = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        result: Tensor = getattr(
            self.model(input_ids=input_ids, attention_mask=attention_mask, **segments), kind(self.model).output
        )
        return result


class _ExportedVision(nn.Module):
    """A model of images with the input and the output of the ONNX graph."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return output(self.model, pixel_values)


def _program(
    model: PreTrainedModel, blocks: int, own: list[int], _image: tuple[int, ...], dtype: torch.dtype
) -> torch.export.ExportedProgram:
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    kv = torch.zeros(BATCH, heads, PAST, head_dim, dtype=dtype)
    inputs: dict[str, Any] = {
        "input_ids": torch.zeros(BATCH, SEQUENCE, dtype=torch.int64),
        "attention_mask": torch.ones(BATCH, PAST + SEQUENCE, dtype=torch.int64),
        "position_ids": torch.zeros(BATCH, SEQUENCE, dtype=torch.int64),
        "past": [(kv.clone(), kv.clone()) for _ in own],
    }
    batch, sequence, past = torch.export.Dim("batch"), torch.export.Dim("sequence"), torch.export.Dim("past")
    dims: dict[str, Any] = {
        "input_ids": {0: batch, 1: sequence},
        "attention_mask": {0: batch, 1: torch.export.Dim.AUTO},
        "position_ids": {0: batch, 1: sequence},
        "past": [({0: batch, 2: past}, {0: batch, 2: past}) for _ in own],
    }
    with torch.no_grad():
        use_onnx_attention(model, dtype)
        exported = _Exported(model, blocks, own)
        return torch.export.export(exported, (), inputs, dynamic_shapes=dims, strict=False)


def _encoder_program(
    model: PreTrainedModel, _blocks: int, _own: list[int], _image: tuple[int, ...], dtype: torch.dtype
) -> torch.export.ExportedProgram:
    names = _text_inputs(model)
    ids = torch.zeros(BATCH, SEQUENCE, dtype=torch.int64)
    inputs = {name: torch.ones_like(ids) if name == "attention_mask" else ids.clone() for name in names}
    # As long as the model has positions for; tracing finds out.
    dims: dict[str, Any] = {name: {0: torch.export.Dim("batch"), 1: torch.export.Dim.AUTO} for name in names}
    with torch.no_grad():
        if getattr(model, "_supports_sdpa", False):  # else its own attention is traced as it is
            use_onnx_attention(model, dtype)
        return torch.export.export(_ExportedEncoder(model), (), inputs, dynamic_shapes=dims, strict=False)


def _image_program(
    model: PreTrainedModel, _blocks: int, _own: list[int], image: tuple[int, ...], dtype: torch.dtype
) -> torch.export.ExportedProgram:
    inputs = {PIXELS: torch.zeros(BATCH, *image, dtype=dtype)}
    with torch.no_grad():
        use_onnx_attention(model, dtype)
        dims = {PIXELS: {0: torch.export.Dim("batch")}}
        return torch.export.export(_ExportedVision(model), (), inputs, dynamic_shapes=dims, strict=False)


def _text_inputs(model: PreTrainedModel) -> list[str]:
    return ["input_ids", "attention_mask", *(["token_type_ids"] if takes_segments(model) else [])]


_DECODER = Capture(lambda _: ["input_ids", "attention_mask", "position_ids"], _program, caches=True)
_ENCODER = Capture(_text_inputs, _encoder_program, interface=False)
_VISION = Capture(lambda _: [PIXELS], _image_program)
CAPTURES = {
    DECODER.name: _DECODER,
    MASKED.name: _ENCODER,
    ENCODER.name: _ENCODER,
    CLASSIFIER.name: _VISION,
    IMAGE_ENCODER.name: _VISION,
}
