"""A loaded OUT as a transformers model: each argument is served as PyTorch serves it, or refused in one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import PLAIN, make_tiny, tiny_tokenizer
from transformers import (
    AutoConfig,
    BertConfig,
    DynamicCache,
    GenerationConfig,
    MistralConfig,
    Phi3Config,
    StaticCache,
    ViTConfig,
)

from converter import convert, load
from converter.checkpoint import open_checkpoint
from converter.errors import ExportError, ValidationError
from converter.evaluation import parity
from converter.evaluation.boundaries import MOST, generated, text_wanted
from converter.evaluation.limits import LIMITS
from converter.evaluation.parity import Parity, validate
from converter.graph.trace import check_blocks
from converter.kinds.decoder import boundaries
from converter.plan import find_blocks
from converter.runtimes.decoder import GraphCausalLM, generation_config
from converter.runtimes.onnxruntime import OnnxEncoder, OnnxVision, decoder, session
from converter.signature import DOMAIN
from converter.sparsity.linear import Params
from converter.sparsity.quantize import Storage

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * n for n in range(8)],
    "long_factor": [1.5 + 4.0 * n for n in range(8)],
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "phi3": {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64},
    "mistral": {"sliding_window": 16},
}
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None}
ROWS = torch.randint(4, 256, (2, 60), generator=torch.Generator().manual_seed(1))
SEEN = torch.ones_like(ROWS)
ROWS[1, :3], SEEN[1, :3] = 0, 0


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def make(family: str) -> Path:
        folder = tmp_path_factory.mktemp(family)
        model = make_tiny(folder / "model", family, **FAMILIES[family])
        told = json.loads((model / "generation_config.json").read_text())
        (model / "generation_config.json").write_text(json.dumps(told | {"cache_implementation": "static"}))
        return convert(str(model), folder / "out", PLAIN)

    return make


def _pair(out: Path) -> tuple[Any, GraphCausalLM]:
    """Return PyTorch's dense model and the graph with nothing dropped, which have to write the same."""
    graph = onnx.load(out / "model.onnx", load_external_data=False)
    for node in graph.graph.node:
        if node.domain == DOMAIN:
            attributes = {a.name: a for a in node.attribute}
            attributes["keep"].i = attributes["group"].i
            attributes["variance"].i = 0
    model: Any = open_checkpoint(str(out.parent / "model")).model()
    model.generation_config = GenerationConfig()
    return model, decoder(model.config, session(graph, out))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"use_cache": False}], ids=["cache", "no cache"])
@pytest.mark.parametrize("length", [10, 60])
def test_tokens_are_those_of_torch(
    out: Callable[[str], Path], family: str, options: dict[str, Any], length: int
) -> None:
    model, graph = _pair(out(family))
    rows, seen = ROWS[:, :length], SEEN[:, :length]
    expected = model.generate(rows, attention_mask=seen, **GREEDY)
    assert graph.generate(rows, attention_mask=seen, **GREEDY, **options).tolist() == expected.tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 3},
        {"num_beams": 2, "use_cache": False},
        {"do_sample": True, "top_k": 5, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 3},
        {"prefill_chunk_size": 4},
        {"repetition_penalty": 1.3},
        {"generation_config": GenerationConfig(max_new_tokens=12, use_cache=False, eos_token_id=-1)},
    ],
    ids=str,
)
def test_ways_of_generating(out: Callable[[str], Path], options: dict[str, Any]) -> None:
    written = []
    rows = ROWS[:1, :20] if "prompt_lookup_num_tokens" in options else ROWS[:, :20]
    for model in _pair(out("mistral")):
        torch.manual_seed(0)
        plain = {} if "generation_config" in options else GREEDY
        written.append(
            model.generate(rows, attention_mask=SEEN[: len(rows), :20], **plain | options).tolist()  # type: ignore[operator]
        )
    assert written[0] == written[1]


