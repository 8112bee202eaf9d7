"""A model of ours behind the interface of lm-evaluation-harness: log-likelihoods in batches, and greedy generation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from converter.errors import EvaluationError
from converter.evaluation.answers import Answers
from converter.kinds import positions

Advance = Callable[[int, int], None]
SPARED = 64  # tokens that a context run once must spare: less is made up for by a batch of many contexts
Answer = tuple[float, bool]


def longest(config: PreTrainedConfig, context: int) -> int:
    """Return `context`, or what a decoder can take where that is less, in tokens."""
    return min(context, positions(config) or context)


class HarnessLM(TemplateLM):  # type: ignore[misc] # lm-eval has no types
    """A transformers model, or OUT in ONNX Runtime, as lm-eval calls it.

    Sequences that are equal but for their last token are run once, each batch has sequences of about one length, and a
    context that several continuations follow is run once where that spares more than a batch does. Sequences are padded
    on the right, where a causal model does not look.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        context: int,
        batch: int,
        advance: Advance = lambda done, total: None,
        answers: Answers | None = None,
    ) -> None:
        """Keep them; no sequence has more than `context` tokens, or what the model can take if that is less.

        What `answers` holds is not asked again, and what is asked is kept there.
        """
        super().__init__()
        self.model, self.tokenizer, self.batch, self.advance = model, tokenizer, batch, advance
        self.max_length, self.answers = longest(model.config, context), answers

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without a context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's name, as lm-eval notes it."""
        return str(self.tokenizer.name_or_path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the tokens of a string; a token that begins a text is not put before one that has it already."""
        bos = self.tokenizer.bos_token
        if add_special_tokens is None:
            add_special_tokens = not (bos and string.startswith(bos))
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        return ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the conversation as the model's template writes it."""
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return str(text)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Answer]:
        """Return the log-likelihood of each continuation after its context, and whether it is the likeliest."""

        def ask(new: list[Instance]) -> list[Answer]:
            answers: list[Answer] = super(HarnessLM, self).loglikelihood(new, disable_tqdm=True)  # the progress is ours
            return answers

        return [(float(score), bool(best)) for score, best in self._kept("loglikelihood", requests, ask)]

    def _kept(self, method: str, requests: list[Instance], ask: Callable[[list[Instance]], list[Any]]) -> list[Any]:
        """Return the answers, of which only those are asked for that are not known."""
        if self.answers is None:
            return ask(requests)
        keys = [[method, *request.args] for request in requests]
        new = [number for number, key in enumerate(keys) if key not in self.answers]
        for number, answer in zip(new, ask([requests[number] for number in new]) if new else [], strict=True):
            self.answers[keys[number]] = answer
        return [self.answers[key] for key in keys]

    def _note(self, method: str, arguments: tuple[Any, ...], answer: Any) -> None:
        """Keep an answer as soon as it is there: what is interrupted goes on."""
        if self.answers is not None:
            self.answers[[method, *arguments]] = answer

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]], **_: Any
    ) -> list[Answer]:
        asked: dict[tuple[int, ...], dict[tuple[int, ...], list[int]]] = {}  # context, continuation, requests
        for number, (_text, context, continuation) in enumerate(requests):
            length = len(context) + len(continuation) - 1  # nothing is asked after the last token
            if length > self.max_length:
                raise EvaluationError(
                    f"request {number}: an example must have at most {self.max_length} tokens, got {length}. "
                    "Raise --context where the model can take it, or ask for fewer --shots."
                )
            asked.setdefault(tuple(context), {}).setdefault(tuple(continuation[:-1]), []).append(number)
        answers: list[Answer | None] = [None] * len(requests)
        done = 0

        def note(numbers: list[int], logits: Tensor) -> None:
            nonlocal done
            for number in numbers:
                text, _context, continuation = requests[number]
                answers[number] = answer = _score(logits, continuation)
                if text is not None:
                    self._note("loglikelihood", text, answer)
                done += 1

        alone: dict[tuple[int, ...], list[int]] = {}
        for before, several in asked.items():
            if len(before) * (len(several) - 1) < SPARED:
                for after, numbers in several.items():
                    alone.setdefault(before + after, []).extend(numbers)
                continue
            for after, logits in self._after(before, list(several)):
                note(several[after], logits)
            self.advance(done, len(requests))
        ordered = sorted(alone, key=len, reverse=True)
        for start in range(0, len(ordered), self.batch):
            part = ordered[start : start + self.batch]
            for ids, logits in zip(part, self._logits(part), strict=True):
                note(alone[ids], logits[: len(ids)])
            self.advance(done, len(requests))
        return [answer for answer in answers if answer is not None]

    def _after(
        self, context: tuple[int, ...], continuations: list[tuple[int, ...]]
    ) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """Yield each continuation with its logits and the one before them; what the context leaves is computed once."""
        cache = DynamicCache()
        first = self._logits([context], cache)[:, -1:]
        for start in range(0, len(continuations), self.batch):
            part = continuations[start : start + self.batch]
            own = copy.deepcopy(cache)
            own.batch_repeat_interleave(len(part))
            logits = first.expand(len(part), -1, -1)
            if any(part):
                logits = torch.cat([logits, self._logits(part, own)], 1)
            for continuation, row in zip(part, logits, strict=True):
                yield continuation, row[: len(continuation) + 1]

    def _logits(self, part: list[tuple[int, ...]], cache: Cache | None = None) -> Tensor:
        """Return the logits of the sequences, one batch, after those whose keys and values `cache` holds."""
        longest = max(map(len, part))
        rows = [[*ids, *[self.eot_token_id] * (longest - len(ids))] for ids in part]
        with torch.no_grad():
            ids = torch.tensor(rows, device=self.model.device)
            logits: Tensor = self.model(input_ids=ids, past_key_values=cache).logits
        return logits

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text, in windows as long as the context, which overlap only at the end."""
        return self._kept("loglikelihood_rolling", requests, self._rolling)

    def _rolling(self, requests: list[Instance]) -> list[float]:
        sums = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            parts = [(None, *make_disjoint_window(window)) for window in windows]
            sums.append(sum(score for score, _ in self._loglikelihood_tokens(parts)))
            self._note("loglikelihood_rolling", (text,), sums[-1])
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return what the model writes after each prompt, greedily, to the first string that ends it."""
        return self._kept("generate_until", requests, self._written)

    def _written(self, requests: list[Instance]) -> list[str]:
        texts = []
        for number, (prompt, settings) in enumerate(request.args for request in requests):
            until = settings.get("until") or []
            until = [until] if isinstance(until, str) else until
            length = int(settings.get("max_gen_toks", 256))
            ids = self.tok_encode(prompt)
            if len(ids) + length > self.max_length:
                raise EvaluationError(
                    f"request {number}: prompt and answer must have at most {self.max_length} tokens, got {len(ids)} "
                    f"and {length}. Raise --context where the model can take it, or ask for fewer --shots."
                )
            new = greedy(self.model, self.tokenizer, ids, length, until)
            text = postprocess_generated_text(self.tokenizer.decode(new, skip_special_tokens=True), until, None)
            self._note("generate_until", (prompt, settings), text)
            texts.append(text)
            self.advance(number + 1, len(requests))
        return texts


def greedy(
    model: Any, tokenizer: PreTrainedTokenizerBase, ids: list[int], length: int, until: Sequence[str] = ()
) -> list[int]:
    """Return at most `length` tokens that the model writes after `ids`, the likeliest each time."""
    stop: dict[str, Any] = {"stop_strings": list(until), "tokenizer": tokenizer} if until else {}
    prompt = torch.tensor([ids], device=model.device)
    mask = torch.ones_like(prompt)
    end = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.no_grad():
        out = model.generate(
            input_ids=prompt, attention_mask=mask, max_new_tokens=length, do_sample=False, pad_token_id=end, **stop
        )
    new: list[int] = out[0, len(ids) :].tolist()
    return new


def _score(logits: Tensor, continuation: list[int]) -> Answer:
    scores = logits[-len(continuation) :].float().log_softmax(-1)
    wanted = torch.tensor(continuation, device=scores.device)
    chosen = scores.gather(-1, wanted[:, None])
    return float(chosen.sum()), bool((scores.argmax(-1) == wanted).all())
