"""Generation across the lengths at which a model goes on otherwise: PyTorch's tokens and the graph's have to be equal.

A graph that is right for a short text may be wrong behind such a length, and so may the loop around it: where the
rotary frequencies switch, a family's own `generate` drops its cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from converter.hugging_face import quiet
from converter.kinds.decoder import boundaries
from converter.records import Limits

BEFORE, AFTER = 4, 8  # tokens that are written before the boundary and after it
PADDING = 3  # of the second row, on the left
# Tokens. 4096 took 73 s with 135 million parameters on one core: as much as calibration with so much text.
MOST = 8192
# A longer text is one row, and is read in pieces, so that attention's scores for all of it are not in memory at once.
PIECE = 1024


@dataclass
class Generated:
    """How many tokens were compared at each boundary, why one was not tried, and what was beyond the limits."""

    tokens: dict[str, int] = field(default_factory=dict)
    not_tried: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    error: float = 0.0  # the largest of the logits, relative to the token's largest


def text_wanted(lengths: Mapping[str, int]) -> int:
    """Return how many tokens of text `generated` can use across such lengths."""
    return max((at for at in lengths.values() if at <= MOST), default=0)


def generated(model: PreTrainedModel, graph: PreTrainedModel, ids: Tensor, limits: Limits) -> Generated:
    """Return how the tokens of `graph` compare with those of the dense `model`, the likeliest each time.

    The prompts are from the text `ids [1, S]`, which is repeated where it is too short, one of them padded on the left.
    A token may be another where the model's logits for the two are nearer than two errors within the limits; what that
    row writes afterwards is not compared.
    """
    result = Generated()
    for name, at in boundaries(model.config).items():
        label = f"{name} {at}"
        if at > MOST:
            result.not_tried[label] = f"it takes too long for more than {MOST} tokens"
            continue
        rows, mask = _prompts(ids, at)
        reference = _written(model, rows, mask, at)
        result.tokens[label] = 0
        try:
            tested = _written(graph, rows, mask, at)
        except ValueError as error:  # the family's own loop gives what the graph does not serve
            result.failures.append(f"{label}: the graph must write on, got {error}")
            continue
        for row in range(len(rows)):
            _compare(result, label, row, reference, tested, rows.shape[1], limits)
    return result


def _prompts(ids: Tensor, at: int) -> tuple[Tensor, Tensor]:
    """Return token ids that end a little before the boundary, and their mask."""
    length = max(2, at - BEFORE)
    text = ids[0].repeat(-(-length // ids.shape[1]))[:length]
    mask = torch.ones(1 if length > PIECE else 2, length, dtype=torch.int64)
    rows = text.expand_as(mask).clone()
    if len(rows) > 1:
        pad = min(PADDING, length - 1)
        rows[1], mask[1, :pad] = rows[1].roll(pad), 0
        rows[1, :pad] = 0
    return rows, mask


def _written(model: Any, rows: Tensor, mask: Tensor, at: int) -> tuple[Tensor, Tensor]:
    """Return the tokens that the model writes across the boundary, `[B, N]`, and their logits, `[B, N, V]`."""
    count = at + AFTER - rows.shape[1]
    before, model.generation_config = model.generation_config, GenerationConfig()  # not the checkpoint's own settings
    try:
        with torch.no_grad(), quiet():
            out = model.generate(
                input_ids=rows,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=count,
                eos_token_id=None,
                prefill_chunk_size=PIECE if rows.shape[1] > PIECE else None,
                return_dict_in_generate=True,
                output_logits=True,
            )
    finally:
        model.generation_config = before
    return out.sequences[:, rows.shape[1] :], torch.stack(out.logits, 1)


def _compare(
    result: Generated,
    label: str,
    row: int,
    reference: tuple[Tensor, Tensor],
    tested: tuple[Tensor, Tensor],
    length: int,
    limits: Limits,
) -> None:
    """Judge one row: its tokens, and while they are equal its logits."""
    (wanted, expected), (written, logits) = ((tokens[row], scores[row]) for tokens, scores in (reference, tested))
    for number, (theirs, own) in enumerate(zip(wanted.tolist(), written.tolist(), strict=True)):
        largest = float(expected[number].abs().max())
        error = float((logits[number] - expected[number]).abs().max()) / max(largest, 1e-30)
        where = f"{label}: row {row}, token {length + number + 1}"
        if not error <= limits.model:
            result.failures.append(
                f"{where}: logits must differ by at most {limits.model:g} of the largest, got {error:.3g}."
            )
            return
        result.error = max(result.error, error)
        if theirs != own:
            gap = float(expected[number, theirs] - expected[number, own])
            if gap > 2 * limits.model * largest:
                result.failures.append(f"{where}: must be {theirs}, as PyTorch writes, got {own}.")
            return
        result.tokens[label] += 1
