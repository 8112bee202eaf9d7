"""nmsparse evaluate: lm-eval's own prompts and scores, statistics worked by hand, and what is refused."""

from __future__ import annotations

import json
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import WIKITEXT, make_tiny, tiny_tokenizer
from lm_eval.models.huggingface import HFLM
from scipy.stats import ttest_rel
from test_cli import refused
from tokenizers import decoders
from transformers import AutoModelForCausalLM

from converter.errors import OutputError
from converter.evaluation.answers import Answers
from converter.evaluation.greedy import compared, write_on
from converter.evaluation.harness import HarnessLM
from converter.evaluation.statistics import anova, paired, recovery
from converter.evaluation.tasks import ask, load_tasks
from converter.records import Setting
from converter.runtimes.onnxruntime import load_onnx
from converter.sources.texts import windows

Command = Callable[..., "subprocess.CompletedProcess[str]"]
PROMPTS = {
    "piqa": [("Question: open jar 0\nAnswer:", " twist it"), ("Question: open jar 0\nAnswer:", " eat it")],
    "arc_easy": [("Question: What is hot?\nAnswer:", f" {choice}") for choice in ("ice", "fire", "rain")],
    "boolq": [("Fire -- Fire is hot.\nQuestion: is fire hot?\nAnswer:", f" {choice}") for choice in ("no", "yes")],
    "winogrande": [(f"A hit B so {option}", " cried.") for option in "AB"],
}


@pytest.fixture(scope="session")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from converter import Recipe, convert

    folder = tmp_path_factory.mktemp("evaluated")
    model = make_tiny(folder / "model")
    recipe = Recipe().replace({"pattern": "8:16", "criterion": "magnitude", "mitigation": "var"})
    convert(str(model), folder / "out", recipe)
    return folder / "out"


def test_prompts_are_those_of_the_definitions_of_lm_eval(data: Path) -> None:
    for task in load_tasks(Setting((*PROMPTS, "wikitext")), data):
        task.build_all_requests(limit=1)
        arguments = [instance.args for instance in task.instances]
        assert arguments == PROMPTS.get(task.config.task, arguments), task.config.task
        if task.config.task == "wikitext":
            second = WIKITEXT.index(" = Two")
            assert [doc["page"] for doc in task.test_docs()] == [WIKITEXT[:second], WIKITEXT[second:]]
    (task,) = load_tasks(Setting(("piqa",), shots=5), data)
    task.build_all_requests()
    assert len(task.instances) == 12
    for instance in task.instances:  # of six examples five are shots, and none is its own
        assert sorted(line for line in instance.args[0].split("\n") if "open" in line) == [
            f"Question: open jar {number}" for number in range(6)
        ]


def test_log_likelihoods_are_those_of_lm_eval_on_transformers(tiny: Path, out: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), tiny_tokenizer()
    theirs = HFLM(model, tokenizer=tokenizer, batch_size=2, device="cpu", max_length=64)
    long = "the quick brown fox jumps over the lazy dog " * 4  # a context that is run once for all that follow it
    pairs = [("the quick", " brown fox"), ("the quick", " dog"), ("a lazy dog jumps", " over"), ("", "the fox")]
    pairs += [(long, follow) for follow in ("the", "the lazy dog", "quick fox", "fox over the dog")]
    requests = [SimpleNamespace(args=pair) for pair in pairs]
    texts = [SimpleNamespace(args=("the quick brown fox jumps over the lazy dog " * 5,))]
    after: list[int] = []

    class Watched(HarnessLM):
        def _after(self, context: Any, continuations: Any) -> Any:
            after.append(len(continuations))
            return super()._after(context, continuations)

    ours = Watched(model, tokenizer, 64, 3)
    for method, asked in (("loglikelihood", requests), ("loglikelihood_rolling", texts)):
        expected = np.array(getattr(theirs, method)(asked, disable_tqdm=True), dtype=float)
        np.testing.assert_allclose(np.array(getattr(ours, method)(asked), dtype=float), expected, rtol=2e-5)
    assert after == [4]
    # In ONNX Runtime a sequence has the same score alone and padded in a batch.
    sparse = load_onnx(out)
    alone, together = (HarnessLM(sparse, tokenizer, 64, size).loglikelihood(requests, True) for size in (1, 4))
    np.testing.assert_allclose([a for a, _ in together], [a for a, _ in alone], rtol=1e-3)


