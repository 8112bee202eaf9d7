"""What a model of OUT may be called with: an argument is returned as the graph takes it, or refused in one sentence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.utils.generic import ModelOutput


def refuse(others: Mapping[str, Any], served: Iterable[str]) -> None:
    """Refuse what no graph of ours serves, where it is given; `served` says what may be.

    Raises:
        ValueError: for the first that is neither None nor False.
    """
    for name, value in others.items():
        if value is not None and value is not False:
            raise ValueError(
                f"{name}: must be left out, got {_shown(value)}. The graph of OUT serves {', '.join(served)}; "
                "open the checkpoint itself for more."
            )


def whole(name: str, given: Any, shape: tuple[int | None, ...], most: int | None = None, least: int = 0) -> Tensor:
    """Return integers of any width in 64 bits, from `least` to below `most`; None in `shape` is any length but 0.

    Raises:
        ValueError: when it is anything else.
    """
    _check_shape(name, given, shape)
    if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
        raise ValueError(f"{name}: must be whole numbers, got {given.dtype}. Give torch.int64.")
    numbers: Tensor = given.to(torch.int64)
    low, high = int(numbers.min()), int(numbers.max())
    if low < least or (most is not None and high >= most):
        limit = "" if most is None else f" to {most - 1}"
        raise ValueError(
            f"{name}: must be from {least}{limit}, got {low if low < least else high}. "
            "Is it from this model's tokenizer?"
        )
    return numbers


def real(name: str, given: Any, shape: tuple[int | None, ...]) -> Tensor:
    """Return a tensor of floating-point numbers; None in `shape` is any length but 0.

    Raises:
        ValueError: when it is anything else.
    """
    _check_shape(name, given, shape)
    if not given.is_floating_point():
        raise ValueError(f"{name}: must be floating-point numbers, got {given.dtype}. Let the processor make them.")
    numbers: Tensor = given
    return numbers


def mask(given: Any, shape: tuple[int, int]) -> Tensor:
    """Return a mask of tokens, of any dtype, in 64 bits.

    Raises:
        ValueError: when it is not of ones and zeros of that shape.
    """
    _check_shape("attention_mask", given, shape)
    numbers: Tensor = given.to(torch.int64)
    if not ((given == 0) | (given == 1)).all():
        raise ValueError("attention_mask: must be 1 for a token that is seen and 0 for padding, got other numbers.")
    return numbers


def zeros(name: str, given: Any, shape: tuple[int, int]) -> None:
    """Refuse token types that say anything, for a graph that knows none.

    Raises:
        ValueError: when they are not all zero.
    """
    if given is not None:
        whole(name, given, shape, most=None)
        if given.any():
            raise ValueError(f"{name}: must be all zero for a model that knows no token types, got others.")


def returned(config: PreTrainedConfig, out: ModelOutput, return_dict: bool | None) -> Any:
    """Return the output, or its parts as a tuple where the call, or else the configuration, asks for that."""
    wanted = config.return_dict if return_dict is None else return_dict
    return out if wanted else out.to_tuple()


def _check_shape(name: str, given: Any, shape: tuple[int | None, ...]) -> None:
    wanted = "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
    if not isinstance(given, Tensor):
        raise ValueError(f"{name}: must be a tensor {wanted}, got {_shown(given)}.")
    fits = given.ndim == len(shape) and all(
        size > 0 if wants is None else size == wants for size, wants in zip(given.shape, shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{name}: must be a tensor {wanted}, got {list(given.shape)}.")


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, str | int | float) else type(value).__name__
