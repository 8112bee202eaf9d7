"""The reference of the op `SparseLinear`: parameters as fitted, their baked form, and both ways to compute y.

Shapes: T tokens (all leading axes), K input channels, N output channels. `weight` is `[N, K]` as in torch; the baked
`weight` is `[K, N]`, so that a dropped channel is one row that need not be read.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from converter.names import Phases
from converter.signature import SHIFT_MODES, VARIANCE_FLOOR
from converter.sparsity.pattern import mask

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # integers as wide as a number of so many bytes


@dataclass(frozen=True)
class Params:
    """What calibration decides for one layer; every tensor is float32."""

    keep: int
    group: int
    shift_mode: str = "none"
    variance: bool = False
    channel_scale: Tensor | None = None  # [K] multiplies |z| to give the score
    shift: Tensor | None = None  # [K] with shift_mode "static"
    output_scale: Tensor | None = None  # [N] multiplies the layer's output
    output_shift: Tensor | None = None  # [N] is added to it afterwards
    permutation: Tensor | None = None  # [K] int64: group g holds channels permutation[g*group : (g+1)*group]
    residual_in: Tensor | None = None  # [K, r] with residual_out: a product of low rank for what is dropped
    residual_out: Tensor | None = None  # [r, N]
    weight: Tensor | None = None  # [N, K] takes the place of the checkpoint's
    sequence_norm: bool = False  # scores are multiplied by the channels' norms over the sequence; in torch only

    def on(self, device: torch.device | str) -> Params:
        """Return the same parameters with every tensor on `device`."""
        values: dict[str, Any] = dict(vars(self))
        for name, value in values.items():
            values[name] = value.to(device) if isinstance(value, Tensor) else value
        return Params(**values)


@dataclass(frozen=True)
class Baked:
    """The op's attributes and inputs; computes in the dtype of its tensors (float64 in tests)."""

    keep: int
    group: int
    shift_mode: str
    variance: bool
    w: Tensor  # [K, N], the op's W
    bias: Tensor | None  # [N]
    channel_scale: Tensor | None  # [K]
    shift: Tensor | None  # [K]
    row_sum: Tensor | None  # [N], with a per-token shift
    permutation: Tensor | None = None  # [K] int64
    residual_in: Tensor | None = None  # [K, r]
    residual_out: Tensor | None = None  # [r, N]
    sequence_norm: bool = False  # no attribute of the op: what has it is not exported

    def to(self, dtype: torch.dtype) -> Baked:
        """Return the same layer with every tensor of numbers in `dtype`."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in values.items():
            values[name] = value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        return Baked(**values)


def token_shift(x: Tensor, shift_mode: str, shift: Tensor | None) -> Tensor | None:
    """Return eta: None, `[K]` (static) or `[..., 1]` (one number a token).

    The median of an even number of channels is the lower of the middle two, as `torch.median` has it: an element of
    x, so that every runtime finds the same bits.
    """
    if shift_mode == "none":
        return None
    if shift_mode == "static":
        return shift
    if shift_mode == "token_mean":
        return x.mean(-1, keepdim=True)
    if shift_mode == "token_median":
        return x.median(-1, keepdim=True).values
    raise AssertionError(f"shift_mode {shift_mode!r} is not one of {SHIFT_MODES}")


def ranked(x: Tensor, params: Params | Baked) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return z = x - eta, its scores, and eta; with `sequence_norm` x is `[..., S, K]`, S one sequence."""
    eta = token_shift(x, params.shift_mode, params.shift)
    z = x if eta is None else x - eta
    scores = z.abs() if params.channel_scale is None else z.abs() * params.channel_scale
    if params.sequence_norm:
        scores = scores * torch.linalg.vector_norm(x, dim=-2, keepdim=True)
    return z, scores, eta