def test_a_tokenizer_for_the_loop_is_no_argument_of_the_graph(out: Callable[[str], Path]) -> None:
    model, graph = _pair(out("mistral"))
    expected = model.generate(IDS[:1], **GREEDY)
    assert graph.generate(IDS[:1], tokenizer=tiny_tokenizer(), **GREEDY).tolist() == expected.tolist()


def test_an_assistant_and_a_cache_to_go_on_from(out: Callable[[str], Path]) -> None:
    model, graph = _pair(out("mistral"))
    row = ROWS[:1, :20]
    expected = model.generate(row, **GREEDY)
    assert graph.generate(row, assistant_model=graph, **GREEDY).tolist() == expected.tolist()
    first = graph.generate(row, return_dict_in_generate=True, **GREEDY | {"max_new_tokens": 5})
    rest = graph.generate(first.sequences, past_key_values=first.past_key_values, **GREEDY | {"max_new_tokens": 7})
    assert rest.tolist() == expected.tolist()


@pytest.mark.parametrize("cache_of", [lambda _config: DynamicCache(), lambda config: DynamicCache(config=config)])
def test_forward_serves_what_torch_does(out: Callable[[str], Path], cache_of: Callable[[Any], Any]) -> None:
    model, graph = _pair(out("llama"))
    rows = ROWS[:, :20]
    with torch.no_grad():
        expected = model(rows, labels=rows.where(rows > 30, -100))
    labels = rows.where(rows > 30, -100).to(torch.int16)
    found = graph(
        rows.int(), labels=labels, attention_mask=torch.ones(2, 20).bool(), past_key_values=cache_of(model.config)
    )
    torch.testing.assert_close(found.loss, expected.loss)
    kept = graph(rows, attention_mask=torch.ones(2, 20), logits_to_keep=2, use_cache=False)
    torch.testing.assert_close(kept.logits, found.logits[:, -2:])
    torch.testing.assert_close(graph(rows, logits_to_keep=torch.tensor([3])).logits, graph(rows).logits[:, 3:4])
    assert kept.past_key_values is None
    logits, cache = graph(rows, return_dict=False, token_type_ids=torch.zeros_like(rows), output_attentions=False)
    assert cache.get_seq_length() == 20
    torch.testing.assert_close(logits, graph(rows, position_ids=torch.arange(20)[None]).logits)
    more = graph(rows[:, :3], past_key_values=found.past_key_values, attention_mask=SEEN[:, :23])
    assert more.past_key_values.get_seq_length() == 23
    assert graph.dtype == torch.float32


def _filled(rows: int, heads: int, blocks: int, dtype: torch.dtype = torch.float32) -> DynamicCache:
    cache: Any = DynamicCache()
    for block in range(blocks):
        cache.update(*[torch.zeros(rows, heads, 3, 16, dtype=dtype)] * 2, block)
    return cache  # type: ignore[no-any-return]


