"""Time and peak memory of the export stage beside its peers, on one checkpoint in float32, in interleaved runs.

    python benchmarks/convert.py MODEL.gguf --optimum .venv-clients/bin/optimum-cli --builder .venv-builder/bin/python

Prints a table; asserts nothing. Each run is a process of its own, its memory the kernel's count for that process
(the largest of it and its children). Ratios are paired: each round runs every tool once.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from converter import json_rows
from converter.checkpoint import open_checkpoint
from converter.errors import ConverterError

EXPORTER = """
import sys, torch
from transformers import AutoModelForCausalLM
from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
config = OnnxConfig(dynamic=True)
config.multi_token_decode = True
inputs = {"input_ids": torch.ones(1, 4, dtype=torch.int64)}
exported = OnnxExporter().export_for_generation(model, inputs, config=config)
exported.save_pretrained(sys.argv[2])
"""


def measure(command: list[str]) -> tuple[float, float]:
    """Return wall seconds and peak memory in bytes of one run."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"{' '.join(command)} failed:\n{errors.decode()[-2000:]}")
    return seconds, usage.ru_maxrss * 1024


def main() -> None:
    """Run every tool in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--optimum", help="optimum-cli of an environment with optimum-onnx")
    parser.add_argument("--builder", help="python of an environment with onnxruntime-genai and transformers 5")
    parser.add_argument("--exporter", action="store_true", help="also transformers' own exporter, which takes minutes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write rows of name, value, unit, goal, met")
    options = parser.parse_args()
    try:
        folder = open_checkpoint(options.model).folder
    except ConverterError as error:
        raise SystemExit(f"error: {error}") from error
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        # transformers 4, which optimum needs, does not know the tokenizer class that transformers 5 writes.
        shutil.copytree(folder, work / "model")
        settings = json.loads((work / "model" / "tokenizer_config.json").read_text())
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        (work / "model" / "tokenizer_config.json").write_text(json.dumps(settings))
        nmsparse = [sys.executable, "-m", "converter"]
        recipe = ["--criterion", "magnitude", "--mitigation", "var"]  # what is exported is timed, not the fit
        subprocess.run([*nmsparse, "calibrate", work / "model", work / "calibrated", *recipe], check=True)
        tools = {"nmsparse export": [*nmsparse, "export", str(work / "calibrated")]}
        if options.optimum:
            arguments = ["export", "onnx", "--model", str(work / "model"), "--task", "text-generation-with-past"]
            tools["optimum-cli (optimum-onnx)"] = [options.optimum, *arguments]
        if options.builder:
            arguments = ["-m", "onnxruntime_genai.models.builder", "-p", "fp32", "-e", "cpu", "-i", str(work / "model")]
            tools["onnxruntime-genai builder"] = [options.builder, *arguments, "-c", str(work / "cache"), "-o"]
        if options.exporter:
            (work / "exporter.py").write_text(EXPORTER)
            tools["transformers OnnxExporter"] = [sys.executable, str(work / "exporter.py"), str(work / "model")]
        runs: dict[str, list[tuple[float, float]]] = {name: [] for name in tools}
        sizes = {}
        for _ in range(options.rounds):
            for name, command in tools.items():
                out = work / "out"
                runs[name].append(measure([*command, str(out)]))
                sizes[name] = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
                shutil.rmtree(out)
    report(runs, sizes, options.json)


def report(runs: dict[str, list[tuple[float, float]]], sizes: dict[str, int], path: Path | None) -> None:
    """Print the table, and write the rows that have a goal."""
    ours = runs["nmsparse export"]
    print(f"| tool | our time / its time: median (min-max) of {len(ours)} | seconds, median | peak memory | written |")
    print("|---|---|---|---|---|")
    rows = []
    for name, theirs in runs.items():
        ratios = [a[0] / b[0] for a, b in zip(ours, theirs, strict=True)]
        middle, peak = statistics.median(ratios), max(memory for _, memory in theirs)
        seconds = statistics.median(second for second, _ in theirs)
        spread = f"{middle:.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        print(f"| {name} | {spread} | {seconds:.1f} | {peak / 1e9:.2f} GB | {sizes[name] / 1e9:.2f} GB |")
        if name.startswith("optimum"):
            rows.append(json_rows.row("export time / optimum-cli", middle, "ratio", 1.0, lower=True))
        if name.startswith("onnxruntime-genai"):
            ratio = max(memory for _, memory in ours) / peak
            rows.append(json_rows.row("export memory / genai builder", ratio, "ratio", 1.0, lower=True))
    json_rows.write(path, rows)


if __name__ == "__main__":
    main()
