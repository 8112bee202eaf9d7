"""The graph for TensorRT: each plugin node, run by the plugin's own code on a CPU, is the layer that it stands for."""

from __future__ import annotations

import importlib.metadata
import json
import os
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
from converter.errors import BuildError
from converter.graph import dispatch
from converter.runtimes.tensorrt import layers_by_type
from converter.runtimes.tune import Shape, Timing, table
from converter.signature import INPUTS
from converter.sparsity.linear import Baked, SparseLinear

Command = Callable[..., subprocess.CompletedProcess[str]]
TEXT = {"calibration.source": "python", "calibration.tokens": 2048}
SHORT = ("--profile", "batch=1,tokens=1:8:64,past=0:16:63")


def meeting(folder: Path, gemv_tokens: int, sparse_tokens: int) -> Path:
    """Write a table in which the paths of every layer meet there."""
    dispatch.write(folder / "dispatch.csv", [dispatch.Row(*"*****", gemv_tokens, sparse_tokens, "a test")])
    return folder / "dispatch.csv"


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
        baked = Baked(w=weight.float(), **attributes, **inputs)
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
    found = nmsparse("build", out, "--runtime", "tensorrt", *SHORT, "--dispatch", meeting(tmp_path, 2, 9))
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
    ("options", "code", "said"),
    [
        (["--target", "sm_89", "--dispatch", "t.csv"], 2, "--dispatch: must not be given with --runtime tensorrt-rtx"),
        (["--target", "sm_89", "--embed-plugin"], 2, "--embed-plugin: must not be given with --runtime tensorrt-rtx"),
        (["--runtime", "tensorrt", "--dispatch", "t.csv"], 16, "--dispatch: must be a table that can be read"),
        ([], 2, "--target: must be given with --runtime tensorrt-rtx"),
    ],
)
def test_options_of_the_other_runtime(
    nmsparse: Command, tmp_path: Path, options: list[str], code: int, said: str
) -> None:
    found = nmsparse("build", tmp_path, *options)
    assert (found.returncode, said in found.stderr) == (code, True), found.stderr


def test_the_script_has_only_options_that_polygraphy_has(tmp_path: Path, tiny: Path, nmsparse: Command) -> None:
    out = convert(str(tiny), tmp_path / "out", PLAIN.replace({"dtype": "float16"}))
    more = ("--version-compatible", "--hardware-compatible", "--workspace-mib", "64")
    assert nmsparse("build", out, "--runtime", "tensorrt", *SHORT, *SHORT, *more).returncode == 0
    commands = []
    for name in ("build.sh", "validate.sh"):
        script = (out / "engines" / "tensorrt" / name).read_text()
        assert subprocess.run(["sh", "-n"], input=script, text=True, check=False).returncode == 0
        commands += [shlex.split(line) for line in script.splitlines() if line.startswith("polygraphy ")]
    assert [command[1] for command in commands] == ["convert", "inspect", "run", "run"]
    for command in commands:
        tool = command[1:3] if command[1] == "inspect" else command[1:2]
        polygraphy = Path(sys.executable).with_name("polygraphy")
        usage = subprocess.run([polygraphy, *tool, "--help"], capture_output=True, text=True, check=True).stdout
        assert {word for word in command if word.startswith("--")} <= set(re.findall(r"--[\w-]+", usage))
    assert commands[0].count("--trt-min-shapes") == 2
    assert "past_key_values.2.value:[1,2,63,16]" in commands[0]
    assert {"--version-compatible", "AMPERE_PLUS", "workspace:67108864"} <= set(commands[0])


def test_an_engine_is_not_built_where_tensorrt_is_not(nmsparse: Command, tiny: Path, tmp_path: Path) -> None:
    if any(found.name == "tensorrt" for found in importlib.metadata.distributions()):
        pytest.skip("TensorRT is here")
    out = convert(str(tiny), tmp_path / "out", PLAIN.replace({"dtype": "float16"}))
    command = ["build", out, "--runtime", "tensorrt", *SHORT, "--plugin", "plugin.so"]
    # Here pytest has the folder `plugins` on its path, in which one is called tensorrt.
    for found, said in ((nmsparse(*command), "a folder of that name"), (nmsparse(*command, cwd=tmp_path), "No module")):
        assert found.returncode == 16
        assert f"tensorrt: must be installed, got {said}" in found.stderr
    assert not (out / "engines" / "tensorrt").exists()


def test_layers_are_counted_once_for_all_profiles() -> None:
    def layer(name: str, kind: str) -> dict[str, str]:
        return {"Name": name, "LayerType": kind}

    plugins = [layer("a", "PluginV3"), layer("b", "PluginV3"), layer("a [profile 1]", "PluginV3")]
    others = [layer("c", "gemm"), "a layer of an engine without details"]
    assert layers_by_type(json.dumps({"Layers": [*plugins, *others]})) == {"PluginV3": 2, "gemm": 1}


