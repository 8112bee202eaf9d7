"""Perplexity: how surprised a model is by a text, in windows that do not overlap."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from converter.errors import EvaluationError


@dataclass(frozen=True)
class Perplexity:
    """The perplexity of a text, the number of tokens it is the mean of, and the window's length."""

    perplexity: float
    tokens: int
    context: int


def perplexity(model: PreTrainedModel, windows: Tensor, progress: Callable[[int, int], None]) -> Perplexity:
    """Return exp(mean negative log-likelihood) of the token ids `windows [count, window]`.

    Every window starts anew; its first token is context only. `progress` is called with windows done and their total.

    Raises:
        EvaluationError: when it is not finite.
    """
    count, context = windows.shape
    mean = window_losses(model, windows, progress).mean()
    value = mean.exp().item()
    if not math.isfinite(value):
        raise EvaluationError(
            f"perplexity: must be finite, got {value} of a mean loss of {mean.item():g}. Where float16 overflows, "
            "export with --dtype bfloat16 or float32."
        )
    return Perplexity(value, count * (context - 1), context)


def window_losses(
    model: PreTrainedModel, windows: Tensor, progress: Callable[[int, int], None] = lambda done, total: None
) -> Tensor:
    """Return the mean negative log-likelihood of each window, `[count]`, in nats and float64."""
    losses = []
    with torch.no_grad():
        for number, window in enumerate(windows.to(model.device)):
            logits = model(input_ids=window[None]).logits[0, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits.float(), window[1:]).double())
            progress(number + 1, len(windows))
    return torch.stack(losses).cpu()
