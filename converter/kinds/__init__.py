"""The kinds of models: which there are, and which one a model is. Each has a module that gives what `kind.py` says."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from converter.errors import CheckpointError, shortened
from converter.kinds.decoder import DECODER
from converter.kinds.encoder import ENCODER, MASKED
from converter.kinds.kind import Kind, positions
from converter.kinds.vision import CLASSIFIER, IMAGE_ENCODER
from converter.recipe import Recipe

__all__ = [
    "CLASSIFIER",
    "DECODER",
    "ENCODER",
    "IMAGE_ENCODER",
    "KINDS",
    "MASKED",
    "Kind",
    "causal_class",
    "completed",
    "kind",
    "kind_of",
    "output",
    "positions",
    "vocabulary",
    "without_head",
    "without_pooler",
]
KINDS = (DECODER, MASKED, ENCODER, CLASSIFIER, IMAGE_ENCODER)


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
    model_kind = _kind(config, saved)
    if model_kind is None:
        what = shortened(saved or config.model_type)
        got = f"an encoder-decoder, {what}" if config.is_encoder_decoder else f"{what}, a head for another task"
        raise CheckpointError(
            f"{where}: must be a causal or masked language model, an image classifier or an encoder, got {got}. "
            + ("None can be converted yet." if config.is_encoder_decoder else "Save its base model alone.")
        )
    return model_kind


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
    names = mapping.get(config.model_type, ())
    return (names,) if isinstance(names, str) else tuple(names)


def without_head(model_kind: Kind) -> Kind | None:
    """Return the kind of the bare model of a kind with a head, or None where that is not one of ours."""
    return {MASKED.name: ENCODER, CLASSIFIER.name: IMAGE_ENCODER}.get(model_kind.name)


def causal_class(config: PreTrainedConfig) -> str:
    """Return the name of transformers' class of causal language models of that configuration."""
    return _names(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, config)[0]


def without_pooler(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model without the layer that makes one vector of a text, which is no part of what the graph gives."""
    if isinstance(getattr(model, "pooler", None), nn.Module):
        setattr(model, "pooler", None)  # noqa: B010 - torch's type of an attribute is that of a module
    return model


def output(model: PreTrainedModel, given: Tensor, *, last: bool = False) -> Tensor:
    """Return what the model gives for token ids `[B, S]` or pixels `[B, C, H, W]`.

    With `last`, for the last token alone where it can be.
    """
    model_kind = kind(model)
    result: Tensor = getattr(model_kind.call(model, given, last), model_kind.output)
    return result


def completed(recipe: Recipe, model_kind: Kind, config: PreTrainedConfig) -> Recipe:
    """Return the recipe for a model of that kind, with the calibration text that such a model has by default.

    Of an image model a window of text is an image.

    Raises:
        RecipeError: when it asks for what only a model with a cache can do.
        CalibrationError: when a window of text is longer than the model's positions, or an image model has no images.
    """
    recipe = recipe if recipe.calibration.source else recipe.replace({"calibration.source": model_kind.source})
    model_kind.check(model_kind.name, recipe, config)
    return recipe


def vocabulary(processor: Any) -> dict[str, int]:
    """Return the tokens that what makes a model's input knows; none of a processor of images."""
    ids: dict[str, int] = processor.get_vocab() if hasattr(processor, "get_vocab") else {}
    return ids
