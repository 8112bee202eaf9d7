from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from converter.errors import RecipeError
from converter.recipe import Allocation, Recipe, from_yaml, parse_set
from converter.sparsity.criteria import CRITERIA


def test_yaml_round_trip(tmp_path: Path) -> None:
    recipe = Recipe().replace({"pattern": "2:4", "mitigation": "s_pts+var", "calibration.tokens": 1024})
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    assert from_yaml(tmp_path / "r.yaml") == recipe
    assert from_yaml(tmp_path / "r.yaml").sha256() == recipe.sha256()


def test_patterns_keep_their_order_and_are_one_value(tmp_path: Path) -> None:
    rows = {"*.up_proj": "10:16", "*": "50%", "model.layers.0.mlp.gate_proj": "dense"}
    recipe = Recipe().replace({"patterns": rows, "preset": "amber", "allocation.budget": "50%"})
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    assert from_yaml(tmp_path / "r.yaml") == recipe
    assert list(from_yaml(tmp_path / "r.yaml").patterns.items()) == list(rows.items())
    # A second table replaces the first: behind "*" its row would never be asked.
    again = recipe.replace(parse_set(['patterns={"*.q_proj": 2:4, "*.k_proj": 24}']))
    assert again.patterns == {"*.q_proj": "2:4", "*.k_proj": "24"}


def test_the_text_suffices_for_the_allocation() -> None:
    changes = {"mitigation": "none", "calibration.window": 32, "allocation.tokens": 100, "allocation.budget": "12.5%"}
    assert Recipe().replace(changes).windows() == 3
    assert Recipe().replace({**changes, "mitigation": "s_pts", "calibration.tokens": 128}).windows() == 4
    assert Recipe().replace({**changes, "allocation.budget": None}).windows() == 0
    assert Recipe().replace(changes).allocation.limit(31) == 3  # 3.875


def test_a_pattern_alone_is_meant_for_every_layer(tmp_path: Path) -> None:
    assert Recipe().allocation.budget == "50%"
    assert Recipe().replace({"criterion": "magnitude"}).allocation.budget == "50%"
    assert Recipe().replace({"pattern": "8:16"}).allocation.budget is None
    assert Recipe(pattern="8:16") == Recipe().replace({"pattern": "8:16"})
    assert Recipe(pattern="8:16", allocation=Allocation(budget="40%")).allocation.budget == "40%"
    assert Recipe().replace({"pattern": "2:4", "allocation.budget": "40%"}).allocation.budget == "40%"
    assert Recipe().replace({"pattern": "2:4", "allocation": {"tokens": 512}}).allocation.budget == "50%"
    (tmp_path / "r.yaml").write_text("pattern: 2:4\n")
    assert from_yaml(tmp_path / "r.yaml").allocation.budget is None


