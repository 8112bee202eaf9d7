from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PLAIN, make_tiny
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing

from converter.calibration import file as calibration_file
from converter.calibration.distill import distill
from converter.calibration.sample import sampled
from converter.calibration.train import train
from converter.calibration.walk import calibrate
from converter.checkpoint import open_checkpoint
from converter.errors import CalibrationError, RecipeError
from converter.pipeline import calibration_text, convert
from converter.place import write_whole
from converter.plan import plan
from converter.recipe import Training
from converter.sources.texts import texts, windows
from converter.sparsity.linear import Params, SparseLinear, install
from converter.sparsity.mitigations import Given
from converter.sparsity.statistics import LayerStats
from converter.stages import Stages


def test_statistics_do_not_depend_on_the_batches() -> None:
    x = torch.randn(100, 8, generator=torch.Generator().manual_seed(0)) + 3
    whole, parts = LayerStats.of("layer", 8), LayerStats.of("layer", 8)
    whole.update(x)
    for part in x.split(7):
        parts.update(part[None])
    assert parts.tokens == 100
    torch.testing.assert_close(parts.channel_mean(), x.double().mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(parts.channel_mean(), whole.channel_mean(), rtol=1e-12, atol=0)
    assert parts.mean_of_medians() == pytest.approx(x.median(-1).values.double().mean().item(), rel=1e-9)


def test_statistics_refuse_what_is_not_finite() -> None:
    with pytest.raises(CalibrationError, match=r"layer: activations must be finite, got NaN or Inf"):
        LayerStats.of("layer", 2).update(torch.tensor([[1.0, float("nan")]]))


def test_statistics_of_a_family_that_flattens_windows_and_tokens(tmp_path: Path) -> None:
    """OPT gives fc1 and fc2 `[B * S, K]`: the first token of every window is still left out."""
    family = {"ffn_dim": 96, "word_embed_proj_dim": 64, "num_key_value_heads": 4}
    checkpoint = open_checkpoint(str(make_tiny(tmp_path / "model", "opt", **family)))
    recipe = PLAIN.replace({"mitigation": "s_pts+var", "calibration.window": 16, "calibration.tokens": 80})
    ids = torch.randint(3, 200, (5, 16), generator=torch.Generator().manual_seed(0))
    params = calibrate(checkpoint.model(), plan(checkpoint.skeleton(), recipe), recipe, ids, tmp_path)
    seen: list[torch.Tensor] = []
    model, name = checkpoint.model(), "model.decoder.layers.0.fc1"
    model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(input_ids=ids)
    assert seen[0].shape == (80, 64)
    expected = seen[0].reshape(5, 16, 64)[:, 1:].mean((0, 1))
    torch.testing.assert_close(params[name].shift, expected, rtol=1e-5, atol=1e-6)


def test_walk_sees_the_inputs_of_the_sparse_model(tiny: Path, tmp_path: Path) -> None:
    """The mean input of each layer without first tokens, earlier blocks sparse and its own block dense."""
    checkpoint = open_checkpoint(str(tiny))
    recipe = PLAIN.replace({"mitigation": "s_pts+var", "calibration.window": 16, "calibration.tokens": 80})
    ids = torch.randint(3, 200, (5, 16), generator=torch.Generator().manual_seed(0))  # batches of 4 and 1
    model, layers = checkpoint.model(), plan(checkpoint.skeleton(), recipe)
    params = calibrate(model, layers, recipe, ids, tmp_path)
    assert isinstance(model.model.layers[0].mlp.up_proj, SparseLinear)
    assert not list(tmp_path.iterdir())

    again = checkpoint.model()
    for name in params:
        index = int(name.split(".")[2])
        if index == 0:
            parent, _, child = name.rpartition(".")
            setattr(again.get_submodule(parent), child, model.get_submodule(name))
    names = [name for name in params if ".1." in name]
    assert len(names) == 7  # q, k, v share their statistics, and so do gate and up
    seen: dict[str, torch.Tensor] = {}
    for name in names:
        again.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    with torch.no_grad():
        again(input_ids=ids)
    for name in names:
        shift, mean = params[name].shift, seen[name][:, 1:].reshape(-1, seen[name].shape[-1]).mean(0)
        assert shift is not None
        torch.testing.assert_close(shift, mean, rtol=1e-4, atol=1e-5)


def test_calibration_file_round_trip(tmp_path: Path) -> None:
    params = {"a.b": Params(8, 16, "static", True, shift=torch.randn(16)), "c": Params(2, 4)}
    calibration_file.write(tmp_path / "c.safetensors", params)
    found = calibration_file.read(tmp_path / "c.safetensors")
    assert found["c"] == params["c"]
    assert (found["a.b"].keep, found["a.b"].shift_mode, found["a.b"].variance) == (8, "static", True)
    assert torch.equal(found["a.b"].shift, params["a.b"].shift)  # type: ignore[arg-type]
    (tmp_path / "bad.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(CalibrationError, match="must be a calibration"):
        calibration_file.read(tmp_path / "bad.safetensors")


def test_a_broken_file_never_stands_in_the_place_of_a_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_whole(path, lambda beside: beside.write_text("whole"))

    def cut(beside: Path) -> None:
        beside.write_text("bro")
        raise CutError

    with pytest.raises(CutError):
        write_whole(path, cut)
    assert path.read_text() == "whole"


SHORT = {
    "training.steps": 12,
    "training.tokens": 256,
    "training.batch": 2,
    "training.held_out": 2,
    "training.patience": 12,
}
METHODS = [
    {"criterion": "wina", "mitigation": "permute+s_pts+var+refit", "calibration.tokens": 512},
    {"criterion": "clact", "mitigation": "pcs+var"},
    {"criterion": "amber_trimmed", "mitigation": "permute+s_pts"},
    {"criterion": "wina", "mitigation": "permute+r_sparse+d_pts+var", "rank": 3},
    {"mitigation": "l_pts+ls+var", "training.learning_rate": 1e-2, **SHORT},
    {"mitigation": "permute+r_sparse", "r_sparse": "trained", "rank": 3, "training.learning_rate": 2e-3, **SHORT},
    {"mitigation": "l_pts+ls+var", "training.objective": "layer", "training.learning_rate": 1e-3, **SHORT},
    {"mitigation": "permute+distill", "distill": "low_rank", "rank": 4, "training.learning_rate": 5e-3, **SHORT},
    {"mitigation": "permute+r_sparse+d_pts+var", "rank": 3, "dtype": "bfloat16", "phases": "decode"},
    {"mitigation": "r_sparse+s_pts+var", "rank": 3, "dtype": "float16", "phases": "prefill"},
    {
        "mitigation": "permute+s_pts+distill",
        "dtype": "float16",
        "training.learning_rate": 2e-3,
        **SHORT,
    },
]


@pytest.mark.parametrize("changes", METHODS, ids=lambda changes: "-".join(map(str, list(changes.values())[:2])))
def test_methods_convert_with_parity(tiny: Path, tmp_path: Path, changes: dict[str, object]) -> None:
    small = {
        "pattern": "2:8",
        "calibration.tokens": 64,
        "calibration.window": 16,
        "calibration.batch": 2,
        "permute": "layer",
    }
    out = convert(str(tiny), tmp_path / "out", PLAIN.replace({**small, **changes}))
    report = json.loads((out / "report.json").read_text())
    assert report["parity"]["passed"]
    parts = {name.rpartition(".")[2] for name in load_file(out / "calibration.safetensors")}
    assert ("permutation" in parts) == ("permute" in str(changes["mitigation"]))
    assert ("output_scale" in parts) == ("ls" in str(changes["mitigation"]).split("+"))
    assert ("weight" in parts) == any(name in str(changes["mitigation"]) for name in ("refit", "distill"))
    assert ("residual_in" in parts) == ("r_sparse" in str(changes["mitigation"]))


def test_refit_needs_a_batch_to_hold_out(tiny: Path, tmp_path: Path) -> None:
    recipe = PLAIN.replace({"mitigation": "refit", "calibration.tokens": 64, "calibration.window": 16})
    with pytest.raises(CalibrationError, match=r"calibration: must have at least two batches .* got 1\."):
        convert(str(tiny), tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("mitigation", "rate", "share"), [("distill", 2e-3, 0.9), ("l_pts", 1e-3, 0.999), ("ls", 3e-3, 0.999)]
)
def test_training_lowers_the_divergence_and_is_the_same_for_a_seed(
    tiny: Path, mitigation: str, rate: float, share: float
) -> None:
    checkpoint = open_checkpoint(str(tiny))
    recipe = PLAIN.replace({"mitigation": mitigation, **SHORT, "training.learning_rate": rate})
    ids = torch.randint(3, 200, (12, 16), generator=torch.Generator().manual_seed(0))
    start = {
        layer.name: recipe.methods()[0].fit(Params(2, 8), Given(torch.empty(layer.out_features, layer.in_features)))
        for layer in plan(checkpoint.skeleton(), recipe).sparse
    }
    runs = [distill(checkpoint.model(), start, ids, recipe)[0] for _ in range(2)]
    for name in start:
        for part in recipe.trains():
            first, second, before = (getattr(run[name], part) for run in (*runs, start))
            assert torch.equal(first, second)
            assert before is None or not torch.equal(first, before)

    def sparse(params: dict[str, Params]) -> torch.Tensor:
        model = checkpoint.model()
        for name, layer in params.items():
            install(model, name, layer)
        with torch.no_grad():
            logits: torch.Tensor = model(input_ids=ids).logits
        return logits.flatten(0, 1).log_softmax(-1)

    with torch.no_grad():
        dense = checkpoint.model()(input_ids=ids).logits.flatten(0, 1).log_softmax(-1)
    losses = [
        torch.nn.functional.kl_div(sparse(params), dense, reduction="batchmean", log_target=True)
        for params in (start, runs[0])
    ]
    assert losses[1] < share * losses[0]


@pytest.mark.parametrize(
    ("windows_", "rate", "message"),
    [
        (3, 1e-4, r"training\.tokens must give at least 4 windows of 16, got 3"),
        (8, 1e4, r"training: (loss must be finite|divergence on held-out text must fall)"),
    ],
)
def test_distillation_that_cannot_work(tiny: Path, windows_: int, rate: float, message: str) -> None:
    checkpoint = open_checkpoint(str(tiny))
    recipe = PLAIN.replace({"mitigation": "distill", **SHORT, "training.learning_rate": rate})
    start = {layer.name: Params(2, 8) for layer in plan(checkpoint.skeleton(), recipe).sparse}
    ids = torch.randint(3, 200, (windows_, 16), generator=torch.Generator().manual_seed(0))
    with pytest.raises(CalibrationError, match=message):
        distill(checkpoint.model(), start, ids, recipe)


class CutError(BaseException):
    pass


@pytest.mark.parametrize("objective", ["logits", "layer"])
def test_interrupted_training_ends_with_the_same_bits(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: str
) -> None:
    """A conversion that is cut off and made again, beside one that is not; the text is the model's own."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    small = {"calibration.tokens": 64, "calibration.window": 16, "calibration.batch": 2, "pattern": "2:8"}
    recipe = PLAIN.replace(
        {
            **small,
            "mitigation": "permute+distill",
            "training.objective": objective,
            "training.learning_rate": 2e-3,
            **SHORT,
        }
    )

    def result(name: str) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = load_file(
            convert(str(tiny), tmp_path / name, recipe) / "calibration.safetensors"
        )
        assert not list((tmp_path / "home" / "nmsparse" / "training").iterdir())  # nothing is left behind
        return tensors

    whole = result("whole")
    calls = 0
    step = torch.optim.AdamW.step

    def cut(self: torch.optim.AdamW, *args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == (8 if objective == "logits" else 20):  # the second block, where blocks are trained one by one
            raise CutError
        return step(self, *args, **kwargs)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.AdamW, "step", cut)
        with pytest.raises(CutError):
            convert(str(tiny), tmp_path / "cut", recipe)
    assert not (tmp_path / "cut").exists()
    (state,) = (tmp_path / "home" / "nmsparse" / "training").iterdir()
    assert {path.name for path in state.iterdir()} == {
        "text.safetensors",
        "distill.pt" if objective == "logits" else "block-0.safetensors",
    }
    steps = 0

    def count(self: torch.optim.AdamW, *args: object, **kwargs: object) -> object:
        nonlocal steps
        steps += 1
        return step(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.optim.AdamW, "step", count)
    again = result("cut")
    assert steps == (12 - 7 if objective == "logits" else 24)  # it went on, and did not start anew
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_training_stops_early_and_keeps_the_best() -> None:
    part = torch.nn.Parameter(torch.tensor([1.0]))
    settings = Training(steps=64, learning_rate=0.1, warm_up=0.0, patience=2)
    # Text that pulls the parameter to -9, judged by text that wants it at 0.
    curve = train([part], lambda _: (part + 9).square().sum(), lambda: part.item() ** 2, 1, settings, 0)
    steps, losses = zip(*curve, strict=True)
    assert steps[-1] < 64
    best = losses.index(min(losses))
    assert 0 < best == len(losses) - 1 - 2
    assert part.item() ** 2 == pytest.approx(losses[best])


def test_too_little_memory(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 1000})())
    checkpoint = open_checkpoint(str(tiny))
    recipe = PLAIN.replace({"mitigation": "distill", **SHORT})
    start = {layer.name: Params(2, 8) for layer in plan(checkpoint.skeleton(), recipe).sparse}
    with pytest.raises(
        CalibrationError, match=r"training: memory must be at least .* Train with --set distill=low_rank"
    ):
        distill(checkpoint.model(), start, torch.zeros(12, 16, dtype=torch.int64), recipe)


@pytest.mark.parametrize("variant", ["full", "low_rank"])
def test_training_by_block_lowers_the_error_of_each_block(tiny: Path, tmp_path: Path, variant: str) -> None:
    """On the training text, block by block: the output of the sparse block against the dense one on the same input."""
    checkpoint = open_checkpoint(str(tiny))
    small = {"pattern": "2:8", "calibration.tokens": 128, "calibration.window": 16, "calibration.batch": 2}
    ids = torch.randint(3, 200, (8, 16), generator=torch.Generator().manual_seed(0))
    errors = {}
    for mitigation in ("none", "distill"):
        recipe = PLAIN.replace(
            {**small, "mitigation": mitigation, "distill": variant, "rank": 16, "training.objective": "layer"}
            | {**SHORT, "training.steps": 40, "training.learning_rate": 1e-3}
        )
        sparse, dense = checkpoint.model(), checkpoint.model()
        calibrate(sparse, plan(checkpoint.skeleton(), recipe), recipe, ids, tmp_path)
        found = []
        for ours, theirs in zip(sparse.model.layers, dense.model.layers, strict=True):
            seen: list[Any] = []
            handle = ours.register_forward_hook(lambda _, *call, seen=seen: seen.append(call), with_kwargs=True)
            with torch.no_grad():
                sparse(input_ids=ids, use_cache=False)
                handle.remove()
                ((args, kwargs, out),) = seen
                wanted = theirs(*args, **kwargs)
            found.append(((out - wanted).square().sum(-1) / wanted.square().sum(-1)).mean().item())
        errors[mitigation] = found
    # The first block sees embeddings of random tokens only: what it learns there need not hold for others.
    assert errors["distill"][0] <= 1.0001 * errors["none"][0]
    assert all(after < 0.9 * before for before, after in zip(errors["none"][1:], errors["distill"][1:], strict=True))


def test_rank_that_is_not_below_the_width(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"r_sparse: rank must be between 1 and 63 for a layer of 64 x 64, got 64"):
        convert(str(tiny), tmp_path / "out", PLAIN.replace({"mitigation": "r_sparse", "rank": 64}))
    assert not (tmp_path / "out").exists()


def test_text_sources(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("plain")
    (tmp_path / "a.jsonl").write_text('{"text": "one", "q": "two"}\n{"text": "three", "q": "four"}\n')
    assert list(texts(str(tmp_path / "a.txt"))) == ["plain"]
    assert list(texts(str(tmp_path / "a.jsonl"))) == ["one", "three"]
    assert list(texts(str(tmp_path / "a.jsonl"), "q")) == ["two", "four"]
    parquet = pytest.importorskip("pyarrow.parquet", reason="nmsparse[data] is not installed")
    import pyarrow

    parquet.write_table(pyarrow.table({"text": ["five", "six"]}), tmp_path / "a.parquet")
    assert list(texts(str(tmp_path / "a.parquet"))) == ["five", "six"]
    assert sum(map(len, texts("python"))) > 100_000


def test_data_set_of_the_hub_format(tmp_path: Path) -> None:
    """A data set folder, read by the library that reads the Hub: no network in the tests."""
    pytest.importorskip("datasets", reason="nmsparse[data] is not installed")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(json.dumps({"text": f"row {i}"}) for i in range(3)))
    assert list(texts(f"hub:{folder}::train")) == ["row 0", "row 1", "row 2"]


def test_sources_take_turns(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("lazy dog " * 40)
    (tmp_path / "b.txt").write_text("brown fox " * 40)
    checkpoint = open_checkpoint(str(tiny))
    small = {"mitigation": "s_pts", "calibration.tokens": 48, "calibration.window": 16}
    sources = [f"{tmp_path / name}.txt" for name in "ab"]
    recipe = PLAIN.replace({**small, "calibration.source": ",".join(sources)})
    found = calibration_text(checkpoint, recipe, None, Stages())
    a, b = (windows(source, checkpoint.tokenizer(), 2, 16) for source in sources)
    assert torch.equal(found, torch.stack([a[0], b[0], a[1]]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "{", r"line 1: must be JSON"),
        ("a.jsonl", '{"t": 1}', r"each row must have text in 'text', got \['t'\]"),
        ("a.txt", "", r"must have at least 32 tokens, got 0"),
        ("a.txt", "short", r"must have at least 32 tokens"),
    ],
)
def test_bad_text(tiny: Path, tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(CalibrationError, match=message):
        windows(str(tmp_path / name), open_checkpoint(str(tiny)).tokenizer(), 2, 16)


def test_absent_text(tiny: Path) -> None:
    with pytest.raises(CalibrationError, match=r"there is no file 'nowhere\.txt'"):
        windows("nowhere.txt", open_checkpoint(str(tiny)).tokenizer(), 2, 16)


def test_self_sampling_is_reproducible(tiny: Path) -> None:
    checkpoint = open_checkpoint(str(tiny))
    model, tokenizer = checkpoint.model(), checkpoint.tokenizer()
    seen: list[int] = []
    draw = [sampled(model, tokenizer, 30, 24, seed, lambda done, total: seen.append(done)) for seed in (0, 0, 1)]
    assert draw[0].shape == (30, 24)
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])
    assert max(seen) == 720
    # The tokenizer begins a text with nothing: the first token is any but the special ones.
    first = draw[0][:, 0]
    assert len(first.unique()) > 10
    assert not set(first.tolist()) & set(tokenizer.all_special_ids)


def test_self_sampling_begins_as_the_tokenizer_does(tiny: Path) -> None:
    checkpoint = open_checkpoint(str(tiny))
    tokenizer = checkpoint.tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    ids = sampled(checkpoint.model(), tokenizer, 30, 5, 0, lambda done, total: None)
    assert ids.shape == (30, 5)
    assert (ids[:, 0] == 1).all()
    assert len(ids[:, 1].unique()) > 10
