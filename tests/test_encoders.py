"""Encoders and masked language models, tiny and random, and all-MiniLM-L6-v2 for proof."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import onnx
import pytest
import torch
from conftest import PLAIN, from_make, tiny_tokenizer
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

from converter import Recipe, convert, load
from converter.bench import speed
from converter.build import build
from converter.calibration import file as calibration_file
from converter.calibration.allocate import measure
from converter.checkpoint import open_checkpoint
from converter.delivery.inspect import inspect
from converter.errors import BuildError, CalibrationError, CheckpointError, ExportError, RecipeError
from converter.kinds import output
from converter.options import BuildOptions
from converter.pipeline import load_with_processor
from converter.plan import plan
from converter.sources.texts import texts, windows
from converter.sparsity.linear import Params, install
from converter.stages import Stages

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


SHARED = {"albert": SIZES | {"embedding_size": 32}}


def make(folder: Path, family: str, auto: type = AutoModel, **changes: int) -> Path:
    """Write a random model of a family, with weights large enough that a wrong layer shows."""
    torch.manual_seed(0)
    sizes = (FAMILIES | SHARED)[family] | changes
    model = auto.from_config(AutoConfig.for_model(family, **sizes))  # type: ignore[attr-defined]
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


@pytest.mark.parametrize(
    ("family", "auto"), [*((family, AutoModel) for family in FAMILIES), ("bert", AutoModelForMaskedLM)]
)
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


@pytest.fixture(scope="module")
def bert(converted: Callable[[str, type], tuple[Path, Path]]) -> tuple[Path, Path]:
    return converted("bert", AutoModel)


def test_default_methods(bert: tuple[Path, Path], tmp_path: Path) -> None:
    changes = {**SMALL, "calibration.tokens": 256, "allocation.tokens": 256, "permute": "folded", "weights": "int8"}
    changes |= {"training.tokens": 512, "training.window": 32, "training.steps": 8, "training.learning_rate": 1e-3}
    out = convert(str(bert[0]), tmp_path / "out", Recipe().replace(changes))
    report = json.loads((out / "report.json").read_text())
    assert report["recipe"]["calibration"]["source"] == "python"
    assert report["parity"]["passed"]
    assert report["permutations"]["folded"] > 0
    curve = [value for _, value in report["training"]]
    assert min(curve[1:]) < curve[0]
    costs = [cost for cost, _ in inspect(out) if cost.keep < cost.group]
    assert len({cost.keep for cost in costs}) > 1
    assert sum(cost.sparse_products for cost in costs) <= 0.5 * sum(cost.products for cost in costs)


def test_effect_is_what_an_error_does_to_the_states(bert: tuple[Path, Path]) -> None:
    checkpoint = open_checkpoint(str(bert[0]))
    changes = {"allocation.menu": ["14:16", "15:16"], "allocation.budget": "100%"}
    recipe = Recipe().replace({"criterion": "magnitude", "mitigation": "none", **changes})
    model, name = checkpoint.model(), "encoder.layer.2.output.dense"
    ids = windows("python", checkpoint.tokenizer(), 64, 32, framed=True)
    layer = next(layer for layer in plan(model, recipe).open if layer.name == name)
    effects = measure(model, [layer], recipe, ids)[name]
    with torch.no_grad():
        dense, linear = output(model, ids), model.get_submodule(name)
        found = []
        for keep in (14, 15):
            install(model, name, Params(keep, 16), linear)  # type: ignore[arg-type]
            found.append(float((output(model, ids) - dense).square().sum()))
    assert effects == pytest.approx(found, rel=0.25)  # to first order, and the mean over random signs


def test_text_is_framed_as_the_tokenizer_does(bert: tuple[Path, Path]) -> None:
    tokenizer = open_checkpoint(str(bert[0])).tokenizer()
    framed, bare = windows("python", tokenizer, 3, 16, framed=True), windows("python", tokenizer, 3, 14)
    assert framed.shape == (3, 16)
    assert framed[:, 0].unique().tolist() == [tokenizer.bos_token_id]
    assert framed[:, -1].unique().tolist() == [tokenizer.eos_token_id]
    assert torch.equal(framed[:, 1:-1], bare)
    with pytest.raises(CalibrationError, match="windows must have room"):
        windows("python", tokenizer, 1, 2, framed=True)


def test_a_checkpoint_without_pooler_and_under_other_names(bert: tuple[Path, Path], tmp_path: Path) -> None:
    source = make(tmp_path / "other", "bert")
    weights = load_file(source / "model.safetensors")
    renamed = {f"bert.{name}": tensor for name, tensor in weights.items() if "pooler" not in name}
    save_file(renamed, source / "model.safetensors", metadata={"format": "pt"})
    ids = torch.arange(3, 19)[None]
    models = [open_checkpoint(str(path)).model() for path in (source, bert[0])]
    torch.testing.assert_close(*(output(model, ids) for model in models))


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"phases": "prefill"}, RecipeError, "phases: must be both for a model without a cache"),
        ({"calibration.source": "python,self"}, RecipeError, "calibration.source: must be a text for an encoder"),
        (
            {"calibration.window": 256, "calibration.tokens": 256},
            CalibrationError,
            "calibration.window: must be at most 160",
        ),
    ],
)
def test_recipes_that_no_encoder_can_have(
    bert: tuple[Path, Path], tmp_path: Path, changes: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        convert(str(bert[0]), tmp_path / "out", Recipe().replace({**SMALL, **changes}))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_model_of_few_positions_is_validated_on_as_many(tmp_path: Path, family: str) -> None:
    source = make(tmp_path / "model", family, max_position_embeddings=40)
    out = convert(str(source), tmp_path / "out", PLAIN)
    assert json.loads((out / "report.json").read_text())["parity"]["tokens"] == 38


def test_blocks_that_share_their_weights_are_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make(tmp_path / "model", "albert")
    with pytest.raises(ExportError, match="AlbertModel: must be a model whose blocks are all attention blocks"):
        convert(str(source), tmp_path / "out", PLAIN)
    assert "calibrate" not in capsys.readouterr().err


def test_a_head_for_another_task_is_refused(tmp_path: Path) -> None:
    source = make(tmp_path / "model", "bert", AutoModelForSequenceClassification)
    with pytest.raises(CheckpointError, match="or an encoder, got BertForSequenceClassification"):
        convert(str(source), tmp_path / "out", PLAIN)


def test_what_only_decoders_can_do(
    bert: tuple[Path, Path], nmsparse: Callable[..., CompletedProcess[str]], tmp_path: Path
) -> None:
    source, out = bert
    for command in (("generate", out, "Hello"), ("perplexity", source), ("evaluate", out), ("evaluate", source)):
        done = nmsparse(*command)
        assert done.returncode == CheckpointError.exit_code
        assert f"must be a causal language model for {command[0]}, got one that is not: encoder" in done.stderr
    for refused in (
        lambda: speed(out, None, None, None, Stages()),
        lambda: build(out, "tensorrt-rtx", BuildOptions(target="sm_89"), Stages()),
        lambda: build(out, "tensorrt", BuildOptions(profile=["batch=1,tokens=1,past=1"]), Stages()),
    ):
        with pytest.raises(BuildError, match="must be a decoder, got a model without a cache"):
            refused()


def test_minilm(tmp_path: Path) -> None:
    source = from_make("NMSPARSE_TEST_ENCODER", "all-MiniLM-L6-v2 is")
    out = convert(str(source), tmp_path / "out", PLAIN)
    sentences = [text.strip().partition(".")[0] for text in texts("python")][:32]

    def embedded(path: Path) -> Tensor:
        model, tokenizer = load_with_processor(path)
        inputs = tokenizer(sentences, padding=True, truncation=True, return_tensors="pt")
        states, seen = model(**inputs).last_hidden_state, inputs["attention_mask"][:, :, None]
        return (states * seen).sum(1) / seen.sum(1)

    cosines = torch.cosine_similarity(embedded(source), embedded(out))
    assert 0.8 < cosines.mean() < 0.99
    assert json.loads((out / "report.json").read_text())["parity"]["largest_layer_error"] < 1e-5


@pytest.mark.parametrize(
    ("auto", "architectures", "kind"),
    [
        (AutoModelForMaskedLM, None, "masked language model"),
        (AutoModelForMaskedLM, ["BertForPreTraining"], "masked language model"),
        (AutoModel, None, "encoder"),
        (AutoModel, ["BertForMaskedLM"], "encoder"),  # as some encoders of sentences are published
    ],
)
def test_what_was_saved_decides_where_the_configuration_does_not(
    tmp_path: Path, auto: type, architectures: list[str] | None, kind: str
) -> None:
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    model = auto.from_config(AutoConfig.for_model("bert", num_attention_heads=4, **sizes))  # type: ignore[attr-defined]
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": architectures}))
    assert open_checkpoint(str(tmp_path)).kind.name == kind
    out = convert(str(tmp_path), tmp_path / "out", PLAIN)
    assert type(load(out)).__name__ == "OnnxEncoder"