IDS = ROWS[:, :20]
REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("output_hidden_states: must be left out, got True", {"output_hidden_states": True}),
    ("output_attentions: must be left out", {"output_attentions": True}),
    ("inputs_embeds: must be left out, got Tensor", {"inputs_embeds": torch.zeros(1, 3, 64), "input_ids": None}),
    ("cache_position: must be left out", {"cache_position": torch.arange(20)}),
    ("colour: must be left out, got 'red'", {"colour": "red"}),
    (r"input_ids: must be a tensor \[any, any\], got NoneType", {"input_ids": None}),
    (r"input_ids: must be a tensor \[any, any\], got \[20\]", {"input_ids": IDS[0]}),
    (r"input_ids: must be a tensor \[any, any\], got \[2, 0\]", {"input_ids": IDS[:, :0]}),
    (r"input_ids: must be a tensor \[any, any\], got list", {"input_ids": [[1, 2]]}),
    ("input_ids: must be whole numbers, got torch.float32", {"input_ids": IDS.float()}),
    ("input_ids: must be from 0 to 255, got 256", {"input_ids": IDS.clamp_min(256)}),
    ("input_ids: must be from 0 to 255, got -1", {"input_ids": IDS.clamp_max(-1)}),
    (r"attention_mask: must be a tensor \[2, 20\], got \[20\]", {"attention_mask": SEEN[0, :20]}),
    (r"attention_mask: must be a tensor \[2, 20\], got \[2, 19\]", {"attention_mask": SEEN[:, :19]}),
    ("attention_mask: must be 1 for a token", {"attention_mask": SEEN[:, :20] - 1.5}),
    (r"position_ids: must be a tensor \[1, 20\], got \[1, 3\]", {"position_ids": torch.arange(3)[None]}),
    (r"position_ids: must be a tensor \[2, 20\], got \[20\]", {"position_ids": torch.arange(20)}),
    ("position_ids: must be from 0, got -2", {"position_ids": torch.arange(20)[None] - 2}),
    ("token_type_ids: must be all zero", {"token_type_ids": torch.ones_like(IDS)}),
    ("labels: must be from -100 to 255, got 256", {"labels": IDS.clamp_min(256)}),
    ("past_key_values: must be a DynamicCache .* got tuple", {"past_key_values": ((torch.zeros(1),) * 2,) * 3}),
    (r"must hold \(\(2, 2, 3, 16\), torch.float32\), got \(\(1, 2, 3, 16\)", {"past_key_values": _filled(1, 2, 3)}),
    (r"must hold \(\(2, 2, 3, 16\), torch.float32\), got \(\(2, 4, 3, 16\)", {"past_key_values": _filled(2, 4, 3)}),
    (r"must hold .* got .* torch.float16", {"past_key_values": _filled(2, 2, 3, torch.float16)}),
    ("past_key_values: must hold 3 layers, got 2", {"past_key_values": _filled(2, 2, 2)}),
]


@pytest.mark.parametrize(("said", "given"), REFUSED, ids=[said for said, _ in REFUSED])
def test_forward_refuses_what_it_does_not_serve(out: Callable[[str], Path], said: str, given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=said):
        load(out("llama"))(**{"input_ids": IDS} | given)


@pytest.mark.parametrize(
    ("said", "given"),
    [
        ("cache_implementation: must be dynamic for a graph, got static", {"cache_implementation": "static"}),
        ("cache_implementation: must be dynamic .* got quantized", {"cache_implementation": "quantized"}),
        ("cache_implementation: must be dynamic .* got paged", {"cache_implementation": "paged"}),
        ("must be dynamic .* got static", {"generation_config": GenerationConfig(cache_implementation="static")}),
        ("assistant_early_exit: must be left out", {"assistant_early_exit": 1}),
        ("output_hidden_states: must be left out", {"output_hidden_states": True, "return_dict_in_generate": True}),
        ("use_cache: must be True where past_key_values", {"use_cache": False, "past_key_values": DynamicCache()}),
        (r"attention_mask: must be a tensor \[1, \d+\]", {"attention_mask": torch.ones(1, 99)}),
        ("colour", {"colour": "red"}),
    ],
    ids=str,
)
def test_generate_refuses_what_it_does_not_serve(out: Callable[[str], Path], said: str, given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=said):
        load(out("mistral")).generate(IDS[:1], max_new_tokens=3, **given)  # type: ignore[operator]


def test_a_cache_that_drops_positions_is_refused(out: Callable[[str], Path]) -> None:
    model = load(out("mistral"))
    for given, got in (
        (DynamicCache(config=model.config), "DynamicCache of other layers"),
        (StaticCache(config=model.config, max_cache_len=64), "StaticCache"),
    ):
        with pytest.raises(ValueError, match=f"must be a DynamicCache that keeps every position, got {got}"):
            model(IDS, past_key_values=given)
        with pytest.raises(ValueError, match="must be a DynamicCache"):
            model.generate(IDS, past_key_values=given, max_new_tokens=3)  # type: ignore[operator]


