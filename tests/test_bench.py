"""`nmsparse bench`: that what ours is timed against is the dense model, and what is said of the times."""

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

from converter import convert, pipeline
from converter.errors import BuildError, OutputError, UsageError
from converter.graph.dense import densify
from converter.names import MODEL
from converter.runtimes.kernel import VARIABLE
from converter.runtimes.onnxruntime import call_feed, session
from converter.runtimes.speed import Speed
from converter.stages import Stages

Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def out(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(str(tiny), tmp_path_factory.mktemp("bench") / "out", PLAIN)


@pytest.mark.parametrize(
    ("family", "dtype", "settings"),
    [
        ("llama", "float32", {"mitigation": "s_pts+var"}),  # without biases of its own
        ("qwen2", "float16", {"mitigation": "s_pts+var"}),
        ("qwen2", "bfloat16", {"mitigation": "d_pts"}),
        ("llama", "float32", {"mitigation": "r_sparse", "rank": 4}),
        ("qwen2", "float32", {"mitigation": "s_pts+var", "weights": "int4", "block": 16}),
        ("llama", "float32", {"mitigation": "var", "weights": "int8"}),
    ],
)
def test_the_dense_graph_is_the_op_with_every_channel_kept(
    tmp_path: Path, family: str, dtype: str, settings: dict[str, object]
) -> None:
    model, folder = make_tiny(tmp_path / "model", family, num_hidden_layers=1), tmp_path / "out"
    text = {"calibration.window": 32, "calibration.tokens": 64}
    pipeline.calibrate(str(model), tmp_path / "fitted", PLAIN.replace({**settings, **text}), None, "cpu", Stages())
    pipeline.export(tmp_path / "fitted", folder, {"dtype": dtype}, Stages())
    graph = onnx.load(folder / MODEL, load_external_data=False)
    whole = onnx.ModelProto()
    whole.CopyFrom(graph)
    for node in whole.graph.node:
        if node.op_type == "SparseLinear":
            attributes = {a.name: a for a in node.attribute}
            attributes["keep"].i = attributes["group"].i
    assert not [node for node in densify(graph).graph.node if node.domain]
    ids = torch.randint(256, (1, 9), generator=torch.Generator().manual_seed(0))
    found, expected = (
        run.run(["logits"], call_feed(run, ids, None))[0]
        for run in (session(g, folder) for g in (densify(graph), whole))
    )
    error = np.abs(found.astype(np.float32) - expected).max() / np.abs(expected).max()
    assert error < (1e-5 if dtype == "float32" and "weights" not in settings else 2e-2)


def test_integers_that_no_dense_kernel_takes_are_not_timed(tiny: Path, tmp_path: Path) -> None:
    out = convert(str(tiny), tmp_path / "out", PLAIN.replace({"weights": "int8", "block": 0}))
    with pytest.raises(BuildError, match=r"down_proj.weight: must have a scale for each 16, 32, .* got 96"):
        densify(onnx.load(out / MODEL, load_external_data=False))


def test_out_is_measured_beside_the_same_out_dense(
    nmsparse: Command, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "")
    options = ["--threads", "1", "--prefill", "16", "--prefill", "200", "--seconds", "0.01"]
    found = nmsparse("bench", out, *options, "--json", tmp_path / "rows.json")
    assert found.returncode == 0, found.stderr
    assert "the function body of the op: our kernel is not built" in " ".join(found.stdout.split())
    rows = json.loads((tmp_path / "rows.json").read_text())
    fields = {"name", "value", "unit", "goal", "met", "call", "threads", "what"}
    assert all(set(row) == fields and row["value"] > 0 for row in rows)
    calls = ["a token after 128", "prefill of 16", "prefill of 200"]
    assert [row["name"] for row in rows if row["unit"] == "tokens/s"] == [f"CPU, {c}, 1 threads: ours" for c in calls]


def test_the_figures_of_a_measurement() -> None:
    speed = Speed(1, 2, 0, ours=[1.0, 2.0, 4.0, 2.0, 2.0], dense=[1.0, 4.0, 4.0, 6.0, 8.0])
    assert speed.ratios() == (1.0, 2.0, 3.0)
    assert speed.per_second() == 1.0


def test_what_cannot_be_measured(nmsparse: Command, tiny: Path, out: Path, tmp_path: Path) -> None:
    def refused(code: int, said: str, *arguments: object) -> None:
        found = nmsparse("bench", *arguments)
        assert (found.returncode, "Traceback" in found.stderr) == (code, False)
        assert said in " ".join(found.stderr.split())

    refused(BuildError.exit_code, "--prefill: must be at most 256, the context of", out, "--prefill", "257")
    refused(UsageError.exit_code, "--plugin: must not be given without --tune, got p.so", out, "--plugin", "p.so")
    tune = ["--tune", tmp_path / "t.csv"]
    refused(UsageError.exit_code, "--threads: must not be given with --tune, got [1]", out, *tune, "--threads", "1")
    refused(BuildError.exit_code, "dtype must be float16 or bfloat16, as of the TensorRT plugin's kernels", out, *tune)
    refused(2, "Must be >= 1", out, "--threads", "0")
    pipeline.calibrate(str(tiny), tmp_path / "fitted", PLAIN, None, "cpu", Stages())
    refused(OutputError.exit_code, "must hold model.onnx, got none", tmp_path / "fitted")
