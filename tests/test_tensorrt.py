"""The graph for TensorRT: each plugin node, run by the plugin's own code on a CPU, is the layer that it stands for."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from conftest import PLAIN, make_tiny
from native import DENSE, GEMV, SPARSE, Native
from torch import Tensor

from converter import convert
from converter.graph.op import INPUTS
from converter.sparsity.linear import Baked, SparseLinear

Command = Callable[..., subprocess.CompletedProcess[str]]
TEXT = {"calibration.source": "python", "calibration.tokens": 2048}
SHORT = ("--profile", "batch=1,tokens=1:8:64,past=0:16:63")


def tensor(value: ir.Value) -> Tensor:
    assert value.const_value is not None
    data = value.const_value.numpy()
    if value.const_value.dtype == ir.DataType.BFLOAT16:
        return torch.from_numpy(data.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(data.copy())


def nodes(model: Path) -> Iterator[ir.Node]:
    return (node for node in ir.load(model).graph if node.op_type == "SparseLinear")


def assert_plugins_are_the_layers(native: Native, out: Path, tokens: int) -> list[int]:
    """Compare each node of the plugin's graph with the node of OUT that it was made of; return the paths they took."""
    paths = []
    pairs = zip(nodes(out / "model.onnx"), nodes(out / "engines" / "tensorrt" / "model.onnx"), strict=True)
    for number, (layer, plugin) in enumerate(pairs):
        stored = {n: tensor(v) for n, v in list(zip(INPUTS, layer.inputs, strict=False))[1:] if v is not None}
        weight = stored.pop("W")
        inputs = dict.fromkeys(("bias", "channel_scale", "shift", "row_sum", "permutation")) | stored
        attributes = {name: attribute.value for name, attribute in layer.attributes.items()}
        baked = Baked(weight=weight.float(), **attributes, **inputs)
        generator = torch.Generator().manual_seed(number)
        x = (torch.randn(tokens, len(weight), generator=generator) + 0.2).to(weight.dtype)
        y = torch.full((tokens, weight.shape[1]), torch.nan, dtype=weight.dtype)

        fields = {name: attribute.value for name, attribute in plugin.attributes.items()}
        assert (fields.pop("plugin_namespace"), fields.pop("plugin_version")) == ("nmsparse", "1")
        bits = fields.pop("inputs")
        names = [name.lower() for bit, name in enumerate(INPUTS) if bits >> bit & 1]
        given = dict(zip(names[1:], [tensor(value) for value in plugin.inputs[1:] if value is not None], strict=True))
        shape = {"k": len(weight), "n": weight.shape[1], **fields}
        paths.append(native.layer(shape, {"x": x, "y": y, **given}))

        expected = SparseLinear(baked)(x.float()[None])[0]
        step, size = torch.finfo(weight.dtype).eps, expected.square().mean().sqrt().item()
        torch.testing.assert_close(y.float(), expected, rtol=8 * step, atol=4 * step * size)
    return paths


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    ("pattern", "mitigation", "group"),
    [("2:4", "permute+var", 4), ("8:16", "d_pts+permute", 16), ("1:4", "s_pts+var", 4), ("5:8", "none", 8)],
)
def test_every_plugin_node_is_its_layer(
    nmsparse: Command, native: Native, tmp_path: Path, dtype: str, pattern: str, mitigation: str, group: int
) -> None:
    changes = {"pattern": pattern, "criterion": "wina", "mitigation": mitigation, "dtype": dtype}
    out = convert(str(make_tiny(tmp_path / "model", "qwen2")), tmp_path / "out", PLAIN.replace(changes | TEXT))
    found = nmsparse("build", out, "--runtime", "tensorrt", *SHORT, "--gemv-tokens", 2, "--sparse-tokens", 9)
    assert found.returncode == 0, found.stderr
    assert "21 plugin nodes" in found.stdout
    # 96 channels are no whole number of the sparse tensor cores' steps of 64.
    sparse = {SPARSE, DENSE} if group == 4 else {DENSE}
    for tokens, paths in {2: {GEMV}, 3: {DENSE}, 9: sparse}.items():
        assert set(assert_plugins_are_the_layers(native, out, tokens)) == paths


def test_what_the_plugin_has_no_kernel_for(nmsparse: Command, tiny: Path, tmp_path: Path) -> None:
    for number, (said, changes) in enumerate(
        {
            "q_proj: dtype must be float16 or bfloat16 for the TensorRT plugin, got float32": {"dtype": "float32"},
            "q_proj: the TensorRT plugin has no kernel for mitigation r_sparse": {"mitigation": "r_sparse", "rank": 4},
            "q_proj: the TensorRT plugin has no kernel for phases prefill or decode": {"phases": "decode"},
        }.items()
    ):
        out = convert(str(tiny), tmp_path / str(number), PLAIN.replace({"dtype": "float16", **TEXT, **changes}))
        found = nmsparse("build", out, "--runtime", "tensorrt")
        assert found.returncode == 16
        assert said in found.stderr
        assert not (out / "engines" / "tensorrt").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--runtime", "tensorrt", "--target", "sm_89"], "--target: must not be given with --runtime tensorrt"),
        (["--target", "sm_89", "--gemv-tokens", "4"], "--gemv-tokens: must not be given with --runtime tensorrt-rtx"),
        (["--runtime", "tensorrt", "--sparse-tokens", "-1"], "--sparse-tokens: must be 0 or more, got -1"),
        ([], "--target: must be given with --runtime tensorrt-rtx"),
    ],
)
def test_options_of_the_other_runtime(nmsparse: Command, tmp_path: Path, options: list[str], said: str) -> None:
    found = nmsparse("build", tmp_path, *options)
    assert (found.returncode, said in found.stderr) == (16, True), found.stderr


def test_the_script_has_only_options_that_polygraphy_has(tmp_path: Path, tiny: Path, nmsparse: Command) -> None:
    out = convert(str(tiny), tmp_path / "out", PLAIN.replace({"dtype": "float16"}))
    assert nmsparse("build", out, "--runtime", "tensorrt", *SHORT, *SHORT).returncode == 0
    script = (out / "engines" / "tensorrt" / "build.sh").read_text()
    assert subprocess.run(["sh", "-n"], input=script, text=True, check=False).returncode == 0
    commands = [shlex.split(line) for line in script.splitlines() if line.startswith("polygraphy ")]
    assert [command[1] for command in commands] == ["convert", "inspect"]
    for command in commands:
        tool = command[1:2] if command[1] == "convert" else command[1:3]
        polygraphy = Path(sys.executable).with_name("polygraphy")
        usage = subprocess.run([polygraphy, *tool, "--help"], capture_output=True, text=True, check=True).stdout
        assert {word for word in command if word.startswith("--")} <= set(re.findall(r"--[\w-]+", usage))
    assert commands[0].count("--trt-min-shapes") == 2
    assert "past_key_values.2.value:[1,2,63,16]" in commands[0]
