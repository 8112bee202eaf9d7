"""Encoders and masked language models, tiny and random, and all-MiniLM-L6-v2 for proof."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import onnx
import pytest
import torch
from conftest import PLAIN, from_make, tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

from converter import Recipe, convert, load
from converter.calibration.allocate import measure
from converter.calibration.texts import windows
from converter.checkpoint import open_checkpoint
from converter.errors import CalibrationError, CheckpointError, RecipeError
from converter.kinds import DECODER, ENCODER, MASKED, completed, output
from converter.plan import plan
from converter.sparsity.linear import install

SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 160,
    "pad_token_id": 0,
}
FAMILIES = {
    "bert": SIZES,  # two segments
    "roberta": SIZES | {"type_vocab_size": 1},  # positions count from the padding token's number
    "distilbert": {"vocab_size": 256, "dim": 64, "hidden_dim": 96, "n_layers": 3, "n_heads": 4, "pad_token_id": 0},
    "mpnet": SIZES,  # attention of its own, with a bias for each distance
}
SMALL = {"calibration.tokens": 64, "calibration.window": 32}


def make(folder: Path, family: str, auto: type = AutoModel) -> Path:
    """Write a random model of a family, with weights large enough that a wrong layer shows."""
    torch.manual_seed(0)
    model = auto.from_config(AutoConfig.for_model(family, **FAMILIES[family]))  # type: ignore[attr-defined]
    for name, parameter in model.named_parameters():
        if "norm" not in name.lower():
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    first, last = "<s>", "</s>"
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=f"{first} $A {last}", special_tokens=[(t, tokenizer.convert_tokens_to_ids(t)) for t in (first, last)]
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, type], tuple[Path, Path]]:
    made: dict[tuple[str, type], tuple[Path, Path]] = {}

    def convert_once(family: str, auto: type) -> tuple[Path, Path]:
        if (family, auto) not in made:
            folder = tmp_path_factory.mktemp(family)
            source = make(folder / "model", family, auto)
            made[family, auto] = source, convert(str(source), folder / "out", PLAIN.replace(SMALL))
        return made[family, auto]

    return convert_once


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForMaskedLM])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(converted: Callable[[str, type], tuple[Path, Path]], family: str, auto: type) -> None:
    source, out = converted(family, auto)
    report = json.loads((out / "report.json").read_text())
    parity = report["parity"]
    assert parity["passed"]
    assert parity["largest_flip_share"] == 0
    assert report["layers"]["sparse"] == parity["layers"] == 18
    graph = onnx.load(out / "model.onnx", load_external_data=False).graph
    assert {node.domain for node in graph.node} == {"", "nmsparse"}
    segments = ["token_type_ids"] if family == "bert" else []
    assert [value.name for value in graph.input] == ["input_ids", "attention_mask", *segments]
    (name,) = [value.name for value in graph.output]
    assert name == ("last_hidden_state" if auto is AutoModel else "logits")
    shapes = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in [*graph.input, *graph.output]]
    assert all(shape[:2] == ["batch_size", "sequence_length"] for shape in shapes)

    # Whole, with padding: our model in PyTorch, made sparse, is what the loaded OUT is.
    checkpoint = open_checkpoint(str(source))
    model = checkpoint.model()
    from converter.calibration import file as calibration_file

    for layer, params in calibration_file.read(out / calibration_file.NAME).items():
        install(model, layer, params)
    ids = torch.randint(3, 250, (2, 17), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 11:] = 0
    ids = ids * mask
    expected = getattr(model(input_ids=ids, attention_mask=mask), name)
    found = getattr(load(out)(input_ids=ids, attention_mask=mask), name)
    assert found.shape == expected.shape
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=2e-3, rtol=2e-3)
