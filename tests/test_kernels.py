"""The CUDA kernels, walked by a CPU, against the reference: `make test` builds them for both."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native import DENSE, GEMV, MMA, SPARSE, WGMMA, Native
from pairs import pairs
from torch import Tensor

from converter.runtimes.layer import TILES
from converter.signature import SHIFT_MODES
from converter.sparsity.linear import Params, SparseLinear, bake, select, token_scale, token_shift

DTYPES = [torch.float16, torch.bfloat16]
PLACES, PART = 1024, 256  # of a block of Select and Pack, and of one of Gemv
# Of dtype, keep and group, shift_mode, permuted.
SELECTIONS = pairs(
    DTYPES,
    [(8, 16), (2, 4), (5, 16), (1, 2), (16, 32), (3, 100), (200, 600)],
    ["none", "static", "token_median"],
    [False, True],
)
BLOCKS = {MMA: (32, 32), WGMMA: (64, 128)}  # tokens and channels of a block of metadata


def awkward(tokens: int, k: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Return activations `[tokens, k]` in which there are ties, zeros of both signs, Inf and NaN, and rows of zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, k, generator=generator).to(dtype)
    x[torch.rand(tokens, k, generator=generator) < 0.3] = 0.5
    x[torch.rand(tokens, k, generator=generator) < 0.2] = -0.5
    x[torch.rand(tokens, k, generator=generator) < 0.1] = 0.0
    x[torch.rand(tokens, k, generator=generator) < 0.05] = -0.0
    if tokens > 3:
        x[1] = 0
        x[2, ::5] = torch.inf
        x[2, 1::7] = -torch.inf
        x[3, 2::6] = torch.nan
    return x


def the_params(keep: int, group: int, k: int, shift_mode: str, permuted: bool, variance: bool = True) -> Params:
    generator = torch.Generator().manual_seed(k + keep)
    return Params(
        keep,
        group,
        shift_mode=shift_mode,
        variance=variance,
        channel_scale=torch.rand(k, generator=generator).round(decimals=1) + 0.5,
        shift=torch.randn(k, generator=generator) if shift_mode == "static" else None,
        permutation=torch.randperm(k, generator=generator) if permuted else None,
    )


def given_to_kernel(x: Tensor, params: Params) -> dict[str, Tensor | None]:
    per_token = params.shift_mode in {"token_mean", "token_median"}
    eta = token_shift(x.float(), params.shift_mode, params.shift) if per_token else None
    return {
        "x": x,
        "channel_scale": params.channel_scale,
        "shift": params.shift,
        "eta": eta,
        "permutation": None if params.permutation is None else params.permutation.int(),
    }


def in_places(of_channels: Tensor, params: Params) -> Tensor:
    return of_channels if params.permutation is None else of_channels[:, params.permutation]


def assert_same_bits(found: Tensor, expected: Tensor) -> None:
    """NaN equals NaN, and zeros are equal whatever their sign: a dropped channel is +0, a kept one may be -0."""
    assert torch.equal(found.nan_to_num(123.0), expected.nan_to_num(123.0))
    assert torch.equal(found.isnan(), expected.isnan())


@pytest.mark.parametrize(
    ("dtype", "keep", "shift_mode", "permuted", "order", "tokens", "k"),
    pairs(
        DTYPES,
        [1, 2],
        ["none", "static", "token_mean"],
        [False, True],
        [
            *[(MMA, 1, 64), (MMA, 33, 96), (MMA, 64, 1088)],
            *[(WGMMA, 1, 64), (WGMMA, 33, 128), (WGMMA, 65, 320), (WGMMA, 130, 1088), (WGMMA, 192, 2048)],
        ],
    ),
)
def test_pack_is_the_pruned_input(
    native: Native, dtype: torch.dtype, keep: int, shift_mode: str, permuted: bool, order: int, tokens: int, k: int
) -> None:
    x, params = awkward(tokens, k, dtype), the_params(keep, 4, k, shift_mode, permuted)
    padded, words = (-(-size // block) * block for size, block in zip((tokens, k), BLOCKS[order], strict=True))
    values = torch.full((padded, k // 2), 7, dtype=dtype)
    metadata = torch.full((words // 32 * padded,), -1, dtype=torch.int32)
    moments, nu = torch.full((2, padded, -(-k // PLACES), 3), 7.0), torch.full((padded,), 7.0)
    kernel = given_to_kernel(x, params)
    shape = {"tokens": tokens, "padded": padded, "k": k, "keep": keep, "order": order}
    native.run("pack", dtype, **kernel, values=values, metadata=metadata, z=moments[0], kept=moments[1], **shape)
    native.run("token_scale", z=moments[0], kept=moments[1], nu=nu, tokens=padded, parts=moments.shape[2])
    z, zs, _ = select(x.float(), params)
    expected = in_places(zs, params).to(dtype)
    assert_same_bits(native.uncompress(values, metadata, k, order)[:tokens], expected)
    assert not native.uncompress(values, metadata, k, order)[tokens:].any()
    torch.testing.assert_close(nu[:tokens], token_scale(z, zs)[:, 0], rtol=1e-5, atol=1e-6, equal_nan=True)
    groups = metadata[:, None] >> torch.arange(0, 32, 4, dtype=torch.int32)
    assert ((groups & 3) < (groups >> 2 & 3)).all(), "mma.sp wants the two places of a group rising"


@pytest.mark.parametrize(
    ("dtype", "keep", "group", "shift_mode", "permuted"),
    SELECTIONS,
)
def test_select_keeps_what_the_reference_keeps(
    native: Native, dtype: torch.dtype, keep: int, group: int, shift_mode: str, permuted: bool
) -> None:
    tokens, k = 5, 2400 if 2400 % group == 0 else 2048
    x, params = awkward(tokens, k, dtype), the_params(keep, group, k, shift_mode, permuted)
    written = torch.full((tokens, k), 7, dtype=dtype)
    moments, nu = torch.empty(2, tokens, -(-k // (PLACES // group * group)), 3), torch.empty(tokens)
    kernel, shape = given_to_kernel(x, params), {"tokens": tokens, "k": k, "keep": keep, "group": group}
    native.run("select", dtype, **kernel, zs=written, z=moments[0], kept=moments[1], **shape)
    native.run("token_scale", z=moments[0], kept=moments[1], nu=nu, tokens=tokens, parts=moments.shape[2])
    z, zs, _ = select(x.float(), params)
    assert_same_bits(written, in_places(zs, params).to(dtype))
    torch.testing.assert_close(nu, token_scale(z, zs)[:, 0], rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize(
    ("dtype", "keep", "group", "shift_mode", "permuted"),
    SELECTIONS,
)
def test_gemv_reads_the_kept_rows_and_no_other(
    native: Native, dtype: torch.dtype, keep: int, group: int, shift_mode: str, permuted: bool
) -> None:
    """Of a W of zeros with one row of ones each column tells which row was read, and as what number."""
    k = 2400 if 2400 % group == 0 else 2048
    part = max(PART // group * group, group)
    x, params = awkward(5, k, dtype), the_params(keep, group, k, shift_mode, permuted)
    z, zs, _ = select(x.float(), params)
    expected = in_places(zs, params).to(dtype).float()
    splits, kernel = -(-k // part), given_to_kernel(x, params)
    for first in range(0, k, 512):
        w = torch.eye(k, dtype=dtype)[:, first : first + 512].contiguous()
        n = w.shape[1]
        partial, moments = torch.full((5, splits, n), torch.nan), torch.full((2, 5, splits, 3), torch.nan)
        shape = {"tokens": 5, "k": k, "n": n, "keep": keep, "group": group}
        native.run("gemv", dtype, **kernel, w=w, partial=partial, z=moments[0], kept=moments[1], **shape)
        # A kept Inf or NaN gives NaN wherever W is 0: see the next test.
        finite = zs.isfinite().all(-1)
        assert torch.equal(partial.sum(1)[finite], expected[finite, first : first + 512])
    nu = torch.empty(5)
    native.run("token_scale", z=moments[0], kept=moments[1], nu=nu, tokens=5, parts=splits)
    torch.testing.assert_close(nu, token_scale(z, zs)[:, 0], rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize(
    ("entry", "shift_mode", "sm", "keep", "group", "tokens", "path"),
    pairs(
        [-1, 192, 193, 10**6, 2**31 - 1, -(2**31)],
        ["none", "static", "token_mean"],
        [80, 90],
        [(8, 16, 2, GEMV), (2, 4, 33, SPARSE), (8, 16, 9, DENSE)],
    ),
)
def test_an_entry_that_is_no_channel_gives_nan_and_reads_nothing(
    native: Native, entry: int, shift_mode: str, sm: int, keep: int, group: int, tokens: int, path: str
) -> None:
    """What lies outside a row is not read: far entries would end the process, and near ones give another's number."""
    k, n, dtype = 192, 16, torch.float16
    params = the_params(keep, group, k, shift_mode, permuted=True, variance=False)
    assert params.permutation is not None
    order = params.permutation.int()
    order[100] = entry
    baked = bake(torch.ones(n, k), None, params)
    y = torch.zeros(tokens, n, dtype=dtype)
    tensors: dict[str, Tensor | None] = {name: getattr(baked, name) for name in ("channel_scale", "shift", "row_sum")}
    tensors |= {"x": torch.ones(tokens, k, dtype=dtype), "w": baked.w.to(dtype).contiguous(), "bias": None}
    shape = {"k": k, "n": n, "keep": keep, "group": group, "shift_mode": SHIFT_MODES.index(shift_mode)}
    shape |= {"variance": 0, "gemv_tokens": 4, "sparse_tokens": 32, "sm": sm}
    assert native.layer(shape, tensors | {"permutation": order, "y": y}) == path
    assert y.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 2, 7, 64, 1000])
