"""TensorRT, which runs our plugin: the script that builds an engine where a GPU and TensorRT are."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

import onnx

from converter.graph.export import MODEL
from converter.runtimes.profile import Profile

ENGINE = "model.engine"


def script(inputs: Sequence[onnx.ValueInfoProto], profiles: Sequence[Profile]) -> str:
    """Return a shell script that builds the engine of the graph beside it with polygraphy and lists its layers.

    Its argument is the plugin's library. TensorRT takes an ONNX function for a plugin that it does not find, in
    silence; the graph has none, so that a missing plugin is an error.
    """
    convert = ["polygraphy", "convert", MODEL, "--convert-to", "trt", "--output", ENGINE, "--strongly-typed"]
    for profile in profiles:
        for number, bound in enumerate(("min", "opt", "max")):
            shapes = (f"{value.name}:[{','.join(map(str, profile.shapes(value)[number]))}]" for value in inputs)
            convert += [f"--trt-{bound}-shapes", *shapes]
    inspect = ["polygraphy", "inspect", "model", ENGINE, "--model-type", "engine", "--show", "layers"]
    lines = [
        "#!/bin/sh",
        "# Builds the engine where TensorRT and a GPU are: sh build.sh path/to/libnmsparse_tensorrt.so",
        "set -eu",
        'plugin=$(realpath "$1")',
        'cd "$(dirname "$0")"',
        f'{shlex.join(convert)} --plugins "$plugin"',
        f'{shlex.join(inspect)} --plugins "$plugin"',
    ]
    return "\n".join(lines) + "\n"
