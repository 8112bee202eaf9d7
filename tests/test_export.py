"""The whole graph on tiny random models of many families; none has code of its own."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import onnx
import pytest
import torch
from conftest import PLAIN, make_tiny
from pairs import each
from safetensors.torch import load_file, save_file

from converter import convert, genai_overlay, load
from converter.calibration import file as calibration_file
from converter.checkpoint import open_checkpoint
from converter.errors import ExportError, RecipeError, ValidationError
from converter.evaluation.parity import Parity, validate
from converter.names import Phases
from converter.pipeline import export
from converter.plan import find_blocks, signature
from converter.runtimes.kernel import VARIABLE
from converter.signature import INPUTS
from converter.sparsity.linear import Params, install
from converter.sparsity.quantize import Storage
from converter.stages import Stages

FAMILIES = {
    "llama": {},
    "qwen2": {},  # biases in q, k, v
    "gemma3_text": {  # two kinds of blocks with two masks, norms with 1 + weight
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "smollm3": {"no_rope_layer_interval": 2},  # every other block without rotary embedding
    "phi": {},  # parallel blocks, partial rotary embedding, biases everywhere, LayerNorm
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[tuple[str, ...], Path] = {}

    def make(family: str, mitigation: str = "var", dtype: str = "float32", phases: str = "both") -> Path:
        key = (family, mitigation, dtype, phases)
        if key not in made:
            folder = tmp_path_factory.mktemp(family)
            small = {"calibration.tokens": 64, "calibration.window": 32}
            recipe = PLAIN.replace({"mitigation": mitigation, "dtype": dtype, "phases": phases, **small})
            make_tiny(folder / "model", family, **FAMILIES[family])
            made[key] = convert(str(folder / "model"), folder / "out", recipe)
        return made[key]

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_families(converted: Callable[..., Path], family: str) -> None:
    out = converted(family)
    parity = json.loads((out / "report.json").read_text())["parity"]
    assert parity["passed"]
    assert parity["largest_flip_share"] == 0
    graph = onnx.load(out / "model.onnx", load_external_data=False)
    onnx.checker.check_model(out / "model.onnx")
    kinds = Counter(node.op_type for node in graph.graph.node)
    assert kinds["Attention"] == 3
    assert kinds["SparseLinear"] == parity["layers"]
    assert {node.domain for node in graph.graph.node} == {"", "nmsparse"}
    names = [value.name for value in graph.graph.input]
    assert names[:3] == ["input_ids", "attention_mask", "position_ids"]
    assert names[3:] == [f"past_key_values.{i}.{part}" for i in range(3) for part in ("key", "value")]
    assert [value.name for value in graph.graph.output] == [
        "logits",
        *(f"present.{i}.{part}" for i in range(3) for part in ("key", "value")),
    ]


@pytest.mark.parametrize("mitigation", ["none", "s_pts", "d_pts", "s_pts+var", "d_pts+var"])
def test_mitigations_reach_the_graph(converted: Callable[..., Path], mitigation: str) -> None:
    out = converted("qwen2", mitigation)
    assert json.loads((out / "report.json").read_text())["parity"]["passed"]
    graph = onnx.load(out / "model.onnx", load_external_data=False)
    node = next(n for n in graph.graph.node if n.op_type == "SparseLinear")
    settings = {a.name: a.i or a.s for a in node.attribute}
    expected = {"none": b"none", "s_pts": b"static", "d_pts": b"token_median"}
    assert settings["shift_mode"] == expected[mitigation.partition("+")[0]]
    assert bool(settings["variance"]) == mitigation.endswith("var")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_other_dtypes(converted: Callable[..., Path], dtype: str) -> None:
    out = converted("llama", "s_pts+var", dtype)
    graph = onnx.load(out / "model.onnx")
    kind = {"float16": onnx.TensorProto.FLOAT16, "bfloat16": onnx.TensorProto.BFLOAT16}[dtype]
    weights = [t for t in graph.graph.initializer if t.name.endswith("_proj.weight")]
    assert {t.data_type for t in weights} == {kind}
    assert json.loads((out / "report.json").read_text())["parity"]["passed"]
    logits = load(out)(input_ids=torch.arange(3, 20)[None]).logits
    full = load(converted("llama", "s_pts+var"))(input_ids=torch.arange(3, 20)[None]).logits
    assert logits.dtype == torch.float32
    assert 0 < (logits - full).norm() / full.norm() < 1  # near the float32 model, and not it


@pytest.mark.parametrize(
    ("where", "error", "said"),
    [
        ("model.embed_tokens", ExportError, r"model\.embed_tokens\.weight: numbers must be at most 65504 for float16"),
        ("model.layers.1.mlp.up_proj", RecipeError, "weights: must be at most 65504 for float16"),
    ],
)
def test_a_number_too_large_for_float16_is_refused(
    tmp_path: Path, where: str, error: type[Exception], said: str
) -> None:
    model = make_tiny(tmp_path / "model")
    path = model / "model.safetensors"
    tensors = load_file(path)
    tensors[f"{where}.weight"][3, 5] = -70000
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(error, match=rf"{said}, got 70000\. Use .*bfloat16"):
        convert(str(model), tmp_path / "out", PLAIN.replace({"dtype": "float16"}))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    convert(str(model), tmp_path / "out", PLAIN.replace({"dtype": "bfloat16"}))


@pytest.mark.parametrize(("phases", "dtype"), each(["prefill", "decode"], ["float32", "float16", "bfloat16"]))
def test_phases(converted: Callable[..., Path], phases: str, dtype: str) -> None:
    out = converted("llama", "s_pts+var", dtype, phases)
    assert json.loads((out / "report.json").read_text())["parity"]["passed"]
    graph = onnx.load(out / "model.onnx", load_external_data=False).graph
    nodes = [node for node in graph.node if node.op_type == "SparseLinear"]
    assert len(nodes) == 21
    assert {node.input[INPUTS.index("sparse")] for node in nodes} == {"sparse"}
    assert sum("sparse" in node.output for node in graph.node) == 1
    if dtype == "float32":
        ids = torch.arange(3, 20)[None]
        tokens = {"prefill": ids, "decode": ids[:, :1]}
        dense = open_checkpoint(str(out.parent / "model")).model()
        for phase, given in tokens.items():
            with torch.no_grad():
                expected = dense(input_ids=given).logits
            error = (load(out)(input_ids=given).logits - expected).norm() / expected.norm()
            assert error > 1e-2 if phase == phases else error < 1e-5


def test_each_setting_of_phases_writes_the_tokens_of_torch(converted: Callable[..., Path]) -> None:
    prompt = torch.tensor([[1, 40, 7, 99, 123, 5, 61], [1, 9, 8, 77, 200, 31, 4]])
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    written = set()
    for phases in get_args(Phases):
        out = converted("llama", phases=phases)
        reference = open_checkpoint(str(out.parent / "model")).model()
        for name, layer in calibration_file.read(out / calibration_file.NAME).items():
            install(reference, name, layer, phases=phases)
        found, expected = (
            model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options).tolist()
            for model in (load(out), reference)
        )
        assert found == expected
        written.add(str(found))
    assert len(written) == 3  # the settings differ, so that a wrong one shows


def test_weights_are_stored_once_and_as_baked(converted: Callable[..., Path]) -> None:
    out = converted("llama")
    graph = onnx.load(out / "model.onnx")
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in graph.graph.initializer}
    checkpoint = open_checkpoint(str(out.parent / "model"))
    for name in checkpoint.files:
        weight = checkpoint.read(name).numpy()
        expected = weight.T if name.endswith("_proj.weight") or name == "lm_head.weight" else weight
        np.testing.assert_array_equal(stored[name], expected, err_msg=name)
    data = (out / "model.onnx.data").stat().st_size
    assert data <= sum(path.stat().st_size for path in {p for p in checkpoint.files.values()})


def test_metadata_and_manifest(converted: Callable[..., Path]) -> None:
    out = converted("llama")
    manifest = json.loads((out / "manifest.json").read_text())
    metadata = {p.key: p.value for p in onnx.load(out / "model.onnx", load_external_data=False).metadata_props}
    assert metadata["nmsparse.recipe_sha256"] == manifest["recipe_sha256"]
    assert metadata["nmsparse.source_revision"] == manifest["source"]["weights_sha256"]
    assert metadata["nmsparse.version"] == manifest["versions"]["nmsparse"]
    assert set(manifest["files"]) == {p.name for p in out.iterdir()} - {"manifest.json"}
    for needed in ("config.json", "generation_config.json", "tokenizer.json", "genai_config.json", "recipe.yaml"):
        assert needed in manifest["files"]


def test_the_kernel_lies_in_out_where_it_is_asked_for(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "libany.so"
    library.write_bytes(b"any")
    out = convert(str(tiny), tmp_path / "out", PLAIN)
    monkeypatch.setenv(VARIABLE, str(library))
    assert not list(out.glob("*.so"))
    for again, embed in ((tmp_path / "without", False), (tmp_path / "with", True)):
        export(out, again, {}, Stages(), embed_kernel=embed)
        options = json.loads((again / "genai_config.json").read_text())["model"]["decoder"]["session_options"]
        assert options.get("custom_ops_library") == (library.name if embed else None)
        assert (again / library.name).is_file() == embed
        assert (library.name in json.loads((again / "manifest.json").read_text())["files"]) == embed
    overlaid = json.loads(genai_overlay())["model"]["decoder"]["session_options"]
    assert overlaid == {"custom_ops_library": str(library)}
    with pytest.raises(ExportError, match="--embed-kernel: dtype must be float32"):
        export(out, tmp_path / "half", {"dtype": "float16"}, Stages(), embed_kernel=True)
    monkeypatch.setenv(VARIABLE, "")
    with pytest.raises(ExportError, match="--embed-kernel: the op's library must be built"):
        export(out, tmp_path / "none", {}, Stages(), embed_kernel=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["libany.so", "out", "with", "without"]


def test_left_padded_batch_gives_the_tokens_of_single_runs(converted: Callable[..., Path]) -> None:
    model = load(converted("gemma3_text"))
    rows = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], [20, 21, 22], [30]]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    batch = model.generate(input_ids=ids, attention_mask=mask, **options)
    for row, found in zip(rows, batch, strict=True):
        alone = torch.tensor([row])
        single = model.generate(input_ids=alone, attention_mask=torch.ones_like(alone), **options)
        assert found[width:].tolist() == single[0, len(row) :].tolist()


def test_prefill_in_pieces_equals_prefill_at_once(converted: Callable[..., Path]) -> None:
    model = load(converted("llama"))
    ids = torch.arange(3, 33)[None]
    whole = model(input_ids=ids).logits
    first = model(input_ids=ids[:, :7])
    second = model(input_ids=ids[:, 7:8], past_key_values=first.past_key_values)
    third = model(input_ids=ids[:, 8:], past_key_values=second.past_key_values)
    pieces = torch.cat([first.logits, second.logits, third.logits], 1)
    torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-4)


def test_equal_blocks_share_a_signature_and_others_do_not(tmp_path: Path) -> None:
    skeleton = open_checkpoint(str(make_tiny(tmp_path, "gemma3_text", **FAMILIES["gemma3_text"]))).skeleton()
    kinds = [signature(block) for block in find_blocks(skeleton)[1]]
    assert kinds[0] == kinds[1] != kinds[2]


def _altered(out: Path, folder: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    model = onnx.load(out / "model.onnx")
    change(model)
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data")
    return folder


def _scale_one_layer(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        if tensor.name.endswith("layers.1.mlp.up_proj.weight"):
            tensor.raw_data = (onnx.numpy_helper.to_array(tensor) * np.float32(1.001)).tobytes()


def _keep_one_more(model: onnx.ModelProto) -> None:
    node = next(n for n in model.graph.node if n.op_type == "SparseLinear")
    next(a for a in node.attribute if a.name == "keep").i += 1


def _body(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Return the nodes of the function, those in branches too."""
    nodes = list(model.functions[0].node)
    return nodes + [inner for node in nodes for a in node.attribute for inner in a.g.node]