def test_token_shift_is_the_mean_and_the_lower_median(native: Native, dtype: torch.dtype, k: int) -> None:
    x = torch.randn(6, k, generator=torch.Generator().manual_seed(k)).to(dtype)
    x[1] = 0.25
    x[2] = -torch.arange(k)
    x[3, 0] = torch.nan
    x[4, : (k + 1) // 2] = torch.inf
    eta = torch.empty(6)
    native.run("token_shift", dtype, x=x, eta=eta, tokens=6, k=k, median=True)
    assert_same_bits(eta, x.float().median(-1).values)
    native.run("token_shift", dtype, x=x, eta=eta, tokens=6, k=k, median=False)
    torch.testing.assert_close(eta, x.float().mean(-1), rtol=1e-5, atol=1e-6, equal_nan=True)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_token_median_of_any_bits(native: Native, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    bits = data.draw(st.lists(st.integers(-(2**15), 2**15 - 1), min_size=1, max_size=40))
    x = torch.tensor(bits, dtype=torch.int16).view(dtype)[None]
    eta = torch.empty(1)
    native.run("token_shift", dtype, x=x, eta=eta, tokens=1, k=len(bits), median=True)
    assert_same_bits(eta, x.float().median(-1).values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "k", "n"), [(1, 576, 1536), (3, 1536, 576), (8, 64, 8), (2, 96, 264), (1, 2048, 40), (2, 14336, 72)]
)
@pytest.mark.parametrize("shift_mode", ["none", "token_median"])
def test_decode_is_the_layer(native: Native, dtype: torch.dtype, tokens: int, k: int, n: int, shift_mode: str) -> None:
    generator = torch.Generator().manual_seed(k)
    params = the_params(8, 16, k, shift_mode, permuted=True)
    weight, bias = torch.randn(n, k, generator=generator).to(dtype), torch.randn(n, generator=generator)
    x = (torch.randn(tokens, k, generator=generator) + 0.3).to(dtype)
    baked = bake(weight.float(), bias, params)
    kernel, splits = given_to_kernel(x, params), -(-k // PART)
    if shift_mode == "token_median":
        kernel["eta"] = torch.empty(tokens)
        native.run("token_shift", dtype, x=x, eta=kernel["eta"], tokens=tokens, k=k, median=True)
    w = baked.w[params.permutation].to(dtype).contiguous()  # the rows of W in the order of the places
    partial, moments = torch.full((tokens, splits, n), torch.nan), torch.full((2, tokens, splits, 3), torch.nan)
    y = torch.empty(tokens, n, dtype=dtype)
    shape = {"tokens": tokens, "k": k, "n": n, "keep": 8, "group": 16}
    native.run("gemv", dtype, **kernel, w=w, partial=partial, z=moments[0], kept=moments[1], **shape)
    of_parts = {"partial": partial, "z": moments[0], "kept": moments[1], "splits": splits, "parts": splits}
    of_columns = {"eta": kernel["eta"], "row_sum": baked.row_sum, "bias": baked.bias}
    native.run("gemv_sum", dtype, **of_parts, **of_columns, y=y, tokens=tokens, n=n)
    # In float64, but with the zs input as T has it: that is what the kernel multiplies.
    z, zs, shift = select(x.float(), params)
    expected = (zs.to(dtype).double() @ weight.double().t()) * token_scale(z, zs).double() + bias
    expected += 0 if shift_mode == "none" else shift.double() * baked.row_sum.double()
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), expected, rtol=step, atol=step * k**0.5 / 16)
    close = {"rtol": 8 * step, "atol": step * k**0.5}
    torch.testing.assert_close(y.float(), SparseLinear(baked)(x.float()[None])[0], **close)


