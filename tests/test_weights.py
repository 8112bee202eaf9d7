"""Laws of the baselines that prune the weight, and the walk with what is for comparison only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import PLAIN

from converter.calibration.walk import calibrate
from converter.checkpoint import open_checkpoint
from converter.errors import CalibrationError
from converter.plan import plan
from converter.sparsity.criteria import CRITERIA
from converter.sparsity.linear import SparseLinear
from converter.sparsity.statistics import LayerStats
from converter.sparsity.weights import sparsegpt, wanda, weight_magnitude

BASELINES = [weight_magnitude, wanda, sparsegpt]


def layer(rows: int, channels: int, tokens: int = 400, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, LayerStats]:
    """Return a random weight, inputs whose channels are correlated and of unequal size, and their statistics."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(channels, channels, generator=generator).double() / channels**0.5
    size = torch.randn(channels, generator=generator).double().exp()
    x = torch.randn(tokens, channels, generator=generator).double() @ (mix + 0.5 * torch.eye(channels)) * size
    stats = LayerStats.of("layer", channels, gram=True)
    stats.update(x)
    return torch.randn(rows, channels, generator=generator), x, stats


def damped(stats: LayerStats) -> torch.Tensor:
    assert stats.gram is not None
    return stats.gram + 0.01 * stats.gram.diagonal().mean() * torch.eye(len(stats.gram), dtype=torch.float64)


def without(h: torch.Tensor, row: torch.Tensor, dropped: int) -> torch.Tensor:
    """Return the row with one weight at zero and those after it the solution of the least squares that remain."""
    result, after = row.clone(), slice(dropped + 1, len(row))
    result[dropped] = 0
    result[after] += torch.linalg.solve(h[after, after], h[after, dropped] * row[dropped])
    return result


def lost(h: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> float:
    return ((after - before) @ h @ (after - before)).item()


def test_sparsegpt_drops_the_weight_whose_loss_can_best_be_made_up_for() -> None:
    """One dropped weight in a row: of all choices, each with its least-squares solution, the best."""
    weight, _, stats = layer(20, 12)
    h, found = damped(stats), sparsegpt(weight, stats, 11, 12)
    for row, pruned in zip(weight.double(), found.double(), strict=True):
        choices = [without(h, row, dropped) for dropped in range(12)]
        best = min(range(12), key=lambda dropped: lost(h, row, choices[dropped]))
        torch.testing.assert_close(pruned, choices[best], rtol=1e-5, atol=1e-5)
    assert len({row.nonzero().flatten().tolist().__repr__() for row in found}) > 3  # not one column for all rows


@pytest.mark.parametrize(
    ("keep", "group", "channels"), [(2, 4, 264), (4, 24, 264), (70, 132, 264), (2, 4, 8), (3, 300, 300)]
)
def test_sparsegpt_is_least_squares_column_by_column(keep: int, group: int, channels: int) -> None:
    """For the masks that it chose, over borders of blocks too, those after a dropped weight make up for it."""
    weight, _, stats = layer(3, channels)
    h, found = damped(stats), sparsegpt(weight, stats, keep, group)
    for row, pruned in zip(weight.double(), found.double(), strict=True):
        expected = row
        for column in (pruned == 0).nonzero().flatten().tolist():
            expected = without(h, expected, column)
        torch.testing.assert_close(pruned, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize(
    ("keep", "group", "channels"), [(2, 4, 264), (8, 16, 48), (70, 132, 264), (150, 300, 300), (1, 300, 300)]
)
def test_baselines_keep_the_pattern(
    baseline: Callable[..., torch.Tensor], keep: int, group: int, channels: int
) -> None:
    weight, _, stats = layer(6, channels)
    found = baseline(weight, stats, keep, group)
    assert found.dtype == torch.float32
    assert torch.equal((found != 0).reshape(-1, group).sum(-1), torch.full((6 * channels // group,), keep))


@pytest.mark.parametrize("group", [4, 16, 64])
def test_the_more_a_baseline_looks_at_the_less_it_loses(group: int) -> None:
    weight, x, stats = layer(40, 64)
    errors = []
    for baseline in BASELINES:
        change = weight.double() - baseline(weight, stats, group // 2, group).double()
        errors.append((x @ change.t()).square().sum().item())
    assert errors[2] < 0.9 * errors[1] < 0.8 * errors[0]


def test_inputs_that_are_all_zero() -> None:
    stats = LayerStats.of("layer", 4, gram=True)
    stats.update(torch.zeros(3, 4))
    with pytest.raises(CalibrationError, match=r"layer: activations must not all be zero .* for sparsegpt"):
        sparsegpt(torch.ones(2, 4), stats, 2, 4)


def ids() -> torch.Tensor:
    return torch.randint(3, 200, (4, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", [name for name, entry in CRITERIA.items() if entry.prune is not None])
def test_walk_with_a_baseline(tiny: Path, tmp_path: Path, name: str) -> None:
    """Every weight has the pattern, every activation is kept, and a layer's input is that of the pruned model."""
    checkpoint = open_checkpoint(str(tiny))
    recipe = PLAIN.replace({"criterion": name, "mitigation": "none", "pattern": "2:4", "calibration.batch": 2})
    model, dense = checkpoint.model(), checkpoint.model()
    layers = plan(checkpoint.skeleton(), recipe)
    params = calibrate(model, layers, recipe, ids() if recipe.needs_statistics() else None, tmp_path)
    assert len(params) == 21
    for layer_name, found in params.items():
        assert found.keep == found.group
        assert found.weight is not None
        assert ((found.weight != 0).reshape(-1, 4).sum(-1) == 2).all()
        dense.get_submodule(layer_name).weight.data = found.weight
    with torch.no_grad():
        expected = dense(input_ids=ids()).logits
        torch.testing.assert_close(model(input_ids=ids()).logits, expected, rtol=1e-4, atol=1e-4)

    # The last block's q_proj, from its input with the blocks before it pruned.
    stats = LayerStats.of("layer", 64, gram=True)
    last = "model.layers.2.self_attn.q_proj"
    dense.get_submodule(last).register_forward_pre_hook(lambda _, args: stats.update(args[0][:, 1:]))
    with torch.no_grad():
        dense(input_ids=ids())
    prune_weight = CRITERIA[name].prune
    assert prune_weight is not None
    expected = prune_weight(checkpoint.model().get_submodule(last).weight.data, stats, 2, 4)
    torch.testing.assert_close(params[last].weight, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("name", "causal"), [("clact_dynamic", False), ("clact", True)])
def test_dynamic_clact_looks_at_later_tokens(tiny: Path, tmp_path: Path, name: str, causal: bool) -> None:
    checkpoint = open_checkpoint(str(tiny))
    recipe = PLAIN.replace({"criterion": name, "mitigation": "permute+var", "calibration.batch": 2})
    model, layers = checkpoint.model(), plan(checkpoint.skeleton(), recipe)
    calibrate(model, layers, recipe, ids(), tmp_path)
    assert isinstance(model.model.layers[0].mlp.up_proj, SparseLinear)
    text, other = ids(), ids()
    other[0, -8:] = 5
    with torch.no_grad():
        first, second = (model(input_ids=t).logits for t in (text, other))
    assert torch.allclose(first[0, :8], second[0, :8], rtol=1e-3, atol=1e-3) == causal
    # The other sequences of the batch are as they were.
    torch.testing.assert_close(first[1:], second[1:], rtol=1e-3, atol=1e-3)
