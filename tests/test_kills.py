"""Commands killed at random moments leave OUT absent, old or new, and nothing behind after the next run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

COUNT = 8  # each command over an OUT that is there, and where none is


def test_kills() -> None:
    """In a process of its own, which can fork."""
    script = Path(__file__).with_name("kills.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[1])}
    command = [sys.executable, str(script), "--count", str(COUNT), "--seed", "27"]
    found = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert found.returncode == 0, found.stdout + found.stderr
    assert sum(json.loads(found.stdout.splitlines()[-1]).values()) == COUNT
