"""The command line: what it prints, its exit codes, and that bad input leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from conftest import PLAIN, QUICK, make_tiny, relisted
from safetensors.torch import load_file, save_file

from converter import cli, convert
from converter.cli import app

Command = Callable[..., "subprocess.CompletedProcess[str]"]
SHORT = ["--set", "calibration.window=32", "--calibration-tokens", "64"]


def refused(nmsparse: Command, tmp_path: Path, code: int, *arguments: object) -> str:
    """Run a command that must fail with `code`, say so in one error without a traceback, and leave no output."""
    before = sorted(p.name for p in tmp_path.iterdir())
    found = nmsparse(*arguments)
    assert found.returncode == code, found.stderr
    assert "Traceback" not in found.stderr
    assert "error:" in found.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    return " ".join(found.stderr.split())


def test_version_is_that_of_the_distribution(nmsparse: Command) -> None:
    assert nmsparse("--version").stdout.strip() == version("nmsparse")


def test_convert_in_one_and_in_stages(nmsparse: Command, tiny: Path, tmp_path: Path) -> None:
    recipe = ["--pattern", "8:16", "--criterion", "magnitude", "--mitigation", "s_pts+var", *SHORT]
    found = nmsparse("convert", tiny, tmp_path / "one", *recipe, "--json")
    assert found.returncode == 0, found.stderr
    report = json.loads(found.stdout)
    assert report["layers"] == {"sparse": 21, "dense": 1}
    assert [cost["stage"] for cost in report["stages"]] == ["checkpoint", "sample", "calibrate", "export", "validate"]
    assert all(cost["peak_bytes"] > 0 for cost in report["stages"])
    assert nmsparse("calibrate", tiny, tmp_path / "calibrated", *recipe).returncode == 0
    assert nmsparse("export", tmp_path / "calibrated", tmp_path / "two").returncode == 0
    found = nmsparse("validate", tmp_path / "two", "--json")
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["passed"]
    for name in ("model.onnx", "model.onnx.data", "recipe.yaml"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    # A second run replaces the first one's output.
    assert nmsparse("export", tmp_path / "calibrated", tmp_path / "two", "--dtype", "float16").returncode == 0
    assert "dtype: float16" in (tmp_path / "two" / "recipe.yaml").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["calibrated", "one", "two"]


def test_dry_run_shows_each_layer_and_why(nmsparse: Command, tiny: Path, tmp_path: Path) -> None:
    options = ["--pattern", "2:4", "--ignore", "*.layers.0.*", "--targets", "*_proj"]
    found = nmsparse("convert", tiny, tmp_path / "out", *options, "--dry-run", "--json")
    layers = {layer["name"]: layer for layer in json.loads(found.stdout)["layers"]}
    assert layers["lm_head"]["reason"] == "output head"
    assert layers["model.layers.0.mlp.up_proj"]["reason"] == "ignored by '*.layers.0.*'"
    assert (layers["model.layers.1.mlp.up_proj"]["keep"], layers["model.layers.1.mlp.up_proj"]["group"]) == (2, 4)
    assert not (tmp_path / "out").exists()
    found = nmsparse("convert", tiny, tmp_path / "out", "--pattern", "50%", "--dry-run")
    assert "48:96" in found.stdout


def test_bad_recipes(nmsparse: Command, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    text = refused(nmsparse, tmp_path, 10, "convert", tiny, out, "--pattern", "8:40")
    assert "model.layers.0.self_attn.q_proj: in_features must be divisible by 40 for pattern 8:40, got 64" in text
    assert "available: amber, amber_trimmed" in refused(
        nmsparse, tmp_path, 10, "convert", tiny, out, "--criterion", "clat"
    )
    assert "no target of" in refused(nmsparse, tmp_path, 10, "convert", tiny, out, "--targets", "nothing*")
    found = nmsparse("convert", tiny, out, "--colour", "1")
    assert found.returncode == 2
    assert "Traceback" not in found.stderr


def test_a_criterion_for_comparison_is_refused_by_every_stage(nmsparse: Command, tiny: Path, tmp_path: Path) -> None:
    out, options = tmp_path / "out", ["--criterion", "wanda", "--mitigation", "none"]
    # No text, and no model either: it is said before any of them is opened.
    for command in (["convert", tiny], ["calibrate", tiny], ["convert", tmp_path / "absent"]):
        text = refused(nmsparse, tmp_path, 10, *command, out, *options)
        assert "criterion: must be one that can be exported, got wanda: it prunes the weight" in text
    assert "got wanda" in refused(nmsparse, tmp_path, 10, "convert", tiny, out, *options, "--dry-run")
    text = refused(nmsparse, tmp_path, 10, "convert", tiny, out, "--criterion", "clact_dynamic")
    assert "got clact_dynamic: it looks at later tokens" in text
    text = refused(nmsparse, tmp_path, 10, "convert", tiny, out, "--criterion", "sparsegpt")
    assert "mitigation: must be none with the criterion sparsegpt" in text

    calibrated = tmp_path / "calibrated"
    assert nmsparse("calibrate", tiny, calibrated, *QUICK).returncode == 0
    recipe = (calibrated / "recipe.yaml").read_text()
    (calibrated / "recipe.yaml").write_text(recipe.replace("criterion: magnitude", "criterion: clact_dynamic"))
    relisted(calibrated)
    assert "looks at later tokens" in refused(nmsparse, tmp_path, 10, "export", calibrated, out)


def test_bad_checkpoints(nmsparse: Command, tiny: Path, tmp_path: Path) -> None:
    def broken(name: str) -> Path:
        return Path(shutil.copytree(tiny, tmp_path / name))

    out = tmp_path / "out"
    pickle = broken("pickle")
    (pickle / "model.safetensors").rename(pickle / "pytorch_model.bin")
    assert "must be safetensors, got pytorch_model.bin" in refused(nmsparse, tmp_path, 11, "convert", pickle, out)

    truncated = broken("truncated")
    weights = truncated / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "must be a complete safetensors file" in refused(nmsparse, tmp_path, 11, "convert", truncated, out)

    nan = broken("nan")
    tensors = load_file(nan / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, nan / "model.safetensors", metadata={"format": "pt"})
    text = refused(nmsparse, tmp_path, 11, "convert", nan, out)
    assert "model.layers.1.mlp.up_proj.weight: weights must be finite, got 1 NaN or Inf" in text

    (tmp_path / "x.gguf").write_bytes(b"no gguf at all")
    assert "must hold a model that transformers can read" in refused(
        nmsparse, tmp_path, 11, "convert", tmp_path / "x.gguf", out
    )
    _gguf_of_a_vision_tower(tmp_path / "clip.gguf")
    text = refused(nmsparse, tmp_path, 11, "convert", tmp_path / "clip.gguf", out)
    assert "must hold a model that transformers can read" in text

    empty = tmp_path / "empty"
    empty.mkdir()
    assert "must hold one or more .safetensors" in refused(nmsparse, tmp_path, 11, "convert", empty, out)
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    found = nmsparse("convert", "nobody/nothing", out, env=environment)
    assert found.returncode == 11
    assert "Hub id that can be reached" in found.stderr


def _gguf_of_a_vision_tower(path: Path) -> None:
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, "clip")
    writer.add_name("a vision tower")
    writer.add_tensor("v.patch_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_bad_calibration_text(nmsparse: Command, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short")
    options = ["--mitigation", "s_pts", "--calibration", tmp_path / "short.txt"]
    text = refused(nmsparse, tmp_path, 12, "convert", tiny, tmp_path / "out", *options)
    assert "must have at least 8192 tokens" in text


def test_bad_output(nmsparse: Command, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "precious").write_text("mine")
    text = refused(nmsparse, tmp_path, 15, "convert", tiny, tmp_path / "taken")
    assert "must be new, empty, or a folder that nmsparse wrote" in text
    assert (tmp_path / "taken" / "precious").read_text() == "mine"
    assert "must be a folder that nmsparse wrote" in refused(nmsparse, tmp_path, 15, "validate", tmp_path / "taken")


def test_names_that_are_not_utf_8(nmsparse: Command, tiny: Path, tmp_path: Path) -> None:
    model, out = (Path(os.fsdecode(os.fsencode(tmp_path) + name)) for name in (b"/model\xff", b"/out\xfe"))
    shutil.copytree(tiny, model)
    out.mkdir()
    for command in (
        ["convert", model, out, *QUICK],
        ["generate", out, "the fox", "--max-new-tokens", "2"],
        ["report", out],
    ):
        found = nmsparse(*command, errors="surrogateescape")
        assert found.returncode == 0, found.stderr
    assert sorted(os.listdir(os.fsencode(tmp_path))) == [b"model\xff", b"out\xfe"]
    assert json.loads((out / "manifest.json").read_text())["source"]["name"] == str(model)


def test_a_full_disk_leaves_nothing(nmsparse: Command, tiny: Path, tmp_path: Path) -> None:
    """A limit on the size of a file fails the same writes as a full disk, at the same place."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    found = nmsparse("convert", tiny, tmp_path / "out", *QUICK, preexec_fn=limit, env=environment)
    assert found.returncode in {13, 15}, found.stderr
    assert "Traceback" not in found.stderr
    assert not list(tmp_path.iterdir())


