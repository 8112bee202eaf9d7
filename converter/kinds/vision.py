"""Models of images: classifiers and encoders, images in one call."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from converter.errors import CalibrationError
from converter.kinds.kind import (
    BATCH,
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
from converter.sources.images import image_shape, images

PIXELS = "pixel_values"
# Pillow is enough: torchvision would have to be of the very version that PyTorch is of.
OPENED_BY: tuple[Any, str, dict[str, Any]] = (
    AutoImageProcessor,
    "come with an image processor (nmsparse[images] reads images)",
    {"backend": "pil"},
)
VALIDATION_IMAGES = 2


def _blank(processor: Callable[[], Any]) -> Tensor:
    """Return a black image."""
    return torch.zeros(1, *image_shape(processor()))


def _read(
    source: str, processor: Any, _config: PreTrainedConfig, count: int, _window: int, _field: str, seed: int
) -> Tensor:
    return images(source, processor, count, seed)


def _cut(image: Tensor, _rows: int, _tokens: int) -> Tensor:
    """Return the image whole, and once: a block is given nothing that depends on how many there are."""
    return image


def _pieces(pixels: Tensor, _window: int) -> tuple[Tensor, str]:
    return pixels, "images"


def _validated(recipe: Recipe) -> tuple[str, int]:
    return (recipe.calibration.source or "").split(",")[0], VALIDATION_IMAGES


def _check(name: str, recipe: Recipe, _config: PreTrainedConfig) -> None:
    check_phases(recipe)
    if recipe.calibration.source in {None, "self", "python"}:
        raise CalibrationError(
            f"calibration.source: must be images for an {name}, got {recipe.calibration.source}. "
            "Give --calibration with a folder of them, or hub:NAME[:CONFIG[:SPLIT]]."
        )


def _call(model: PreTrainedModel, pixels: Tensor, _last: bool) -> Any:
    return model(pixel_values=pixels)


class _Exported(nn.Module):
    """The model with the input and the output of the ONNX graph."""

    def __init__(self, model: PreTrainedModel, output: str) -> None:
        super().__init__()
        self.model, self.output = model, output

    def forward(self, pixel_values: Tensor) -> Tensor:
        result: Tensor = getattr(self.model(pixel_values=pixel_values), self.output)
        return result


def _wrap(
    model: PreTrainedModel, _blocks: int, _own: list[int], blank: Tensor, dtype: torch.dtype, *, output: str
) -> Wrapped:
    examples = {PIXELS: torch.zeros(BATCH, *blank.shape[1:], dtype=dtype)}
    free = {PIXELS: {0: torch.export.Dim("batch")}}
    return Wrapped(_Exported(model, output), examples, free, [PIXELS], [output], _dims)


def _dims(inputs: Sequence[Sequence[str]]) -> dict[str, str]:
    return {inputs[0][0]: "batch_size"}


def _feeds(_model: PreTrainedModel, pixels: Tensor, dtype: Any) -> list[Feed]:
    return [OrderedDict([(PIXELS, pixels.numpy().astype(dtype))])]


IMAGE_ENCODER = Kind(
    name="image encoder",
    auto=AutoModel,
    output="last_hidden_state",
    calls=("images",),
    source=None,
    opened_by=OPENED_BY,
    blank=_blank,
    read=_read,
    cut=_cut,
    pieces=_pieces,
    validated=_validated,
    check=_check,
    call=_call,
    distance=of_states,
    loss=signed,
    wrap=partial(_wrap, output="last_hidden_state"),
    feeds=_feeds,
    run=partial(run_once, output="last_hidden_state"),
    steps=partial(once, call=_call),
)
CLASSIFIER = replace(
    IMAGE_ENCODER,
    name="image classifier",
    auto=AutoModelForImageClassification,
    output="logits",
    distance=of_logits,
    loss=drawn,  # the images have no labels here
    wrap=partial(_wrap, output="logits"),
    run=partial(run_once, output="logits"),
)
