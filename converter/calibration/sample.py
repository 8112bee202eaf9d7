"""Text that a model writes itself, to be calibrated on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from converter.calibration.products import bfloat16_products
from converter.errors import CalibrationError
from converter.hugging_face import quiet
from converter.sources.texts import check_ids


class _Count(StoppingCriteria):
    """Never stops; tells how far sampling is."""

    def __init__(self, progress: Callable[[int, int], None], total: int) -> None:
        self.progress, self.total = progress, total

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        self.progress(input_ids.numel(), self.total)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def sampled(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    window: int,
    seed: int,
    progress: Callable[[int, int], None],
) -> Tensor:
    """Return `count` windows of `window` token ids that the model itself writes, at temperature 1, `[count, window]`.

    Each begins as the tokenizer begins a text, and goes on with a token drawn from the whole vocabulary, so that the
    texts are of every kind that the model knows (Liu et al. 2023, arXiv:2305.17888); an end of text is a token like
    any other. Deviation from the source: every later token is drawn from the model's whole distribution.
    """
    special = set(tokenizer.all_special_ids)
    known = min(len(tokenizer), model.config.get_text_config().vocab_size)
    plain = torch.tensor([number for number in range(known) if number not in special])
    begin = torch.tensor(tokenizer("").input_ids, dtype=torch.int64).expand(count, -1)
    check_ids(begin, model.config)
    if not len(plain) or begin.shape[1] + 1 >= window:
        raise CalibrationError(
            f"calibration.source: the model must have room to write, got {len(plain)} tokens to begin with and windows "
            f"of {window} after the {begin.shape[1]} that begin a text. Give a text, or longer windows."
        )
    # Quiet: transformers warns of an end token that no token can be.
    cuda = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(cuda), bfloat16_products(), quiet():
        torch.manual_seed(seed)
        start = torch.cat([begin, plain[torch.randint(len(plain), (count, 1))]], 1).to(model.device)
        ids: Tensor = model.generate(  # type: ignore[operator]
            start,
            attention_mask=torch.ones_like(start),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
            max_new_tokens=window - start.shape[1],
            eos_token_id=-1,
            pad_token_id=int(plain[0]),
            stopping_criteria=StoppingCriteriaList([_Count(progress, count * window)]),
        )
    return ids.cpu()
