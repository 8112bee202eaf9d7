"""nmsparse evaluate: lm-eval's own prompts and scores, statistics worked by hand, and what is refused."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_tiny, tiny_tokenizer
from lm_eval.models.huggingface import HFLM
from test_cli import refused
from transformers import AutoModelForCausalLM

from converter.evaluation.harness import HarnessLM
from converter.evaluation.statistics import anova, paired, recovery
from converter.evaluation.tasks import Setting, load_tasks
from converter.runtimes.onnxruntime import load_onnx

Command = Callable[..., "subprocess.CompletedProcess[str]"]
ROWS = {
    "piqa/valid.jsonl": [
        {"goal": f"open jar {n}", "sol1": "twist it", "sol2": "eat it", "label": n % 2} for n in range(6)
    ],
    "arc_easy/test.jsonl": [{"id": "a", "question": "What is hot?", "choices": ["ice", "fire", "rain"], "answer": 1}],
    "boolq/dev.jsonl": [{"question": "is fire hot", "passage": "Fire -- Fire is hot.", "answer": True}],
    "winogrande/dev.jsonl": [{"sentence": "A hit B so _ cried.", "option1": "A", "option2": "B", "answer": "2"}],
}
WIKITEXT = " = One = \n Some words . \n = = Part = = \n More words . \n = Two = \n Other words . \n"
PROMPTS = {
    "piqa": [("Question: open jar 0\nAnswer:", " twist it"), ("Question: open jar 0\nAnswer:", " eat it")],
    "arc_easy": [("Question: What is hot?\nAnswer:", f" {choice}") for choice in ("ice", "fire", "rain")],
    "boolq": [("Fire -- Fire is hot.\nQuestion: is fire hot?\nAnswer:", f" {choice}") for choice in ("no", "yes")],
    "winogrande": [(f"A hit B so {option}", " cried.") for option in "AB"],
}


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, rows in ROWS.items():
        (folder / name).parent.mkdir()
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "wikitext2").mkdir()
    (folder / "wikitext2" / "wiki.test.raw").write_text(WIKITEXT)
    return folder


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
    pairs = [("the quick", " brown fox"), ("the quick", " dog"), ("a lazy dog jumps", " over"), ("", "the fox")]
    requests = [SimpleNamespace(args=pair) for pair in pairs]
    texts = [SimpleNamespace(args=("the quick brown fox jumps over the lazy dog " * 5,))]
    ours = HarnessLM(model, tokenizer, 64, 3)
    for method, asked in (("loglikelihood", requests), ("loglikelihood_rolling", texts)):
        expected = np.array(getattr(theirs, method)(asked, disable_tqdm=True), dtype=float)
        np.testing.assert_allclose(np.array(getattr(ours, method)(asked), dtype=float), expected, rtol=2e-5)
    # In ONNX Runtime a sequence has the same score alone and padded in a batch.
    sparse = load_onnx(out)
    alone, together = (HarnessLM(sparse, tokenizer, 64, size).loglikelihood(requests, True) for size in (1, 4))
    np.testing.assert_allclose([a for a, _ in together], [a for a, _ in alone], rtol=1e-3)


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
    p, table = anova(pd.DataFrame({"dense": dense, "8:16": sparse, "2:4": 1 - dense}))
    assert 0 < p < 1
    assert list(table.difference) == pytest.approx([-0.3, -0.6, -0.3])


def test_evaluate_writes_resumes_and_judges(
    nmsparse: Command, out: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
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
    gate = nmsparse(*command, "--min-recovery", "50", "--out", tmp_path / "third")
    assert gate.returncode == 19, gate.stderr
    assert "accuracy: sparse / dense must be at least 50" in " ".join(gate.stderr.split())
    assert (tmp_path / "third" / "results.json").exists()


def test_what_cannot_be_evaluated_is_said(
    nmsparse: Command, out: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    command = ["evaluate", out, "--out", tmp_path / "results", "--data-dir"]
    text = refused(nmsparse, tmp_path, 18, *command, data, "--tasks", "piqaa")
    assert "must be a task of lm-eval, got 'piqaa'. Nearest: piqa" in text
    text = refused(nmsparse, tmp_path, 18, *command, data / "absent", "--tasks", "boolq")
    assert "absent/boolq/dev.jsonl: must be the data of boolq, got FileNotFoundError" in text
    text = refused(nmsparse, tmp_path, 18, *command, data, "--tasks", "gsm8k")
    assert "gsm8k: must be one of arc_easy, boolq, piqa, wikitext, winogrande with --data-dir" in text
    text = refused(nmsparse, tmp_path, 18, *command, data, "--tasks", "boolq", "--context", "8")
    assert "an example must have at most 8 tokens, got" in text
    model = make_tiny(tmp_path / "model")
    settings = json.loads((model / "tokenizer.json").read_text())
    settings["added_tokens"].append({**settings["added_tokens"][-1], "id": 255, "content": "<other>"})
    (model / "tokenizer.json").write_text(json.dumps(settings))
    text = refused(nmsparse, tmp_path, 11, *command, data, "--against", model)
    assert "must have the tokenizer of" in text
