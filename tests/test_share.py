"""Sharing: layers that read one tensor choose its channels together, and are one node."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
import torch
from conftest import PLAIN, make_tiny

from converter import load
from converter.calibration import file as calibration_file
from converter.calibration.blocks import siblings
from converter.checkpoint import open_checkpoint
from converter.delivery import report as pages
from converter.errors import RecipeError
from converter.graph.costs import layer_costs
from converter.graph.merge import parts
from converter.pipeline import convert, export
from converter.plan import plan
from converter.recipe import Recipe, from_yaml
from converter.stages import Stages

TEXT = {
    "calibration": {"source": "python", "window": 32, "tokens": 256},
    "allocation": {"budget": "50%", "tokens": 128},
}
SHARED = PLAIN.replace({**TEXT, "share": True, "criterion": "wina", "mitigation": "permute+var"})


def layers(out: Path) -> list[list[str]]:
    """Return the layers of each node, by their projections."""
    graph = onnx.load(out / "model.onnx", load_external_data=False)
    return [[name.rpartition(".")[2] for name in parts(cost.name)] for cost in layer_costs(graph)]


def parity(out: Path) -> tuple[bool, int]:
    found = json.loads((out / "report.json").read_text())["parity"]
    return found["passed"], found["layers"]


OF_LLAMA = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def test_by_hand(tmp_path: Path) -> None:
    out = convert(str(make_tiny(tmp_path / "model", "qwen2")), tmp_path / "out", SHARED)
    assert layers(out) == OF_LLAMA * 3
    assert parity(out) == (True, 21)
    checkpoint, params = open_checkpoint(str(tmp_path / "model")), calibration_file.read(out / calibration_file.NAME)
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(out / "model.onnx").graph.initializer}
    block = "model.layers.1.self_attn"
    node, names = f"{block}.q_proj+k_proj+v_proj", [f"{block}.{part}_proj" for part in "qkv"]
    weights = [checkpoint.read(f"{name}.weight") for name in names]
    np.testing.assert_array_equal(stored[f"{node}.weight"], torch.cat(weights).t())
    biases = torch.cat([checkpoint.read(f"{name}.bias") for name in names])
    np.testing.assert_array_equal(stored[f"{node}.bias"], biases)
    assert np.abs(stored[f"{node}.bias"]).min() > 0, "qwen2 has biases"
    # The norm of a column over the rows of all three, the same order of channels for all, and one pattern.
    norms = torch.cat(weights).double().square().sum(0).sqrt().float()
    np.testing.assert_allclose(stored[f"{node}.channel_scale"], norms, rtol=1e-6)
    np.testing.assert_array_equal(stored[f"{node}.permutation"], params[names[2]].permutation)
    assert len({(params[name].keep, params[name].group) for name in names}) == 1
    # What is left of the siblings is their names: nothing is stored twice.
    assert not any(name.startswith(f"{part}.") for part in names for name in stored)


def test_who_shares_is_seen_and_not_read_from_names(tmp_path: Path) -> None:
    # In Phi one norm is read by q, k, v and by fc1, which lies in another module.
    checkpoint = open_checkpoint(str(make_tiny(tmp_path, "phi")))
    layers = plan(checkpoint.skeleton(), PLAIN).sparse
    found = siblings(checkpoint.model(), layers, checkpoint.blank())
    assert found == [tuple(f"model.layers.{i}.self_attn.{part}_proj" for part in "qkv") for i in range(3)]


def test_one_node_or_several_give_the_same(tmp_path: Path) -> None:
    out = convert(str(make_tiny(tmp_path / "model")), tmp_path / "out", SHARED)
    export(out, tmp_path / "apart", {"share": False}, Stages())
    assert len(layers(tmp_path / "apart")) == 21
    ids = torch.arange(3, 40)[None]
    one, several = (load(folder)(input_ids=ids).logits for folder in (out, tmp_path / "apart"))
    torch.testing.assert_close(one, several, rtol=1e-5, atol=1e-4)
    assert one.abs().max() > 1


def test_the_budget_is_kept_and_siblings_are_one_choice(tmp_path: Path) -> None:
    out = convert(str(make_tiny(tmp_path / "model")), tmp_path / "out", SHARED)
    costs = layer_costs(onnx.load(out / "model.onnx", load_external_data=False))
    assert len({cost.keep for cost in costs}) > 1
    share = sum(cost.sparse_products for cost in costs) / sum(cost.products for cost in costs)
    assert 0.45 < share <= 0.5
    patterns = from_yaml(out / "recipe.yaml").patterns
    assert len(patterns) == 21
    for block in range(3):
        for module, names in (("self_attn", "qkv"), ("mlp", ("gate", "up"))):
            assert len({patterns[f"model.layers.{block}.{module}.{name}_proj"] for name in names}) == 1


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"patterns": {"*.q_proj": "2:4"}}, [["q_proj"], ["k_proj", "v_proj"], *OF_LLAMA[1:]]),
        ({"ignore": "*.k_proj"}, [["q_proj", "v_proj"], *OF_LLAMA[1:]]),
        ({"phases": "decode"}, OF_LLAMA),
        ({"mitigation": "d_pts+ls", "training.steps": 1, "training.tokens": 256, "training.window": 16}, OF_LLAMA),
        ({"criterion": "clact", "mitigation": "s_pts+pcs+var"}, OF_LLAMA),
        ({"criterion": "wina", "mitigation": "permute+var", "permute": "folded"}, OF_LLAMA),
        ({"share": False}, [[name] for names in OF_LLAMA for name in names]),
    ],
)
def test_what_is_alike_is_merged(changes: dict[str, object], expected: list[list[str]], tmp_path: Path) -> None:
    recipe: Recipe = PLAIN.replace({**TEXT, "allocation": {"budget": None}, "share": True, **changes})
    out = convert(str(make_tiny(tmp_path / "model")), tmp_path / "out", recipe)
    assert layers(out) == expected * 3
    assert parity(out) == (True, sum(map(len, expected)) * 3)


@pytest.mark.parametrize("weights", ["bfloat16", "int8", "int4"])
def test_weights_of_fewer_bits(weights: str, tmp_path: Path) -> None:
    out = convert(str(make_tiny(tmp_path / "model")), tmp_path / "out", SHARED.replace({"weights": weights}))
    assert layers(out) == [*(OF_LLAMA * 3), ["lm_head"]]
    assert parity(out) == (True, 22)


def test_the_page_has_a_row_for_each_node(tmp_path: Path) -> None:
    out = convert(str(make_tiny(tmp_path / "model")), tmp_path / "out", SHARED)
    page = pages.report(pages.read(out), [])
    assert page.count("<td>model.layers.1.self_attn.q_proj+k_proj+v_proj</td>") == 3  # its cost, and two calls
    assert "<td>model.layers.1.self_attn.k_proj</td>" not in page


@pytest.mark.parametrize("mitigation", ["l_pts", "r_sparse"])
def test_what_every_layer_has_for_itself_is_refused(mitigation: str) -> None:
    with pytest.raises(RecipeError, match=f"share: must be false with {mitigation}, .* got true. Leave out"):
        PLAIN.replace({"share": True, "mitigation": mitigation})
