"""Every input of `attacks.py` ends as it must: one line, its exit code, nothing written, no code run."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from attacks import ATTACKS, QUICK, Attack, Place


@pytest.fixture(scope="module")
def good(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint and an OUT of it."""
    from converter.pipeline import convert
    from converter.recipe import Recipe

    out = tmp_path_factory.mktemp("attacks") / "out"
    changes = dict(zip((o.removeprefix("--") for o in QUICK[::2]), QUICK[1::2], strict=True))
    return tiny, convert(str(tiny), out, Recipe().replace(changes))


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.kind)
def test_every_try_ends_as_it_must(
    attack: Attack,
    good: tuple[Path, Path],
    tmp_path: Path,
    main: Callable[..., tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    wrong = []
    for one in attack.tries(Place(tmp_path, *good)):
        before, start = sorted(os.listdir(tmp_path)), time.monotonic()
        code, said = main(*one.command)
        error = said[said.rfind("error:") :]
        problems = [
            *([f"exit code {code}"] if code != one.code else []),
            *(["a traceback"] if "Traceback" in said else []),
            *(["no line"] if one.code and "error:" not in said else []),
            *([f"not said: {one.says}"] if one.says not in " ".join(error.split()) else []),
            *([f"{len(error)} characters"] if len(error) > 1600 else []),
            *(["something written"] if sorted(os.listdir(tmp_path)) != before else []),
            *(["half a minute"] if time.monotonic() - start > 30 else []),
        ]
        if problems:
            wrong.append(f"{one.name}: {', '.join(problems)}; {error[:300]!r}")
    assert not wrong, "\n".join(wrong)
    assert not (tmp_path / "RAN").exists()
