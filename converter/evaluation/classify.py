"""Images of a classifier: whether their label is the likeliest class, and whether it is among the five likeliest."""

from __future__ import annotations

import hashlib
from typing import Any

import pandas as pd
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from converter.errors import EvaluationError
from converter.evaluation.answers import Answers
from converter.evaluation.harness import Advance
from converter.evaluation.tasks import COLUMNS
from converter.sources.images import drawn, image_shape, pixels

TASK, TOP = "images", 5


def labelled(source: str, config: PreTrainedConfig, count: int, seed: int) -> tuple[str, Any, list[int]]:
    """Return the source, rows of a data set of images as `drawn` does, and the model's class of each.

    Classes are told by their names, or by their order where the model's have other names and are as many.

    Raises:
        EvaluationError: when the images have no classes, or others than the model.
    """
    rows = drawn(source, count, seed)
    column, names = next(((name, f.names) for name, f in rows.features.items() if hasattr(f, "names")), ("", []))
    known = {str(name): int(number) for name, number in (config.label2id or {}).items()}
    if names and set(names) <= set(known):
        return source, rows, [known[names[label]] for label in rows[column]]
    if len(names) != len(known):
        raise EvaluationError(
            f"{source}: images must have the {len(known)} classes of the model, got {len(names)}. "
            "Put the images of each class into a folder of its name."
        )
    return source, rows, list(rows[column])


def classify(
    model: PreTrainedModel,
    processor: Any,
    source: str,
    rows: Any,
    classes: list[int],
    batch: int,
    kept: Answers,
    advance: Advance,
) -> pd.DataFrame:
    """Return a row for each image and metric: `acc`, and `top5` where there are more than five classes.

    An image whose classes are `kept` is not shown to the model again.
    """
    shape = image_shape(processor)
    examples: list[tuple[Any, ...]] = []
    for start in range(0, len(rows), batch):
        given = [
            pixels(row, source, processor, shape) for row in rows.select(range(start, min(start + batch, len(rows))))
        ]
        keys = [[TASK, hashlib.sha256(part.numpy().tobytes()).hexdigest()] for part in given]
        new = [number for number, key in enumerate(keys) if key not in kept]
        if new:
            with torch.no_grad():
                logits = model(pixel_values=torch.cat([given[number] for number in new]).to(model.device)).logits
            best = logits.float().topk(TOP if logits.shape[-1] > TOP else 1).indices.tolist()
            for number, likeliest in zip(new, best, strict=True):
                kept[keys[number]] = likeliest
        for place, key in enumerate(keys, start):
            likeliest, target = kept[key], classes[place]
            values = {"acc": likeliest[0] == target}
            if len(likeliest) == TOP:  # of more classes, or all would be right
                values["top5"] = target in likeliest
            examples += [(TASK, place, metric, float(v), 1.0, likeliest[0], target) for metric, v in values.items()]
        advance(min(start + batch, len(rows)), len(rows))
    return pd.DataFrame(examples, columns=list(COLUMNS))
