"""How near the sentence embeddings of a sparse encoder are to those of the dense one, recipe by recipe, in PyTorch.

    python benchmarks/encoders.py MODEL --text boolq/dev.jsonl --calibration python

An embedding is the mean of the last hidden states over a text's tokens. The texts are cut to the model's positions.
"""

from __future__ import annotations

import json
import tempfile
from itertools import islice
from pathlib import Path
from typing import Annotated

import record
import torch
from cyclopts import App, Parameter
from rich.box import MARKDOWN
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from converter import json_rows
from converter.calibration.fitting import Means, fit
from converter.checkpoint import open_checkpoint
from converter.kinds import completed
from converter.pipeline import calibration_text
from converter.plan import plan
from converter.recipe import Recipe, parse_set
from converter.sources.texts import texts
from converter.sparsity.linear import install
from converter.stages import Stages

ROWS = (
    "pattern=2:4 criterion=magnitude mitigation=none",
    "pattern=8:16 criterion=magnitude mitigation=none",
    "pattern=8:16 mitigation=permute+var",
    "mitigation=permute+var",
    "",
)
BATCH = 32
app = App(help_format="plaintext")


def embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sentences: list[str]) -> Tensor:
    """Return the embedding of each sentence, `[count, H]`."""
    found = []
    with torch.no_grad():
        for start in range(0, len(sentences), BATCH):
            inputs = tokenizer(sentences[start : start + BATCH], padding=True, truncation=True, return_tensors="pt")
            states, seen = model(**inputs).last_hidden_state, inputs["attention_mask"][:, :, None]
            found.append((states * seen).sum(1) / seen.sum(1))
    return torch.cat(found)


@app.default
def main(
    model: str,
    *,
    text: Annotated[str, Parameter(help="what is embedded, a text to a row")],
    field: str = "question",
    count: int = 256,
    calibration: Annotated[str, Parameter(help="the recipe's calibration.source")] = "python",
    row: Annotated[tuple[str, ...], Parameter(help="changes of the recipe; '' is the default one")] = ROWS,
    json_file: Annotated[Path | None, Parameter(name="--json")] = None,
    result: str | None = None,
) -> None:
    """Print the mean, the lowest tenth and the least cosine of the dense and the sparse embedding of a text."""
    checkpoint, stages = open_checkpoint(model), Stages()
    sentences, tokenizer = list(islice(texts(text, field), count)), checkpoint.tokenizer()
    dense = embeddings(checkpoint.model(), tokenizer, sentences)
    table, lines = Table("recipe", "cosine", "lowest tenth", "least", "calibration, s", box=MARKDOWN), []
    for changes in row:
        given = Recipe().replace({"calibration.source": calibration, **parse_set(changes.split())})
        recipe = completed(given, checkpoint.kind, checkpoint.config)
        stages.costs.clear()
        with tempfile.TemporaryDirectory() as scratch:
            written = calibration_text(checkpoint, recipe, None, stages) if recipe.windows() else None
            layers = plan(checkpoint.skeleton(), recipe)
            found = fit(checkpoint, layers, recipe, Means(written, Path(scratch)), stages)
        sparse = found.checkpoint.model()
        for name, params in found.params.items():
            install(sparse, name, params)
        cosines = torch.cosine_similarity(dense, embeddings(sparse, tokenizer, sentences))
        figures = (cosines.mean().item(), cosines.quantile(0.1).item(), cosines.min().item())
        seconds = sum(cost.seconds for cost in stages.costs)
        table.add_row(changes or "default", *(f"{figure:.3f}" for figure in figures), f"{seconds:.0f}")
        print(json.dumps([changes or "default", *figures, seconds]), flush=True)
        parts = ("mean", "lowest tenth", "least")
        lines += [
            json_rows.row(f"{changes or 'default'}: cosine, {part}", value, "cosine")
            for part, value in zip(parts, figures, strict=True)
        ]
        json_rows.write(json_file, lines)
    record.show(table, result)


if __name__ == "__main__":
    app()