def test_texts_that_are_written_are_those_of_lm_eval_on_transformers(tiny: Path, out: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), tiny_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()  # or no string could be found in what it writes
    theirs = HFLM(model, tokenizer=tokenizer, batch_size=1, device="cpu", max_length=64)
    whole = HarnessLM(model, tokenizer, 64, 3).generate_until(_asked([], 12))
    stop = next(text[len(text) // 2] for text in whole if len(set(text)) > 1)  # a letter amid what it writes
    for until in ([], [stop]):
        expected = theirs.generate_until(_asked(until, 12), disable_tqdm=True)
        assert HarnessLM(model, tokenizer, 64, 3).generate_until(_asked(until, 12)) == expected
    assert expected != whole
    written = HarnessLM(load_onnx(out), tokenizer, 64, 3).generate_until(_asked([stop], 12))
    assert all(stop not in text for text in written)


def _asked(until: list[str], length: int) -> list[Any]:
    prompts = ("the quick brown fox", "a lazy dog", "jumps over the")
    settings = {"until": until, "max_gen_toks": length, "do_sample": False}
    return [SimpleNamespace(args=(prompt, dict(settings))) for prompt in prompts]


def test_statistics_of_a_case_worked_by_hand() -> None:
    # 10 examples: dense has 8 right, sparse 5; of the 5 that differ dense has 4. Exact McNemar: two sides of a binomial
    # of 5 at 1/2 with at most 1, 2 * (1 + 5) / 32 = 0.375. Differences: -1 four times, +1 once, 0 five times; mean
    # -0.3, variance (5 - 10 * 0.09) / 9 = 0.4556, d = -0.3 / 0.6749 = -0.4444, t = d * sqrt(10) = -1.4055, p = 0.1934
    # (9 df).
    dense = np.array([1, 1, 1, 1, 1, 1, 1, 1, 0, 0.0])
    sparse = np.array([1, 1, 1, 1, 0, 0, 0, 0, 1, 0.0])
    found = paired("piqa", "acc", dense, sparse, np.ones(10))
    assert (found.dense, found.sparse) == (0.8, 0.5)
    assert found.mcnemar == pytest.approx(0.375)
    assert found.effect == pytest.approx(-0.4444, abs=1e-4)
    assert found.t_test == pytest.approx(0.1934, abs=1e-3)
    assert found.low < -0.3 < found.high
    assert recovery([found]) == pytest.approx(0.625)
    same = paired("piqa", "acc", dense, dense, np.ones(10))
    assert (same.low, same.high, same.t_test, same.mcnemar, same.effect) == (0, 0, 1, 1, 0)
    # Two documents, 4 and 6 words, -10 and -20 nats: exp(30 / 10).
    one = paired("wikitext", "word_perplexity", np.array([-10, -20.0]), np.array([-10, -20.0]), np.array([4, 6.0]))
    assert one.dense == pytest.approx(np.exp(3))
    low, share, high = found.recovery or (0, 0, 0)
    assert share == pytest.approx(0.625)
    assert low < share < high <= 1.25
    assert one.recovery is None


def test_analysis_of_variance_of_cases_worked_by_hand() -> None:
    # Two models, whose F is the square of the paired t: of t = -1.4055 above, so its p is that of the t-test.
    dense = np.array([1, 1, 1, 1, 1, 1, 1, 1, 0, 0.0])
    sparse = np.array([1, 1, 1, 1, 0, 0, 0, 0, 1, 0.0])
    effects, table = anova(pd.DataFrame({"dense": dense, "8:16": sparse}))
    assert effects == {"model": pytest.approx(0.1934, abs=1e-3)}
    assert list(table.p_holm) == pytest.approx([effects["model"]])
    # Three models: of three tests Holm takes the least p three times, the next twice, and none below one before it.
    effects, table = anova(pd.DataFrame({"dense": dense, "8:16": sparse, "2:4": 1 - dense}))
    assert list(table.difference) == pytest.approx([-0.3, -0.6, -0.3])
    single = [ttest_rel(*pair).pvalue for pair in ((dense, sparse), (dense, 1 - dense), (sparse, 1 - dense))]
    first, second, third = np.argsort(single)
    expected = np.zeros(3)
    expected[first] = 3 * single[first]
    expected[second] = max(expected[first], 2 * single[second])
    expected[third] = max(expected[second], single[third])
    assert list(table.p_holm) == pytest.approx(list(np.minimum(expected, 1)))
    # Patterns by mitigations: what the pattern does shows, what the mitigation does not is chance.
    rng = np.random.default_rng(0)
    noise = rng.normal(scale=0.1, size=(40, 4))
    values = pd.DataFrame(noise + np.array([1, 1, 0, 0]), columns=["a", "b", "c", "d"])
    factors = pd.DataFrame(
        {"pattern": ["8:16", "8:16", "2:4", "2:4"], "mitigation": ["none", "var", "none", "var"]}, ["a", "b", "c", "d"]
    )
    effects, table = anova(values, factors)
    assert set(effects) == {"pattern", "mitigation", "pattern:mitigation"}
    assert effects["pattern"] < 1e-10
    assert min(effects["mitigation"], effects["pattern:mitigation"]) > 0.01
    # One factor of a 2 x 2 design is the paired t-test of its two means.
    means = [(values.a + values.b) / 2, (values.c + values.d) / 2]
    assert effects["pattern"] == pytest.approx(ttest_rel(*means).pvalue)
    same, table = anova(pd.DataFrame({"dense": dense, "8:16": dense}))
    assert (same["model"], table.p_holm[0]) == (1, 1)


def test_greedy_texts_of_a_case_worked_by_hand() -> None:
    # The dense model wrote 5 6 7 8 after the prompt 1 2, this one 5 6 9: two of four places are equal, and they part
    # after two. After the dense model's own text it would write 5 6 9 8: three of four.
    logits = torch.nn.functional.one_hot(torch.tensor([[0, 5, 6, 9, 8]]), 10).float()
    seen: list[list[int]] = []

    def model(input_ids: torch.Tensor) -> SimpleNamespace:
        seen.extend(input_ids.tolist())
        return SimpleNamespace(logits=logits[:, : input_ids.shape[1]])

    model.device = "cpu"  # type: ignore[attr-defined]
    rows = compared(model, torch.tensor([[1, 2]]), [[5, 6, 7, 8]], [[5, 6, 9]])  # type: ignore[arg-type]
    assert seen == [[1, 2, 5, 6, 7]]
    found = dict(zip(rows.metric, rows.value, strict=True))
    assert found == {"same_next": 0.75, "same": 0.5, "parts_at": 2, "length": 3}
    rows = compared(model, torch.tensor([[1, 2]]), [[5, 6]], [[5, 6]])  # type: ignore[arg-type]
    assert dict(zip(rows.metric, rows.value, strict=True))["parts_at"] == 2


def test_both_models_write_on_from_the_same_prompts(
    nmsparse: Command, tiny: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    command = ["evaluate", out, "--tasks", "", "--prompts", "3", "--json", "--out", tmp_path / "results"]
    found = nmsparse(*command)
    assert found.returncode == 0, found.stderr
    said = {one["metric"]: one for one in json.loads(found.stdout)["compared"]}
    assert set(said) == {"same_next", "same", "parts_at", "length"}
    assert said["same_next"]["dense"] == said["same"]["dense"] == 1
    assert said["same"]["sparse"] < 1
    table = pd.read_csv(tmp_path / "results" / "compared.csv")
    assert list(table.metric) == list(said)
    assert list(table["sparse"]) == pytest.approx([one["sparse"] for one in said.values()])
    # The same in PyTorch, whose sparse model is that of OUT: a near tie may fall the other way, in one token of many.
    torches = nmsparse(*command[:-1], tmp_path / "torch", "--runtime", "pytorch")
    assert torches.returncode == 0, torches.stderr
    theirs = {one["metric"]: one for one in json.loads(torches.stdout)["compared"]}
    assert theirs["same_next"]["sparse"] == pytest.approx(said["same_next"]["sparse"], abs=0.05)
    assert theirs["same_next"]["dense"] == 1
    # What each wrote is what transformers writes, and what is kept is not written again.
    prompts = windows("python", tiny_tokenizer(), 3, 64)
    model, cache = load_onnx(out), Answers(tmp_path / "kept")
    written = write_on(model, tiny_tokenizer(), prompts, cache, lambda done, total: None)
    for prompt, text in zip(prompts[:, None], written, strict=True):
        wanted = model.generate(input_ids=prompt, attention_mask=prompt >= 0, max_new_tokens=64, do_sample=False)
        assert text == wanted[0, 64:].tolist()
    rows = compared(model, prompts, written, written)
    assert set(rows[rows.metric.isin(["same", "same_next"])].value) == {1.0}
    assert write_on(SimpleNamespace(config=model.config), tiny_tokenizer(), prompts, cache, print) == written  # type: ignore[arg-type]


def test_an_interrupted_evaluation_goes_on(data: Path, out: Path, tmp_path: Path) -> None:
    class Counting(HarnessLM):
        runs = 0

        def _logits(self, part: list[tuple[int, ...]]) -> torch.Tensor:
            self.runs += len(part)
            return super()._logits(part)

    def interrupt(done: int, total: int) -> None:
        if done < total:
            raise KeyboardInterrupt

    setting = Setting(("piqa", "boolq"))
    model = load_onnx(out)
    whole = Counting(model, tiny_tokenizer(), 128, 2)
    expected = ask(whole, load_tasks(setting, data), setting)
    with Answers(tmp_path / "kept") as answers:
        first = Counting(model, tiny_tokenizer(), 128, 2, interrupt, answers)
        with pytest.raises(KeyboardInterrupt):
            ask(first, load_tasks(setting, data), setting)
    with Answers(tmp_path / "kept") as answers:
        second = Counting(model, tiny_tokenizer(), 128, 2, answers=answers)
        pd.testing.assert_frame_equal(ask(second, load_tasks(setting, data), setting), expected)
    assert 0 < second.runs < whole.runs
    assert first.runs + second.runs == whole.runs


def test_answers_are_json_and_a_damaged_file_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "answers.sqlite"
    with Answers(path) as answers:
        answers[["loglikelihood", "a", "b"]] = (-1.5, True)
        answers["far"] = float("-inf")
    with Answers(path) as answers:
        assert answers[["loglikelihood", "a", "b"]] == [-1.5, True]
        assert answers["far"] == float("-inf")
        assert "near" not in answers
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        answers.database.execute("PRAGMA busy_timeout = 1")
        with pytest.raises(OutputError, match=r"answers\.sqlite: must be a file that can be written, got .*locked"):
            answers["near"] = 1
        other.close()
    assert all(
        type(json.loads(row[0])) in {list, float} for row in sqlite3.connect(path).execute("SELECT answer FROM answers")
    )
    path.write_bytes(b"no database at all" * 100)
    with Answers(path) as answers:
        assert "far" not in answers


def test_evaluate_writes_resumes_and_judges(
    nmsparse: Command, out: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    command = ["evaluate", out, "--data-dir", data, "--tasks", "piqa,boolq,wikitext", "--context", "128"]
    found = nmsparse(*command, "--json", "--out", tmp_path / "first")
    assert found.returncode == 0, found.stderr
    results = json.loads((tmp_path / "first" / "results.json").read_text())
    assert results["compared"] == json.loads(found.stdout)["compared"]
    examples = pd.read_parquet(tmp_path / "first" / "examples.parquet")
    assert len(examples[(examples.task == "piqa") & (examples.metric == "acc")]) == 12
    # The same again takes what is kept, to the last bit; what was cut off before it was kept is asked anew.
    again = nmsparse(*command, "--json", "--out", tmp_path / "second")
    assert json.loads(again.stdout) == json.loads(found.stdout)
    gate = nmsparse(*command, "--min-recovery", "9", "--out", tmp_path / "third")
    assert gate.returncode == 19, gate.stderr
    assert "accuracy: sparse / dense must be at least 9" in " ".join(gate.stderr.split())
    assert (tmp_path / "third" / "results.json").exists()


def test_what_cannot_be_evaluated_is_said(
    nmsparse: Command, out: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["evaluate", out, "--out", tmp_path / "results", "--data-dir"]
    text = refused(nmsparse, tmp_path, 18, *command, data, "--tasks", "piqaa")
    assert "must be a task of lm-eval, got 'piqaa'. Nearest: piqa" in text
    text = refused(nmsparse, tmp_path, 18, *command, data / "absent", "--tasks", "boolq")
    assert "absent/boolq/dev.jsonl: must be the data of boolq, got FileNotFoundError" in text
    text = refused(nmsparse, tmp_path, 18, *command, data, "--tasks", "gsm8k")
    assert "gsm8k: must be one of arc_easy, boolq, piqa, wikitext, winogrande with --data-dir" in text
    text = refused(nmsparse, tmp_path, 18, *command, data, "--tasks", "boolq", "--context", "8")
    assert "an example must have at most 8 tokens, got" in text
    assert "must name a task of lm-eval, got none" in refused(nmsparse, tmp_path, 18, *command, data, "--tasks", "")
    model = make_tiny(tmp_path / "model")
    settings = json.loads((model / "tokenizer.json").read_text())
    settings["added_tokens"].append({**settings["added_tokens"][-1], "id": 255, "content": "<other>"})
    (model / "tokenizer.json").write_text(json.dumps(settings))
    text = refused(nmsparse, tmp_path, 11, *command, data, "--against", model)
    assert "must have the tokenizer of" in text