def test_too_little_room_is_said_before_the_work(monkeypatch: pytest.MonkeyPatch, tiny: Path, tmp_path: Path) -> None:
    from converter import convert
    from converter.errors import OutputError

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OutputError, match=r"the disk must have .* GB free, got 0\.00 GB"):
        convert(str(tiny), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(tiny: Path, tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "converter", "convert", tiny, tmp_path / "out", *QUICK]
    # A shell that runs the tests in the background lets its children ignore SIGINT.
    process = subprocess.Popen(
        list(map(str, command)),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not any(p.name.startswith(".nmsparse-") for p in tmp_path.iterdir()):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "Interrupted; OUT was left unchanged." in errors
    assert not list(tmp_path.iterdir())


def test_a_failed_validation_has_its_own_exit_code(nmsparse: Command, tmp_path: Path) -> None:
    model, out = make_tiny(tmp_path / "model"), tmp_path / "out"
    assert nmsparse("convert", model, out, *QUICK).returncode == 0
    data = bytearray((out / "model.onnx.data").read_bytes())
    data[: len(data) // 2] = bytes(len(data) // 2)
    (out / "model.onnx.data").write_bytes(data)
    assert "model.onnx.data: must have SHA-256" in refused(nmsparse, tmp_path, 15, "validate", out)
    relisted(out)
    assert "ONNX Runtime must agree with PyTorch" in refused(nmsparse, tmp_path, 14, "validate", out)
    make_tiny(tmp_path / "model", seed=1)
    assert "was made from others" in refused(nmsparse, tmp_path, 11, "validate", out)


def test_generate_and_perplexity(nmsparse: Command, tiny: Path, tmp_path: Path) -> None:
    assert nmsparse("convert", tiny, tmp_path / "out", "--pattern", "16:16", "--ignore", "x").returncode == 10
    assert nmsparse("convert", tiny, tmp_path / "out", "--pattern", "15:16", *QUICK[2:]).returncode == 0
    (tmp_path / "t.txt").write_text("the quick brown fox jumps over the lazy dog " * 40)
    values = []
    for model in (tiny, tmp_path / "out"):
        options = ["--text", tmp_path / "t.txt", "--context", "32", "--tokens", "64", "--json"]
        found = nmsparse("perplexity", model, *options)
        assert found.returncode == 0, found.stderr
        values.append(json.loads(found.stdout))
        assert values[-1]["tokens"] == 62
        assert nmsparse("generate", model, "the quick", "--max-new-tokens", "4").returncode == 0
    assert values[0]["perplexity"] != values[1]["perplexity"]


@pytest.mark.parametrize("sample", sorted((Path(__file__).parents[1] / "samples").glob("*.py")), ids=lambda p: p.name)
def test_samples_run(tiny: Path, tmp_path: Path, sample: Path) -> None:
    command = [sys.executable, str(sample), str(tiny), str(tmp_path / "out")]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip()


ROOT = Path(__file__).parents[1]
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")


def of_command(name: str) -> set[str]:
    """Return the options that a command takes: by its own account, and what `main` takes from every command."""
    arguments = app[name].assemble_argument_collection()
    return {option for argument in arguments for option in argument.names} | {"--help", cli.DEBUG}


def said_in(text: str) -> tuple[list[tuple[str, str]], set[str]]:
    """Return the commands in a page, each with what follows it, and the options that are named alone."""
    blocks = re.findall(r"^```(?:bash|console|text)\n(.*?)^```", text, re.M | re.S)
    inline = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    code = [line.partition(" #")[0] for line in [*lines, *inline]]
    commands = [found for line in code for found in re.findall(r"(?:^|[;&|$(] *)nmsparse ([a-z][\w-]*)([^;&|]*)", line)]
    return commands, {text for text in inline if text.startswith("--")}


def test_commands_and_options_of_the_documentation_exist() -> None:
    names = {name for name in app if not name.startswith("-")}
    options = {name: of_command(name) for name in names}
    # Options of benchmarks and of polygraphy are named in the pages, too.
    others = OPTION.findall("".join(path.read_text("utf-8") for path in (ROOT / "benchmarks").glob("*.py")))
    known = set(others) | {"--onnxrt", "--nmsparse-ort", "--version"} | set().union(*options.values())
    used, wrong = set(), []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        commands, alone = said_in(page.read_text("utf-8"))
        used |= {command for command, _ in commands}
        wrong += [(page.name, f"nmsparse {command}") for command, _ in commands if command not in names]
        wrong += [
            (page.name, f"nmsparse {command} {option}")
            for command, rest in commands
            for option in OPTION.findall(rest)
            if option not in options.get(command, {option})
        ]
        wrong += [(page.name, option) for text in alone for option in OPTION.findall(text) if option not in known]
    assert wrong == []
    assert used == names


def test_what_needs_no_model_imports_no_torch(tiny: Path, tmp_path: Path) -> None:
    """Its import takes seconds, and sympy's, which onnx_ir brings, half of one."""
    out = convert(str(tiny), tmp_path / "out", PLAIN)
    program = "import sys; from converter.cli import main\ntry: main()\nfinally: print(*sys.modules, file=sys.stderr)"
    for command in (
        ["--help"],
        ["--version"],
        ["convert", "--help"],
        ["convert", tiny, out, "--colour", "red"],
        ["inspect", out],
        ["report", out],
        ["doctor"],
    ):
        done = subprocess.run([sys.executable, "-c", program, *map(str, command)], capture_output=True, text=True)
        assert done.returncode == (2 if "--colour" in command else 0), done.stderr
        loaded = set(done.stderr.splitlines()[-1].split())
        assert "converter.cli" in loaded
        assert not loaded & {"torch", "transformers", "sympy", "tensorrt_rtx_bindings"}, command
