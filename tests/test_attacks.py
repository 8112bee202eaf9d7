"""Every input of `attacks.py` ends as it must: one line, its exit code, nothing written, no code run."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from attacks import ATTACKS, QUICK, Attack, Place
from test_corruption import FILES, READERS
from test_fuzz_op import CASES
from test_kills import COUNT as KILLS

from converter import cli


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


def test_one_function_reads_what_others_have_saved() -> None:
    """Every other call of transformers' would have to say for itself that no code of a folder is run."""
    package = Path(cli.__file__).parent
    calls = {
        path.name: found
        for path in package.rglob("*.py")
        if (found := re.findall(r"\.from_(?:pretrained|config)\([^)]*\)", path.read_text()))
    }
    assert {name: len(found) for name, found in calls.items()} == {"hugging_face.py": 1, "checkpoint.py": 1}
    assert all("trust_remote_code=False" in call for found in calls.values() for call in found)
    text = "\n".join(path.read_text() for path in package.rglob("*.py"))
    assert not re.search(
        r"import pickle|SqliteDict|weights_only=False|engine_host_code_allowed = True(?!  # of our own)", text
    )
    assert all("weights_only=True" in call for call in re.findall(r"torch\.load\([^)]*\)", text))
    assert text.count("subprocess.run(") == 2, "nvidia-smi, and polygraphy: with -P, in an empty folder"


def test_the_table_of_the_docs_is_what_was_tried(good: tuple[Path, Path], tmp_path: Path) -> None:
    """`NMSPARSE_WRITE_DOCS=1 pytest tests/test_attacks.py -k table` writes it anew."""
    lines = ["# What was tried", "", "Each row is tried in every run of `tests/test_attacks.py`; see SECURITY.md.", ""]
    rows: list[tuple[str, object, str]] = []
    for number, attack in enumerate(ATTACKS):
        (here := tmp_path / str(number)).mkdir()
        rows.append((attack.kind, len(attack.tries(Place(here, *good))), attack.outcome))
    damaged = f"refused by {len(READERS)} commands, 15 (`tests/test_corruption.py`)"
    rows.append(("file of OUT with a bit flipped, cut off, longer or gone", 4 * len(FILES) * len(READERS), damaged))
    kills = "SIGKILL, SIGTERM or SIGINT at a random moment of convert, export, build and evaluate"
    rows.append((kills, KILLS, "OUT absent, old or whole, and nothing left after the next run (`tests/test_kills.py`)"))
    rows.append(("kill at each step of an exchange of folders", "all", "the old or the new (`tests/test_place.py`)"))
    nodes = "nodes of the op, valid and not, and once more with sanitizers"
    rows.append((nodes, CASES, "the right value or an error (`tests/test_fuzz_op.py`; `make fuzz` runs more)"))
    lines += ["| input | tries | outcome |", "|---|---|---|", *(f"| {a} | {b} | {c} |" for a, b, c in rows)]
    table, page = "\n".join(lines) + "\n", Path(__file__).parents[1] / "docs" / "attacks.md"
    if os.environ.get("NMSPARSE_WRITE_DOCS"):
        page.write_text(table)
    assert page.read_text() == table
