"""The pages: links lead somewhere, code is code, and what is written by hand says what the code says."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel

import converter
from converter import cli, errors
from converter.presets import PRESETS
from converter.recipe import Recipe, parse_set
from converter.sparsity.criteria import CRITERIA
from converter.sparsity.mitigations import MITIGATIONS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]
NOTEBOOKS = sorted(DOCS.rglob("*.ipynb"))
FENCED = re.compile(r"^(`{3,})(\w*)\n(.*?)^\1$", re.M | re.S)


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def text_of(page: Path) -> str:
    """Return the page without what is fenced; of a notebook its Markdown."""
    if page.suffix == ".ipynb":
        return "\n\n".join(cell for kind, cell in cells(page) if kind == "markdown")
    return FENCED.sub("", page.read_text("utf-8"))


def cells(notebook: Path) -> Iterator[tuple[str, str]]:
    for cell in json.loads(notebook.read_text("utf-8"))["cells"]:
        yield cell["cell_type"], "".join(cell["source"])


def anchors(page: Path) -> set[str]:
    """Return the names that code hosts and MyST give the headings."""
    headings = re.findall(r"^#+ (.*)$", text_of(page), re.M)
    plain = (unicodedata.normalize("NFKC", heading).lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


def test_readme_is_two_screens() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS], ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        if anchor:
            assert anchor in anchors(found), target


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS], ids=named)
def test_python_compiles_and_uses_what_the_package_has(page: Path) -> None:
    if page.suffix == ".ipynb":
        codes = [code for kind, code in cells(page) if kind == "code"]
    else:
        codes = [body for _, language, body in FENCED.findall(page.read_text("utf-8")) if language == "python"]
    for code in codes:
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "converter":
                assert node.module == "converter", f"{node.module} is not public"
                assert {name.name for name in node.names} <= set(converter.__all__)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=named)
def test_notebooks_have_no_outputs(notebook: Path) -> None:
    found = json.loads(notebook.read_text("utf-8"))
    assert found["nbformat"] == 4
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in found["cells"])


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_are_understood(page: Path) -> None:
    bodies = [body for _, language, body in FENCED.findall(page.read_text("utf-8")) if language == "bash"]
    for line in "".join(bodies).replace("\\\n", " ").splitlines():
        if not line.startswith("nmsparse "):
            continue
        words = shlex.split(re.split(r" [|>] ", line)[0], comments=True)[1:]
        _, bound, _ = cli.app.parse_args(words, exit_on_error=False, print_error=False)
        options = bound.arguments.get("options")
        if isinstance(options, cli.RecipeOptions) and options.recipe is None:
            options.effective()


def run(notebook: Path, model: Path, out: Path) -> None:
    """Run the cells one after the other, with this model and this OUT in the place of the notebook's own."""
    first, *rest = (code for kind, code in cells(notebook) if kind == "code")
    assert first.startswith("MODEL, OUT = ")
    code = "\n".join([f"MODEL, OUT = {str(model)!r}, {str(out)!r}", *rest])
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert 0 <= float(found.stdout.split()[-1]) <= 1, found.stdout


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=named)
def test_notebooks_run(notebook: Path, tiny: Path, tmp_path: Path) -> None:
    run(notebook, tiny, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("NMSPARSE_TEST_FULL"), reason="it takes a minute: make test-all does it")
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=named)
def test_notebooks_run_on_the_real_model(notebook: Path, gguf: Path, tmp_path: Path) -> None:
    run(notebook, gguf, tmp_path / "out")


def table(page: str, head: str) -> list[list[str]]:
    """Return the cells of the table of a page that begins with the column `head`."""
    lines = (DOCS / page).read_text("utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {head} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the keys of a recipe, dotted, and the type of each."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field.annotation


def value(recipe: Recipe, key: str) -> Any:
    found: Any = recipe
    for part in key.split("."):
        found = getattr(found, part)
    return found


def test_recipe_page_is_the_model() -> None:
    rows = {
        key.strip("`"): (default.strip("`"), meaning) for key, default, meaning in table("reference/recipe.md", "key")
    }
    assert list(rows) == [key for key, _ in keys(Recipe)]
    for key, kind in keys(Recipe):
        default, meaning = rows[key]
        found = value(Recipe().replace(parse_set([f"{key}={default}"])), key)
        assert found == value(Recipe(), key), key
        for choice in get_args(kind) if get_origin(kind) is Literal else ():
            assert choice in {default, *re.findall(r"`([^`]*)`", meaning)}, (key, choice)


@pytest.mark.parametrize(
    ("head", "names"),
    [
        ("preset", list(PRESETS)),
        ("criterion", [name for name, one in CRITERIA.items() if not one.reference]),
        ("mitigation", list(MITIGATIONS)),
    ],
)
def test_methods_of_the_recipe_page_are_those_of_the_code(head: str, names: list[str]) -> None:
    assert sorted(row[0].strip("`") for row in table("reference/recipe.md", head)) == sorted(names)


def test_criteria_for_comparison_are_named() -> None:
    page = (DOCS / "reference/recipe.md").read_text("utf-8")
    assert [name for name, one in CRITERIA.items() if one.reference and f"`{name}`" not in page] == []


def test_exit_codes_are_those_of_the_code() -> None:
    classes = [one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, errors.ConverterError)]
    expected = {(str(one.exit_code), one.__name__) for one in classes if one is not errors.ConverterError}
    expected |= {(str(code), "") for code in (0, cli.UNFORESEEN, cli.INTERRUPTED, cli.CLOSED)}
    found = [(code, name.strip("`")) for code, name, _ in table("reference/exit-codes.md", "code")]
    assert set(found) == expected
    assert [int(code) for code, _ in found] == sorted(int(code) for code, _ in expected)


def test_format_page_names_the_format_of_the_code() -> None:
    from converter.delivery.bundle import FORMAT

    assert f"`{FORMAT}`" in (DOCS / "release.md").read_text("utf-8")


def test_the_version_is_the_same_everywhere() -> None:
    version = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text("utf-8"), re.M)
    changelog = re.findall(r"^## \[([\d.]+)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)
    assert version == re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text("utf-8"), re.M)
    assert version == changelog[:1]
