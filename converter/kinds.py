"""The kinds of models: how each is opened, what its graph gives, and what a difference of two of its outputs means."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto

from converter.errors import CalibrationError, CheckpointError, RecipeError, shortened
from converter.recipe import Recipe


def _of_logits(found: Tensor, wanted: Tensor) -> Tensor:
    """Return the mean over the rows of KL(wanted || found), in nats, of logits `[..., V]`."""
    logs, targets = (part.flatten(0, -2).log_softmax(-1) for part in (found, wanted))
    return nn.functional.kl_div(logs, targets, reduction="batchmean", log_target=True)


def _of_states(found: Tensor, wanted: Tensor) -> Tensor:
    """Return the mean over the tokens of the squared error relative to the token's length, of states `[B, S, H]`."""
    return ((found - wanted).square().sum(-1) / wanted.square().sum(-1).clamp_min(1e-30)).mean()


@dataclass(frozen=True)
class Kind:
    """A kind of models; `output` is what the graph gives, `calls` how it is called, each one a phase of parity.

    `source` is the calibration text when the recipe names none, `distance` what distillation makes small; `images` are
    what the model is given instead of text.
    """

    name: str
    auto: Any
    output: str
    calls: tuple[str, ...]
    source: str | None
    distance: Callable[[Tensor, Tensor], Tensor]
    images: bool = False

    @property
    def cached(self) -> bool:
        """Whether calls follow each other over a key/value cache."""
        return "decode" in self.calls


DECODER = Kind("causal language model", AutoModelForCausalLM, "logits", ("prefill", "decode"), "self", _of_logits)
MASKED = Kind("masked language model", AutoModelForMaskedLM, "logits", ("text",), "python", _of_logits)
ENCODER = Kind("encoder", AutoModel, "last_hidden_state", ("text",), "python", _of_states)
CLASSIFIER = Kind(
    "image classifier", AutoModelForImageClassification, "logits", ("images",), None, _of_logits, images=True
)
IMAGE_ENCODER = Kind("image encoder", AutoModel, "last_hidden_state", ("images",), None, _of_states, images=True)


def kind_of(config: PreTrainedConfig, where: str) -> Kind:
    """Return the kind of the model that the checkpoint `where` was saved from; a decoder where that does not say.

    The bare model of a family that is trained to fill in masked tokens, or to name what is on an image, is an encoder;
    of any other, part of a decoder.

    Raises:
        CheckpointError: when it is an encoder-decoder, or has a head for another task.
    """
    classes = config.architectures or [""]
    if not isinstance(classes, list) or not isinstance(classes[0], str):
        raise CheckpointError(
            f"{where}: architectures must be names, got {shortened(repr(classes))}. Mend config.json."
        )
    saved = classes[0]
    found = _kind(config, saved)
    if found is None:
        what = shortened(saved or config.model_type)
        got = f"an encoder-decoder, {what}" if config.is_encoder_decoder else f"{what}, a head for another task"
        raise CheckpointError(
            f"{where}: must be a causal or masked language model, an image classifier or an encoder, got {got}. "
            + ("None can be converted yet." if config.is_encoder_decoder else "Save its base model alone.")
        )
    return found


def kind(model: PreTrainedModel) -> Kind:
    """Return the kind of a model in memory."""
    return _kind(model.config, type(model).__name__) or DECODER


def _kind(config: PreTrainedConfig, saved: str) -> Kind | None:
    """Return the kind of the class `saved` of that family, or None when it has a head for another task."""
    if config.is_encoder_decoder:
        return None
    families = (
        (modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, CLASSIFIER, IMAGE_ENCODER),
        (modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, MASKED, ENCODER),
    )
    bare = saved in _names(modeling_auto.MODEL_MAPPING_NAMES, config)
    pretrained = saved in _names(modeling_auto.MODEL_FOR_PRETRAINING_MAPPING_NAMES, config)
    for mapping, headed, without_head in families:
        if config.model_type in mapping:
            if not saved or saved in _names(mapping, config) or (pretrained and headed is MASKED):
                return headed
            if bare:
                return without_head
    # A name that no class has any more may still say what it was.
    causal = saved in _names(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, config) or saved.endswith("ForCausalLM")
    return DECODER if causal or bare or not saved else None


def _names(mapping: Any, config: PreTrainedConfig) -> tuple[str, ...]:
    found = mapping.get(config.model_type, ())
    return (found,) if isinstance(found, str) else tuple(found)


def positions(config: PreTrainedConfig) -> int | None:
    """Return how many tokens a call of the model may have in all, or None where nothing bounds them."""
    found: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found


def without_head(found: Kind) -> Kind | None:
    """Return the kind of the bare model of a kind with a head, or None where that is not one of ours."""
    return {MASKED.name: ENCODER, CLASSIFIER.name: IMAGE_ENCODER}.get(found.name)


def causal_class(config: PreTrainedConfig) -> str:
    """Return the name of transformers' class of causal language models of that configuration."""
    return _names(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, config)[0]


def without_pooler(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model without the layer that makes one vector of a text, which is no part of what the graph gives."""
    if isinstance(getattr(model, "pooler", None), nn.Module):
        setattr(model, "pooler", None)  # noqa: B010 - torch's type of an attribute is that of a module
    return model


def takes_segments(model: PreTrainedModel) -> bool:
    """Return whether the model tells several texts in one call apart, by `token_type_ids`."""
    segments = getattr(model.config, "type_vocab_size", 0)
    return segments > 1 and "token_type_ids" in inspect.signature(model.forward).parameters


def output(model: PreTrainedModel, given: Tensor, *, last: bool = False) -> Tensor:
    """Return what the model gives for token ids `[B, S]` or pixels `[B, C, H, W]`.

    With `last`, for the last token alone where it can be.
    """
    found = kind(model)
    options: dict[str, Any] = {"pixel_values" if found.images else "input_ids": given}
    if found.cached:
        options |= {"use_cache": False, "logits_to_keep": 1} if last else {"use_cache": False}
    result: Tensor = getattr(model(**options), found.output)
    return result


def completed(recipe: Recipe, found: Kind, config: PreTrainedConfig) -> Recipe:
    """Return the recipe for a model of that kind, with the calibration text that such a model has by default.

    Of an image model a window of text is an image.

    Raises:
        RecipeError: when it asks for what only a model with a cache can do.
        CalibrationError: when a window of text is longer than the model's positions, or an image model has no images.
    """
    recipe = recipe if recipe.calibration.source else recipe.replace({"calibration.source": found.source})
    most = positions(config)
    if not found.images and recipe.windows() and most is not None and recipe.calibration.window > most:
        raise CalibrationError(
            f"calibration.window: must be at most {most}, the positions of the model, got {recipe.calibration.window}. "
            f"Give --set calibration.window={most} or less."
        )
    if found.cached:
        return recipe
    if recipe.phases != "both":
        raise RecipeError(f"phases: must be both for a model without a cache, got {recipe.phases}. Leave it out.")
    if found.images:
        if recipe.calibration.source in {None, "self", "python"}:
            raise CalibrationError(
                f"calibration.source: must be images for an {found.name}, got {recipe.calibration.source}. "
                "Give --calibration with a folder of them, or hub:NAME[:CONFIG[:SPLIT]]."
            )
        return recipe
    if "self" in (recipe.calibration.source or "").split(","):
        raise RecipeError(
            "calibration.source: must be a text for an encoder, got self: it cannot write. "
            "Give --calibration FILE, or python."
        )
    return recipe
