"""Tables worked by hand: one or two tokens, the arithmetic beside them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from converter.calibration.refit import Sums, gain, refit, solve
from converter.sparsity.criteria import CRITERIA
from converter.sparsity.linear import Params, SparseLinear, apply, bake, select, token_scale
from converter.sparsity.mitigations import MITIGATIONS, Given, mitigations
from converter.sparsity.pattern import Pattern, mask
from converter.sparsity.permutation import decorrelate
from converter.sparsity.statistics import LayerStats

NAN, INF = math.nan, math.inf

MASKS = [
    # scores, keep, group, kept channels
    ([3, 1, 2, 4], 2, 4, [0, 3]),
    ([3, 1, 2, 4, 9, 8, 7, 6], 2, 4, [0, 3, 4, 5]),  # each group for itself: 7 and 6 lose to 9 and 8
    ([3, 1, 2, 4, 9, 8, 7, 6], 4, 8, [4, 5, 6, 7]),  # one group
    ([5, 5, 5, 5], 2, 4, [0, 1]),  # all tied: the lower positions
    ([1, 5, 5, 5], 2, 4, [1, 2]),
    ([5, 1, 5, 7], 2, 4, [0, 3]),  # 7, then the lower of the two fives
    ([0, 0, 0, 0], 1, 4, [0]),
    ([1, 2, 3, 4], 3, 4, [1, 2, 3]),  # keep counts what is kept: 3 of 4, not 1
    ([1, 2, 3, 4], 1, 4, [3]),
    ([1, NAN, 3, 4], 2, 4, [1, 3]),  # NaN is kept
    ([1, INF, NAN, 4], 1, 4, [1]),  # and ties with infinity
]


@pytest.mark.parametrize(("scores", "keep", "group", "kept"), MASKS)
def test_mask(scores: list[float], keep: int, group: int, kept: list[int]) -> None:
    found = mask(torch.tensor([scores], dtype=torch.float64), keep, group)
    assert found[0].nonzero().flatten().tolist() == kept


PATTERNS = [
    # text, in_features, keep, group
    ("8:16", 64, 8, 16),
    ("2:4", 8, 2, 4),
    ("3", 10, 3, 10),
    ("50%", 10, 5, 10),
    ("25%", 10, 2, 10),  # 2.5 rounds to even
    ("1%", 10, 1, 10),  # never nothing
]


@pytest.mark.parametrize(("text", "in_features", "keep", "group"), PATTERNS)
def test_pattern(text: str, in_features: int, keep: int, group: int) -> None:
    assert Pattern.parse(text).at(in_features, "layer") == (keep, group)
    assert str(Pattern.parse(text)) == text


# One layer for all rows: x = (4, -1, 2, 3), mean 2, lower median 2; W = rows (1, 2, 3, 4) and (0, 1, 0, -1).
X = [[4.0, -1.0, 2.0, 3.0]]
WEIGHT = [[1.0, 2.0, 3.0, 4.0], [0.0, 1.0, 0.0, -1.0]]
BIAS = [10.0, 20.0]


def statistics() -> LayerStats:
    """Return those of two tokens: (4,-1,2,3) with median 2 and (-2,3,0,-1) with median -1; channel means (1,1,1,1)."""
    stats = LayerStats.of("layer", 4, together=True)
    stats.update(torch.tensor([*X, [-2.0, 3.0, 0.0, -1.0]]))
    return stats


def fitted(name: str, variant: str) -> Params:
    (method,) = mitigations([name], {name: variant})
    return method.fit(Params(2, 4), Given(torch.tensor(WEIGHT), statistics(), rank=1))


T = 7 - math.sqrt(50)
C = (4 - T) / (1 + T * T)

GOLDEN = {
    # none: kept 4 and 3: y = 4*1 + 3*4 + 10 = 26; 0 - 3 + 20 = 17
    ("none", ""): [26.0, 17.0],
    # s_pts channel: eta = (1,1,1,1); z = (3,-2,1,2); kept 3, -2 (ties with 2 at the lower channel):
    # z part: 3 - 4 = -1 and -2; eta part: 1+2+3+4 = 10 and 0: y = -1 + 10 + 10 = 19; -2 + 0 + 20 = 18
    ("s_pts", "channel"): [19.0, 18.0],
    # s_pts scalar: eta = mean of the medians 2 and -1 = 0.5; z = (3.5,-1.5,1.5,2.5); kept 3.5, 2.5:
    # 3.5 + 10 = 13.5 and -2.5; eta part 5 and 0: y = 28.5; 17.5
    ("s_pts", "scalar"): [28.5, 17.5],
    # d_pts: median and mean of x are both 2; z = (2,-3,0,1); kept -3, 2: 2 - 6 = -4 and -3; eta part 20, 0:
    # y = -4 + 20 + 10 = 26; -3 + 0 + 20 = 17
    ("d_pts", "median"): [26.0, 17.0],
    ("d_pts", "mean"): [26.0, 17.0],
    # var: x = (4,-1,2,3), mean 2, squares 4+9+0+1 = 14, Var = 14/3; zs = (4,0,0,3), mean 1.75,
    # squares 5.0625+3.0625+3.0625+1.5625 = 12.75, Var = 4.25; nu = sqrt(14/12.75); y = nu*(16, -3) + bias
    ("var", ""): [16 * math.sqrt(14 / 12.75) + 10, -3 * math.sqrt(14 / 12.75) + 20],
    # pcs: max|X| = (4,3,2,3), max|W| = (1,2,3,4), s^2 = (4, 3/2, 2/3, 3/4); |x|/s = 2, 0.82, 2.45, 3.46; kept 2 and 3
    # in their own size: y = 2*3 + 3*4 + 10 = 28; 0 - 3 + 20 = 17
    ("pcs", ""): [28.0, 17.0],
    # permute: 2:4 of 4 channels is one group, so as none; test_permutation has two groups. A layer that is arranged
    # is left alone: tests/test_arrange.py
    ("permute", "layer"): [26.0, 17.0],
    ("permute", "folded"): [26.0, 17.0],
    # refit needs the tokens again, once the layer is sparse: test_refit
    ("refit", ""): [26.0, 17.0],
    # distill sets nothing of a single layer: tests/test_calibration.py
    ("distill", "full"): [26.0, 17.0],
    ("distill", "low_rank"): [26.0, 17.0],
    # r_sparse: what is dropped, d = (0,-1,2,0), gives W d = (4,-1). W W^T = ((30,-2),(-2,2)) has the largest
    # eigenvalue 16 + sqrt(200), with u ~ (1, T), T = 7 - sqrt(50); rank 1 adds u u^T (4,-1) = C (1, T)
    ("r_sparse", "svd"): [26.0 + C, 17.0 + C * T],
    ("r_sparse", "trained"): [26.0 + C, 17.0 + C * T],
    # l_pts, ls: before training a shift of 0, a scale of 1 and a shift of 0; after it, test_learned_parts
    ("l_pts", ""): [26.0, 17.0],
    ("ls", ""): [26.0, 17.0],
}


@pytest.mark.parametrize(("name", "variant"), GOLDEN)
def test_mitigation(name: str, variant: str) -> None:
    params = fitted(name, variant)
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if name != "r_sparse" else {"rtol": 1e-6, "atol": 1e-6}
    x, weight, bias = (torch.tensor(t, dtype=torch.float64) for t in (X, WEIGHT, BIAS))
    expected = torch.tensor([GOLDEN[name, variant]], dtype=torch.float64)
    torch.testing.assert_close(apply(x, weight, bias, params), expected, **tolerance)
    baked = bake(weight, bias, params).to(torch.float64)
    torch.testing.assert_close(SparseLinear(baked)(x), expected, **tolerance)


@pytest.mark.parametrize(("name", "variant"), GOLDEN)
def test_dense_phase(name: str, variant: str) -> None:
    # All of x = (4,-1,2,3) is kept, whatever the method: 4 - 2 + 6 + 12 + 10 = 30; -1 - 3 + 20 = 16.
    x, weight, bias = (torch.tensor(t, dtype=torch.float64) for t in (X, WEIGHT, BIAS))
    baked = bake(weight, bias, fitted(name, variant)).to(torch.float64)
    dense = torch.tensor([[30.0, 16.0]], dtype=torch.float64)
    torch.testing.assert_close(SparseLinear(baked, "prefill")(x), dense, rtol=1e-12, atol=1e-12)
    twice = torch.cat([x, x])
    torch.testing.assert_close(SparseLinear(baked, "decode")(twice), dense.expand(2, 2), rtol=1e-12, atol=1e-12)
    for phases, given in (("prefill", twice), ("decode", x), ("decode", x[None].expand(2, 1, 4))):  # [B, S, K]
        layer = SparseLinear(baked, phases)
        assert torch.equal(layer(given), SparseLinear(baked)(given))


def test_a_dense_phase_corrects_nothing() -> None:
    # z = x = (2,2,2,2) has no variance: nu would be 0. y = 2 * 10 + 10 = 30; 0 + 20 = 20
    layer = SparseLinear(bake(torch.tensor(WEIGHT), torch.tensor(BIAS), Params(2, 4, variance=True)), "prefill")
    assert layer(torch.full((1, 4), 2.0)).tolist() == [[30.0, 20.0]]
    # Nothing is dropped of an infinity: no remainder that is not a number.
    thin = {"residual_in": torch.ones(4, 1), "residual_out": torch.ones(1, 2)}
    layer = SparseLinear(bake(torch.ones(2, 4), None, Params(2, 4, **thin)), "prefill")
    assert layer(torch.tensor([[INF, 1.0, 1.0, 1.0]])).tolist() == [[INF, INF]]


def test_learned_parts() -> None:
    # shift (1,1,1,1) as in s_pts channel: (19, 18); then times (2, -1) plus (0.5, 0): (38.5, -18)
    params = Params(
        2,
        4,
        shift_mode="static",
        shift=torch.ones(4),
        output_scale=torch.tensor([2.0, -1.0]),
        output_shift=torch.tensor([0.5, 0.0]),
    )
    x, weight, bias = (torch.tensor(t) for t in (X, WEIGHT, BIAS))
    assert apply(x, weight, bias, params).tolist() == [[38.5, -18.0]]
    assert SparseLinear(bake(weight, bias, params))(x).tolist() == [[38.5, -18.0]]


def test_even_median_is_the_lower_of_the_two() -> None:
    params = Params(2, 4, shift_mode="token_median")
    # sorted -1, 2, 3, 9: the median is 2, not 2.5
    _, _, eta = select(torch.tensor([[9.0, -1.0, 2.0, 3.0]]), params)
    assert eta is not None
    assert eta.item() == 2.0


# The weights in order: -1, 0, 0, 1, 1, 2, 3, 4. Their quantiles 0.005 and 0.995 lie just inside -1 and 4, so the
# outliers are these two; of the others the mean is 7/6 and the variance 41/36: standardised, w is (6 w - 7) / sqrt(41).
SCALES = {
    "magnitude": None,
    "clact": [20, 10, 4, 10],  # 16 + 4, 1 + 9, 4 + 0, 9 + 1
    "wina": [1, 5, 9, 17],
    "weight_variance": [0.25, 0.25, 2.25, 6.25],  # columns (1,0), (2,1), (3,0), (4,-1)
    "amber": [50 / 41, 26 / 41, 170 / 41, 458 / 41],  # (-1,-7), (5,-1), (11,-7), (17,-13)
    "amber_trimmed": [50 / 41, 26 / 41, 170 / 41, 0],  # both weights of the last column are outliers
    "clact_dynamic": None,  # its norms are of the sequence that is pruned: test_sequence_norm
}


@pytest.mark.parametrize("name", SCALES)
def test_criterion(name: str) -> None:
    found, squares = CRITERIA[name].scale(torch.tensor(WEIGHT), statistics()), SCALES[name]
    if squares is None:
        assert found is None
    else:
        assert found is not None
        torch.testing.assert_close(found.square(), torch.tensor(squares, dtype=torch.float32), rtol=1e-5, atol=1e-6)


def test_sequence_norm() -> None:
    # Squared norms over the first sequence (40, 9): of (2,3) the scores' squares are 160 and 81. Over the second
    # (4, 10): 16 and 90. Over both (44, 19) it would be 176 and 171 in either.
    x = torch.tensor([[[2.0, 3.0], [6.0, 0.0]], [[2.0, 3.0], [0.0, 1.0]]])
    expected = [[[2.0, 0.0], [6.0, 0.0]], [[0.0, 3.0], [0.0, 1.0]]]
    params = Params(1, 2, sequence_norm=CRITERIA["clact_dynamic"].sequence_norm)
    identity = torch.eye(2)
    assert apply(x, identity, None, params).tolist() == expected
    layer = SparseLinear(bake(identity, None, params).to(torch.float32))  # `to` keeps the flag
    assert layer(x).tolist() == expected
    # A token alone: its squares, so as magnitude.
    assert layer(x[:1, :1]).tolist() == [[[0.0, 3.0]]]
    # The norms are of x, as in clact, not of what a shift leaves: z = (-2,3) and (2,0); by (40, 9) the scores' squares
    # are 160 and 81, by (8, 9) they would be 32 and 81.
    shifted = replace(params, shift_mode="static", shift=torch.tensor([4.0, 0.0]))
    assert select(x[0], shifted)[1].tolist() == [[-2.0, 0.0], [2.0, 0.0]]


def weighed(*tokens: list[float]) -> LayerStats:
    """Return the statistics of these tokens, in float64."""
    stats = LayerStats.of("layer", len(tokens[0]), gram=True)
    stats.update(torch.tensor(tokens, dtype=torch.float64))
    return stats


# Gram ((100, 50.5), (50.5, 100)), damped by 0.01 * 100: H = 50.5 * ((2, 1), (1, 2)); so that H^-1 is proportional to
# ((2, -1), (-1, 2)), U_00^2 to 2, U_01 / U_00 = -1/2, and U_11^2 to 2 - 1/2 = 3/2.
CORRELATED = weighed([10, 5.05], [0, math.sqrt(100 - 5.05**2)])

PRUNED = {
    # weight, statistics, keep, group, expected
    "weight_magnitude": (WEIGHT, None, 2, 4, [[0, 0, 3, 4], [0, 1, 0, -1]]),
    # squared norms (20, 10, 4, 10); row 1: 20, 40, 36, 160; row 2: 0, 10, 0, 10
    "wanda": (WEIGHT, statistics(), 2, 4, [[0, 2, 0, 4], [0, 1, 0, -1]]),
    # Row 1: 4/2 < 3.61/1.5: the first goes though it is larger, and the second takes over half of it: 1.9 + 1.
    # Row 2: 9/2 > 4/1.5: the second goes, and nothing comes after it.
    "sparsegpt": ([[2.0, 1.9], [3.0, 2.0]], CORRELATED, 1, 2, [[0, 2.9], [3, 0]]),
}


@pytest.mark.parametrize("name", PRUNED)
def test_weight_baseline(name: str) -> None:
    weight, stats, keep, group, expected = PRUNED[name]
    prune_weight = CRITERIA[name].prune
    assert prune_weight is not None
    found = prune_weight(torch.tensor(weight), stats, keep, group)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32))
    assert torch.equal(found != 0, torch.tensor(expected) != 0)


def test_permutation() -> None:
    # Shares |x|/||x||: (4,1,2,3)/sqrt(30) and (2,3,0,1)/sqrt(14). Energies .82, .68, .13, .37: first 0, then 1, which
    # is large with 0 (.56) and so goes to the other group; 3 is large with 0 (.54) more than with 1 (.31); 2 is left.
    together = statistics().together
    assert together is not None
    assert decorrelate(together, 2).tolist() == [0, 2, 1, 3]
    # What is ranked is |x| * scale: with (1,1,4,1) channel 2 has 16 * .13 = 2.1 and goes first, then 0 to the other
    # group; 1 is large with 2 (4 * .07 = .27) less than with 0 (.56); 3 is left.
    (method,) = mitigations(["permute"], {"permute": "layer"})
    scaled = Params(1, 2, channel_scale=torch.tensor([1.0, 1.0, 4.0, 1.0]))
    found = method.fit(scaled, Given(torch.tensor(WEIGHT), statistics())).permutation
    assert found is not None
    assert found.tolist() == [1, 2, 0, 3]
    # Groups (0,3) and (1,2) of x = (4,-1,2,3): kept 4 and 2: y = 4 + 6 + 10 = 20; 0 + 0 + 20 = 20
    params = Params(1, 2, permutation=torch.tensor([0, 3, 1, 2]))
    y = SparseLinear(bake(torch.tensor(WEIGHT), torch.tensor(BIAS), params))(torch.tensor(X))
    assert y.tolist() == [[20.0, 20.0]]


def test_refit() -> None:
    # Tokens (4,-1,2,3) and (-2,3,0,-1), kept (4,0,0,3) and (-2,3,0,0); squared lengths 30 and 14. No permutation, so
    # channel 2 is never kept: its row and column of A are zero, and so is its row of the change.
    x, weight = torch.tensor([*X, [-2.0, 3.0, 0.0, -1.0]], dtype=torch.float64), torch.tensor(WEIGHT)
    sums = Sums.of(4)
    for token in x:
        sums.update(token, Params(2, 4))
    gram = [[16 / 30 + 4 / 14, -6 / 14, 0, 12 / 30], [-6 / 14, 9 / 14, 0, 0], [0, 0, 0, 0], [12 / 30, 0, 0, 9 / 30]]
    # What is missing: (0,-1,2,0) and (0,0,0,-1).
    cross = [[0, -4 / 30, 8 / 30, 2 / 14], [0, 0, 0, -3 / 14], [0, 0, 0, 0], [0, -3 / 30, 6 / 30, 0]]
    torch.testing.assert_close(sums.gram, torch.tensor(gram, dtype=torch.float64))
    torch.testing.assert_close(sums.cross, torch.tensor(cross, dtype=torch.float64))
    # lambda = 0.1 * mean(diagonal), and the normal equations with the rows of lambda appended to the tokens.
    ridge = 0.1 * (25 / 30 + 13 / 14) / 4
    given = torch.tensor([[4.0, 0, 0, 3], [-2, 3, 0, 0]], dtype=torch.float64) / torch.tensor([[30.0], [14.0]]).sqrt()
    missing = (
        torch.tensor([[0, -1.0, 2, 0], [0, 0, 0, -1]], dtype=torch.float64) / torch.tensor([[30.0], [14.0]]).sqrt()
    )
    rows = torch.cat([given, math.sqrt(ridge) * torch.eye(4, dtype=torch.float64)])
    wanted = torch.cat([missing @ weight.double().t(), torch.zeros(4, 2, dtype=torch.float64)])
    torch.testing.assert_close(solve(sums, weight, 0.1), torch.linalg.lstsq(rows, wanted).solution)
    # Held out are the same tokens: it helps, by as much as `gain` says. On tokens that go the other way nothing does.
    found = refit(sums, sums, weight)
    assert found is not None
    change = (found.double() - weight.double()).t()
    errors = [(missing @ weight.double().t() - given @ d).square().sum().item() for d in (0 * change, change)]
    assert gain(sums, weight, change) == pytest.approx(errors[0] - errors[1])
    assert errors[1] < 0.1 * errors[0]
    assert refit(sums, Sums(sums.gram, -sums.cross), weight) is None


def test_criterion_magnitude_scores_by_absolute_value() -> None:
    _, zs, _ = select(torch.tensor([[-5.0, 1.0, 4.0, -2.0]]), Params(2, 4))
    assert zs.tolist() == [[-5.0, 0.0, 4.0, 0.0]]


def test_channel_scale_multiplies_the_score_and_not_the_value() -> None:
    params = Params(1, 2, channel_scale=torch.tensor([1.0, 3.0]))
    _, zs, _ = select(torch.tensor([[2.0, 1.0]]), params)
    assert zs.tolist() == [[0.0, 1.0]]


def test_variance_floor() -> None:
    z, zs = torch.tensor([[1.0, -1.0]]), torch.zeros(1, 2)
    # Var(z) = 2, Var(zs) = 0 -> sqrt(2 / 1e-9)
    assert token_scale(z, zs).item() == pytest.approx(math.sqrt(2e9))


def test_dropped_infinity_gives_no_nan() -> None:
    _, zs, _ = select(torch.tensor([[INF, INF, 1.0, 2.0]]), Params(1, 4))
    assert zs.tolist() == [[INF, 0.0, 0.0, 0.0]]


def test_every_entry_has_a_row() -> None:
    assert set(GOLDEN) == {(name, variant) for name, table in MITIGATIONS.items() for variant in table}
    assert set(SCALES) | set(PRUNED) == set(CRITERIA)
