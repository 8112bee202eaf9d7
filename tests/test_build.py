"""Engines of TensorRT-RTX: real ones, built without a GPU; and the standard nodes that they are built from."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import PLAIN, WITH_RTX, make_tiny
from pairs import each
from polygraphy.json import load_json

from converter import convert
from converter.build import BuildReport, validate_engine
from converter.build import build as build_engine
from converter.errors import BuildError, OutputError, ValidationError
from converter.graph.forms import form_of
from converter.graph.lower import lower
from converter.graph.widen import widen
from converter.options import BuildOptions, EngineOptions
from converter.runtimes import trial
from converter.runtimes.engine import layer_counts
from converter.runtimes.kernel import VARIABLE
from converter.runtimes.onnxruntime import session
from converter.runtimes.profile import Profile, default_profiles
from converter.signature import Form
from converter.stages import Stages

SHORT = ["batch=1,tokens=1:8:64,past=0:16:63"]


def build(out: Path, target: str, profiles: list[str] = SHORT) -> BuildReport:
    return build_engine(out, "tensorrt-rtx", BuildOptions(target=target, profile=profiles), Stages())


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[tuple[str, ...], Path] = {}

    def make(dtype: str = "float32", mitigation: str = "var", phases: str = "both", pattern: str = "8:16") -> Path:
        key = (dtype, mitigation, phases, pattern)
        if key not in made:
            folder = tmp_path_factory.mktemp("build")
            changes = {"pattern": pattern, "dtype": dtype, "mitigation": mitigation, "phases": phases, "rank": 4}
            text = {"calibration.source": "python", "calibration.tokens": 64, "calibration.window": 32}
            recipe = PLAIN.replace({**changes, **text})
            made[key] = convert(str(make_tiny(folder / "model")), folder / "out", recipe)
        return made[key]

    return make


def outputs(model: onnx.ModelProto, folder: Path) -> list[np.ndarray]:
    """Return logits and caches of a prefill of six tokens, two sequences."""
    run = session(model, folder)
    rng = np.random.default_rng(0)
    shape = {"batch_size": 2, "sequence_length": 6, "past_sequence_length": 0}
    feeds = {}
    for value in run.get_inputs():
        size = [shape.get(d, 6) if isinstance(d, str) else d for d in value.shape]
        if value.name == "input_ids":
            feeds[value.name] = rng.integers(3, 250, size)
        elif value.name == "attention_mask":
            feeds[value.name] = np.ones(size, np.int64)
        elif value.name == "position_ids":
            feeds[value.name] = np.tile(np.arange(6), (2, 1))
        else:
            feeds[value.name] = np.zeros(size, np.float16 if "float16" in value.type else np.float32)
    return run.run(None, feeds)


@pytest.mark.parametrize(("phases", "mitigation"), each(["decode", "both"], ["d_pts+permute", "var", "s_pts+r_sparse"]))
def test_the_lowered_graph_computes_the_same_by_standard_nodes(
    converted: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, mitigation: str, phases: str
) -> None:
    out = converted(mitigation=mitigation, phases=phases)
    monkeypatch.setenv(VARIABLE, "")  # the op by its function body, not by our kernel
    model = onnx.load(out / "model.onnx", load_external_data=False)
    lowered = lower(model)
    assert {node.domain for node in lowered.graph.node} == {""}
    assert not lowered.functions
    for wanted, found in zip(outputs(model, out), outputs(lowered, out), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_the_lowered_graph_multiplies_in_bfloat16_and_not_in_float32(converted: Callable[..., Path]) -> None:
    out = converted("bfloat16")
    model = onnx.load(out / "model.onnx", load_external_data=False)
    lowered = lower(model)
    weights = {tensor.name for tensor in lowered.graph.initializer if tensor.data_type == onnx.TensorProto.BFLOAT16}
    products = [n for n in lowered.graph.node if n.op_type == "MatMul" and n.input[1].endswith("proj.weight")]
    assert len(products) == 21
    assert all(node.input[1] in weights for node in products)
    # The first product's other factor is what the body rounds to bfloat16; run widened it must still be the same.
    for wanted, found in zip(outputs(widen(model), out), outputs(widen(lowered), out), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * abs(wanted).max())


def test_the_form_is_read_from_the_nodes(converted: Callable[..., Path]) -> None:
    out = converted("float16", "d_pts+permute", "decode")
    found = form_of(onnx.load(out / "model.onnx", load_external_data=False))
    assert found == Form("float16", "token_median", False, frozenset({"permutation", "sparse"}))


def test_profiles() -> None:
    profile = Profile.parse("past=0:256:1023, batch=2,tokens=1:128:512")
    assert profile == Profile((2, 2, 2), (1, 128, 512), (0, 256, 1023))
    assert Profile.parse(str(profile)) == profile
    mask = onnx.helper.make_tensor_value_info("m", 7, ["batch_size", "past_sequence_length + sequence_length"])
    cache = onnx.helper.make_tensor_value_info("c", 1, ["batch_size", 3, "past_sequence_length", 64])
    assert profile.shapes(mask) == [(2, 1), (2, 384), (2, 1535)]
    assert profile.shapes(cache) == [(2, 3, 0, 64), (2, 3, 256, 64), (2, 3, 1023, 64)]
    decode, prefill = default_profiles(8192)
    assert (decode.tokens, decode.past) == ((1, 1, 1), (0, 1024, 2047))
    assert prefill.tokens == (1, 1024, 2048)
    assert default_profiles(64)[0].past == (0, 32, 63)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("batch=1,tokens=4", "must have batch, tokens, past"),
        ("batch=1,tokens=4,past=0,heads=3", "'heads=3'"),
        ("batch=0,tokens=4,past=0", "batch must have MIN <= OPT <= MAX from 1"),
        ("batch=1,tokens=4:2:8,past=0", "'tokens=4:2:8'"),
        ("batch=1,tokens=4:8,past=0", "'tokens=4:8'"),
        ("", "got ''"),
    ],
)
def test_bad_profiles(text: str, said: str) -> None:
    with pytest.raises(BuildError, match=said.replace("<", "[<]")):
        Profile.parse(text)


@WITH_RTX
@pytest.mark.parametrize(("pattern", "dtype"), each(["2:4", "8:16"], ["float32", "float16", "bfloat16"]))
def test_engines_of_every_dtype(converted: Callable[..., Path], dtype: str, pattern: str) -> None:
    out = converted(dtype, pattern=pattern)
    engine, folder = build(out, "sm_89").to_json()["engine"], out / "engines" / "tensorrt-rtx-sm_89"
    half = {"float32": "float", "float16": "half", "bfloat16": "bf16"}[dtype]
    assert {tensor["dtype"] for tensor in engine["inputs"][3:]} == {half}
    assert engine["outputs"][0]["name"] == "logits"
    assert json.loads((folder / "manifest.json").read_text())["engine"] == engine
    assert engine["layers"] == layer_counts((folder / "layers.txt").read_text())
    name = {"float32": "float", "float16": "half", "bfloat16": "bfloat16"}[dtype]
    assert any(kind.split() == ["gemm", name] or kind.split() == ["runtime_fusion", name] for kind in engine["layers"])
    assert (folder / "model.engine").stat().st_size == engine["bytes"] > (out / "model.onnx.data").stat().st_size / 2


@WITH_RTX
def test_command(nmsparse: Callable[..., subprocess.CompletedProcess[str]], converted: Callable[..., Path]) -> None:
    out = converted("float16")
    found = nmsparse(
        "build", out, "--target", "sm_80,sm_120,sm_80", "--profile", *SHORT, "--workspace-mib", 256, "--json"
    )
    assert found.returncode == 0, found.stderr
    engine = json.loads(found.stdout)["engine"]
    assert engine["targets"] == ["sm_80", "sm_120"]
    assert engine["workspace"] == 256 << 20
    assert engine["profiles"] == ["batch=1:1:1,tokens=1:8:64,past=0:16:63"]
    # What was built before stays when the next build cannot be.
    found = nmsparse("build", out, "--target", "../sm_1")
    assert found.returncode == 16
    assert "--target: must be of sm_120" in " ".join(found.stderr.split())
    assert "Traceback" not in found.stderr
    assert [path.name for path in (out / "engines").iterdir() if "120" in path.name] == ["tensorrt-rtx-sm_80+sm_120"]
    assert not any(".." in path.name for path in (out / "engines").iterdir())


@WITH_RTX
def test_an_engine_that_cannot_run_here_is_looked_at(
    nmsparse: Callable[..., subprocess.CompletedProcess[str]], converted: Callable[..., Path], tmp_path: Path
) -> None:
    out = Path(shutil.copytree(converted("float16"), tmp_path / "out"))
    shutil.rmtree(out / "engines", ignore_errors=True)
    found = nmsparse("validate", out, "--runtime", "tensorrt-rtx")
    assert (found.returncode, "must have one engine tensorrt-rtx-*, got none" in found.stderr) == (16, True)
    engine = build(out, "sm_89", [*SHORT, "batch=1,tokens=1,past=0:16:63"]).written.engine
    assert engine is not None
    script = (out / "engines" / "tensorrt-rtx-sm_89" / "validate.sh").read_text()
    assert [shlex.split(line) for line in script.splitlines() if line.startswith("polygraphy")] == trial.commands(2)
    hidden = {**os.environ, "PATH": ""}  # where there is a GPU, nmsparse does not find it
    found = nmsparse("validate", out, "--runtime", "tensorrt-rtx", env=hidden)
    assert found.returncode == 17
    said = " ".join(found.stderr.split())
    assert "a GPU must be here to run it, got none" in said
    assert all(f"{count} {kind}" in said for kind, count in engine.layers.items())
    build(out, "sm_80")
    with pytest.raises(BuildError, match="got tensorrt-rtx-sm_80, tensorrt-rtx-sm_89"):
        validate_engine(out, "tensorrt-rtx", EngineOptions(), Stages())
    with (out / "engines" / "tensorrt-rtx-sm_80" / "model.engine").open("r+b") as file:
        file.write(b"other")
    with pytest.raises(OutputError, match=r"model\.engine: must have SHA-256"):
        validate_engine(out, "tensorrt-rtx", EngineOptions(target="sm_80"), Stages())


def sabotaged(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with one channel of a group more than it says."""
    for node in model.graph.node:
        for attribute in node.attribute:
            attribute.i += attribute.name == "keep"
    return model