def test_a_bare_pattern_is_no_number_in_base_60(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("pattern: 8:16\ncalibration: {tokens: 1024}\n")
    recipe = from_yaml(tmp_path / "r.yaml")
    assert recipe.pattern == "8:16"
    assert recipe.calibration.tokens == 1024
    assert recipe.calibration.window == Recipe().calibration.window
    assert Recipe().replace(parse_set(["pattern=2:4"])).pattern == "2:4"


def test_recipes_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        Recipe().pattern = "2:4"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": 1}, r"unknown key 'colour'; available: allocation\.budget, .*targets"),
        ({"calibration.colour": 1}, r"unknown key 'calibration\.colour'; available"),
        ({"pattern": "9:8"}, r"N:M must have 0 < N <= M, got '9:8'"),
        (
            {"criterion": "clat"},
            r"unknown criterion 'clat'; available: amber, amber_trimmed, clact, clact_dynamic, ma.*, wanda, w.*, wina",
        ),
        ({"mitigation": "vat"}, r"unknown mitigation 'vat'; available: d_pts, distill, l_pts, ls, none, .* s_pts, var"),
        ({"mitigation": "none+var"}, r"none cannot be combined"),
        ({"mitigation": "refit+r_sparse"}, r"refit and r_sparse cannot be combined"),
        ({"mitigation": "var+var"}, r"both set the variance"),
        ({"preset": "ambre"}, r"unknown preset 'ambre'; available: all, amber, k_v_gate_down"),
        ({"patterns": "2:4"}, r"patterns: .*must be a table of name patterns, .* got '2:4'"),
        ({"patterns": {"*.q_proj": "9:8"}}, r"N:M must have 0 < N <= M, got '9:8'"),
        ({"allocation.budget": "0%"}, r"allocation\.budget: .*above 0% and at most 100%, such as 50%, got '0%'"),
        ({"allocation.budget": "100.1%"}, r"allocation\.budget: .*above 0% and at most 100%.*, got '100\.1%'"),
        ({"allocation.budget": 50}, r"allocation\.budget: .*such as 50%, got 50"),
        ({"allocation.menu": []}, r"allocation\.menu: .*must be one or more patterns"),
        ({"allocation.menu": "9:8"}, r"N:M must have 0 < N <= M, got '9:8'"),
        (
            {"allocation.budget": "50%", "pattern": "24"},
            r"allocation\.menu: must be given with .*, got 24 and no menu",
        ),
        (
            {"allocation.budget": "50%", "allocation.tokens": 100},
            r"allocation\.tokens must be at least one window \(256\), got 100",
        ),
        (
            {"criterion": "wanda"},
            r"must be none with the criterion wanda, which prunes .* got permute\+var\+distill\. Set ",
        ),
        ({"criterion": "sparsegpt", "mitigation": "none+var"}, r"none cannot be combined"),
        (
            {"criterion": "clact_dynamic", "mitigation": "var+refit"},
            r"must be without refit with the criterion clact_dynamic, got var\+refit: .* Leave out refit",
        ),
        ({"dtype": "int8"}, r"'float32', 'float16' or 'bfloat16', got 'int8'"),
        ({"phases": "training"}, r"phases: .*'both', 'prefill' or 'decode', got 'training'"),
        ({"s_pts": "median"}, r"'channel' or 'scalar', got 'median'"),
        ({"calibration.tokens": 3}, r"tokens must be at least one window \(256\), got 3"),
        ({"mitigation": "distill", "training.window": 200}, r"training\.window must divide .* \(256\), got 200"),
        ({"calibration.window": 0}, r"calibration\.window: .*greater than 1"),
    ],
)
def test_refusals(changes: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe().replace(changes)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("clact_dynamic", r"looks at later tokens .* Use clact"),
        ("weight_magnitude", r"prunes the weight, where the op prunes activations\. Use magnitude"),
        ("wanda", r"prunes the weight"),
        ("sparsegpt", r"prunes the weight"),
    ],
)
def test_criteria_for_comparison_are_not_exported(name: str, reason: str) -> None:
    recipe = Recipe().replace({"criterion": name, "mitigation": "none"})
    with pytest.raises(RecipeError, match=rf"criterion: must be one that can be exported, got {name}: it {reason}"):
        recipe.require_exportable()


def test_all_other_criteria_are_exported() -> None:
    for name, entry in CRITERIA.items():
        if not entry.reference:
            Recipe().replace({"criterion": name}).require_exportable()


@pytest.mark.parametrize(("text", "message"), [("[1]", "must be a table"), ("a: [", "must be YAML")])
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        from_yaml(tmp_path / "r.yaml")
    with pytest.raises(RecipeError, match="must be a YAML recipe"):
        from_yaml(tmp_path / "absent.yaml")


def test_set_needs_an_equals_sign() -> None:
    with pytest.raises(RecipeError, match="must be key=value, got 'pattern'"):
        parse_set(["pattern"])


@pytest.mark.parametrize(
    ("pattern", "menu"),
    [
        (
            "50%",
            "25%,28.125%,31.25%,34.375%,37.5%,40.625%,43.75%,46.875%,50%,53.125%,56.25%,59.375%,62.5%,65.625%,68.75%,71.875%,75%",
        ),
        ("80%", "40%,45%,50%,55%,60%,65%,70%,75%,80%,85%,90%,95%"),
        ("2:4", "1:4,2:4,3:4"),
        ("3:4", "2:4,3:4"),
        ("1:2", "1:2"),
        ("1:1", "1:1"),
        ("4:8", "2:8,3:8,4:8,5:8,6:8"),
    ],
)
def test_menu_by_default(pattern: str, menu: str) -> None:
    assert Recipe().replace({"pattern": pattern}).menu() == tuple(menu.split(","))
    assert Recipe().replace({"pattern": pattern, "allocation.menu": "8:16"}).menu() == ("8:16",)