def _ties_to_the_higher_channel(model: onnx.ModelProto) -> None:
    node = next(n for n in _body(model) if n.op_type == "TopK")
    next(a for a in node.attribute if a.name == "largest").i = 0


def _no_variance(model: onnx.ModelProto) -> None:
    node = next(n for n in _body(model) if n.op_type == "Sqrt")
    node.op_type = "Identity"


def _wrong_scale_of_attention(model: onnx.ModelProto) -> None:
    node = next(n for n in model.graph.node if n.op_type == "Attention")
    next(a for a in node.attribute if a.name == "scale").f *= 1.001


def _ignore_the_phase_in_the_body(model: onnx.ModelProto) -> None:
    for node in model.functions[0].node:
        if node.op_type == "If":
            branches = {a.name: a for a in node.attribute}
            branches["else_branch"].g.CopyFrom(branches["then_branch"].g)


def _correct_the_dense_phase(model: onnx.ModelProto) -> None:
    branches = {a.name: a for a in [n for n in model.functions[0].node if n.op_type == "If"][1].attribute}
    product = branches["else_branch"].g.node[0]
    product.op_type = "Add"
    product.input.append(product.input[0])


def _the_other_phase(model: onnx.ModelProto) -> None:
    next(n for n in model.graph.node if "sparse" in n.output).op_type = "Equal"


