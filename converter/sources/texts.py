"""Text: where calibration, validation and perplexity read from, as windows of token ids."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

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
    number = min(len(ids) // window, count or len(ids))
    if number < max(count, 1):
        raise CalibrationError(
            f"{source}: must have at least {max(count, 1) * window} tokens, got {len(ids)}. "
            "Give more text, or ask for fewer tokens or shorter windows."
        )
    inner = torch.tensor(ids[: number * window]).reshape(number, window)
    first_ids, last_ids = (torch.tensor(part, dtype=inner.dtype).expand(number, -1) for part in (before, after))
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
