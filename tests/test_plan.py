"""Which layers become sparse and at which pattern: tables of names, the reasons, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from conftest import PLAIN
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from converter.checkpoint import open_checkpoint
from converter.errors import RecipeError
from converter.plan import plan
from converter.presets import AMBER_SKIPS, PRESETS, amber
from converter.recipe import Recipe

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def skeleton(tiny: Path) -> PreTrainedModel:
    return open_checkpoint(str(tiny)).skeleton()


def planned(model: PreTrainedModel, changes: dict[str, object]) -> dict[str, str]:
    """Return the pattern of each layer, or why it stays dense."""
    return {
        layer.name: layer.reason or f"{layer.keep}:{layer.group}"
        for layer in plan(model, PLAIN.replace(changes)).layers
    }


def row(found: dict[str, str], block: int) -> list[str]:
    """Return the block's entries in the order of `PROJECTIONS`."""
    return [next(v for k, v in found.items() if f".{block}." in k and k.endswith(p)) for p in PROJECTIONS]


ONLY_3 = "preset amber prunes down_proj, gate_proj, q_proj only (no list of blocks is published for this model)"
ONLY_4 = "preset k_v_gate_down prunes down_proj, gate_proj, k_proj, v_proj only"
UP, BLOCK_1 = "dense by patterns '*.up_proj'", "ignored by '*.1.*'"
PLANS = [
    # changes, block 0, block 1 (q, k, v, o, gate, up, down)
    ({}, ["8:16"] * 7, ["8:16"] * 7),
    # The first row that matches wins, not the most exact one; what none matches has `pattern`.
    (
        {"patterns": {"*.mlp.*": "4:16", "model.layers.1.mlp.up_proj": "12:16", "*.q_proj": "2:4"}},
        ["2:4", "8:16", "8:16", "8:16", "4:16", "4:16", "4:16"],
        ["2:4", "8:16", "8:16", "8:16", "4:16", "4:16", "4:16"],
    ),
    (
        {"patterns": {"model.layers.1.mlp.up_proj": "12:16", "*.mlp.*": "25%"}},
        ["8:16", "8:16", "8:16", "8:16", "16:64", "16:64", "24:96"],
        ["8:16", "8:16", "8:16", "8:16", "16:64", "12:16", "24:96"],
    ),
    ({"patterns": {"*.up_proj": "dense"}}, ["8:16"] * 5 + [UP, "8:16"], ["8:16"] * 5 + [UP, "8:16"]),
    (
        {"patterns": {"*.up_proj": "16:16"}},
        ["8:16"] * 5 + ["pattern 16:16 keeps every channel", "8:16"],
        ["8:16"] * 5 + ["pattern 16:16 keeps every channel", "8:16"],
    ),
    (
        {"preset": "amber"},
        ["8:16", ONLY_3, ONLY_3, ONLY_3, "8:16", ONLY_3, "8:16"],
        ["8:16", ONLY_3, ONLY_3, ONLY_3, "8:16", ONLY_3, "8:16"],
    ),
    (
        {"preset": "k_v_gate_down"},
        [ONLY_4, "8:16", "8:16", ONLY_4, "8:16", ONLY_4, "8:16"],
        [ONLY_4, "8:16", "8:16", ONLY_4, "8:16", ONLY_4, "8:16"],
    ),
    # A layer is sparse only where all allow it: a row of `patterns` opens nothing that another rule closes.
    (
        {"preset": "k_v_gate_down", "ignore": "*.1.*", "targets": "*_proj", "patterns": {"*": "2:4"}},
        [ONLY_4, "2:4", "2:4", ONLY_4, "2:4", ONLY_4, "2:4"],
        [BLOCK_1] * 7,
    ),
]


@pytest.mark.parametrize(("changes", "first", "second"), PLANS, ids=[json.dumps(r[0])[:60] for r in PLANS])
def test_plans(skeleton: PreTrainedModel, changes: dict[str, object], first: list[str], second: list[str]) -> None:
    found = planned(skeleton, changes)
    assert len(found) == 22
    assert found["lm_head"] == "output head"
    assert (row(found, 0), row(found, 1)) == (first, second)