def test_a_table_of_paths(tmp_path: Path) -> None:
    layer = {"sm": "sm_90", "dtype": "float16", "pattern": "2:4", "k": "64", "n": "96"}
    shipped = dispatch.read(None)
    assert [(row.sm, row.gemv_tokens, row.sparse_tokens) for row in shipped] == [("*", 1, 1024), ("sm_90", 1, 64)]
    assert "measured on an H200" in dispatch.choose(shipped, layer).source
    assert "not measured" in dispatch.choose(shipped, {**layer, "sm": "sm_80"}).source
    rows = [
        dispatch.Row("sm_90", "*", "*", "*", "*", 2, 0, "one key"),
        dispatch.Row("*", "float16", "2:4", "*", "*", 3, 0, "two keys"),
        dispatch.Row("sm_90", "float16", "2:4", "64", "96", 4, 512, "five keys, a comma"),
        *shipped,
    ]
    dispatch.write(tmp_path / "t.csv", rows)
    assert dispatch.read(tmp_path / "t.csv") == rows
    assert dispatch.choose(rows, layer) == rows[2]
    assert dispatch.choose(rows, layer | {"n": "128"}) == rows[1]
    assert dispatch.choose(rows, layer | {"n": "128", "pattern": "1:4"}) == rows[0]
    assert dispatch.choose(rows, layer | {"sm": "sm_80", "dtype": "bfloat16"}) == rows[3]
    with pytest.raises(BuildError, match="must have a row for sm sm_80, dtype float16"):
        dispatch.choose(rows[:1], layer | {"sm": "sm_80"})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sm,dtype\n", "columns must be sm, dtype, pattern"),
        (",".join(dispatch.Row._fields) + "\n*,*,*,*,*,-1,0,x\n", "line 2: gemv_tokens must be 0 or more tokens"),
        (
            ",".join(dispatch.Row._fields) + "\n*,*,*,*,*,1\n",
            "sparse_tokens must be 0 or more tokens, got None",
        ),
    ],
)
def test_no_table_of_paths(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(BuildError, match=said):
        dispatch.read(tmp_path / "t.csv")


@pytest.mark.parametrize(
    ("best", "expected"),
    [
        ("gemv gemv dense sparse sparse", (2, 512)),
        ("gemv dense gemv dense dense", (1, 0)),
        ("sparse sparse dense sparse dense", (0, 0)),
        ("dense dense dense dense sparse", (0, 1024)),
        ("sparse sparse sparse sparse sparse", (0, 1)),
    ],
)
def test_where_paths_meet(best: str, expected: tuple[int, int]) -> None:
    found = dict(zip((1, 2, 64, 512, 1024), best.split(), strict=True))
    assert dispatch.thresholds(dict(reversed(found.items()))) == expected


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:4", "8:16"])
@pytest.mark.parametrize(("gemv", "sparse"), [(1, 1024), (0, 1), (4, 2), (2, 0), (0, 0), (2, 3)])
@pytest.mark.parametrize("k", [64, 96])
def test_the_paths_that_are_shown_are_those_of_the_library(
    native: Native, pattern: str, gemv: int, sparse: int, k: int
) -> None:
    keep, group = map(int, pattern.split(":"))
    row = dispatch.Row(*"*****", gemv, sparse, "a test")
    shown = dispatch.paths(row, {"pattern": pattern, "k": str(k)}).split(", ")
    found = {}
    for part in shown:
        path, _, last = part.partition(" to ")
        found |= dict.fromkeys(range(len(found) + 1, int(last or 2000) + 1), path)
    numbers = {"gemv_tokens": gemv, "sparse_tokens": sparse, "shift_mode": 0, "variance": 0}
    layer = {"k": k, "n": 64, "keep": keep, "group": group, **numbers}
    assert found == {tokens: native.path(layer, tokens) for tokens in range(1, 2001)}


def test_a_measurement_makes_a_table() -> None:
    one, two = Shape(64, 96, 2, 4, "float16"), Shape(64, 96, 8, 16, "float16")
    timings = [
        Timing(one, 1, "gemv", "wide", [1.2, 1.3, 9.0]),
        Timing(one, 1, "dense", "wide", [1.4, 1.0, 1.0]),
        Timing(one, 4096, "dense", "wide", [0.8] * 3),
        Timing(one, 4096, "sparse", "wide", [0.7, 0.7, 9.0]),
        Timing(one, 4096, "sparse", "tall", [1.4] * 3),
        Timing(two, 1, "dense", "wide", [0.9] * 3),
    ]
    assert table(timings, "sm_90", "here") == [
        dispatch.Row("sm_90", "float16", "2:4", "64", "96", 1, 4096, "here"),
        dispatch.Row("sm_90", "float16", "8:16", "64", "96", 0, 0, "here"),
    ]


def test_without_a_gpu_nothing_is_measured(nmsparse: Command, tiny: Path, tmp_path: Path) -> None:
    out = convert(str(tiny), tmp_path / "out", PLAIN.replace({"dtype": "float16"}))
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    found = nmsparse("bench", out, "--tune", tmp_path / "t.csv", env=hidden)
    assert (found.returncode, "GPU: must be here to be measured" in found.stderr) == (17, True)
    assert not (tmp_path / "t.csv").exists()
