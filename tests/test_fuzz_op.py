"""Nodes of the op by chance, some hundred in each run; `make fuzz MINUTES=10` runs more."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from test_cpu_op import cpu_op  # noqa: F401 # a fixture

CASES = 300


def fuzz(library: Path, cases: int) -> subprocess.CompletedProcess[str]:
    """Run the program, for a call that goes wrong may end its process."""
    program = Path(__file__).with_name("fuzz_op.py")
    command = [sys.executable, program, "--library", library, "--seed", "0", "--cases", str(cases)]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)


def assert_right_or_refused(done: subprocess.CompletedProcess[str], cases: int) -> None:
    assert done.returncode == 0, done.stdout + done.stderr
    counts = {way: int(count) for count, way in re.findall(r"(\d+) ([^,\n]+)", done.stdout.splitlines()[-1])}
    assert counts["cases"] == cases
    assert min(counts["right"], counts["refused by the op"]) > cases / 4
    assert counts["refused by ONNX Runtime"] < cases / 4


def test_every_call_is_right_or_refused(cpu_op: Path) -> None:  # noqa: F811
    assert_right_or_refused(fuzz(cpu_op / "libnmsparse_onnxruntime.so", CASES), CASES)


def test_sanitizers_find_nothing_in_any_node(cpu_op: Path) -> None:  # noqa: F811
    """The folder stands for the library with sanitizers; where the compiler has none, the usual one runs again."""
    assert_right_or_refused(fuzz(cpu_op, CASES), CASES)


def test_a_wrong_library_is_noticed(cpu_op: Path) -> None:  # noqa: F811
    done = fuzz(cpu_op / "libnmsparse_mutant.so", 20)
    assert done.returncode == 1
    assert re.search(r"seed 0, case \d+ .*: a valid call gives another value: error .* times what is", done.stderr)
