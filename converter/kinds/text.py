"""What kinds of models that read text share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedConfig

from converter.errors import CalibrationError
from converter.kinds.kind import positions
from converter.recipe import Recipe
from converter.sources.texts import check_ids, windows

OPENED_BY: tuple[Any, str, dict[str, Any]] = (AutoTokenizer, "come with a tokenizer", {})
VALIDATION = "python"


def blank(_processor: Callable[[], Any]) -> Tensor:
    """Return two tokens."""
    return torch.zeros(1, 2, dtype=torch.int64)


def read(
    source: str,
    tokenizer: Any,
    config: PreTrainedConfig,
    count: int,
    window: int,
    field: str,
    _seed: int,
    *,
    framed: bool,
) -> Tensor:
    """Return `count` windows of `window` token ids of a source, each of which the model has an embedding for."""
    ids = windows(source, tokenizer, count, window, field, framed=framed)
    check_ids(ids, config)
    return ids


def cut(ids: Tensor, rows: int, tokens: int) -> Tensor:
    """Return so many rows of the first tokens of `ids [1, S]`."""
    return ids[:, :tokens].expand(rows, -1)


def pieces(windows: Tensor, window: int) -> tuple[Tensor, str]:
    """Return windows of at most `window` tokens, and what they are called."""
    cut_windows = windows.reshape(-1, min(window, windows.shape[1]))
    return cut_windows, f"windows of {cut_windows.shape[1]}"


def validated(_recipe: Recipe) -> tuple[str, int]:
    """Return the source of one window."""
    return VALIDATION, 1


def check_window(recipe: Recipe, config: PreTrainedConfig) -> None:
    """Refuse windows that are longer than the model's positions.

    Raises:
        CalibrationError: when they are.
    """
    most = positions(config)
    if recipe.windows() and most is not None and recipe.calibration.window > most:
        raise CalibrationError(
            f"calibration.window: must be at most {most}, the positions of the model, got {recipe.calibration.window}. "
            f"Give --set calibration.window={most} or less."
        )
