"""Allocation: what a pattern costs against the definition, and the choice against all choices."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from conftest import PLAIN
from hypothesis import given, settings
from hypothesis import strategies as st

from converter.calibration.allocate import allocate, choose, measure
from converter.checkpoint import open_checkpoint
from converter.errors import CalibrationError
from converter.pipeline import convert
from converter.plan import plan
from converter.recipe import from_yaml
from converter.sparsity.criteria import wina
from converter.sparsity.linear import Params, apply

MENU = ["2:8", "4:8", "6:8", "8:8"]
BUDGET = {
    "calibration.window": 16,
    "calibration.tokens": 64,
    "allocation": {"budget": "50%", "menu": MENU, "tokens": 48},
}


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(st.tuples(st.lists(st.integers(0, 50), min_size=3, max_size=3), st.integers(1, 9)), max_size=5),
    share=st.integers(1, 4),
)
def test_no_other_choice_is_better_for_what_is_kept(rows: list[tuple[list[int], int]], share: int) -> None:
    """The menu keeps 1, 2 or 3 of 4; effects need not fall with what is kept."""
    effects = {str(number): [float(e) for e in row] for number, (row, _) in enumerate(rows)}
    kept = {str(number): [size, 2 * size, 3 * size] for number, (_, size) in enumerate(rows)}
    limit = share * sum(size for _, size in rows)
    found = choose(effects, kept, limit)

    def total(table: dict[str, list[float]] | dict[str, list[int]], choice: dict[str, int]) -> float:
        return sum(table[name][i] for name, i in choice.items())

    used = total(kept, found)
    assert used <= limit
    every = [dict(zip(effects, choice, strict=True)) for choice in itertools.product(range(3), repeat=len(rows))]
    assert total(effects, found) == min(total(effects, c) for c in every if total(kept, c) <= used)


def test_choice_by_hand() -> None:
    # Sizes 4 and 4, patterns of 1/4, 1/2, 3/4: kept 1, 2, 3 of each. Effects 9, 4, 1 and 3, 2, 1: from the sparsest on
    # a step of the first saves 5, then 3, of the second 1 and 1. Of 5 kept, 3 go to the first.
    effects, kept = {"a": [9.0, 4.0, 1.0], "b": [3.0, 2.0, 1.0]}, {"a": [4, 8, 12], "b": [4, 8, 12]}
    assert choose(effects, kept, 12) == {"a": 1, "b": 0}
    assert choose(effects, kept, 16) == {"a": 2, "b": 0}
    assert choose(effects, kept, 15) == {"a": 1, "b": 0}  # never more than the limit
    assert choose(effects, kept, 24) == {"a": 2, "b": 2}
    assert choose(effects, kept, 8) == {"a": 0, "b": 0}


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(3, 200, (4, 16), generator=torch.Generator().manual_seed(0))


def test_effect_is_the_squared_change_of_the_loss_to_first_order(tiny: Path, ids: torch.Tensor) -> None:
    """Against the definition: the error of the whole layer, times the gradient to its output, of every token."""
    checkpoint = open_checkpoint(str(tiny))
    recipe = PLAIN.replace({**BUDGET, "criterion": "wina", "mitigation": "d_pts+var"})
    layers, model = plan(checkpoint.skeleton(), recipe), checkpoint.model()
    model.get_submodule("model.layers.0").requires_grad_()
    before = [parameter.requires_grad for parameter in model.parameters()]
    found = measure(model, layers.open, recipe, ids[:2])
    assert [parameter.requires_grad for parameter in model.parameters()] == before
    assert all(parameter.grad is None for parameter in model.parameters())
    name = "model.layers.1.mlp.up_proj"
    linear, expected = model.get_submodule(name), [0.0] * len(MENU)
    assert not linear._forward_hooks
    for window in ids[:2]:
        seen: list[torch.Tensor] = []

        def keep(_module: object, args: tuple[torch.Tensor], y: torch.Tensor, seen: list[torch.Tensor] = seen) -> None:
            y.retain_grad()
            seen.extend((args[0].detach(), y))

        handle = linear.register_forward_hook(keep)
        logits = model(input_ids=window[None]).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").backward()
        handle.remove()
        x, y = seen
        params = Params(8, 8, "token_median", True, channel_scale=wina(linear.weight, None))
        for number, count in enumerate((2, 4, 6, 8)):
            error = apply(x, linear.weight.detach(), None, replace(params, keep=count)) - y.detach()
            assert y.grad is not None
            expected[number] += (y.grad * error).sum(-1).square().sum().item()
    assert found[name][3] == 0  # keeps every channel, and costs nothing
    assert found[name][:3] == pytest.approx(expected[:3], rel=1e-3)
    assert all(row[0] > 0 and row[3] == 0 for row in found.values())


def test_a_criterion_that_needs_statistics_is_measured_as_wina(tiny: Path, ids: torch.Tensor) -> None:
    checkpoint = open_checkpoint(str(tiny))
    effects = []
    for criterion, mitigation in (("clact", "permute+s_pts+var"), ("wina", "var"), ("magnitude", "var")):
        recipe = PLAIN.replace({**BUDGET, "criterion": criterion, "mitigation": mitigation})
        layers = plan(checkpoint.skeleton(), recipe)
        effects.append(measure(checkpoint.model(), layers.open, recipe, ids))
    assert effects[0] == effects[1]
    assert effects[0] != effects[2]


@pytest.mark.parametrize("budget", ["25%", "33.3%", "50%", "74.9%"])
def test_the_budget_is_never_exceeded(tiny: Path, ids: torch.Tensor, budget: str) -> None:
    checkpoint = open_checkpoint(str(tiny))
    recipe = PLAIN.replace({**BUDGET, "allocation.budget": budget, "allocation.menu": ["1:4", "2:4", "3:4"]})
    layers, model = plan(checkpoint.skeleton(), recipe), checkpoint.model()
    first = allocate(model, layers, recipe, ids)
    assert first == allocate(model, layers, recipe, ids)  # and the model is as it was
    chosen = plan(checkpoint.skeleton(), recipe.replace({"patterns": first})).sparse
    sizes = [layer.in_features * layer.out_features for layer in chosen]
    kept = sum(layer.keep / layer.group * size for layer, size in zip(chosen, sizes, strict=True)) / sum(sizes)
    share = float(budget.removesuffix("%")) / 100
    assert share - 0.05 < kept <= share
    # The 48 tokens that the recipe asks for, whatever else the text holds.
    assert first == allocate(model, layers, recipe, ids[:3])


def test_a_layer_without_a_part_in_the_loss(tiny: Path, ids: torch.Tensor) -> None:
    checkpoint = open_checkpoint(str(tiny))
    recipe = PLAIN.replace(BUDGET)
    layers, model = plan(checkpoint.skeleton(), recipe), checkpoint.model()
    model.get_submodule("model.layers.2.mlp.down_proj").weight.data.zero_()
    with pytest.raises(CalibrationError, match=r"layers\.2\.mlp\.gate_proj: must have a part in the loss .*, got none"):
        measure(model, layers.open, recipe, ids)
    model.get_submodule("model.layers.2.mlp.down_proj").weight.data.fill_(torch.nan)
    with pytest.raises(CalibrationError, match=r"layers\..*: effects of the patterns must be finite, got NaN or Inf"):
        measure(model, layers.open, recipe, ids)


def test_conversion_with_a_budget_and_again_from_its_recipe(tiny: Path, tmp_path: Path) -> None:
    changes = {**BUDGET, "criterion": "wina", "mitigation": "s_pts+var", "patterns": {"*.1.mlp.up_proj": "3:8"}}
    out = convert(str(tiny), tmp_path / "out", PLAIN.replace(changes))
    report = json.loads((out / "report.json").read_text())
    assert report["parity"]["passed"]
    assert "allocate" in [cost["stage"] for cost in report["stages"]]
    recipe = from_yaml(out / "recipe.yaml")
    assert recipe.allocation.budget == "50%"
    assert next(iter(recipe.patterns)) == "*.1.mlp.up_proj"
    assert len(recipe.patterns) == 21  # one row of the user, twenty layers
    nodes = [n for n in onnx.load(out / "model.onnx", load_external_data=False).graph.node if n.domain == "nmsparse"]
    found = {}
    for node in nodes:
        settings_ = {a.name: a.i for a in node.attribute}
        found[node.input[1].removesuffix(".weight")] = f"{settings_['keep']}:{settings_['group']}"
    assert found.pop("model.layers.1.mlp.up_proj") == "3:8"
    assert found == {n: p for n, p in recipe.patterns.items() if "*" not in n and p != "8:8"}
    assert len(set(found.values())) > 1
    again = convert(str(tiny), tmp_path / "again", recipe)
    assert "allocate" not in (again / "report.json").read_text()
    for name in ("recipe.yaml", "model.onnx", "model.onnx.data"):
        assert (out / name).read_bytes() == (again / name).read_bytes(), name
