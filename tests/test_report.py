"""The pages of `nmsparse report` and `compare`, in a real Chromium where the system has one."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import PLAIN, QUICK, make_tiny, relisted
from huggingface_hub import constants
from playwright.sync_api import Browser, Page, sync_playwright

import converter.delivery
from converter.cli import app
from converter.delivery import accuracy
from converter.delivery.page import Line, Section, page
from converter.delivery.report import Out, compare, read, report
from converter.errors import OutputError
from converter.graph.costs import LayerCost
from converter.json_rows import HIGH, LOW, OURS, RATIO, SpeedRow, read_speed, row, write
from converter.pipeline import convert
from converter.records import Paired, Results, Setting

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WITH_CHROMIUM = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium: install Debian's package chromium")
FITTED = {
    "pattern": "2:8",
    "allocation.budget": "25%",
    "mitigation": "permute+s_pts+distill",
    "permute": "layer",
    "calibration.tokens": 64,
    "calibration.window": 16,
    "training.tokens": 256,
    "training.steps": 12,
    "training.batch": 2,
    "training.held_out": 2,
    "training.learning_rate": 2e-3,
}
BENCH = [
    SpeedRow(call, threads, what, value)
    for call, threads, ratio in (("a token after 128", 1, 1.31), ("prefill of 128", 2, 1.02))
    for what, value in (
        (OURS, 40.0),
        (LOW, ratio - 0.1),
        (RATIO, ratio),
        (HIGH, ratio + 0.1),
    )
]
# Of WCAG: how much lighter the lighter of a text's colour and the page's is, at the worst text.
CONTRAST = """() => {
  const linear = c => { c /= 255; return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; };
  const light = color => {
    const [r, g, b] = color.match(/[\\d.]+/g).map(Number).map(linear);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const page = light(getComputedStyle(document.body).backgroundColor);
  const texts = document.querySelectorAll("h1, h2, p, li, a, figcaption, td, th, summary, pre, svg text");
  return Math.min(...[...texts].map(element => {
    const style = getComputedStyle(element);
    const pair = [page, light(element instanceof SVGElement ? style.fill : style.color)];
    return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
  }));
}"""


def nmsparse(*arguments: object) -> None:
    app([str(argument) for argument in arguments], exit_on_error=False, result_action="return_value")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Out:
    folder = tmp_path_factory.mktemp("report")
    tiny = make_tiny(folder / "model")
    return read(convert(str(tiny), folder / "out", PLAIN.replace(FITTED)))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


def opened(browser: Browser, path: Path, width: int, scheme: Any) -> tuple[Page, list[str]]:
    """Return the page in a window of that width, and the list of what goes wrong or is asked of the network."""
    tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    wrong: list[str] = []
    tab.on("console", lambda message: wrong.append(message.text))
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("request", lambda request: None if request.url.startswith("file://") else wrong.append(request.url))
    tab.goto(path.as_uri())
    tab.wait_for_function(
        "() => [...document.querySelectorAll('.plotly-graph-div')].every(d => d.querySelector('svg'))"
    )
    return tab, wrong


@WITH_CHROMIUM
@pytest.mark.parametrize(("width", "scheme"), [(380, "light"), (1200, "light"), (380, "dark"), (1200, "dark")])
def test_the_page_is_drawn_without_a_network_and_can_be_read(
    out: Out, browser: Browser, tmp_path: Path, width: int, scheme: str
) -> None:
    (tmp_path / "page.html").write_text(report(out, BENCH), "utf-8")
    tab, wrong = opened(browser, tmp_path / "page.html", width, scheme)
    assert tab.locator("h2").all_text_contents() == [
        "Layers",
        "Parity",
        "Training",
        "What it took",
        "Speed",
        "Recipe",
        "Made from",
    ]
    drawn = tab.locator("figure")
    assert drawn.count() == 6
    for figure in drawn.all():
        says = figure.locator("[role=img]").get_attribute("aria-label")
        assert says is not None
        assert says == figure.locator("figcaption").inner_text()
        assert figure.locator("svg").count()
        assert figure.bounding_box()["height"] > 150
    assert tab.evaluate("document.documentElement.scrollWidth") == width  # nothing sticks out of a phone
    assert tab.evaluate(CONTRAST) >= 4.5
    assert not wrong
    tab.close()


@WITH_CHROMIUM
def test_tables_open_by_keyboard_and_are_filtered_and_a_chart_answers(
    out: Out, browser: Browser, tmp_path: Path
) -> None:
    (tmp_path / "page.html").write_text(report(out, BENCH), "utf-8")
    tab, wrong = opened(browser, tmp_path / "page.html", 1000, "light")
    table = tab.locator("table").first
    assert not table.is_visible()
    tab.locator("summary").first.focus()
    tab.keyboard.press("Enter")
    assert table.is_visible()
    rows = table.locator("tbody tr")
    assert rows.count() == len(out.costs) == 21
    tab.keyboard.press("Tab")
    tab.keyboard.type("Q_PROJ")
    assert [row.is_visible() for row in rows.all()] == ["q_proj" in cost.name for cost in out.costs]
    assert tab.locator("[role=status]").first.inner_text() == "3 of 21 rows"
    chart = tab.locator(".plotly-graph-div").nth(1)
    assert chart.locator(".trace.bars").count() == 2
    chart.locator(".legendtoggle").first.click()  # after a moment, in which a second click would mean another thing
    tab.wait_for_function(
        "() => document.querySelectorAll('.plotly-graph-div')[1].querySelectorAll('.trace.bars').length == 1"
    )
    assert not wrong
    tab.close()


def test_the_verdict_says_what_was_measured_and_what_was_not(out: Out, tmp_path: Path) -> None:
    text = report(out, BENCH)
    assert "A token uses 25% of the weights of 21 layers (1:8 to 3:8)." in text
    assert "<li>ONNX Runtime computes what PyTorch does: the worst layer is off by " in text
    assert (
        "1.31 times as fast at best (a token after 128, one thread), 1.02 at worst (prefill of 128, 2 threads)" in text
    )
    slow = [replace(row, value=0.9) for row in BENCH]
    assert '<li class="bad">Beside the same model run dense: 0.90 times as fast' in report(out, slow)
    assert '<li class="bad">How fast it is was not measured' in report(out, [])
    assert out.report.parity is not None
    failed = replace(out.report.parity, passed=False, failures=["layer 1 <is> off"])
    broken = replace(out, report=replace(out.report, parity=failed))
    assert '<li class="bad">ONNX Runtime does not compute what PyTorch does: layer 1 &lt;is&gt; off' in report(
        broken, []
    )
    nmsparse("export", out.folder, tmp_path / "again")
    again = report(read(tmp_path / "again"), [])
    assert '<li class="bad">Not compared with PyTorch when it was written' in again
    assert ">Parity<" not in again


def test_figures_are_those_of_the_files(out: Out) -> None:
    text = report(out, [])
    first, curve = out.costs[0], out.report.training
    for cell in (
        f"{first.keep}:{first.group}",
        f"{2 * first.sparse_products / 1e6:.2f}",
        *(f"{loss:.4f}" for _, loss in curve),
        out.about.source.weights_sha256,
        out.about.versions["onnxruntime"],
    ):
        assert f"<td>{cell}</td>" in text
    assert out.recipe.splitlines()[0] in text


def test_figures_of_a_layer_worked_by_hand(out: Out) -> None:
    # 4096 x 14336 in float32 at 8:16: 58,720,256 products of two operations, 234,881,024 bytes, and half of them.
    layer = LayerCost("model.layers.0.up_proj", 4096, 14336, 8, 16, 234_881_024, 117_440_512, 58_720_256, 29_360_128)
    cells = ("4096 x 14336", "8:16", "50%", "117.44", "58.72", "234.88", "117.44")
    text = report(replace(out, costs=[layer]), [])
    assert "<td>model.layers.0.up_proj</td>" + "".join(f"<td>{cell}</td>" for cell in cells) in text
    assert "117 dense, 59 sparse in all" in text


def test_compare_has_a_row_for_each(out: Out, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = out.about.source.name
    nmsparse("convert", model, tmp_path / "plain", *QUICK)
    capsys.readouterr()
    nmsparse("compare", out.folder, tmp_path / "plain", "--to", tmp_path / "page.html")
    assert capsys.readouterr().out.split() == [str(tmp_path / "page.html")]
    text = (tmp_path / "page.html").read_text("utf-8")
    assert "2 conversions of model." in text
    for cell in ("1:8 to 3:8", "8:16", "permute+s_pts+distill", "var", "passed"):
        assert f"<td>{cell}</td>" in text
    other = convert(str(make_tiny(tmp_path / "other", seed=1)), tmp_path / "out", PLAIN)
    assert '<li class="bad">These are conversions of different checkpoints: model, other' in compare([out, read(other)])


@pytest.fixture(scope="module")
def asked(data: Path, out: Out, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Out]]:
    """Two conversions of one model, both evaluated."""
    folder = tmp_path_factory.mktemp("asked")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HOME", str(folder / "home"))
        first = folder / "first"
        shutil.copytree(out.folder, first)
        second = convert(out.about.source.name, folder / "second", PLAIN)
        for made in (first, second):
            options = ("--tasks", "piqa,boolq,wikitext", "--context", 128, "--prompts", 2)
            nmsparse("evaluate", made, "--data-dir", data, *options)
        yield [read(first), read(second)]


def test_accuracy_is_said_first_and_is_that_of_the_evaluation(asked: list[Out]) -> None:
    results = json.loads((asked[1].folder / "evaluation" / "results.json").read_text())
    text = report(asked[1], [])
    share = f"{results['recovery']:.0%}"
    assert f"{share} of the dense model&#39;s accuracy is left (the mean of 2 tasks)" in text.lower()
    assert text.index(">Accuracy</a>") < text.index(">Layers</a>")
    for one in results["compared"]:
        figures = (one["examples"], f"{one['dense']:.3f}", f"{one['sparse']:.3f}", f"{one['difference']:+.3f}")
        assert "".join(f"<td>{cell}</td>" for cell in (one["task"], one["metric"], *figures)) in text
    kept = asked[1].evaluated
    assert kept is not None
    worse = [replace(one, high=-0.01) if one.task == "piqa" else one for one in kept.results.compared]
    found = replace(kept, results=replace(kept.results, compared=worse))
    assert not accuracy.verdict(found).good
    assert "piqa worse beyond chance; perplexity " in accuracy.verdict(found).text
    nothing_right = replace(kept, results=replace(kept.results, recovery=None))
    assert "None" not in accuracy.verdict(nothing_right).text
    assert '<li class="bad">How accurate it is was not measured' in report(replace(asked[1], evaluated=None), [])


@WITH_CHROMIUM
def test_compare_shows_accuracy_and_perplexity_by_pattern(asked: list[Out], browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(compare(asked), "utf-8")
    tab, wrong = opened(browser, tmp_path / "page.html", 380, "dark")
    sections = tab.locator("h2").all_text_contents()
    said = ["Accuracy", "Perplexity of wikitext", "Differences beyond chance", "Pair by pair"]
    assert sections[1:5] == said
    for figure in tab.locator("figure").all():
        assert figure.locator("svg").count()
    assert tab.evaluate("document.documentElement.scrollWidth") == 380
    assert tab.evaluate(CONTRAST) >= 4.5
    assert not wrong
    tab.close()


def test_what_was_asked_differently_is_not_compared(asked: list[Out]) -> None:
    text = compare([asked[0], replace(asked[1], evaluated=None)])
    assert "Not compared; not evaluated: second. Run nmsparse evaluate" in text
    kept = asked[1].evaluated
    assert kept is not None
    setting = replace(kept.results.setting, limit=1)
    other = replace(kept, results=replace(kept.results, setting=setting))
    text = compare([asked[0], replace(asked[1], evaluated=other)])
    assert "Not compared; evaluated under different settings or versions." in text
    assert ">Pair by pair<" not in text


def test_patterns_and_mitigations_that_are_crossed_are_told_apart(tmp_path: Path) -> None:
    sides = []
    rng = np.random.default_rng(0)
    for pattern in ("2:4", "8:16"):
        for mitigation in ("none", "var"):
            folder = tmp_path / f"{pattern} {mitigation}"
            folder.mkdir()
            right = rng.random(50) < (0.9 if pattern == "8:16" else 0.2)
            rows = {
                "task": "piqa",
                "example": range(50),
                "metric": "acc",
                "value": right.astype(float),
                "model": "sparse",
            }
            pd.DataFrame(rows).to_parquet(folder / "examples.parquet")
            one = Paired("piqa", "acc", 50, 1.0, 0.5, -0.5, -0.6, -0.4, 0.0, None, 0.0, None)
            results = Results("out", "model", Setting(("piqa",)), 1, {}, None, {}, [one])
            sides.append(accuracy.Side(folder.name, pattern, mitigation, accuracy.Evaluated(folder, results)))
    effects, pairs = accuracy.side_by_side(sides)
    assert [(task, factor) for task, factor, _ in effects.rows] == [
        ("piqa", "pattern"),
        ("piqa", "mitigation"),
        ("piqa", "pattern:mitigation"),
    ]
    assert float(effects.rows[0][2]) < 0.001 < 0.01 < float(effects.rows[1][2])
    assert len(pairs.rows) == 6
    # Without one of the four they are models, and the dense one is among them.
    table = pd.read_parquet(sides[0].evaluated.folder / "examples.parquet")  # type: ignore[union-attr]
    dense = table.assign(model="dense", value=1.0)
    pd.concat([table, dense]).to_parquet(sides[0].evaluated.folder / "examples.parquet")  # type: ignore[union-attr]
    effects, pairs = accuracy.side_by_side(sides[:3])
    assert [factor for _, factor, _ in effects.rows] == ["model"]
    assert [row[1:3] for row in pairs.rows][:2] == [("dense", "2:4 none"), ("dense", "2:4 var")]


def test_rows_of_speed_are_read_as_they_were_written(tmp_path: Path) -> None:
    write(tmp_path / "bench.json", (row.row("ratio") for row in BENCH))
    assert read_speed(tmp_path / "bench.json") == BENCH


def test_what_is_said_is_text_and_never_html() -> None:
    text = page(
        "<b>title", [Line("<i>good")], [Section("<s>", "<u>", head=("<q>",), rows=[("<p class=x>",)], verbatim="<a>")]
    )
    for tag in ("b>title", "i>good", "s>", "u>", "q>", "p class=x>", "a>"):
        assert f"&lt;{tag.replace('>', '&gt;')}" in text
        assert f"<{tag}" not in text.split("</script>", 1)[1].replace("</a>", "")


def test_bad_input(out: Out, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutputError, match="must be a folder that nmsparse wrote"):
        nmsparse("report", tmp_path)
    (tmp_path / "bench.json").write_text(json.dumps([{"name": "x"}]))
    with pytest.raises(OutputError, match="must be a file that --json wrote"):
        nmsparse("report", out.folder, "--bench", tmp_path / "bench.json")
    # Of an earlier nmsparse, of --tune, or of a benchmark.
    write(tmp_path / "bench.json", [BENCH[0].row("tokens/s"), row("CPU, prefill of 128, 2 threads: ours", 1, "")])
    said = r"each row must have call, threads and what, .* got one without: CPU, prefill of 128, 2 threads: ours\."
    with pytest.raises(OutputError, match=said):
        nmsparse("report", out.folder, "--bench", tmp_path / "bench.json")
    with pytest.raises(OutputError, match="must be a file that can be written"):
        nmsparse("report", out.folder, "--to", tmp_path / "no" / "page.html")
    assert not (out.folder / "report.html").exists()
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "results.json").write_text("{}")
    with pytest.raises(OutputError, match="must be what nmsparse evaluate wrote, got "):
        accuracy.evaluated(tmp_path)
    for name, data in {"list": [], "recipe": {**asdict(out.report), "recipe": {"criterion": "wina"}}}.items():
        shutil.copytree(out.folder, tmp_path / name)
        (tmp_path / name / "report.json").write_text(json.dumps(data))
        relisted(tmp_path / name)
        with pytest.raises(OutputError, match=r"must hold report.json and recipe.yaml as nmsparse wrote them"):
            read(tmp_path / name)
    monkeypatch.setitem(sys.modules, "plotly", None)
    for name in ("converter.delivery.page", "converter.delivery.accuracy", "converter.delivery.report"):
        monkeypatch.delitem(sys.modules, name)
    for name in ("report", "accuracy"):
        monkeypatch.delattr(converter.delivery, name)
    with pytest.raises(OutputError, match=r"Install nmsparse\[report\]"):
        nmsparse("report", out.folder)


def test_a_report_is_left_in_out_and_out_is_still_whole(out: Out) -> None:
    nmsparse("report", out.folder)
    assert (out.folder / "report.html").stat().st_size > 1_000_000
    nmsparse("validate", out.folder)
    (out.folder / "report.html").unlink()