def _the_batch_for_the_sequence(model: onnx.ModelProto) -> None:
    size = model.graph.node[0]
    assert (size.op_type, size.input) == ("Shape", ["input_ids"])
    start, end = (next(a for a in size.attribute if a.name == name) for name in ("start", "end"))
    start.i, end.i = 0, 1


MUTANTS = [
    (_scale_one_layer, r"up_proj \(prefill\): error must be at most"),
    (_keep_one_more, r"q_proj \(prefill\): masks must differ in at most"),
    (_ties_to_the_higher_channel, r"masks must differ"),
    (_no_variance, r"error must be at most"),
    (_wrong_scale_of_attention, r"\(prefill, dense\): error must be at most"),
]
MUTANTS_OF_PHASES = [
    (_ignore_the_phase_in_the_body, r"q_proj \(decode\): masks must differ"),
    (_correct_the_dense_phase, r"\(decode\): error must be at most"),
    (_the_other_phase, r"q_proj \(prefill\): masks must differ"),
    (_the_batch_for_the_sequence, r"q_proj \(decode\): masks must differ"),
]
ALL_MUTANTS = [
    *(("both", *row) for row in MUTANTS),
    *(("prefill", *row) for row in [*MUTANTS, *MUTANTS_OF_PHASES]),
]


