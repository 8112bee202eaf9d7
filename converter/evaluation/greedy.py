"""What two models write on from the same prompts, the likeliest token each time: where they part, and how far."""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from converter.errors import EvaluationError
from converter.evaluation.answers import Answers
from converter.evaluation.harness import Advance, greedy
from converter.evaluation.tasks import COLUMNS
from converter.kinds import positions

PROMPT = LENGTH = 64  # tokens of a prompt, and the most that are written after it
TASK = "greedy"


def write_on(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Tensor, kept: Answers, advance: Advance
) -> list[list[int]]:
    """Return what the model writes after each of the `prompts [count, tokens]`, or wrote, by what is `kept`.

    Raises:
        EvaluationError: when the model cannot take so many tokens.
    """
    most = positions(model.config)
    if most is not None and most < PROMPT + LENGTH:
        raise EvaluationError(f"--prompts: the model must take {PROMPT + LENGTH} tokens, got {most}. Leave it out.")
    written: list[list[int]] = []
    for number, prompt in enumerate(prompts.tolist()):
        key = [TASK, LENGTH, prompt]
        if key not in kept:
            kept[key] = greedy(model, tokenizer, prompt, LENGTH)
        written.append(kept[key])
        advance(number + 1, len(prompts))
    return written


def compared(model: PreTrainedModel, prompts: Tensor, dense: list[list[int]], written: list[list[int]]) -> pd.DataFrame:
    """Return a row for each prompt and metric of what `model` has `written`, beside what the dense model wrote.

    `same_next` is the share of the dense model's tokens that this one would also write after the same text; `same`
    that of equal tokens at equal places once each goes its own way; `parts_at` how many tokens are equal before the
    first that is not; `length` how many were written before the text was ended.
    """
    rows: list[tuple[Any, ...]] = []
    for number, (prompt, theirs, own) in enumerate(zip(prompts.tolist(), dense, written, strict=True)):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *theirs[:-1]]], device=model.device)).logits
        following = logits[0, len(prompt) - 1 :].argmax(-1).tolist()
        equal = [one == other for one, other in zip(theirs, own, strict=False)]
        frame = {
            "same_next": sum(one == other for one, other in zip(theirs, following, strict=True)) / len(theirs),
            "same": sum(equal) / max(len(theirs), len(own)),
            "parts_at": [*equal, False].index(False),
            "length": len(own),
        }
        rows += [(TASK, number, metric, float(value), 1.0, -1, -1) for metric, value in frame.items()]
    return pd.DataFrame(rows, columns=list(COLUMNS))
