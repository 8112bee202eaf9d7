"""Attention as one ONNX operator, with a mask that padding cannot turn into NaN."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

ATTENTION = "nmsparse_onnx"


def use_onnx_attention(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Let the model use the ONNX attention operator and its mask."""

    def mask(*args: Any, **kwargs: Any) -> Tensor:
        kwargs["dtype"] = dtype
        return _additive_mask(*args, **kwargs)

    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, mask)
    model.set_attn_implementation(ATTENTION)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    shape = (*query.shape[:-1], value.shape[-1])
    given = [query, key, value, *([] if mask is None else [mask])]
    y = torch.onnx.ops.symbolic("Attention", given, {"scale": scale}, dtype=query.dtype, shape=shape)
    return y.transpose(1, 2), None


def _additive_mask(*args: Any, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Tensor:
    """Return the mask `[B, 1, S, T]`: 0 where a key is seen and a large negative number elsewhere.

    Half the lowest number, not infinity: the query of a padding token sees no key, and must not become NaN.
    """
    kwargs["allow_is_causal_skip"] = False
    kwargs["allow_is_bidirectional_skip"] = False
    seen = sdpa_mask(*args, **kwargs)
    assert seen is not None
    return torch.where(seen, torch.zeros((), dtype=dtype), torch.full((), torch.finfo(dtype).min / 2, dtype=dtype))
