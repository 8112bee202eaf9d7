"""Whole models beside their peers: tokens a second, and memory in prefill; in float32, or with weights of fewer bits.

    make bench-models     # SmolLM2-135M-Instruct, and a random Llama of 1.1 billion parameters made for the occasion

Ours is OUT at 8:16 with `share`, in ONNX Runtime with our kernel. A peer is the same OUT run dense in ONNX Runtime
(`dense`), or the model as onnxruntime-genai's builder writes it (`--precision int4`: linear layers and head), run by
ONNX Runtime (`builder`) or by onnxruntime-genai (`genai`), which then runs ours, too. Each is a process of its own.
Ours and one peer take turns, call by call: a prefill, or a prompt of 128 tokens (not timed) and 32 tokens after it,
greedily. A cell is peer's time / our time, the median of the ratios of neighbours, and their quartiles. It prints a
table and asserts nothing.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import onnx
import onnxruntime
import psutil
import record
import torch
from cyclopts import App, Parameter
from rich.box import MARKDOWN
from rich.table import Table
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from converter import json_rows
from converter.checkpoint import open_checkpoint
from converter.delivery.manifest import GENAI, exported
from converter.graph.costs import layer_costs
from converter.graph.dense import densify
from converter.names import MODEL, Weights
from converter.runtimes.kernel import library
from converter.runtimes.onnxruntime import session
from converter.stages import forget_peak, peak_bytes

app = App(help_format="plaintext")
PROMPT, NEW, WARM = 128, 32, 2
CALLS = (("decode", NEW), ("prefill", 128), ("prefill", 512))
PEERS = ("dense", "builder", "genai")
RECIPE = ("--pattern", "8:16", "--criterion", "magnitude", "--mitigation", "none", "--set", "share=true")
# What is wanted: the time of the better peer / ours in decoding, and in prefill; peak memory / that of dense.
DECODE_GOALS, PREFILL_GOAL, MEMORY_GOAL = {"SmolLM2-135M": 1.5, "random Llama, 1.1B": 1.65}, 0.95, 1.1
LOW_BITS_GOAL = 1.0  # of decoding, beside the builder's int4
# Runs a folder in onnxruntime-genai, with a library of ops where one is named; its answers are those of `serve`.
GENAI_RUN = """
import json, sys, time
import numpy as np
import onnxruntime_genai as genai
folder, ops, threads, prompt, warm = *sys.argv[1:3], *map(int, sys.argv[3:])
config = genai.Config(folder)
options = {"intra_op_num_threads": threads, "session.force_spinning_stop": "1"}
if ops:
    options["custom_ops_library"] = ops
config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
model = genai.Model(config)
tokens = np.random.default_rng(0).integers(0, 30_000, 4096)
def generator(length):
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=length, min_length=length, do_sample=False)
    return genai.Generator(model, params)
print("ready", flush=True)
for line in sys.stdin:
    kind, count = line.split()
    count = int(count)
    if kind == "prefill":
        run, calls = generator(count + 1), 1
        start = time.perf_counter()
        run.append_tokens(tokens[:count])
    else:
        run, calls = generator(prompt + warm + count), count
        run.append_tokens(tokens[:prompt])
        for _ in range(warm):
            run.generate_next_token()
        start = time.perf_counter()
        for _ in range(count):
            run.generate_next_token()
    print((time.perf_counter() - start) / calls, 0, flush=True)
"""
Values = list[onnxruntime.OrtValue]


class Worker:
    """A process that holds one model and times calls of it."""

    def __init__(self, command: list[str]) -> None:
        """Start it, and wait until the model is loaded."""
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.answer() == ["ready"]

    def answer(self) -> list[str]:
        """Return the words of its next line."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args}: ended")
        return line.split()

    def ask(self, kind: str, count: int) -> tuple[float, float]:
        """Return the seconds of a call and the peak memory of the process in it, in bytes."""
        assert self.process.stdin is not None
        print(kind, count, file=self.process.stdin, flush=True)
        seconds, peak = map(float, self.answer())
        return seconds, peak


@contextmanager
def workers(*commands: list[str]) -> Iterator[list[Worker]]:
    """Give a worker for each command, and end them."""
    made: list[Worker] = []
    try:
        for command in commands:
            made.append(Worker(command))
        yield made
    finally:
        for worker in made:
            worker.process.kill()
            worker.process.wait()


