"""The small inputs of `../shared/cases` that failed once: the project's own collection, skipped where it is not."""

from __future__ import annotations

import importlib
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import DATASETS, in_process
from test_cpu_op import cpu_op  # noqa: F401 # a fixture

CASES = DATASETS.parent / "cases"
CODES = {
    "01-classification-head": [11],
    "02-stale-shards": [0, 0, 0],
    "03-quantised-checkpoint": [11, 11, 11, 11],
    "04-trace-tracebacks": [13, 13, 13],
    "07-out-dot-symlink-mount": [0, 0, 0],
    "08-empty-prompt": [2, 2],
    "09-perplexity-arguments": [2, 2, 2],
    "11-config-mismatch": [11],
    "12-adapter": [11, 11],
    "13-remote-code": [11, 11],
    "15-prefix-message": [11, 11],
}
FAR = (16, 17, 100, -1, 10**6, 10**9, 2**62)


@pytest.fixture
def common(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """What the cases share; it changes the environment, which is put back."""
    if not CASES.is_dir():
        pytest.skip(f"there are no cases at {CASES}")
    for name in ("HF_HOME", "HF_HUB_OFFLINE", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    for name in ("common", "families", "tiny"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(CASES))
    return importlib.import_module("common")


@pytest.mark.parametrize("name", CODES)
def test_case(common: Any, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    codes: list[int] = []
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))

    def run(*arguments: object, stdin: str = "", cwd: Path | None = None) -> int:
        with monkeypatch.context() as patch:
            if cwd is not None:
                patch.chdir(cwd)
            done = in_process(*arguments)
        assert "Traceback" not in done.stderr
        assert not done.returncode or "error:" in done.stderr
        codes.append(done.returncode)
        return done.returncode

    monkeypatch.setattr(common, "nmsparse", run)
    monkeypatch.chdir(CASES / name)
    runpy.run_path("run.py")
    said = capsys.readouterr().out
    # One of its three tries needs the right to mount.
    assert codes in ([CODES[name], CODES[name][:2]] if "mount" in name else [CODES[name]])
    if "stale" in name:
        whole, staged = ((common.W / out / "model.onnx.data").read_bytes() for out in ("out", "out2"))
        assert whole == staged
    assert "code ran: True" not in said
    assert "is still a link: False" not in said


@pytest.mark.parametrize("entry", FAR)
def test_a_permutation_out_of_range(cpu_op: Path, entry: int) -> None:  # noqa: F811
    script = CASES / "op" / "permutation_out_of_range.py"
    if not script.exists():
        pytest.skip(f"there are no cases at {CASES}")
    command = [sys.executable, str(script), str(cpu_op / "libnmsparse_onnxruntime.so"), str(entry)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout  # and no signal
    assert "permutation must" in done.stderr
