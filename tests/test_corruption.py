"""Every file of OUT with a bit flipped, cut off, longer or gone: each command that reads OUT refuses it by its name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import PLAIN, relisted

from converter import convert, load
from converter.delivery import manifest
from converter.delivery.manifest import check_files
from converter.errors import OutputError

FILES = ("calibration.safetensors", "config.json", "genai_config.json", "generation_config.json", "manifest.json")
FILES += ("model.onnx", "model.onnx.data", "recipe.yaml", "report.json", "tokenizer.json", "tokenizer_config.json")
Main = Callable[..., tuple[int, str]]
READERS = {
    "generate": lambda out, _: ["generate", out, "a"],
    "perplexity": lambda out, _: ["perplexity", out, "--context", 64, "--tokens", 64],
    "bench": lambda out, _: ["bench", out, "--seconds", 0.1],
    "inspect": lambda out, _: ["inspect", out],
    "report": lambda out, here: ["report", out, "--to", here / "page.html"],
    "compare": lambda out, here: ["compare", out, out, "--to", here / "page.html"],
    "export": lambda out, here: ["export", out, here / "never"],
    "validate": lambda out, _: ["validate", out],
    "evaluate": lambda out, here: ["evaluate", out, "--prompts", 1, "--tasks", "", "--out", here / "never"],
    "build": lambda out, _: ["build", out, "--runtime", "tensorrt"],
    "engine": lambda out, _: ["validate", out, "--runtime", "tensorrt"],
}


@pytest.fixture(scope="module")
def out(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(str(tiny), tmp_path_factory.mktemp("corruption") / "out", PLAIN)


def damages(file: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    data = bytearray(file.read_bytes())
    middle = bytearray(data)
    # In the manifest: a bit of a hash, as what it says of versions nobody compares.
    place = data.rindex(b'"sha256"') + 14 if file.name == "manifest.json" else len(data) // 2
    middle[place] ^= 1
    yield "a bit", lambda: file.write_bytes(middle)
    yield "cut", lambda: file.write_bytes(data[: len(data) // 2])
    yield "longer", lambda: file.write_bytes(data + b"}")
    yield "gone", file.unlink


@pytest.mark.parametrize("reader", READERS)
def test_every_file_damaged_in_every_way(reader: str, out: Path, tmp_path: Path, main: Main) -> None:
    place = tmp_path / "out"
    shutil.copytree(out, place)
    assert sorted(path.name for path in out.iterdir()) == sorted(FILES)
    command, tries = READERS[reader](place, tmp_path), 0
    for name in FILES:
        for how, damage in damages(place / name):
            damage()
            before = sorted(os.listdir(tmp_path))
            code, said = main(*command)
            assert code == 15, (name, how, said)
            assert "Traceback" not in said
            assert name in said or name == "manifest.json", (name, how, said)
            assert sorted(os.listdir(tmp_path)) == before
            (place / name).write_bytes((out / name).read_bytes())
            tries += 1
    assert tries == 4 * len(FILES)


def test_python_refuses_it_too(out: Path, tmp_path: Path) -> None:
    place = tmp_path / "out"
    shutil.copytree(out, place)
    assert load(place)(torch.tensor([[3, 4]])).logits.shape[-1] == 256
    (place / "model.onnx.data").write_bytes((place / "model.onnx.data").read_bytes()[:-1] + b"\xff")
    with pytest.raises(OutputError, match=r"model\.onnx\.data: must have SHA-256 [0-9a-f]{64}, got another"):
        load(place)


def test_what_a_large_out_was_is_remembered(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("converter.place.constants.HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(manifest, "LARGE", 1)
    place, read = tmp_path / "out", []
    shutil.copytree(out, place)
    hashed = manifest.sha256
    monkeypatch.setattr(manifest, "sha256", lambda path: read.append(path.name) or hashed(path))
    # Written this very moment, it may change once more within one tick of the clock: it is read again.
    for _ in range(2):
        read.clear()
        check_files(place)
        assert "model.onnx.data" in read
    monkeypatch.setattr(manifest, "SETTLED", -1.0)
    check_files(place)
    read.clear()
    check_files(place)
    assert not read
    # Its times put back, a file that was changed has another time of change still.
    file, before = place / "model.onnx.data", (place / "model.onnx.data").stat()
    data = file.read_bytes()
    file.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(OutputError, match="got another"):
        check_files(place)
    file.write_bytes(data)
    (memory,) = (tmp_path / "home" / "nmsparse" / "verified").iterdir()
    memory.write_text("[")  # what is remembered is damaged
    check_files(place)
    about = json.loads((place / "manifest.json").read_text())
    about["files"]["config.json"]["sha256"] = "0" * 64
    (place / "manifest.json").write_text(json.dumps(about))
    with pytest.raises(OutputError, match=r"config\.json: must have SHA-256"):
        check_files(place)
    relisted(place)
    check_files(place)
