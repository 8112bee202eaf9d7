"""Text: where calibration, validation and perplexity read from, as windows of token ids."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from converter.calibration.products import bfloat16_products
from converter.checkpoint import quiet
from converter.errors import CalibrationError, CheckpointError, said, shortened

SOURCES = (
    "a file (.jsonl, .parquet, or any other as plain text), hub:NAME[:CONFIG[:SPLIT]], "
    "python (the language reference that comes with every Python)"
)


def texts(source: str, field: str = "text") -> Iterator[str]:
    """Yield the documents of `source`; of tables, the column `field`.

    Raises:
        CalibrationError: when the source does not exist or has no such field.
    """
    if source == "python":
        from pydoc_data.topics import topics

        yield from (topics[name] for name in sorted(topics))
    elif source.startswith("hub:"):
        yield from _rows(_hub(source), source, field)
    else:
        path = Path(source)
        try:
            there = path.is_file()
        except OSError:  # such as a name that is too long
            there = False
        if not there:
            raise CalibrationError(f"text: must be {SOURCES}; there is no file {shortened(repr(source))}.")
        if path.suffix == ".jsonl":
            yield from _rows(_json_lines(path), source, field)
        elif path.suffix == ".parquet":
            yield from _rows(_parquet(path), source, field)
        else:
            try:
                yield path.read_text("utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise CalibrationError(f"{source}: must be UTF-8 text, got {said(error)}.") from error


def _json_lines(path: Path) -> Iterator[Any]:
    line = 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            for text in file:
                line += 1
                if text.strip():
                    yield json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise CalibrationError(f"{path}, line {line}: must be JSON, got {said(error)}.") from error


def _parquet(path: Path) -> Iterator[Any]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise CalibrationError(f"{path}: reading parquet needs pyarrow. Install nmsparse[data].") from error
    try:
        for batch in ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except (ArrowException, OSError) as error:
        raise CalibrationError(f"{path}: must be a parquet file, got {said(error)}. Fetch it again.") from error


def _hub(source: str) -> Iterator[Any]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise CalibrationError(f"{source}: reading the Hub needs datasets. Install nmsparse[data].") from error
    name, config, split = hub_name(source)
    try:
        yield from load_dataset(name, config, split=split, streaming=True)
    except Exception as error:  # whatever a remote data set may raise
        raise CalibrationError(f"{source}: must be a data set that can be reached, got {error}.") from error


def hub_name(source: str) -> tuple[str, str | None, str]:
    """Return the name, the configuration and the split in hub:NAME[:CONFIG[:SPLIT]]."""
    _, name, *rest = source.split(":")
    config, split = [*rest, "", ""][:2]
    return name, config or None, split or "train"


def _rows(rows: Iterator[Any], source: str, field: str) -> Iterator[str]:
    for row in rows:
        if not isinstance(row, dict) or not isinstance(row.get(field), str):
            have = sorted(row) if isinstance(row, dict) else type(row).__name__
            raise CalibrationError(
                f"{source}: each row must have text in {shortened(repr(field))}, got {shortened(str(have))}. "
                "Choose with --set calibration.field=NAME."
            )
        yield row[field]


def windows(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    window: int,
    field: str = "text",
    *,
    framed: bool = False,
    begin: Sequence[int] = (),
) -> Tensor:
    """Return the first `count` windows of `window` token ids of the source, `[count, window]`; 0 counts all.

    Documents follow each other, divided by two line ends. With `framed`, each window begins and ends as the tokenizer
    begins and ends a text, as an encoder always sees it; else it begins with the tokens `begin`.

    Raises:
        CalibrationError: when the text is too short.
    """
    before, after = _frame(tokenizer) if framed else ([*begin], [])
    whole, window = window, window - len(before) - len(after)
    if window < 1:
        raise CalibrationError(f"{source}: windows must have room for a text's first and last tokens, got {whole}.")
    ids: list[int] = []
    first = True
    for text in texts(source, field):
        try:
            ids += tokenizer.encode(text if first else "\n\n" + text, add_special_tokens=False, verbose=False)
        except Exception as error:  # whatever a tokenizer says to a text that is none
            raise CalibrationError(f"{source}: must be a text that can be divided, got {said(error)}.") from error
        first = False
        if count and len(ids) >= count * window:
            break
    found = min(len(ids) // window, count or len(ids))
    if found < max(count, 1):
        raise CalibrationError(
            f"{source}: must have at least {max(count, 1) * window} tokens, got {len(ids)}. "
            "Give more text, or ask for fewer tokens or shorter windows."
        )
    inner = torch.tensor(ids[: found * window]).reshape(found, window)
    first_ids, last_ids = (torch.tensor(part, dtype=inner.dtype).expand(found, -1) for part in (before, after))
    return torch.cat([first_ids, inner, last_ids], 1)


def check_ids(ids: Tensor, config: PreTrainedConfig) -> None:
    """Refuse token ids that the model has no embedding for.

    Raises:
        CheckpointError: naming the largest.
    """
    known: int | None = getattr(config.get_text_config(), "vocab_size", None)
    if known is not None and ids.numel() and int(ids.max()) >= known:
        raise CheckpointError(
            f"tokenizer: ids must be below {known}, the number of the model's embeddings, got {int(ids.max())}. "
            "It is another model's: put the right one beside the weights."
        )


def _frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the token ids that the tokenizer puts before and behind a text."""
    bare = tokenizer.encode("a", add_special_tokens=False)
    whole = tokenizer.encode("a")
    start = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return whole[:start], whole[start + len(bare) :]


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
