"""Engines as models: parts by profile, and `nmsparse evaluate` on one, with ONNX Runtime in TensorRT's place."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import onnx
import pandas as pd
import pytest
import torch
from conftest import PLAIN, WITH_RTX, make_tiny
from test_cli import Command, refused
from torch import Tensor

from converter import convert
from converter.build import build, runnable
from converter.errors import BuildError, DeviceError, EvaluationError
from converter.evaluate import Evaluation, evaluate
from converter.options import BuildOptions, EngineOptions, EvaluationOptions
from converter.records import Setting
from converter.runtimes import engine_model, tensorrt
from converter.runtimes.engine_model import Engine, by_profile, load_engine
from converter.runtimes.onnxruntime import session
from converter.runtimes.profile import Profile, fitting
from converter.runtimes.tensorrt_rtx import bindings
from converter.stages import Stages

SETTING = Setting(("piqa", "arc_easy", "wikitext"), prompts=2)
CONTEXT = 256
PROFILES = [f"batch=1,tokens=1,past=0:16:{CONTEXT - 1}", f"batch=1:2:3,tokens=1:8:{CONTEXT},past=0:16:{CONTEXT - 1}"]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    out = convert(str(make_tiny(folder / "model")), folder / "out", PLAIN.replace({"dtype": "float16"}))
    build(out, "tensorrt-rtx", BuildOptions(target="sm_89", profile=PROFILES), Stages())
    return out


@pytest.fixture
def with_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nvidia-smi tell of a GPU."""
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho 'A GPU, 8.9, 580, 1 MiB'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")


@pytest.fixture
def stand_in(out: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int, int]]:
    """Put ONNX Runtime in the place of TensorRT; returns the calls: profile, sequences, tokens, tokens before them."""
    calls: list[tuple[int, int, int, int]] = []
    run = session(onnx.load(out / "model.onnx", load_external_data=False), out)

    class OnOnnxRuntime(Engine):
        device = "cpu"

        def __init__(
            self, _trt: object, _place: Path, inputs: dict[str, torch.dtype], _outputs: object, *, host_code: bool
        ) -> None:
            assert not host_code, "only who asks for it gets it"
            self.inputs = inputs

        def run(self, profile: int, feeds: dict[str, Tensor]) -> list[Tensor]:
            assert {name: tensor.dtype for name, tensor in feeds.items()} == self.inputs
            rows, tokens = feeds["input_ids"].shape
            calls.append((profile, rows, tokens, feeds["attention_mask"].shape[1] - tokens))
            found = run.run(None, {name: tensor.numpy() for name, tensor in feeds.items()})
            return [torch.from_numpy(array) for array in found]

    monkeypatch.setattr(engine_model, "Engine", OnOnnxRuntime)
    return calls


def test_the_profile_that_takes_most_sequences_of_a_call() -> None:
    profiles = [Profile.parse(text) for text in (*PROFILES, "batch=4,tokens=2:4:8,past=0")]
    assert fitting(profiles, 1, 1, 7) == (0, 1)
    assert fitting(profiles, 2, 1, 7) == (1, 2)
    assert fitting(profiles, 9, 4, 0) == (2, 4)
    assert fitting(profiles, 3, 4, 0) == (1, 3)
    for batch, tokens, past in ((1, CONTEXT + 1, 0), (1, 1, CONTEXT)):
        with pytest.raises(BuildError, match=f"must take 1 sequences of {tokens} tokens after {past}, got batch=1"):
            fitting(profiles, batch, tokens, past)


def test_a_call_is_run_in_parts() -> None:
    calls: list[tuple[int, list[int]]] = []

    def run(profile: int, feeds: dict[str, Tensor]) -> list[Tensor]:
        calls.append((profile, feeds["input_ids"][:, 0].tolist()))
        return [feeds["input_ids"] * 2, feeds["attention_mask"]]

    ids = torch.arange(21).reshape(7, 3)
    mask = torch.ones(7, 5)
    doubled, same = by_profile(run, [Profile.parse(text) for text in PROFILES])(
        {"input_ids": ids, "attention_mask": mask}
    )
    assert calls == [(1, [0, 3, 6]), (1, [9, 12, 15]), (1, [18])]
    assert torch.equal(doubled, ids * 2)
    assert torch.equal(same, mask)