def test_the_checkpoints_cache_implementation_is_dropped_with_a_word(
    out: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    GenerationConfig(cache_implementation="static", max_new_tokens=7).save_pretrained(tmp_path)
    found = generation_config(tmp_path)
    assert (found.cache_implementation, found.max_new_tokens) == (None, 7)
    assert "cache_implementation static is left out" in caplog.text
    assert load(out("llama")).generate(IDS[:1], **GREEDY).shape == (1, 32)  # type: ignore[operator]


# Where the configuration says that a model goes on otherwise.


def test_boundaries_are_those_that_a_text_can_cross() -> None:
    assert boundaries(Phi3Config(max_position_embeddings=4096)) == {}
    assert boundaries(Phi3Config(max_position_embeddings=131072)) == {"original_max_position_embeddings": 4096}
    assert boundaries(MistralConfig(max_position_embeddings=32768)) == {"sliding_window": 4096}
    assert text_wanted(boundaries(MistralConfig(max_position_embeddings=32768))) == 4096
    far = MistralConfig(max_position_embeddings=131072, sliding_window=32768)
    assert boundaries(far) == {"sliding_window": 32768}
    assert text_wanted(boundaries(far)) == 0
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    for family, rope in (("llama", yarn), ("gemma3_text", {"full_attention": LONGROPE})):
        config = AutoConfig.for_model(family, sliding_window=None)
        config.rope_parameters = rope
        assert boundaries(config) == ({} if rope is yarn else {"original_max_position_embeddings": 64})


@pytest.mark.parametrize(
    ("family", "boundary"),
    [("phi3", {"original_max_position_embeddings 64": 24}), ("mistral", {"sliding_window 16": 24}), ("llama", {})],
)
def test_validate_writes_across_each_boundary(
    out: Callable[[str], Path], family: str, boundary: dict[str, int]
) -> None:
    found = json.loads((out(family) / "report.json").read_text())["parity"]
    assert found["passed"]
    assert (found["generated"], found["not_tried"]) == (boundary, {})


def test_a_boundary_too_far_away_is_said_to_be(out: Callable[[str], Path]) -> None:
    model, graph = _pair(out("mistral"))
    model.config.sliding_window, model.config.max_position_embeddings = MOST + 1, 10**6
    found = generated(model, graph, IDS, LIMITS["float32"])
    assert found.not_tried == {f"sliding_window {MOST + 1}": f"it takes too long for more than {MOST} tokens"}
    assert not found.tokens


def test_validate_finds_a_loop_that_is_not_the_familys(
    out: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def plain(config: Any, run: Any) -> GraphCausalLM:
        model = decoder(config, run)
        return GraphCausalLM(config, model.caches, model.run)

    monkeypatch.setattr(parity, "decoder", plain)
    with pytest.raises(ValidationError, match="original_max_position_embeddings 64: row 0, token 66: logits must"):
        _parity(out("phi3")).check()


def test_a_loop_that_gives_what_the_graph_does_not_serve_fails(
    out: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, graph = _pair(out("mistral"))
    prepare = graph.prepare_inputs_for_generation
    more = wraps(prepare)(lambda *args, **options: prepare(*args, **options) | {"tone": 1})
    monkeypatch.setattr(graph, "prepare_inputs_for_generation", more)
    (found,) = generated(model, graph, IDS, LIMITS["float32"]).failures
    assert found.startswith("sliding_window 16: the graph must write on, got tone: must be left out, got 1.")


def test_validate_finds_another_window(out: Callable[[str], Path]) -> None:
    model = open_checkpoint(str(out("mistral").parent / "model")).model()
    model.config.sliding_window = 18
    found = _parity(out("mistral"), model).failures
    assert [text for text in found if text.startswith("sliding_window 18: row 0, token 18: logits must differ")]


def _parity(out: Path, model: Any = None) -> Parity:
    model = model or open_checkpoint(str(out.parent / "model")).model()
    _, blocks = find_blocks(model)
    inside = {module for block in blocks for module in block.modules()}
    params = {
        name: Params(8, 16, variance=True)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module in inside
    }
    return validate(out, model, params, Storage(), "both", ROWS[:1, :40])


def test_dynamic_rope_is_refused(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    model = make_tiny(tmp_path / "model", rope_parameters=rope)
    with pytest.raises(ExportError, match="rope_type must be one of fixed frequencies for a graph, got dynamic"):
        check_blocks(open_checkpoint(str(model)).skeleton())


# Models without a cache.


class _Session:
    """A session of ONNX Runtime with such inputs and outputs, which gives zeros, or cannot run."""

    def __init__(self, inputs: dict[str, list[Any]], output: str, shape: tuple[int, ...]) -> None:
        self.inputs, self.output, self.shape = inputs, output, shape

    def get_inputs(self) -> list[Any]:
        return [SimpleNamespace(name=name, shape=shape, type="tensor(float)") for name, shape in self.inputs.items()]

    def get_outputs(self) -> list[Any]:
        return [SimpleNamespace(name=self.output)]

    def run(self, _names: None, feeds: dict[str, Any]) -> list[Any]:
        if next(iter(feeds.values())).shape[1] > 30:
            raise RuntimeError("Gather failed")
        return [np.zeros(self.shape, np.float16)]


def _encoder(*more: str) -> OnnxEncoder:
    names = ("input_ids", "attention_mask", *more)
    run: Any = _Session({name: [None, None] for name in names}, "last_hidden_state", (2, 20, 8))
    return OnnxEncoder(BertConfig(vocab_size=256), run)


@pytest.mark.parametrize(
    ("said", "given"),
    [
        ("output_hidden_states: must be left out", {"output_hidden_states": True}),
        ("labels: must be left out", {"labels": IDS}),
        ("position_ids: must be left out", {"position_ids": IDS}),
        ("input_ids: must be from 0 to 255, got 256", {"input_ids": IDS.clamp_min(256)}),
        (r"attention_mask: must be a tensor \[2, 20\], got \[20\]", {"attention_mask": SEEN[0, :20]}),
        ("token_type_ids: must be from 0 to 1, got 2", {"token_type_ids": IDS.clamp(2, 2)}),
        (r"must be what the graph can take, got \[2, 60\].*Gather failed", {"input_ids": ROWS}),
    ],
    ids=str,
)
def test_an_encoder_refuses_what_it_does_not_serve(said: str, given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=said):
        _encoder("token_type_ids")(**{"input_ids": IDS} | given)


def test_an_encoder_serves_the_rest() -> None:
    model = _encoder()
    assert model(IDS.int(), SEEN[:, :20].bool(), torch.zeros_like(IDS)).last_hidden_state.dtype == torch.float32
    (states,) = model(IDS, return_dict=False)
    assert states.shape == (2, 20, 8)
    with pytest.raises(ValueError, match="token_type_ids: must be all zero for a model that knows no token types"):
        model(IDS, token_type_ids=torch.ones_like(IDS))


def test_a_vision_model_serves_images_alone() -> None:
    run: Any = _Session({"pixel_values": [None, 3, 8, 8]}, "logits", (2, 5))
    model = OnnxVision(ViTConfig(), run)
    images = torch.zeros(2, 3, 8, 8, dtype=torch.float64)
    assert model(images).logits.shape == (2, 5)
    assert isinstance(model(images, return_dict=False), tuple)
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("interpolate_pos_encoding: must be left out", {"interpolate_pos_encoding": True}),
        ("labels: must be left out", {"labels": torch.zeros(2)}),
        (
            r"pixel_values: must be a tensor \[any, 3, 8, 8\], got \[2, 3, 9, 9\]",
            {"pixel_values": torch.zeros(2, 3, 9, 9)},
        ),
        ("pixel_values: must be floating-point numbers", {"pixel_values": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)}),
    ]
    for said, given in wrong:
        with pytest.raises(ValueError, match=said):
            model(**{"pixel_values": images} | given)
