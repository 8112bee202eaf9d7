"""float16 ends at 65504: a model that goes beyond it is refused, with the layer and what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import PLAIN, make_tiny
from safetensors.torch import load_file, save_file
from torch import Tensor

from converter import convert, pipeline
from converter.checkpoint import open_checkpoint
from converter.errors import ExportError, ValidationError
from converter.evaluation.overflow import beyond_float16, check_range
from converter.pipeline import export, validate
from converter.sparsity.linear import Params
from converter.sparsity.quantize import Storage
from converter.stages import Stages

SAID = (
    r"model\.layers\.1\.mlp\.down_proj: numbers must be at most 65504 for float16, got \d(\.\d)?e\+0[56] at its "
    r"input\. Export with --dtype bfloat16 or float32\."
)
IDS = torch.randint(4, 256, (1, 16), generator=torch.Generator().manual_seed(1))


def _changed(folder: Path, change: Callable[[dict[str, Tensor]], None], **settings: object) -> str:
    path = make_tiny(folder, **settings) / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    return str(folder)


def _large_products(tensors: dict[str, Tensor]) -> None:
    """Let the products inside one block be of 1e5 and more, and what comes out of it small again."""
    for name, factor in (("gate", 1000.0), ("up", 1000.0), ("down", 1e-6)):
        tensors[f"model.layers.1.mlp.{name}_proj.weight"] *= factor


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return _changed(tmp_path_factory.mktemp("large") / "model", _large_products)


@pytest.fixture(scope="module")
def wide(model: str) -> Path:
    """The model in bfloat16, which has room for them."""
    return convert(model, Path(model).with_name("wide"), PLAIN.replace({"dtype": "bfloat16"}))


def test_convert_and_export_refuse_float16(model: str, wide: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=SAID):
        convert(model, tmp_path / "out", PLAIN.replace({"dtype": "float16"}))
    with pytest.raises(ExportError, match=SAID):
        export(wide, tmp_path / "out", {"dtype": "float16"}, Stages())
    assert not list(tmp_path.iterdir())


def test_validate_names_the_layer_and_nothing_else(wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "check_range", lambda *_: None)
        export(wide, tmp_path / "out", {"dtype": "float16"}, Stages())
    with pytest.raises(ValidationError, match=SAID) as error:
        validate(tmp_path / "out", None, None, Stages())
    assert len(str(error.value).splitlines()) == 2


def test_a_sum_between_layers_counts(tmp_path: Path) -> None:
    def each_fits_and_two_do_not(tensors: dict[str, Tensor]) -> None:
        for block in (0, 1):
            tensors[f"model.layers.{block}.mlp.down_proj.bias"][5] = 40000

    model = open_checkpoint(_changed(tmp_path / "model", each_fits_and_two_do_not, mlp_bias=True)).model()
    said = "model.layers.2.input_layernorm: numbers must be at most 65504 for float16, got 8e+04 at its input."
    assert beyond_float16(model, IDS).startswith(said)


def test_what_only_the_sparse_model_needs_is_found(tiny: Path) -> None:
    model = open_checkpoint(str(tiny)).model()
    layer = "model.layers.0.self_attn.o_proj"
    with pytest.raises(
        ExportError, match=rf"{layer}: numbers must be at most 65504 for float16, got 7e\+04 at its out"
    ):
        check_range(model, {layer: Params(8, 16, output_shift=torch.full((64,), 7e4))}, Storage(), "both", IDS)


def test_what_fits_passes(tiny: Path) -> None:
    assert beyond_float16(open_checkpoint(str(tiny)).model(), IDS) == ""
