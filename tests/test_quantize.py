"""Weights of few bits: what they stand for, in torch, in the graph and on the command line."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import PLAIN, make_tiny

from converter import convert
from converter.errors import BuildError, RecipeError
from converter.graph.costs import layer_costs
from converter.graph.dense import densify
from converter.graph.forms import form_of
from converter.graph.lower import lower
from converter.names import Weights
from converter.runtimes.kernel import has_kernel
from converter.runtimes.onnxruntime import session
from converter.sparsity.quantize import Storage

Command = Callable[..., subprocess.CompletedProcess[str]]


def test_the_largest_number_of_a_block_is_the_lowest_integer() -> None:
    weight = torch.tensor([[4.0, -2.0], [-1.0, 0.0], [0.5, 0.0], [0.0, 0.0]])
    whole, scale = Storage(weights="int4", block=2).quantized(weight)
    # Scales 4 / -8, -2 / -8, 0.5 / -8, and 0 where all are 0.
    assert scale.tolist() == [[-0.5, 0.25], [-0.0625, 0.0]]
    assert whole.tolist() == [[-8, -8], [2, 0], [-8, 0], [0, 0]]
    whole, scale = Storage(weights="int8").quantized(weight)
    assert scale.tolist() == [[-0.03125, 0.015625]]
    assert whole.tolist() == [[-128, -128], [32, 0], [-16, 0], [0, 0]]
    # What is as large at the other end is clipped: 7 / 8 of it is left.
    assert Storage(weights="int4").rounded(torch.tensor([[-3.0, 3.0]])).tolist() == [[-3.0, 2.625]]


@pytest.mark.parametrize(("weights", "block"), [("int8", 0), ("int8", 32), ("int4", 16), ("int4", 64)])
def test_rounding_is_small_and_done_once(weights: Weights, block: int) -> None:
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    storage = Storage(weights=weights, block=block)
    rounded = storage.rounded(weight)
    assert torch.equal(storage.rounded(rounded), rounded)
    largest = weight.unflatten(1, (-1, block or 64)).abs().amax(2, keepdim=True)
    error = (rounded - weight).unflatten(1, (-1, block or 64)).abs()
    step = largest / 2 ** (storage.bits - 1)
    assert (error <= step).all()
    assert (error <= 0.500001 * step).float().mean() > 0.95
    assert torch.equal(Storage("float16").rounded(weight), weight.half().float())


def test_numbers_of_sixteen_bits() -> None:
    weight = torch.tensor([[1 + 2**-10, 1 + 2**-11, 2**-20, 70000.0]])
    assert Storage(weights="bfloat16").rounded(weight).tolist() == [[1, 1, 2**-20, 70144]]
    assert Storage(weights="float16").rounded(weight[:, :3]).tolist() == [[1 + 2**-10, 1, 2**-20]]
    with pytest.raises(RecipeError, match=r"must be at most 65504 for float16, got 70000\. Use bfloat16"):
        Storage(weights="float16").rounded(weight)


@pytest.mark.parametrize(("weights", "bytes_"), [("float16", 2), ("bfloat16", 2), ("int8", 1), ("int4", 0.5)])
def test_a_model_of_fewer_bits_agrees_with_pytorch(weights: str, bytes_: float, tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", tie_word_embeddings=True)
    recipe = PLAIN.replace({"weights": weights, "mitigation": "d_pts+var", "criterion": "wina", "ignore": "*.k_proj"})
    out = convert(str(model), tmp_path / "out", recipe)
    report = json.loads((out / "report.json").read_text())["parity"]
    # Seven projections of three blocks, k_proj dense, and the head, all compared with PyTorch on the rounded weights.
    assert (report["passed"], report["layers"], report["largest_layer_error"] < 2e-6) == (True, 22, True)
    graph = onnx.load(out / "model.onnx")
    stored = {tensor.name: tensor for tensor in graph.graph.initializer}
    kind = getattr(onnx.TensorProto, weights.upper())
    assert sum(tensor.data_type == kind for tensor in stored.values()) == 22
    assert stored["model.embed_tokens.weight"].data_type == onnx.TensorProto.FLOAT, "the head has its own copy"
    costs = {cost.name: cost for cost in layer_costs(graph)}
    down, key = costs["model.layers.0.mlp.down_proj"], costs["model.layers.0.self_attn.k_proj"]
    scales = 4 * 96 * 64 // 32 if bytes_ < 2 else 0
    assert (down.bytes, down.sparse_bytes) == (96 * 64 * bytes_ + scales, (96 * 64 * bytes_ + scales) / 2)
    assert (key.keep, key.group, key.sparse_bytes) == (1, 1, key.bytes)
    assert has_kernel(graph)
    assert form_of(graph).weights == weights
    with pytest.raises(BuildError, match=f"must be dtype for TensorRT-RTX, got {weights}. .*--weights dtype"):
        lower(graph)
    # The same run dense: activations are float32, and the peer of a benchmark reads its weights widened.
    ids = {"input_ids": np.arange(6)[None] + 5, "attention_mask": np.ones((1, 6), np.int64)}
    feeds = {**ids, "position_ids": np.arange(6)[None]}
    peer = session(densify(graph), out)
    for value in peer.get_inputs()[3:]:
        feeds[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
    assert np.isfinite(peer.run(None, feeds)[0]).all()


def test_on_the_command_line(nmsparse: Command, tiny: Path, tmp_path: Path) -> None:
    calibrated, out = tmp_path / "calibrated", tmp_path / "out"
    assert nmsparse("calibrate", tiny, calibrated, "--pattern", "8:16", "--mitigation", "none").returncode == 0
    found = nmsparse("export", calibrated, out, "--weights", "int4")
    assert found.returncode == 0, found.stderr
    found = nmsparse("validate", out)
    assert found.returncode == 0, found.stderr
    found = nmsparse("build", out, "--runtime", "tensorrt")
    assert (found.returncode, "weights: must be dtype for the TensorRT plugin" in found.stderr) == (16, True), (
        found.stderr
    )
    found = nmsparse("export", calibrated, tmp_path / "half", "--weights", "int4", "--dtype", "float16")
    assert (found.returncode, "must be dtype with dtype float16, got int4" in found.stderr) == (10, True), found.stderr
    assert not (tmp_path / "half").exists()


def test_a_block_that_does_not_fit_is_refused_by_name(tiny: Path) -> None:
    recipe = PLAIN.replace({"weights": "int8", "block": 48})
    with pytest.raises(RecipeError, match=r"q_proj: its 64 input channels must be divisible by block, got 48"):
        convert(str(tiny), tiny.parent / "never", recipe)
    assert not (tiny.parent / "never").exists()
    with pytest.raises(RecipeError, match="block: Input should be a multiple of 16, got 24"):
        PLAIN.replace({"weights": "int8", "block": 24})
    with pytest.raises(RecipeError, match="must be an even number for weights int4, got 9"):
        Storage(weights="int4").blocks("head", 64, 9)