@pytest.mark.parametrize(
    ("dtype", "keep", "group", "shift_mode", "variance", "permuted", "biased", "tokens", "fast", "sm"),
    pairs(
        DTYPES,
        [(2, 4), (1, 4), (8, 16)],
        ["none", "static", "token_mean", "token_median"],
        [(True, True, True), (False, False, False)],
        [
            *[(1, GEMV, 80), (4, GEMV, 90), (5, DENSE, 80), (31, DENSE, 90)],
            *[(32, SPARSE, 80), (40, SPARSE, 120), (32, SPARSE, 90), (70, SPARSE, 90)],
        ],
    ),
)
def test_layer_is_the_reference_on_every_path(
    native: Native,
    dtype: torch.dtype,
    keep: int,
    group: int,
    shift_mode: str,
    variance: bool,
    permuted: bool,
    biased: bool,
    tokens: int,
    fast: int,
    sm: int,
) -> None:
    k, n = 192, 40
    params = the_params(keep, group, k, shift_mode, permuted, variance)
    generator = torch.Generator().manual_seed(tokens)
    weight = torch.randn(n, k, generator=generator).to(dtype)
    bias = torch.randn(n, generator=generator) if biased else None
    x = (torch.randn(tokens, k, generator=generator) + 0.3).to(dtype)
    baked = bake(weight.float(), bias, params)
    w = baked.w.to(dtype)
    y = torch.full((tokens, n), torch.nan, dtype=dtype)
    tensors = {
        "x": x,
        "w": (w if params.permutation is None else w[params.permutation]).contiguous(),
        "bias": baked.bias,
        "channel_scale": baked.channel_scale,
        "shift": baked.shift,
        "row_sum": baked.row_sum,
        "permutation": None if params.permutation is None else params.permutation.int(),
        "y": y,
    }
    shape = {"k": k, "n": n, "keep": keep, "group": group, "shift_mode": SHIFT_MODES.index(shift_mode)}
    shape |= {"variance": int(variance), "gemv_tokens": 4, "sparse_tokens": 32, "sm": sm}
    assert native.layer(shape, tensors) == (DENSE if (fast, group) == (SPARSE, 16) else fast)
    assert native.order(shape) == (WGMMA if (native.sm or sm) == 90 else MMA)
    step = torch.finfo(dtype).eps
    expected = SparseLinear(baked)(x.float()[None])[0]
    torch.testing.assert_close(y.float(), expected, rtol=8 * step, atol=step * k**0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("keep", "group"), [(2, 4), (8, 16), (1, 4), (3, 100)])