def step(run: onnxruntime.InferenceSession, ids: np.ndarray, caches: Values, head: int) -> Values:
    """Return logits and caches after the tokens `ids [1, S]`; they stay in ONNX Runtime's own memory.

    Without `caches` there are no tokens before; a key has `head` numbers, which the builder's graph does not say.
    """
    past = caches[0].shape()[2] if caches else 0
    length = ids.shape[1]
    arrays = {"input_ids": ids, "attention_mask": np.ones((1, past + length), np.int64)}
    arrays["position_ids"] = np.arange(past, past + length)[None]
    feeds, names = {}, ["logits"]
    for value in run.get_inputs():
        if value.name in arrays:
            feeds[value.name] = onnxruntime.OrtValue.ortvalue_from_numpy(arrays[value.name])
            continue
        empty = np.zeros((1, value.shape[1], 0, head), np.float32)
        feeds[value.name] = caches[len(names) - 1] if caches else onnxruntime.OrtValue.ortvalue_from_numpy(empty)
        names.append(value.name.replace("past_key_values", "present"))
    found: Values = run.run_with_ort_values(names, feeds)
    return found


def timed(run: onnxruntime.InferenceSession, kind: str, count: int, head: int) -> float:
    """Return the seconds of a prefill of `count` tokens, or of each of `count` tokens after a prompt."""
    tokens = np.random.default_rng(0).integers(0, 30_000, (1, 4096))
    if kind == "prefill":
        start = time.perf_counter()
        step(run, tokens[:, :count], [], head)
        return time.perf_counter() - start
    found = step(run, tokens[:, :PROMPT], [], head)
    start = 0.0
    for number in range(-WARM, count):
        if number == 0:
            start = time.perf_counter()
        found = step(run, found[0].numpy()[:, -1].argmax(-1)[:, None], found[1:], head)
    return (time.perf_counter() - start) / count


@app.command(show=False)
def serve(what: str, folder: Path, threads: int) -> None:
    """Time calls of a model in ONNX Runtime, as the lines of stdin ask for them."""
    graph = onnx.load(folder / MODEL, load_external_data=False)
    head = json.loads((folder / GENAI).read_text())["model"]["decoder"]["head_size"]
    before = psutil.Process().memory_info().rss
    run = session(densify(graph) if what == "dense" else graph, folder, threads=threads)
    print("ready", flush=True)
    for line in sys.stdin:
        kind, count = line.split()
        forget_peak()
        print(timed(run, kind, int(count), head), peak_bytes() - before, flush=True)


def random_llama(folder: Path) -> Path:
    """Write a Llama of 1.1 billion random parameters, with a tokenizer of single words, unless it is there."""
    if folder.exists():
        return folder
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(config.vocab_size)}, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="t1", eos_token="t2", pad_token="t0").save_pretrained(
        folder
    )
    return folder


def prepared(source: Path, out: Path, weights: Weights, built: Path, precision: str, builder: Path) -> None:
    """Convert the checkpoint to OUT, and to what the builder makes of it, where they are not there yet."""
    if not out.exists():
        fitted = out.with_name(f"{out.name}.fitted")
        for command in (["calibrate", source, fitted, *RECIPE], ["export", fitted, out, "--weights", weights]):
            subprocess.run([sys.executable, "-m", "converter", *command], check=True)
    if not (built / MODEL).exists():
        options = ["-p", precision, "-e", "cpu", "-i", source, "-c", built.with_name("cache"), "-o", built]
        subprocess.run([builder, "-m", "onnxruntime_genai.models.builder", *options], check=True)


def bound(out: Path) -> float:
    """Return the bytes of the weights that a token reads dense / those that it reads sparse."""
    graph = exported(out)
    sizes = {t.name: 4 * math.prod(t.dims) for t in graph.graph.initializer}
    nodes = densify(graph).graph.node
    sizes |= {node.output[0]: sizes.get(node.input[0], 0) for node in nodes if node.op_type == "Transpose"}
    whole = sum(sizes.get(node.input[1], 0) for node in nodes if node.op_type == "MatMul")
    return whole / (whole - sum(cost.bytes - cost.sparse_bytes for cost in layer_costs(graph)))


def compared(commands: list[list[str]], rounds: int) -> dict[tuple[str, int], np.ndarray]:
    """Return for each call seconds and peak bytes `[rounds, 2, 2]` of two workers that take turns."""
    found = {}
    with workers(*commands) as both:
        for call in CALLS:
            for worker in both:
                worker.ask(call[0], min(call[1], WARM))
            found[call] = np.array([[worker.ask(*call) for worker in both] for _ in range(rounds)])
    return found