def select(x: Tensor, params: Params | Baked) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return z = x - eta, zs, what is kept of it beside zeros, and eta."""
    z, scores, eta = ranked(x, params)
    zs: Tensor = _Kept.apply(z, kept(scores, params))  # type: ignore[no-untyped-call]
    return z, zs, eta


class _Kept(torch.autograd.Function):
    """z where the mask is true, 0 elsewhere; of a dropped Inf too.

    The bits are multiplied, as integers: `torch.where` takes ten times as long on a CPU, for it branches.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return (z.contiguous().view(BITS[z.element_size()]) * mask).view(z.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return _Kept.apply(grads[0], mask), None  # type: ignore[no-untyped-call]


def kept(scores: Tensor, params: Params | Baked) -> Tensor:
    """Return the mask `[..., K]` in the order of the channels, whoever shares a group."""
    if params.permutation is None:
        return mask(scores, params.keep, params.group)
    there, back = params.permutation.expand_as(scores), params.permutation.argsort().expand_as(scores)
    return mask(scores.gather(-1, there), params.keep, params.group).gather(-1, back)  # faster than indexing


def token_scale(z: Tensor, zs: Tensor) -> Tensor:
    """Return nu `[..., 1]` = sqrt(Var(z) / max(Var(zs), 1e-9)), unbiased and centred.

    Source: arXiv:2509.22166 eq. (5); taken after the GEMM, where it is a scale of rows.
    """
    return (_variance(z) / _variance(zs).clamp_min(VARIANCE_FLOOR)).sqrt()


def _variance(z: Tensor) -> Tensor:
    # Two passes, as the op's function body has it; torch.var takes several times as long on a CPU.
    return (z - z.mean(-1, keepdim=True)).square().sum(-1, keepdim=True) / (z.shape[-1] - 1)


def approximate(x: Tensor, params: Params) -> tuple[Tensor, Tensor, Tensor]:
    """Return z, zs and xhat = nu * zs + eta, what stands for x before the weight; all `[..., K]`."""
    z, zs, eta = select(x, params)
    xhat = zs * token_scale(z, zs) if params.variance else zs
    return z, zs, xhat if eta is None else xhat + eta


def apply(x: Tensor, weight: Tensor, bias: Tensor | None, params: Params) -> Tensor:
    """Return y `[..., N]` by the definition, with xhat = nu * zs + eta.

    y = (xhat W^T + b + (z - zs) residual_in residual_out) * output_scale + output_shift.

    This is what a mitigation means. It adds eta back, which makes the activations dense: never run it for speed.
    Source: arXiv:2509.22166 eqs. (3) and (5).
    """
    z, zs, xhat = approximate(x, params)
    y = nn.functional.linear(xhat, weight, bias)
    if params.residual_in is not None and params.residual_out is not None:
        y = y + (z - zs) @ params.residual_in.to(z.dtype) @ params.residual_out.to(z.dtype)
    y = y if params.output_scale is None else y * params.output_scale
    return y if params.output_shift is None else y + params.output_shift


def bake(weight: Tensor, bias: Tensor | None, params: Params) -> Baked:
    """Return the op that equals `apply`: what is static is folded into weight and bias, row sums are precomputed."""
    residual_out = params.residual_out
    if params.output_scale is not None:
        residual_out = None if residual_out is None else residual_out * params.output_scale
        weight = weight * params.output_scale[:, None].to(weight.dtype)
        bias = None if bias is None else bias * params.output_scale.to(bias.dtype)
    if params.shift_mode == "static" and params.shift is not None:
        folded = weight.double() @ params.shift.double()
        bias = (folded if bias is None else bias.double() + folded).to(weight.dtype)
    if params.output_shift is not None:
        bias = params.output_shift.to(weight.dtype) if bias is None else bias + params.output_shift.to(bias.dtype)
    per_token = params.shift_mode in {"token_mean", "token_median"}
    return Baked(
        keep=params.keep,
        group=params.group,
        shift_mode=params.shift_mode,
        variance=params.variance,
        w=weight.t(),
        bias=bias,
        channel_scale=params.channel_scale,
        shift=params.shift,
        row_sum=weight.double().sum(-1).to(weight.dtype) if per_token else None,
        permutation=params.permutation,
        residual_in=params.residual_in,
        residual_out=residual_out,
        sequence_norm=params.sequence_norm,
    )


class SparseLinear(nn.Module):
    """The op in torch, for calibration and as the reference that runtimes are compared with."""

    def __init__(self, baked: Baked, phases: Phases = "both") -> None:
        """Keep the baked tensors; `weight` stays a view of the layer it came from."""
        super().__init__()
        self.baked, self.phases = baked, phases

    def forward(self, x: Tensor) -> Tensor:
        """Return y `[..., N]` for x `[..., S, K]`: nu * (zs W) + eta * row_sum + bias + residual.

        Where the phase is dense every channel is kept: zs = z, nu = 1 and no residual.
        """
        baked, sparse = self.baked, self.sparse(x)
        z, zs, eta = self.selected(x)
        y = zs @ baked.w
        if sparse and baked.variance:
            y = y * token_scale(z, zs)
        if baked.row_sum is not None and eta is not None:
            y = y + eta * baked.row_sum
        if sparse and baked.residual_in is not None and baked.residual_out is not None:
            y = y + (z - zs) @ baked.residual_in @ baked.residual_out
        return y if baked.bias is None else y + baked.bias

    def selected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return z, zs and eta as the function `select` does, with zs = z where the phase is dense."""
        z, zs, eta = select(x, self.baked)
        return z, zs if self.sparse(x) else z, eta

    def sparse(self, x: Tensor) -> bool:
        """Return whether the layer is sparse for x `[..., S, K]`: it is a prefill when S, its tokens, are several."""
        return self.phases == "both" or (x.shape[-2] > 1) == (self.phases == "prefill")


def install(
    model: nn.Module, name: str, params: Params, linear: nn.Module | None = None, phases: Phases = "both"
) -> None:
    """Put the sparse layer of `linear`, by default the module called `name`, in that place, over the same weight."""
    linear = linear or model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    bias = None if linear.bias is None else linear.bias.data
    weight = linear.weight.data if params.weight is None else params.weight
    model.set_submodule(name, SparseLinear(bake(weight, bias, params), phases))
