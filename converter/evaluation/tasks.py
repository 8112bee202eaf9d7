"""Tasks of lm-evaluation-harness, on the Hub's data or on the same rows from a folder, and what each example gave."""

from __future__ import annotations

import difflib
import json
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache as once
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import pandas as pd
from datasets import Dataset, DatasetDict
from lm_eval.tasks import TaskManager

from converter.errors import EvaluationError
from converter.evaluation.harness import HarnessLM
from converter.options import TaskOptions
from converter.records import Setting

TASKS = "piqa,arc_easy,boolq,winogrande,wikitext"  # by default
COLUMNS = ("task", "example", "metric", "value", "weight", "predicted", "target")
ARTICLE = re.compile(r"^ = [^=]+ = $", re.M)


def setting(options: TaskOptions, runtime: str) -> Setting:
    """Return the setting that the options ask for; by default the tasks are `TASKS`, for images none."""
    tasks = options.tasks if options.tasks is not None else "" if options.images else TASKS
    names = tuple(name for name in tasks.split(",") if name)
    same = {name: value for name, value in vars(options).items() if name != "tasks"}
    return Setting(names, **same, runtime=runtime)


@dataclass(frozen=True)
class Local:
    """The files of a task by split, and what makes the Hub's columns of one of their rows."""

    splits: dict[str, str]
    row: Callable[[dict[str, Any]], dict[str, Any]]


def _arc(row: dict[str, Any]) -> dict[str, Any]:
    labels = [chr(ord("A") + number) for number in range(len(row["choices"]))]
    choices = {"text": row["choices"], "label": labels}
    return {"question": row["question"], "choices": choices, "answerKey": labels[row["answer"]]}


def _boolq(row: dict[str, Any]) -> dict[str, Any]:
    return {"question": row["question"], "passage": row["passage"], "label": int(row["answer"])}


# The first split is the one that is asked; its file must be there.
LOCAL = {
    "piqa": Local({"validation": "piqa/valid.jsonl"}, dict),
    "arc_easy": Local({"test": "arc_easy/test.jsonl", "train": "arc_easy/train.jsonl"}, _arc),
    "boolq": Local({"validation": "boolq/dev.jsonl"}, _boolq),
    "winogrande": Local({"validation": "winogrande/dev.jsonl"}, dict),
    "wikitext": Local({"test": "wikitext2/wiki.test.raw"}, dict),
}


def load_tasks(setting: Setting, data: Path | None) -> list[Any]:
    """Return lm-eval's tasks, whose rows come from the folder `data`, or from the Hub where there is none.

    Raises:
        EvaluationError: when a task is unknown, or its data are not there.
    """
    if not setting.tasks:
        return []
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = _manager()
    for name in setting.tasks:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=5)
            raise EvaluationError(f"--tasks: must be a task of lm-eval, got {name!r}. Nearest: {', '.join(near)}.")
    tasks: list[Any] = []
    for name in setting.tasks:
        changes: dict[str, Any] = {} if setting.shots is None else {"num_fewshot": setting.shots}
        if data is not None:
            changes |= _local(name, data)
        try:
            # Of a member of a group lm-eval takes its own definition, with changes; of a task alone only what is given.
            loaded = manager.load([{"group": "nmsparse", "task": [{"task": name, **changes}]}])
        except ImportError as error:
            raise EvaluationError(
                f"{name}: needs the package {error.name}, got none. Install lm_eval[{name}]."
            ) from error
        except (OSError, ValueError, ConnectionError) as error:
            raise EvaluationError(
                f"{name}: its data must be on the Hub and in reach, got {type(error).__name__}: "
                f"{(str(error).splitlines() or [''])[0]}. Give a folder with --data-dir."
            ) from error
        tasks += loaded["tasks"].values()
    return tasks


@once
def _manager() -> TaskManager:
    """Return lm-eval's index of its tasks, which it takes seconds to read from thousands of files."""
    return TaskManager()


def _local(name: str, data: Path) -> dict[str, Any]:
    """Return what changes in the task's configuration: where its rows come from, and nothing of what is asked."""
    if name not in LOCAL:
        raise EvaluationError(
            f"{name}: must be one of {', '.join(sorted(LOCAL))} with --data-dir. Leave it out to take data of the Hub."
        )
    local = LOCAL[name]
    asked, *others = local.splits
    splits = {asked: list(_rows(name, data / local.splits[asked]))}
    for split in others:
        if (data / local.splits[split]).is_file():
            splits[split] = list(_rows(name, data / local.splits[split]))
    sets = DatasetDict({split: Dataset.from_list(rows) for split, rows in splits.items()})
    # Of shots from its test split lm-eval leaves the question itself out, of those from a validation split it does not.
    shots = "train" if "train" in sets else asked
    return {"custom_dataset": lambda **_: sets, "test_split": asked, "fewshot_split": shots}


def _rows(name: str, path: Path) -> Iterator[dict[str, Any]]:
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(
            f"{path}: must be the data of {name}, got {type(error).__name__}. Put it there, or leave --data-dir out."
        ) from error
    if name == "wikitext":
        starts = [match.start() for match in ARTICLE.finditer(text)]
        ends = [*starts[1:], len(text)]
        yield from ({"page": text[start:end]} for start, end in zip(starts, ends, strict=True))
        return
    for number, line in enumerate(text.splitlines(), 1):
        try:
            yield LOCAL[name].row(json.loads(line))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise EvaluationError(
                f"{path}:{number}: must be a row of {name}, got {type(error).__name__}: {error}. Fetch the file again."
            ) from error


def ask(lm: HarnessLM, tasks: list[Any], setting: Setting) -> pd.DataFrame:
    """Return a row for each example and metric.

    A perplexity's value is a document's log-likelihood, and its weight the words or bytes it is spread over.
    """
    answers = lm_eval.simple_evaluate(
        lm,
        tasks=tasks,
        limit=setting.limit,
        num_fewshot=setting.shots,
        apply_chat_template=setting.chat,
        task_manager=_manager(),
        bootstrap_iters=0,
        random_seed=setting.seed,
        numpy_random_seed=setting.seed,
        torch_random_seed=setting.seed,
        fewshot_random_seed=setting.seed,
    )
    rows = [row for task, samples in answers["samples"].items() for sample in samples for row in _values(task, sample)]
    return pd.DataFrame(rows, columns=COLUMNS)


def _values(task: str, sample: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    answers = sample["filtered_resps"]
    scores = [answer[0] for answer in answers if isinstance(answer, (tuple, list))]
    predicted = int(np.argmax(scores)) if len(scores) == len(answers) > 1 else -1
    target = sample["target"] if isinstance(sample["target"], int) else -1
    for metric in sample["metrics"]:
        value = sample[metric]
        if isinstance(value, (tuple, list)):
            yield task, sample["doc_id"], metric, float(value[0]), float(value[1]), predicted, target
        elif isinstance(value, (int, float, np.number)):
            yield task, sample["doc_id"], metric, float(value), 1.0, predicted, target
