"""What a kind of models is: all that a stage asks of it, one value or function each."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from converter.errors import RecipeError
from converter.recipe import Recipe

Array = np.ndarray[Any, Any]
Feed = OrderedDict[str, Array]  # inputs of the graph by name
# Sizes of the example inputs: all different, none 0 or 1, which torch.export would take for constants.
BATCH, SEQUENCE, PAST = 2, 3, 5


@dataclass(frozen=True)
class Wrapped:
    """A model with the inputs and outputs of its graph, the examples that it is traced with, and the graph's names.

    `free` are the dimensions of the examples that may be of any size, as torch.export has it. `dims` names the graph's
    dimensions, given those of each input.
    """

    module: nn.Module
    examples: dict[str, Any]
    free: dict[str, Any]
    inputs: list[str]
    outputs: list[str]
    dims: Callable[[Sequence[Sequence[str]]], dict[str, str]]


@dataclass(frozen=True)
class Kind:
    """A kind of models: how each is opened, called, traced, compared and judged.

    `auto` is transformers' class that opens it, `output` what the graph gives, `calls` how the graph is called, each
    one a phase of parity, `source` the calibration text when the recipe names none.
    """

    name: str
    auto: Any
    output: str
    calls: tuple[str, ...]
    source: str | None

    # What makes its input, and the input. `opened_by` is transformers' class, what it `must`, and its options.
    opened_by: tuple[Any, str, Mapping[str, Any]]
    blank: Callable[[Callable[[], Any]], Tensor]  # one that says nothing, where need be by what makes inputs
    read: Callable[[str, Any, PreTrainedConfig, int, int, str, int], Tensor]  # see `text.read`
    cut: Callable[[Tensor, int, int], Tensor]  # of one input so many rows of so many tokens
    pieces: Callable[[Tensor, int], tuple[Tensor, str]]  # of windows what is trained on, and what one is called
    validated: Callable[[Recipe], tuple[str, int]]  # the source of what OUT is compared on, and how many windows
    check: Callable[[str, Recipe, PreTrainedConfig], None]  # refuses a recipe for the kind of that name

    # The model: its call, what an error of it means, and, where it writes text, how it is sampled.
    call: Callable[[PreTrainedModel, Tensor, bool], Any]  # of what is given, whether for the last token alone
    distance: Callable[[Tensor, Tensor], Tensor]  # what distillation makes small
    loss: Callable[[Tensor, Tensor, torch.Generator], Tensor]  # of the output for one input, for the allocation

    # The graph: how it is traced and called, and the same calls in PyTorch.
    wrap: Callable[[PreTrainedModel, int, list[int], Tensor, torch.dtype], Wrapped]  # see `decoder.wrap`
    feeds: Callable[[PreTrainedModel, Tensor, Any], list[Feed]]  # one for each of `calls`, of floats of that dtype
    run: Callable[[PreTrainedModel, Feed], dict[str, Array]]
    steps: Callable[[PreTrainedModel, Tensor], Iterator[None]]  # makes one of `calls` after the other

    interface: bool = True  # must have transformers' attention interface; else its own attention is traced
    sampling: Callable[[Path, Callable[[], PreTrainedConfig], str], GenerationConfig] | None = None
    boundaries: Callable[[PreTrainedConfig], dict[str, int]] = field(default=lambda _: {})  # see `decoder.boundaries`


def positions(config: PreTrainedConfig) -> int | None:
    """Return how many tokens a call of the model may have in all, or None where nothing bounds them."""
    most: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return most


def of_logits(got: Tensor, wanted: Tensor) -> Tensor:
    """Return the mean over the rows of KL(wanted || found), in nats, of logits `[..., V]`."""
    logs, targets = (part.flatten(0, -2).log_softmax(-1) for part in (got, wanted))
    return nn.functional.kl_div(logs, targets, reduction="batchmean", log_target=True)


def of_states(got: Tensor, wanted: Tensor) -> Tensor:
    """Return the mean over the tokens of the squared error relative to the token's length, of states `[B, S, H]`."""
    return ((got - wanted).square().sum(-1) / wanted.square().sum(-1).clamp_min(1e-30)).mean()


def drawn(y: Tensor, _given: Tensor, generator: torch.Generator) -> Tensor:
    """Return the loss of logits `[..., V]` where the model is asked for what it draws itself."""
    y = y.reshape(-1, y.shape[-1])
    wanted = y.detach().softmax(-1).multinomial(1, generator=generator)[:, 0]
    return nn.functional.cross_entropy(y, wanted, reduction="sum")


def signed(y: Tensor, _given: Tensor, generator: torch.Generator) -> Tensor:
    """Return the sum of states under random signs: (g . e)^2 is, on average, the square of what an error does."""
    signs = torch.randint(2, y.shape, generator=generator, device=y.device) * 2 - 1
    return (y * signs).sum()


def check_phases(recipe: Recipe) -> None:
    """Refuse phases of a model that has one call.

    Raises:
        RecipeError: when the recipe names a phase.
    """
    if recipe.phases != "both":
        raise RecipeError(f"phases: must be both for a model without a cache, got {recipe.phases}. Leave it out.")


def once(model: PreTrainedModel, given: Tensor, call: Callable[[PreTrainedModel, Tensor, bool], Any]) -> Iterator[None]:
    """Make the one call of a model without a cache."""
    call(model, given, False)
    yield


def run_once(model: PreTrainedModel, feed: Feed, output: str) -> dict[str, Array]:
    """Return what a model without a cache gives for a call of its graph."""
    given = {name: torch.from_numpy(array) for name, array in feed.items()}
    out = model(**{name: part.float() if part.is_floating_point() else part for name, part in given.items()})
    return {output: getattr(out, output).numpy()}