def test_gemv_never_reads_a_dropped_row(native: Native, dtype: torch.dtype, keep: int, group: int) -> None:
    """Dropped rows are NaN. Of a token with Inf, more in some groups than are kept, the sum is Inf then, not NaN."""
    k, n = 4 * group, 16
    x, params = torch.randn(2, k, generator=torch.Generator().manual_seed(group)).to(dtype), Params(keep, group)
    x[1, : keep + 1] = torch.inf
    x[1, k - 1] = torch.inf
    _, zs, _ = select(x.float(), params)
    for token, expected in enumerate([zs[0].sum(), torch.tensor(torch.inf)]):
        w = torch.full((k, n), torch.nan, dtype=dtype)
        w[zs[token] != 0] = 1
        assert int((zs[token] != 0).sum()) == keep * 4
        partial = torch.full((1, -(-k // max(PART // group * group, group)), n), torch.nan)
        shape = {"tokens": 1, "k": k, "n": n, "keep": keep, "group": group}
        native.run("gemv", dtype, **given_to_kernel(x[token : token + 1], params), w=w, partial=partial, **shape)
        torch.testing.assert_close(partial[0].sum(0), expected.expand(n), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(
    ("tokens", "keep", "group", "path"),
    [(300, 2, 4, SPARSE), (300, 8, 16, DENSE), (40, 8, 16, DENSE), (64, 2, 4, DENSE)],
)
def test_every_tile_is_the_layer(
    native: Native, dtype: torch.dtype, tile: str, tokens: int, keep: int, group: int, path: str
) -> None:
    """More tiles than one in every direction, of every GEMM that the GPU has; a CPU has products without tiles."""
    k, n = 1088, 264
    params = the_params(keep, group, k, "none", permuted=False)
    generator = torch.Generator().manual_seed(tokens)
    weight, bias = torch.randn(n, k, generator=generator).to(dtype), torch.randn(n, generator=generator)
    x, y = torch.randn(tokens, k, generator=generator).to(dtype), torch.full((tokens, n), torch.nan, dtype=dtype)
    tensors = {"x": x, "w": weight.t().contiguous(), "bias": bias, "channel_scale": params.channel_scale, "y": y}
    shape = {"k": k, "n": n, "keep": keep, "group": group, "shift_mode": 0, "variance": 1}
    assert native.layer(shape | {"gemv_tokens": 1, "sparse_tokens": 128, "sm": 90}, tensors, tile) == path
    z, zs, _ = select(x.float(), params)
    expected = (zs.double() @ weight.double().t()) * token_scale(z, zs).double() + bias
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), expected, rtol=step, atol=step * k**0.5 / 16)
