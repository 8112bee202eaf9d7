"""The predicted speeds: what the roofline of benchmarks/gpu_model.py must say where it can be worked out by hand."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PLAIN

from converter import convert

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_model.py"


@pytest.fixture(scope="module")
def model() -> object:
    spec = importlib.util.spec_from_file_location("gpu_model", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_model"] = module
    spec.loader.exec_module(module)
    return module


def test_one_token_is_bound_by_the_weights_it_reads(model) -> None:
    gpu, k, n = model.GPUS[0], 4096, 14336
    dense = model.vendor(gpu, 1, k, n)
    assert dense == pytest.approx(2 * k * n / (2039e9 * 0.85) + 2e-6, rel=1e-3)
    found = model.paths(gpu, model.read_registers(), 1, k, n, 8, 16)
    # Half of the rows, two bytes a number; and sums of 16 parts, written and read.
    launches, moved = 2 * 2e-6, k * n + 2 * 4 * 16 * n
    assert found["gemv"] == pytest.approx(launches + moved / (2039e9 * 0.85), rel=1e-2)
    assert "sparse" not in found


def test_many_tokens_are_bound_by_products(model) -> None:
    gpu, registers, size = model.GPUS[0], model.read_registers(), 108 * 128  # whole waves of tiles
    dense, sparse = (model.gemm(gpu, registers, kind, size, size, size) for kind in ("dense", "sparse"))
    assert dense == pytest.approx(2 * size**3 / (312e12 * 0.8) + 2e-6, rel=1e-3)
    assert sparse == pytest.approx(2 * size**3 / (312e12 * 0.8 * 1.59) + 2e-6, rel=1e-3)
    gpu, size = model.GPUS[2], 132 * 128  # an H100: its products are wgmma's
    sparse = model.gemm(gpu, registers, "sparse", size, size, size)
    assert sparse == pytest.approx(2 * size**3 / (989e12 * 0.8 * 1.59) + 2e-6, rel=1e-3)


def test_every_figure_says_that_it_is_predicted(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--tokens", "1,4096", "--json", str(tmp_path / "rows.json")]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("PREDICTED, not measured") == 2
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == 2 * 4 * 2
    assert all(row["name"].startswith("predicted, ") and row["value"] > 0 for row in rows)


def test_the_layers_of_a_model_of_ours(tiny: Path, tmp_path: Path) -> None:
    out = convert(str(tiny), tmp_path / "out", PLAIN)
    command = [sys.executable, str(SCRIPT), str(out), "--tokens", "1", "--json", str(tmp_path / "rows.json")]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == 2 * 4
    assert all(row["name"].startswith("predicted, out, ") and row["value"] > 0 for row in rows)