@pytest.mark.parametrize(("phases", "mutate", "message"), ALL_MUTANTS)
def test_validate_finds_every_mutant(
    converted: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    phases: Phases,
    mutate: Callable[[onnx.ModelProto], None],
    message: str,
) -> None:
    out = converted("llama", phases=phases)
    monkeypatch.setenv(VARIABLE, "")  # some are mutants of the function body, which our kernel does not run
    assert not _parity(out, out, phases).failures
    with pytest.raises(ValidationError, match=message):
        _parity(out, _altered(out, tmp_path, mutate), phases).check()


@pytest.mark.parametrize(("written", "wanted"), [("both", "prefill"), ("prefill", "both"), ("prefill", "decode")])
def test_validate_finds_the_phases_of_another_recipe(
    converted: Callable[..., Path], written: Phases, wanted: Phases
) -> None:
    out = converted("llama", phases=written)
    with pytest.raises(ValidationError, match=r"\((prefill|decode)\): masks must differ in at most"):
        _parity(out, out, wanted).check()


def _parity(source: Path, out: Path, phases: Phases) -> Parity:
    """Compare `out` with the checkpoint that `source` was converted from."""
    checkpoint = open_checkpoint(str(source.parent / "model"))
    params = {
        name: Params(8, 16, variance=True)
        for name, module in checkpoint.skeleton().named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    ids = torch.randint(3, 200, (1, 48), generator=torch.Generator().manual_seed(0))
    return validate(out, checkpoint.model(), params, Storage(), phases, ids)