def test_amber_leaves_the_published_blocks_dense() -> None:
    """On a model with the sizes of the published one: a configuration is enough, the weights are never made."""
    config = AutoConfig.for_model(
        "llama",
        num_hidden_layers=32,
        hidden_size=4096,
        intermediate_size=14336,
        vocab_size=128256,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = planned(model, {"preset": "amber"})
    only = "preset amber prunes down_proj, gate_proj, q_proj only (blocks as in Llama-3.1-8B)"
    assert row(found, 18) == ["8:16", only, only, only, "8:16", only, "8:16"]
    skipped = "preset amber leaves {} of block 19 dense in Llama-3.1-8B"
    assert row(found, 19) == [skipped.format("q_proj"), only, only, only, skipped.format("gate_proj"), only, "8:16"]
    sparse = [block for block in range(32) if row(found, block)[0] == "8:16"]
    assert sorted(set(range(32)) - set(sparse)) == [19, 21, 28, 30, 31]


def test_amber_takes_no_other_model_for_a_published_one() -> None:
    """Llama-2-7B has the type, the blocks and the width of Llama-3.1-8B; Qwen2-1.5B has the blocks of Qwen2-7B."""
    for name, blocks, width, words in (("llama", 32, 4096, 32000), ("qwen2", 28, 1536, 151936)):
        config = AutoConfig.for_model(name, num_hidden_layers=blocks, hidden_size=width, vocab_size=words)
        assert not any(amber("q_proj", block, config) for block in range(blocks))
    for skips in AMBER_SKIPS:
        assert max(skips.skipped) < skips.blocks


def test_a_model_with_other_projections_is_not_pruned_by_guess() -> None:
    config = AutoConfig.for_model("phi")
    assert [bool(rule("fc1", 0, config)) for rule in PRESETS.values()] == [False, True, True]


REFUSED = [
    ({"patterns": {"*.up_porj": "2:4"}}, r"patterns: '\*\.up_porj' must match a layer of the model, got none"),
    ({"patterns": {"*.up_proj": "8:40"}}, r"model\.layers\.0\.mlp\.up_proj: in_features must be divisible by 40"),
    ({"patterns": {"*": "dense"}}, r"plan: at least one layer must be sparse, got none: dense by patterns '\*'; outp"),
    (
        {"allocation": {"budget": "50%", "menu": ["4:16", "8:40"]}},
        r"model\.layers\.0\.self_attn\.q_proj: in_features must be divisible by 40 for pattern 8:40, got 64",
    ),
    (
        {"allocation": {"budget": "30%", "menu": ["8:16", "5:16"]}},
        r"allocation\.budget: must be at least 31\.25%, what the sparsest of the menu keeps, got 30%\. Raise it",
    ),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_refusals(skeleton: PreTrainedModel, changes: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        plan(skeleton, PLAIN.replace(changes))


def test_a_budget_leaves_open_what_no_row_names(skeleton: PreTrainedModel) -> None:
    changes = {"patterns": {"*.up_proj": "12:16"}, "preset": "k_v_gate_down", "allocation.budget": "50%"}
    found = plan(skeleton, PLAIN.replace(changes))
    assert {layer.name.rpartition(".")[2] for layer in found.open} == {"k_proj", "v_proj", "gate_proj", "down_proj"}
    exact = {layer.name: "8:16" for layer in found.open}
    assert not plan(skeleton, PLAIN.replace({**changes, "patterns": exact})).open


def test_dry_run_shows_patterns_and_what_is_open(
    nmsparse: Callable[..., CompletedProcess[str]], skeleton: PreTrainedModel, tiny: Path, tmp_path: Path
) -> None:
    options = ["--set", 'patterns={"*.up_proj": "10:16"}', "--set", "allocation.budget=50%", "--pattern", "8:16"]
    options += ["--dry-run"]
    found = nmsparse("convert", tiny, tmp_path / "out", *options, "--json")
    recipe = Recipe().replace({"patterns": {"*.up_proj": "10:16"}})
    layers = [asdict(layer) for layer in plan(skeleton, recipe).layers]
    assert json.loads(found.stdout)["layers"] == json.loads(json.dumps(layers))
    text = nmsparse("convert", tiny, tmp_path / "out", *options).stdout
    assert text.count("by budget") == 18
    assert text.count("10:16") == 4  # three layers, and the row in the recipe
