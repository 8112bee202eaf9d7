"""What an engine is compared with: inputs of real text for each profile, and what ONNX Runtime makes of them.

They lie beside the engine as polygraphy's own files, with a script that runs the engine on them and compares.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from polygraphy.comparator import IterationResult, RunResults
from polygraphy.json import save_json
from torch import Tensor

from converter.errors import ValidationError
from converter.graph.widen import is_bfloat16
from converter.names import MODEL
from converter.quiet import quiet
from converter.runtimes.engine import ENGINE
from converter.runtimes.onnxruntime import call_feed, session
from converter.runtimes.profile import Profile

SCRIPT = "validate.sh"
LENGTH = 64  # tokens of a call and of the cache before it, where the profile has room
# Cosine of each output with ONNX Runtime's, at least. Where two runtimes round apart a near tie keeps another channel,
# and every block adds to that: SmolLM2 at 8:16 in float16 beside the same in float32 has 1.000 in the caches of the
# first block, 0.98 in the logits and down to 0.76 in a cache. One channel of 16 too many or too few has 0.997 in the
# first. So what a layer computes is judged in the first block, and the others for being the right model at all. Every
# layer alone is judged by `make test-gpu`.
COSINES = {"": 0.5, "logits": 0.95, "present.0.key": 0.998, "present.0.value": 0.998}


def write(folder: Path, profiles: Sequence[Profile], text: Callable[[int, int], Tensor], place: Path) -> None:
    """Write inputs and ONNX Runtime's outputs of OUT for each profile to `place`.

    `text` is called with how many windows of how many tokens are wanted, and returns their ids.
    """
    model = onnx.load(folder / MODEL, load_external_data=False)
    run, rounded = session(model, folder), is_bfloat16(model)
    for number, profile in enumerate(profiles):
        batch, tokens, past = profile.batch[1], _length(profile.tokens), _length(profile.past)
        ids = text(batch, past + tokens)
        caches = run.run(None, call_feed(run, ids[:, :past], None))[1:] if past else None
        feed = call_feed(run, ids[:, past:], caches)
        if rounded:  # the caches that ONNX Runtime takes in float32
            feed = {name: _bfloat16(array) if array.dtype == np.float32 else array for name, array in feed.items()}
        given = {name: value.float().numpy() if isinstance(value, Tensor) else value for name, value in feed.items()}
        names = [value.name for value in run.get_outputs()]
        tensors = {
            name: _bfloat16(array) if rounded else array
            for name, array in zip(names, run.run(None, given), strict=True)
        }
        with quiet():
            save_json([feed], str(place / f"inputs-{number}.json"))
            results = RunResults([("onnxruntime", [IterationResult(tensors, runner_name="onnxruntime")])])
            results.save(str(place / f"outputs-{number}.json"))


def commands(profiles: int, place: str = "") -> list[list[str]]:
    """Return polygraphy's command lines that compare an engine with what `write` left beside it, one for a profile.

    The files are named as they are in the folder, or after its path `place`, which ends in a slash.
    """
    return [
        [
            *("polygraphy", "run", f"{place}{ENGINE}", "--trt", "--model-type", "engine"),
            *("--optimization-profile", str(number)),
            *("--load-inputs", f"{place}inputs-{number}.json", "--load-outputs", f"{place}outputs-{number}.json"),
            *("--compare", "cosine_similarity", "--cosine-similarity-threshold"),
            *(f"{name}:{least}" if name else str(least) for name, least in COSINES.items()),
        ]
        for number in range(profiles)
    ]


def run(
    place: Path,
    environment: Mapping[str, str],
    profiles: int,
    plugin: Path | None,
    advance: Callable[[int, int], None],
) -> None:
    """Run the `commands` on the folder of an engine, from an empty one: no module is imported from either.

    `environment` is that of the engine's runtime.

    Raises:
        ValidationError: with what polygraphy says of the first that fails.
    """
    variables = {**os.environ, **environment}
    last = ["--plugins", str(plugin.resolve())] if plugin is not None else []
    main = "import sys; from polygraphy.tools import main; sys.exit(main())"
    with tempfile.TemporaryDirectory(prefix="nmsparse-") as nowhere:
        for number, (_, *command) in enumerate(commands(profiles, f"{place.resolve()}/")):
            tool = [sys.executable, "-P", "-c", main, *command, *last]
            done = subprocess.run(tool, cwd=nowhere, env=variables, capture_output=True, text=True, check=False)
            if done.returncode:
                said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-20:])
                raise ValidationError(
                    f"{place}, profile {number}: the engine must agree with ONNX Runtime, got:\n{said}"
                )
            advance(number + 1, profiles)


def script(environment: Mapping[str, str], profiles: int, *, plugin: bool) -> str:
    """Return a shell script that runs the `commands`; with `plugin` its argument is the plugin's library."""
    lines = [
        "#!/bin/sh",
        "# Compares the engine with ONNX Runtime, where a GPU is: sh validate.sh"
        + (" path/to/libnmsparse_tensorrt.so" if plugin else ""),
        "# Polygraphy lets an engine run code of its own on this CPU: run it on one that you trust.",
        "set -eu",
        *(f"export {name}={shlex.quote(value)}" for name, value in environment.items()),
        *(['plugin=$(realpath "$1")'] if plugin else []),
        'cd "$(dirname "$0")"',
        *(shlex.join(command) + (' --plugins "$plugin"' if plugin else "") for command in commands(profiles)),
    ]
    return "\n".join(lines) + "\n"


def _length(bounds: tuple[int, int, int]) -> int:
    low, _, high = bounds
    return min(max(LENGTH, low), high)


def _bfloat16(array: Any) -> Tensor:
    return torch.from_numpy(array).bfloat16()
