from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from converter.errors import RecipeError
from converter.recipe import Recipe, from_yaml, parse_set


def test_yaml_round_trip(tmp_path: Path) -> None:
    recipe = Recipe().replace({"pattern": "2:4", "mitigation": "s_pts+var", "calibration.tokens": 1024})
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    assert from_yaml(tmp_path / "r.yaml") == recipe
    assert from_yaml(tmp_path / "r.yaml").sha256() == recipe.sha256()


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
        ({"colour": 1}, r"unknown key 'colour'; available: calibration\.batch, .*targets"),
        ({"calibration.colour": 1}, r"unknown key 'calibration\.colour'; available"),
        ({"pattern": "9:8"}, r"N:M must have 0 < N <= M, got '9:8'"),
        (
            {"criterion": "clat"},
            r"unknown criterion 'clat'; available: amber, amber_trimmed, clact, magnitude, we.*, wina",
        ),
        ({"mitigation": "vat"}, r"unknown mitigation 'vat'; available: d_pts, distill, l_pts, ls, none, .* s_pts, var"),
        ({"mitigation": "none+var"}, r"none cannot be combined"),
        ({"mitigation": "refit+r_sparse"}, r"refit and r_sparse cannot be combined"),
        ({"mitigation": "var+var"}, r"both set the variance"),
        ({"dtype": "int8"}, r"'float32', 'float16' or 'bfloat16', got 'int8'"),
        ({"phases": "training"}, r"phases: .*'both', 'prefill' or 'decode', got 'training'"),
        ({"s_pts": "median"}, r"'channel' or 'scalar', got 'median'"),
        ({"calibration.tokens": 3}, r"tokens must be at least one window \(512\), got 3"),
        ({"calibration.window": 0}, r"calibration\.window: .*greater than 1"),
    ],
)
def test_refusals(changes: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe().replace(changes)


@pytest.mark.parametrize(("text", "message"), [("[1]", "must be a table"), ("a: [", "must be a YAML recipe")])
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        from_yaml(tmp_path / "r.yaml")
    with pytest.raises(RecipeError, match="must be a YAML recipe"):
        from_yaml(tmp_path / "absent.yaml")


def test_set_needs_an_equals_sign() -> None:
    with pytest.raises(RecipeError, match="must be key=value, got 'pattern'"):
        parse_set(["pattern"])
