"""What an interrupted calibration leaves: taken up by the same command alone, and never in the way of the next one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import make_tiny

from converter import place
from converter.calibration.resume import resumable
from converter.checkpoint import open_checkpoint
from converter.errors import CalibrationError
from converter.recipe import Recipe

TRAINED = ["--pattern", "8:16", "--criterion", "magnitude", "--mitigation", "distill", "--calibration", "self"]
for setting in ("calibration.window=32", "calibration.tokens=128", "training.tokens=256", "training.window=32"):
    TRAINED += ["--set", setting]
TRAINED += ["--set", "training.steps=4", "--set", "training.held_out=2"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own."""
    monkeypatch.setattr(place.constants, "HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "nmsparse" / "training"


@pytest.mark.parametrize("name", ["text.safetensors", "distill.pt"])
@pytest.mark.parametrize("how", ["cut", "empty", "no tensors", "other tensors"])
def test_a_damaged_state_is_discarded_with_a_word(
    tiny: Path, tmp_path: Path, home: Path, main: Callable[..., tuple[int, str]], name: str, how: str
) -> None:
    from safetensors.torch import save_file

    with suppress(KeyboardInterrupt), resumable(open_checkpoint(str(tiny)), _recipe(), print) as state:
        save_file({"text": torch.zeros(8, 32, dtype=torch.int64)}, state / "text.safetensors")
        torch.save({"curve": [(0, 1.0)]}, state / "distill.pt")
        raise KeyboardInterrupt
    file = next(home.rglob(name))
    if how == "other tensors":
        save_file({"a": torch.ones(1)}, file) if name.startswith("text") else torch.save({"a": 1}, file)
    else:
        file.write_bytes({"cut": file.read_bytes()[:50], "empty": b"", "no tensors": b"[" * 100_000}[how])
    code, said = main("calibrate", tiny, tmp_path / "out", *TRAINED)
    if how == "other tensors":  # it can be read, and is not what it should be: that is found on the way
        assert code == 70
        assert "unforeseen" in said
        code, said = main("calibrate", tiny, tmp_path / "out", *TRAINED)
    else:
        assert "is damaged" in " ".join(said.split())
    assert code == 0, said
    assert not any(home.iterdir())


def _recipe(**changes: object) -> Recipe:
    given = dict(zip((o.removeprefix("--") for o in TRAINED[:8:2]), TRAINED[1:8:2], strict=True))
    given["calibration.source"] = given.pop("calibration")
    settings = dict(text.split("=") for text in TRAINED if "=" in text)
    return Recipe().replace({**given, **{key: int(value) for key, value in settings.items()}, **changes})


def test_the_key_has_all_that_calibration_depends_on(tmp_path: Path, home: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a")
    first = make_tiny(tmp_path / "model")

    def key(**changes: object) -> str:
        with resumable(
            open_checkpoint(str(first)), _recipe(**{"calibration.source": str(text), **changes}), print
        ) as s:
            return s.name

    keys = [key(), key(seed=1)]
    text.write_text("b")
    keys.append(key())
    settings = first / "tokenizer.json"
    settings.write_text(settings.read_text().replace("lazy", "lazi") + " ")
    keys.append(key())
    config = first / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    keys.append(key())
    make_tiny(first, seed=1)
    keys.append(key())
    assert len(set(keys)) == len(keys)


def test_two_equal_runs_at_once_do_not_share_it(tiny: Path, home: Path) -> None:
    checkpoint, said = open_checkpoint(str(tiny)), []
    with resumable(checkpoint, _recipe(), said.append) as first:
        (first / "mine.safetensors").touch()
        with resumable(checkpoint, _recipe(), said.append) as second:
            assert second != first
            assert not any(second.iterdir())
        assert not second.exists()
        assert (first / "mine.safetensors").exists()
    assert not first.exists()
    assert said == ["the same calibration is running already: this one cannot be resumed"]


def test_what_is_wrong_with_the_input_leaves_no_state_and_a_full_disk_leaves_it(tiny: Path, home: Path) -> None:
    checkpoint = open_checkpoint(str(tiny))
    for error, stays in (
        (CalibrationError("x"), False),
        (OSError("full"), True),
        (MemoryError(), True),
        (KeyError("x"), False),
    ):
        with pytest.raises(type(error)), resumable(checkpoint, _recipe(), print) as state:
            raise error
        assert state.exists() == stays
        shutil.rmtree(state, ignore_errors=True)


def test_a_full_disk_is_one_line_and_leaves_the_state(
    tiny: Path, tmp_path: Path, home: Path, main: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 864128 vs 864016")

    monkeypatch.setattr(torch, "save", full)
    code, said = main("calibrate", tiny, tmp_path / "out", *TRAINED)
    assert code == 15, said
    assert "Free some space there" in " ".join(said.split())
    assert [path.name for path in home.rglob("*") if path.is_file()] == ["text.safetensors"]


def test_a_cache_that_cannot_be_written_is_one_line(
    tiny: Path, tmp_path: Path, main: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(place.constants, "HF_HOME", str(tmp_path / "file" / "home"))
    code, said = main("calibrate", tiny, tmp_path / "out", *TRAINED)
    assert code == 15
    assert "Set HF_HOME" in " ".join(said.split())
    assert not (tmp_path / "out").exists()
