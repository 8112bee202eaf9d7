"""The checkpoint reordered so that groups lie side by side: the same function, and no permutation left in the op."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from conftest import PLAIN, make_tiny
from safetensors.torch import save_file
from test_export import FAMILIES
from transformers import PreTrainedModel

from converter import Recipe, convert
from converter.arrangement import Arrangement, read
from converter.calibration import arrange as stage
from converter.calibration.arrange import arrange
from converter.calibration.wiring import Feed, Wiring, wiring
from converter.checkpoint import Checkpoint, open_checkpoint
from converter.errors import CalibrationError
from converter.pipeline import calibrate, export, validate
from converter.plan import Plan, plan
from converter.stages import Stages

HEAD = 16
OTHERS: dict[str, dict[str, object]] = {
    "phi3": {},  # q, k, v in one layer, gate and up in one
    "olmo2": {},  # norms of q and k that are as wide as the residual stream and no part of it
    "gpt_neox": {"num_key_value_heads": 4},  # heads interleaved in one layer
    "llama-tied": {"tie_word_embeddings": True},
    "llama-mha": {"num_key_value_heads": 4, "intermediate_size": 64},  # all widths are the same
    "mixtral": {},  # experts that are no linear layers
}
# For each family: how many layers are sparse, and how many of them need no permutation.
FOLDED = {
    "llama": (21, 21),
    "qwen2": (21, 21),
    "gemma3_text": (21, 21),
    "smollm3": (21, 21),
    "phi": (18, 18),
    "phi3": (12, 12),
    "olmo2": (21, 21),
    "gpt_neox": (12, 12),
    "llama-tied": (21, 21),
    "llama-mha": (21, 21),
    "mixtral": (12, 3),  # the residual stream runs through the experts: only o by the rows of v
}
RECIPE = PLAIN.replace(
    {"pattern": "2:8", "mitigation": "permute", "calibration.tokens": 64, "calibration.window": 32}
).replace({"permute": "folded"})
IDS = torch.randint(3, 200, (3, 32), generator=torch.Generator().manual_seed(0))

Case = tuple[Checkpoint, Plan, PreTrainedModel]


def case(folder: Path, family: str = "llama", recipe: Recipe = RECIPE, **changes: object) -> Case:
    name = family.partition("-")[0]
    settings = {**FAMILIES, **OTHERS}.get(family, {}) | changes
    checkpoint = open_checkpoint(str(make_tiny(folder / "model", name, **settings)))
    return checkpoint, plan(checkpoint.skeleton(), recipe), checkpoint.model()


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("family", FAMILIES | OTHERS)
def test_an_arranged_model_is_the_same_function(tmp_path: Path, family: str) -> None:
    checkpoint, layers, model = case(tmp_path, family)
    before = logits(model)
    found = arrange(model, layers, IDS, 2, tmp_path)
    assert (len(layers.sparse), len(found.layers)) == FOLDED[family]
    assert set(found.layers) <= {layer.name for layer in layers.sparse}
    assert_same(logits(model), before)
    again = checkpoint.arranged(found).model()
    assert torch.equal(logits(again), logits(model))
    for name, parameter in again.named_parameters():
        assert torch.equal(checkpoint.arranged(found).read(name), parameter), name
    # Something has moved, in every folded layer.
    for name in found.layers:
        weight = checkpoint.read(f"{name}.weight")
        assert not torch.equal(again.get_submodule(name).weight, weight)
        assert sorted(found.orders[f"{name}.weight"][1].tolist()) == list(range(weight.shape[1]))


def test_every_family_of_the_export_is_here() -> None:
    assert set(FOLDED) == set(FAMILIES | OTHERS)


def inputs(model: PreTrainedModel, name: str) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logits(model)
    handle.remove()
    return seen[0]


def test_orders_are_those_of_the_dense_moments(tmp_path: Path) -> None:
    """Of down alone, of the query heads of a kv head together, and of all that read the residual stream together."""
    _, layers, model = case(tmp_path)

    def moments(name: str) -> torch.Tensor:
        x = inputs(model, name)[:, 1:].flatten(0, 1).double().abs()
        x = x / x.norm(dim=-1, keepdim=True)
        return x.t() @ x

    expected, stream = {}, torch.zeros(64, 64, dtype=torch.float64)
    for index in range(3):
        block = f"model.layers.{index}"
        expected[f"{block}.mlp.down_proj.weight"] = stage.decorrelate(moments(f"{block}.mlp.down_proj"), 8)
        heads = moments(f"{block}.self_attn.o_proj")
        order = torch.arange(64)
        for first in (0, 32):  # two query heads for each kv head
            spans = [slice(first, first + HEAD), slice(first + HEAD, first + 2 * HEAD)]
            chosen = stage.decorrelate(sum(heads[span, span] for span in spans), 8)  # type: ignore[arg-type]
            for span in spans:
                order[span] = span.start + chosen
        expected[f"{block}.self_attn.o_proj.weight"] = order
        stream += 3 * moments(f"{block}.self_attn.q_proj") + 2 * moments(f"{block}.mlp.up_proj")
    found = arrange(model, layers, IDS, 2, tmp_path).orders
    for name, order in expected.items():
        assert torch.equal(found[name][1], order), name
    order = stage.decorrelate(stream, 8)
    for name, dims in found.items():
        if name not in expected and not name.endswith(("v_proj.weight", "gate_proj.weight", "up_proj.weight")):
            assert [o for o in dims.values() if torch.equal(o, order)], name


def test_heads_that_groups_do_not_fit_keep_an_input(tmp_path: Path) -> None:
    recipe = RECIPE.replace({"pattern": "16:32"})
    out = convert(str(make_tiny(tmp_path / "model")), tmp_path / "out", recipe)
    report = json.loads((out / "report.json").read_text())
    assert report["permutations"] == {"folded": 18, "inputs": 3}
    assert report["parity"]["passed"]


def test_one_group_needs_no_order(tmp_path: Path) -> None:
    _, layers, model = case(tmp_path, recipe=RECIPE.replace({"pattern": "50%"}))
    assert arrange(model, layers, IDS, 2, tmp_path) == Arrangement({})


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_convert_folded(tiny: Path, tmp_path: Path, dtype: str) -> None:
    recipe = RECIPE.replace({"mitigation": "permute+s_pts+var", "criterion": "wina", "dtype": dtype})
    out = convert(str(tiny), tmp_path / "out", recipe)
    report = json.loads((out / "report.json").read_text())
    assert report["parity"]["passed"]
    assert report["permutations"] == {"folded": 21, "inputs": 0}
    graph = onnx.load(out / "model.onnx", load_external_data=False).graph
    nodes = [node for node in graph.node if node.op_type == "SparseLinear"]
    assert len(nodes) == 21
    assert all(len(node.input) < 7 for node in nodes)  # X, W, bias, channel_scale, shift, row_sum: no permutation
    # The stages by themselves give the same files.
    calibrate(str(tiny), tmp_path / "calibrated", recipe, None, "cpu", Stages())
    export(tmp_path / "calibrated", tmp_path / "again", {}, Stages())
    for name in ("model.onnx", "model.onnx.data"):
        assert (out / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    assert not validate(tmp_path / "again", None, None, Stages()).failures
    # Run dense, both forms are the dense model: parity has compared the folded one with the arranged checkpoint.
    checkpoint = open_checkpoint(str(tiny))
    assert_same(logits(checkpoint.arranged(read(out / "arrangement.safetensors")).model()), logits(checkpoint.model()))


def test_layer_form_arranges_nothing(tiny: Path, tmp_path: Path) -> None:
    out = convert(str(tiny), tmp_path / "out", RECIPE.replace({"permute": "layer"}))
    assert not (out / "arrangement.safetensors").exists()
    assert json.loads((out / "report.json").read_text())["permutations"] == {"folded": 0, "inputs": 21}


def _without(part: str) -> Callable[[Wiring], Wiring]:
    def change(found: Wiring) -> Wiring:
        kept = tuple(place for place in found.stream if part not in place[0])
        assert len(kept) < len(found.stream)
        return replace(found, stream=kept)

    return change


def _across_heads(found: Wiring) -> Wiring:
    name = "model.layers.1.self_attn.o_proj"
    feed = found.feeds[name]
    return replace(found, feeds=found.feeds | {name: replace(feed, span=4 * HEAD)})


def _of_one_producer(found: Wiring) -> Wiring:
    name = "model.layers.1.mlp.down_proj"
    feed = found.feeds[name]
    return replace(found, feeds=found.feeds | {name: Feed(feed.producers, feed.rows[:, :1], feed.span)})


@pytest.mark.parametrize(
    ("family", "change", "folded"),
    [
        ("llama", _without("layers.2.input_layernorm"), 6),  # the feeds are left
        ("llama", _without("layers.0.mlp.down_proj"), 6),
        ("llama", _without("lm_head"), 6),
        ("llama", _without("embed_tokens"), 6),
        ("llama", _across_heads, 20),  # query heads that share rows of v: no order of the rows
        ("llama-mha", _across_heads, 0),
        ("llama", _of_one_producer, 0),
    ],
)
def test_a_wrong_fold_is_not_accepted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, family: str, change: Callable[[Wiring], Wiring], folded: int
) -> None:
    _, layers, model = case(tmp_path, family)
    before = logits(model)
    monkeypatch.setattr(stage, "wiring", lambda *arguments: change(wiring(*arguments)))
    found = arrange(model, layers, IDS, 2, tmp_path)
    assert len(found.layers) == folded
    assert_same(logits(model), before)


def test_an_input_that_other_things_touch_is_not_folded(tmp_path: Path) -> None:
    """Gate and up by themselves say that down can be folded; a factor for each channel between them says no."""
    _, layers, model = case(tmp_path)
    factor = 1 + torch.rand(96, generator=torch.Generator().manual_seed(0))
    mlp = model.get_submodule("model.layers.1.mlp")
    mlp.act_fn = torch.nn.Sequential(mlp.act_fn, _Times(factor))
    found = wiring(model, layers, IDS[:1])
    assert sorted(found.feeds) == [
        f"model.layers.{i}.{name}"
        for i in range(3)
        for name in ("mlp.down_proj", "self_attn.o_proj")
        if (i, name) != (1, "mlp.down_proj")
    ]


class _Times(torch.nn.Module):
    def __init__(self, factor: torch.Tensor) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


def test_file_round_trip(tmp_path: Path) -> None:
    order = torch.tensor([2, 0, 1])
    found = Arrangement({"a": {0: order, 1: order.argsort()}, "b": {1: order}}, ("x", "y"))
    found.write(tmp_path / "a.safetensors")
    again = read(tmp_path / "a.safetensors")
    assert again.layers == found.layers
    assert {n: {d: o.tolist() for d, o in dims.items()} for n, dims in again.orders.items()} == {
        "a": {0: [2, 0, 1], 1: [1, 2, 0]},
        "b": {1: [2, 0, 1]},
    }
    matrix = torch.arange(9.0).reshape(3, 3)
    assert again.of("b", matrix).tolist() == [[2, 0, 1], [5, 3, 4], [8, 6, 7]]
    assert torch.equal(again.inverse().of("a", again.of("a", matrix)), matrix)
    assert again.of("c", matrix) is matrix


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"absent: must be an arrangement, got .* Run nmsparse calibrate\."):
        read(tmp_path / "absent")
    save_file({"order.0": torch.tensor([0])}, tmp_path / "other")
    with pytest.raises(CalibrationError, match=r"other: format must be nmsparse-arrangement-1, got None"):
        read(tmp_path / "other")
    Arrangement({"a": {0: torch.tensor([0, 0, 2])}}).write(tmp_path / "twice")
    with pytest.raises(CalibrationError, match=r"twice: order\.0 must hold every place once"):
        read(tmp_path / "twice")