def measure(name: str, out: Path, built: Path, builder: Path, threads: int, rounds: int, table: Table) -> list[Any]:
    """Add the rows of a model to the table; return those of `--json`."""

    def here(what: str, folder: Path) -> list[str]:
        return [sys.executable, __file__, "serve", what, str(folder), str(threads)]

    def genai(folder: Path, ops: str) -> list[str]:
        return [str(builder), "-c", GENAI_RUN, str(folder), ops, *map(str, (threads, PROMPT, WARM))]

    pairs = {
        "dense": [here("ours", out), here("dense", out)],
        "builder": [here("ours", out), here("builder", built)],
        "genai": [genai(out, str(library())), genai(built, "")],
    }
    found = {peer: compared(pair, rounds) for peer, pair in pairs.items()}
    lines = []
    for kind, count in CALLS:
        call = "decode" if kind == "decode" else f"prefill of {count}"
        where, middles, cells = f"CPU, {name}, {threads} threads, {call}", [], []
        for peer in PEERS:
            times = found[peer][kind, count][:, :, 0]
            low, middle, high = np.quantile(times[:, 1] / times[:, 0], (0.25, 0.5, 0.75))
            middles.append(float(middle))
            cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
            lines.append(json_rows.row(f"{where}: {peer} time / our time", float(middle), "ratio"))
        low_bits = name not in DECODE_GOALS
        goal = (
            (LOW_BITS_GOAL if low_bits else DECODE_GOALS[name])
            if kind == "decode"
            else None
            if low_bits
            else PREFILL_GOAL
        )
        lines.append(json_rows.row(f"{where}: better peer's time / our time", min(middles), "ratio", goal))
        mine, theirs = map(float, found["dense"][kind, count].max(0)[:, 1])
        if kind == "prefill":
            row = json_rows.row(f"{where}: our memory / dense memory", mine / theirs, "ratio", MEMORY_GOAL, lower=True)
            lines.append(row)
        seconds = np.median(found["dense"][kind, count][:, 0, 0])
        speed = f"{(count if kind == 'prefill' else 1) / seconds:.1f}"
        lines.append(json_rows.row(f"{where}: ours", float(speed), "tokens/s"))
        table.add_row(name, call, speed, *cells, f"{mine / 1e9:.2f} GB, {mine / theirs:.2f}")
    return lines


@app.default
def main(
    model: str,
    *,
    builder: Path,
    random: bool = True,
    weights: Weights = "dtype",
    precision: Literal["fp32", "int4"] = "fp32",
    threads: int = 2,
    rounds: int = 5,
    work: Path | None = None,
    json_file: Annotated[Path | None, Parameter(name="--json")] = None,
    result: str | None = None,
) -> None:
    """Measure MODEL, SmolLM2-135M, and a random model unless --no-random; ours in WEIGHTS, the builder's in PRECISION.

    BUILDER is the python of an environment with onnxruntime-genai and transformers 5. What is made for the occasion
    takes 14 GB in WORK, which is kept, or in a temporary folder.
    """
    if library() is None:
        sys.exit("benchmarks/models.py: the op's library must be built, got none. Run make cpu-op.")
    columns = ("model", "call", "ours, tokens/s", *(f"{peer} time / our time" for peer in PEERS))
    table = Table(*columns, "our peak memory, / dense", box=MARKDOWN, title=f"{threads} threads, {rounds} rounds")
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        place = work or Path(scratch)
        place.mkdir(parents=True, exist_ok=True)
        sources = {"SmolLM2-135M": lambda: open_checkpoint(model).folder}
        if random:
            sources["random Llama, 1.1B"] = lambda: random_llama(place / "random")
        for number, (name, source) in enumerate(sources.items()):
            out, built = place / f"out-{number}-{weights}", place / f"built-{number}-{precision}"
            prepared(source(), out, weights, built, precision, builder.absolute())
            if weights == "dtype":
                print(f"{name}: the weights bound the decode at {bound(out):.2f} of dense")
            if (weights, precision) != ("dtype", "fp32"):
                name = f"{name}, ours in {weights}, the builder's in {precision}"
            lines += measure(name, out, built, builder.absolute(), threads, rounds, table)
    record.show(table, result)
    json_rows.write(json_file, lines)


if __name__ == "__main__":
    app()
