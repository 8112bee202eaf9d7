"""Perplexity: how surprised a model is by a text, in windows that do not overlap."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Perplexity:
    """The perplexity of a text, the number of tokens it is the mean of, and the window's length."""

    perplexity: float
    tokens: int
    context: int


def perplexity(model: PreTrainedModel, windows: Tensor, progress: Callable[[int, int], None]) -> Perplexity:
    """Return exp(mean negative log-likelihood) of the token ids `windows [count, window]`.

    Every window starts anew; its first token is context only. `progress` is called with windows done and their total.
    """
    total, tokens = 0.0, 0
    with torch.no_grad():
        for number, window in enumerate(windows):
            logits = model(input_ids=window[None]).logits[0, :-1]
            total += torch.nn.functional.cross_entropy(logits.float(), window[1:], reduction="sum").double().item()
            tokens += len(window) - 1
            progress(number + 1, len(windows))
    return Perplexity(math.exp(total / tokens), tokens, windows.shape[1])
