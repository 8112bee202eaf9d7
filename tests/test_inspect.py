"""`nmsparse inspect`: what each layer of OUT costs."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

from conftest import PLAIN, make_tiny

from converter import convert
from converter.graph import dispatch
from converter.recipe import Recipe


def test_every_layer_and_what_a_token_costs(
    nmsparse: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    recipe: Recipe = PLAIN.replace(
        {
            "patterns": {"*.q_proj": "1:4", "*.k_proj": "dense"},
            "dtype": "float16",
            "mitigation": "r_sparse",
            "rank": 4,
            "calibration.source": "python",
        }
    )
    out = convert(str(make_tiny(tmp_path / "model")), tmp_path / "out", recipe)
    found = nmsparse("inspect", out, "--json")
    assert found.returncode == 0, found.stderr
    layers = {layer["name"]: layer for layer in json.loads(found.stdout)}
    assert len(layers) == 18, "k_proj is dense: no op, no row"
    # 64 channels to 64, 16-bit weights, one of four used; the factors are [64, 4] and [4, 64].
    assert layers["model.layers.1.self_attn.q_proj"] == {
        "name": "model.layers.1.self_attn.q_proj",
        "in_features": 64,
        "out_features": 64,
        "keep": 1,
        "group": 4,
        "bytes": 8192,
        "sparse_bytes": 2048 + 1024,
        "products": 4096,
        "sparse_products": 1024 + 512,
        "paths": "gemv to 1, dense to 1023, sparse",
    }
    down = layers["model.layers.2.mlp.down_proj"]
    assert (down["in_features"], down["out_features"], down["keep"], down["group"]) == (96, 64, 8, 16)
    table = nmsparse("inspect", out, env={**os.environ, "COLUMNS": "80"})
    assert table.returncode == 0, table.stderr
    assert max(map(len, table.stdout.splitlines())) <= 80
    rows = [re.split(r" {2,}", line.strip()) for line in table.stdout.splitlines()]
    assert ["q_proj", "3", "64 x 64", "1:4", "38%", "0.02 -> 0.01", "0.02 -> 0.01"] in rows, rows
    # 28,672 products in each of three blocks, two operations and two bytes each.
    assert ["all", "18", "1:4 to 8:16", "58%", "0.17 -> 0.10", "0.17 -> 0.10"] in rows, rows
    assert "gemv to 1, dense to 1023, sparse" in " ".join(table.stdout.split())
    dispatch.write(tmp_path / "t.csv", [dispatch.Row("sm_89", *"****", 4, 0, "a test"), *dispatch.read(None)])
    for target, paths in {"sm_89": "gemv to 4, dense", "sm_90": "gemv to 1, dense to 63, sparse"}.items():
        found = nmsparse("inspect", out, "--target", target, "--dispatch", tmp_path / "t.csv", "--json")
        assert json.loads(found.stdout)[0]["paths"] == paths


def test_what_is_no_exported_model(
    nmsparse: Callable[..., subprocess.CompletedProcess[str]], tiny: Path, tmp_path: Path
) -> None:
    assert nmsparse("inspect", tmp_path).returncode == 15
    calibrated = tmp_path / "calibrated"
    assert nmsparse("calibrate", tiny, calibrated, "--pattern", "8:16", "--mitigation", "none").returncode == 0
    found = nmsparse("inspect", calibrated)
    assert (found.returncode, "must hold model.onnx, got none" in found.stderr) == (15, True), found.stderr