@WITH_RTX
def test_an_engine_that_this_machine_cannot_load_is_refused(
    nmsparse: Command, out: Path, data: Path, tmp_path: Path
) -> None:
    command = ["evaluate", out, "--data-dir", data, "--out", tmp_path / "results", "--runtime", "tensorrt-rtx"]
    if shutil.which("nvidia-smi") is None:
        assert "a GPU must be here to run it, got none" in refused(nmsparse, tmp_path, 17, *command)
    (place,) = (out / "engines").iterdir()
    other = tmp_path / "engine"
    shutil.copytree(place, other)
    (other / "model.engine").write_bytes(b"no engine at all")
    with pytest.raises(DeviceError, match=r"model\.engine: must be built for this GPU and for 1\..*Build it again"):
        Engine(bindings(), other, {}, {})
    text = refused(nmsparse, tmp_path, 16, *command[:-1], "tensorrt")
    assert "must have one engine tensorrt, got none" in text
    text = refused(nmsparse, tmp_path, 2, *command, "--plugin", "library.so")
    assert "--plugin: must not be given with --runtime tensorrt-rtx" in text


def evaluated(out: Path, data: Path, runtime: str, context: int = CONTEXT) -> Evaluation:
    setting = Setting(SETTING.tasks, prompts=SETTING.prompts, runtime=runtime)
    return evaluate(str(out), setting, EvaluationOptions(data_dir=data, context=context), EngineOptions(), Stages())


@WITH_RTX
@pytest.mark.usefixtures("with_gpu")
def test_tasks_on_an_engine(
    out: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stand_in: list[tuple[int, int, int, int]],
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    found, wanted = (evaluated(out, data, runtime) for runtime in ("tensorrt-rtx", "onnxruntime"))
    pd.testing.assert_frame_equal(found.examples, wanted.examples, rtol=1e-3)
    assert json.loads((out / "evaluation" / "results.json").read_text())["setting"]["runtime"] == "onnxruntime"
    # A token alone runs under the profile for decoding, all else under the other, which takes three sequences.
    assert {profile for profile, rows, tokens, _ in stand_in if (rows, tokens) == (1, 1)} == {0}
    assert {profile for profile, rows, tokens, _ in stand_in if (rows, tokens) != (1, 1)} == {1}
    assert max(rows for _, rows, _, _ in stand_in) == 3
    assert max(past for profile, _, _, past in stand_in if profile == 0) == 126
    # What was answered by the engine is not asked again; another engine would be.
    stand_in.clear()
    evaluated(out, data, "tensorrt-rtx")
    assert {tokens for _, _, tokens, _ in stand_in} == {127}  # what comes next in the dense model's text


@WITH_RTX
@pytest.mark.usefixtures("with_gpu", "stand_in")
def test_what_an_engine_cannot_be_asked(
    out: Path, data: Path, converted_again: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(EvaluationError, match=r"--context: must be at most 32, what a profile of .* got 64"):
        evaluated(converted_again, data, "tensorrt-rtx", 64)
    found = runnable(out, "tensorrt-rtx", None)
    theirs = replace(found, runtime=tensorrt.RUNTIME, engine=replace(found.engine, own={"embed_plugin": False}))
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(Builder=None))
    with pytest.raises(BuildError, match=r"--plugin: must be given for .*, whose engine has not embedded it"):
        load_engine(out, theirs, EngineOptions())
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(BuildError, match="tensorrt: must be installed, got"):
        load_engine(out, theirs, EngineOptions())


@pytest.fixture
def converted_again(out: Path, tmp_path: Path) -> Path:
    """OUT with an engine of short calls."""
    again = Path(shutil.copytree(out, tmp_path / "out", ignore=shutil.ignore_patterns("engines")))
    options = BuildOptions(target="sm_89", profile=["batch=1,tokens=1:8:32,past=0:16:63"])
    build(again, "tensorrt-rtx", options, Stages())
    return again