def on_onnxruntime(command: list[str]) -> list[str]:
    """Return a command of polygraphy with another runtime."""
    at = command.index("--trt")
    assert command[at : at + 4] == ["--trt", "--model-type", "engine", "--optimization-profile"]
    return [*command[:at], "--onnxrt", "--model-type", "onnx", *command[at + 5 :]]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_trial_tells_a_wrong_model_from_the_right_one(
    converted: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """ONNX Runtime stands in for the engine: polygraphy's command is the same but for what runs."""
    out = converted(dtype, mitigation="none")
    profiles = [Profile((1, 1, 1), (1, 1, 1), (0, 16, 63)), Profile((1, 2, 2), (1, 8, 64), (0, 0, 63))]
    trial.write(out, profiles, lambda count, tokens: torch.randint(3, 250, (count, tokens)), tmp_path)
    shapes = [[(1, 1), (1, 64)], [(2, 64), (2, 127)]]
    for number, (ids, mask) in enumerate(shapes):
        feed = load_json(str(tmp_path / f"inputs-{number}.json"))[0]
        assert (feed["input_ids"].shape, feed["attention_mask"].shape) == (ids, mask)
        assert str(feed["past_key_values.0.key"].dtype).removeprefix("torch.") == dtype
    if dtype != "float16":
        return  # the commands are the same, and ONNX Runtime's CPU provider has no kernels for bfloat16
    commands = trial.commands(2, f"{tmp_path}/")
    monkeypatch.setattr(trial, "commands", lambda *_: [on_onnxruntime(command) for command in commands])
    (tmp_path / "polygraphy").mkdir()  # what lies beside an engine is not imported
    (tmp_path / "polygraphy" / "__init__.py").write_text("raise SystemExit(3)")
    model = onnx.load(out / "model.onnx")
    for graph in (model, lower(model)):
        onnx.save(graph, tmp_path / "model.engine")
        trial.run(tmp_path, {}, 2, None, lambda done, total: None)
    onnx.save(sabotaged(model), tmp_path / "model.engine")
    with pytest.raises(ValidationError, match="profile 0: the engine must agree with ONNX Runtime"):
        trial.run(tmp_path, {}, 2, None, lambda done, total: None)


@WITH_RTX
def test_interrupted(converted: Callable[..., Path]) -> None:
    out = converted("float32")
    command = [sys.executable, "-m", "converter", "build", str(out), "--target", "sm_86"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert any("check" in line for line in process.stderr)  # waits until that is done
        process.terminate()
        said = process.stderr.read()
    assert process.returncode == 130
    assert "Interrupted; OUT was left unchanged." in said
    assert not list((out / "engines").glob("*sm_86*"))


@WITH_RTX
def test_what_cannot_be_built(converted: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    out = converted("float16", "s_pts+var")
    # The cache of the profile is of no length that the mask can have.
    with monkeypatch.context() as patch:
        patch.setattr(Profile, "shapes", lambda _, value: [(1,) * len(value.type.tensor_type.shape.dim)] * 3)
        with pytest.raises(BuildError, match="cannot build it: "):
            build(out, "sm_89")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tensorrt_rtx_bindings", None)
        with pytest.raises(BuildError, match=r"Install nmsparse\[tensorrt-rtx\]"):
            build(out, "sm_89")
    assert not (out / "engines").exists()
