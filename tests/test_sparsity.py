"""Laws of the mathematics, over random layers."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from converter.errors import RecipeError
from converter.signature import SHIFT_MODES
from converter.sparsity.linear import Params, SparseLinear, apply, bake, select
from converter.sparsity.mitigations import mitigations
from converter.sparsity.pattern import Pattern, mask

SHAPES = st.sampled_from(
    [(2, 4), (1, 4), (4, 8), (8, 16), (3, 16), (16, 32), (7, 32), (32, 32), (2, 5), (7, 12), (50, 96)]
)


@settings(max_examples=150, deadline=None)
@given(
    shape=SHAPES,
    seed=st.integers(0, 2**31),
    shift_mode=st.sampled_from(SHIFT_MODES),
    flags=st.tuples(*[st.booleans()] * 8),
    tokens=st.integers(1, 5),
)
def test_bake_equals_apply(
    shape: tuple[int, int], seed: int, shift_mode: str, flags: tuple[bool, ...], tokens: int
) -> None:
    keep, group = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    variance, bias, scaled, output_scale, output_shift, permuted, residual, sequence_norm = flags
    in_features, out_features = 2 * group, 5
    params = Params(
        keep,
        group,
        shift_mode=shift_mode,
        variance=variance,
        channel_scale=normal(in_features).abs() if scaled else None,
        shift=normal(in_features) if shift_mode == "static" else None,
        output_scale=normal(out_features) if output_scale else None,
        output_shift=normal(out_features) if output_shift else None,
        permutation=torch.randperm(in_features, generator=generator) if permuted else None,
        residual_in=normal(in_features, 2) if residual else None,
        residual_out=normal(2, out_features) if residual else None,
        sequence_norm=sequence_norm,
    )
    weight, b = normal(out_features, in_features), normal(out_features) if bias else None
    x = normal(tokens, in_features) + 0.5
    expected = apply(x, weight, b, params)
    found = SparseLinear(bake(weight, b, params))(x)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@settings(max_examples=100, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 2**31), levels=st.integers(1, 6))
def test_mask_is_the_stable_sort(shape: tuple[int, int], seed: int, levels: int) -> None:
    keep, group = shape
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(levels, (3, 2 * group), generator=generator).float()  # few levels: many ties
    found = mask(scores, keep, group)
    order = scores.reshape(-1, group).sort(dim=-1, descending=True, stable=True).indices[:, :keep]
    expected = torch.zeros(len(order), group, dtype=torch.bool).scatter_(1, order, True).reshape(scores.shape)
    assert torch.equal(found, expected)
    assert torch.equal(found.reshape(-1, group).sum(-1), torch.full((len(order),), keep))


def test_dense_pattern_is_the_linear_layer() -> None:
    x, weight, bias = torch.randn(3, 8).double(), torch.randn(4, 8).double(), torch.randn(4).double()
    for shift_mode in ("none", "token_mean", "token_median"):
        params = Params(8, 8, shift_mode=shift_mode, variance=True)
        expected = torch.nn.functional.linear(x, weight, bias)
        torch.testing.assert_close(SparseLinear(bake(weight, bias, params))(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_what_is_dropped_is_zero_and_has_no_gradient(dtype: torch.dtype) -> None:
    x = torch.tensor([[5.0, 1.0], [-1.0, -7.0], [-3.0, -0.5], [2.0, 4.0]], dtype=dtype).t().requires_grad_()
    assert not x.is_contiguous()
    _, zs, _ = select(x, Params(2, 4))
    assert zs.dtype == dtype
    assert zs.tolist() == [[5.0, 0.0, -3.0, 0.0], [0.0, -7.0, 0.0, 4.0]]
    (zs * torch.tensor([2.0, 3.0, 4.0, 5.0], dtype=dtype)).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[2.0, 0.0, 4.0, 0.0], [0.0, 3.0, 0.0, 5.0]]


def test_a_dropped_infinity_is_zero() -> None:
    _, zs, _ = select(torch.tensor([[torch.inf, -torch.inf]]), Params(1, 2))
    assert zs.tolist() == [[torch.inf, 0.0]]


@pytest.mark.parametrize("text", ["0:4", "5:4", "4", "0", "0%", "101%", "a:b", "", "2:4:8", "-2:4"])
def test_bad_patterns(text: str) -> None:
    if text == "4":
        with pytest.raises(RecipeError, match="must keep at most in_features channels, got 3"):
            Pattern.parse(text).at(3, "layer")
    else:
        with pytest.raises(RecipeError, match="pattern"):
            Pattern.parse(text)


def test_pattern_that_does_not_divide_names_the_layer() -> None:
    with pytest.raises(RecipeError, match=r"down_proj: in_features must be divisible by 16 .* got 24"):
        Pattern.parse("8:16").at(24, "down_proj")


@pytest.mark.parametrize("names", list(itertools.permutations(["s_pts", "d_pts"])))
def test_two_shifts_are_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(RecipeError, match="both set the shift"):
        mitigations(names, {"s_pts": "channel", "d_pts": "median"})
