"""Files of parameters and orders that lie: what they hold is consistent, or a CalibrationError says what is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from converter import arrangement
from converter.arrangement import Arrangement
from converter.calibration import file as calibration_file
from converter.errors import CalibrationError
from converter.sparsity.linear import Params
from converter.sparsity.permutation import stray

SETTINGS = {"keep": 2, "group": 4, "shift_mode": "static", "variance": True}
Tensors = dict[str, Tensor]
WHOLE = {
    "a.b.channel_scale": torch.ones(8),
    "a.b.shift": torch.zeros(8),
    "a.b.output_scale": torch.ones(6),
    "a.b.output_shift": torch.ones(6),
    "a.b.permutation": torch.arange(8).flip(0),
    "a.b.residual_in": torch.ones(8, 3),
    "a.b.residual_out": torch.ones(3, 6),
    "a.b.weight": torch.ones(6, 8),
}


def written(path: Path, tensors: Tensors, layers: object = None, **metadata: str) -> Path:
    layers = {"a.b": SETTINGS} if layers is None else layers
    text = layers if isinstance(layers, str) else json.dumps(layers)
    save_file(tensors, path, metadata={"format": calibration_file.FORMAT, "layers": text, **metadata})
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    (found,) = calibration_file.read(written(tmp_path / "whole", WHOLE)).values()
    assert (found.keep, found.group, found.shift_mode, found.variance) == (2, 4, "static", True)
    for name, tensor in WHOLE.items():
        assert torch.equal(getattr(found, name.removeprefix("a.b.")), tensor)


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ("", "metadata must hold layers as JSON, got JSONDecodeError"),
        ("{", "metadata must hold layers as JSON, got JSONDecodeError"),
        ("[" * 100_000, "metadata must hold layers as JSON, got RecursionError"),
        ([], r"layers must be an object, got \[\]"),
        ({"a.b": 1}, "a.b: settings must be keep, group, shift_mode, variance, got 1"),
        ({"a.b": {"keep": 2}}, "a.b: settings must be keep, group, shift_mode, variance, got {'keep': 2}"),
        ({"a.b": SETTINGS | {"weight": 1}}, "a.b: settings must be keep, group, shift_mode, variance, got {"),
        ({"a.b": SETTINGS | {"keep": True}}, "a.b: keep must be of type int, got True"),
        ({"a.b": SETTINGS | {"keep": 2.0}}, "a.b: keep must be of type int, got 2.0"),
        ({"a.b": SETTINGS | {"group": "4"}}, "a.b: group must be of type int, got '4'"),
        ({"a.b": SETTINGS | {"variance": 1}}, "a.b: variance must be of type bool, got 1"),
        ({"a.b": SETTINGS | {"shift_mode": None}}, "a.b: shift_mode must be of type str, got None"),
        ({"a.b": SETTINGS | {"keep": 0}}, "a.b: keep must be from 1 to group, got 0:4"),
        ({"a.b": SETTINGS | {"keep": 5}}, "a.b: keep must be from 1 to group, got 5:4"),
        ({"a.b": SETTINGS | {"group": -4}}, "a.b: keep must be from 1 to group, got 2:-4"),
        ({"a.b": SETTINGS | {"shift_mode": "mean"}}, "a.b: shift_mode must be one of none, static, .* got 'mean'"),
        ({"a.b": SETTINGS | {"shift_mode": "static\0"}}, r"a.b: shift_mode must be one of .* got 'static\\x00'"),
        (
            {"a.b": SETTINGS | {"shift_mode": "none"}},
            "a.b: shift must be there with shift_mode static, .* got none with one",
        ),
        ({"a.b": SETTINGS | {"keep": 3, "group": 3}}, "a.b: group must divide the input channels, got 3 and 8"),
        ({"a": SETTINGS}, "a.b.channel_scale must be a known part of a layer of the file, got another"),
        ({}, "a.b.channel_scale must be a known part of a layer of the file, got another"),
    ],
)
def test_settings_that_lie_are_refused(tmp_path: Path, layers: object, said: str) -> None:
    with pytest.raises(CalibrationError, match=f"{tmp_path}/lie: {said}.* Run nmsparse calibrate."):
        calibration_file.read(written(tmp_path / "lie", WHOLE, layers))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"a.b.extra": torch.ones(1)}, "a.b.extra must be a known part of a layer of the file, got another"),
        ({"stray": torch.ones(1)}, "stray must be a known part of a layer of the file, got another"),
        ({"a.b.shift": None}, "a.b: shift must be there with shift_mode static, .* static without one"),
        ({"a.b.residual_in": None}, "a.b: residual_in and residual_out must be there together, got residual_out"),
        ({"a.b.residual_out": None}, "a.b: residual_in and residual_out must be there together, got residual_in"),
        ({"a.b.channel_scale": torch.ones(8).half()}, "a.b: channel_scale must be of torch.float32, got torch.float16"),
        ({"a.b.permutation": torch.arange(8).int()}, "a.b: permutation must be of torch.int64, got torch.int32"),
        ({"a.b.channel_scale": torch.ones(1, 8)}, r"a.b: channel_scale must be of shape \[K\], got \[1, 8\]"),
        ({"a.b.shift": torch.ones(4)}, r"a.b: shift must be of shape \[8\], got \[4\]"),
        ({"a.b.output_shift": torch.ones(5)}, r"a.b: output_shift must be of shape \[6\], got \[5\]"),
        ({"a.b.permutation": torch.arange(4)}, r"a.b: permutation must be of shape \[8\], got \[4\]"),
        ({"a.b.residual_in": torch.ones(8)}, r"a.b: residual_in must be of shape \[8, r\], got \[8\]"),
        ({"a.b.residual_in": torch.ones(8, 0)}, r"a.b: residual_in must be of shape \[8, r\], got \[8, 0\]"),
        ({"a.b.residual_out": torch.ones(2, 6)}, r"a.b: residual_out must be of shape \[3, 6\], got \[2, 6\]"),
        ({"a.b.weight": torch.ones(8, 6)}, r"a.b: weight must be of shape \[6, 8\], got \[8, 6\]"),
        ({"a.b.weight": torch.full((6, 8), torch.nan)}, "a.b: weight must hold finite numbers, got Inf or NaN"),
        ({"a.b.shift": torch.full((8,), torch.inf)}, "a.b: shift must hold finite numbers, got Inf or NaN"),
        ({"a.b.permutation": torch.arange(1, 9)}, "a.b: permutation must hold every channel once, got 8 at place 7"),
        ({"a.b.permutation": torch.arange(-1, 7)}, "a.b: permutation must hold every channel once, got -1 at place 0"),
        ({"a.b.permutation": torch.full((8,), 5)}, "a.b: permutation must hold every channel once, got 5 8 times"),
    ],
)
def test_parts_that_do_not_agree_are_refused(tmp_path: Path, changes: dict[str, Tensor | None], said: str) -> None:
    tensors = {name: tensor for name, tensor in (WHOLE | changes).items() if tensor is not None}
    with pytest.raises(CalibrationError, match=f"{tmp_path}/lie: {said}.* Run nmsparse calibrate."):
        calibration_file.read(written(tmp_path / "lie", tensors))


def test_metadata_without_layers_are_refused(tmp_path: Path) -> None:
    save_file(WHOLE, tmp_path / "lie", metadata={"format": calibration_file.FORMAT})
    with pytest.raises(CalibrationError, match="metadata must hold layers as JSON, got KeyError: 'layers'"):
        calibration_file.read(tmp_path / "lie")


def test_a_layer_may_have_no_tensors(tmp_path: Path) -> None:
    calibration_file.write(tmp_path / "file", {"a": Params(1, 1)})
    assert calibration_file.read(tmp_path / "file") == {"a": Params(1, 1)}


@pytest.mark.parametrize(
    ("tensors", "metadata", "said"),
    [
        (
            {"order.0": torch.tensor([0.0, 1.0])},
            {},
            r"order.0 must be a vector of torch.int64, got \[2\] of",
        ),
        ({"order.0": torch.zeros(1, 1).long()}, {}, r"order.0 must be a vector of torch.int64, got \[1, 1\]"),
        ({"order.0": torch.tensor([2, 0])}, {}, "order.0 must hold every place once, got 2 at place 0"),
        ({"order.0": torch.tensor([0, -1])}, {}, "order.0 must hold every place once, got -1 at place 1"),
        ({}, {"orders": None}, "metadata must hold orders as JSON, got KeyError: 'orders'"),
        ({}, {"layers": None}, "metadata must hold layers as JSON, got KeyError: 'layers'"),
        ({}, {"orders": "{"}, "metadata must hold orders as JSON, got JSONDecodeError"),
        ({}, {"orders": "[]"}, r"orders must be an object, got \[\]"),
        ({}, {"orders": '{"a": []}'}, r"orders of a must be an object, got \[\]"),
        ({}, {"orders": '{"a": {"-1": 0}}'}, "a dimension of a must be from 0 to 9, got '-1'"),
        ({}, {"orders": '{"a": {"x": 0}}'}, "a dimension of a must be from 0 to 9, got 'x'"),
        ({}, {"orders": '{"a": {"0": 1}}'}, "a must have an order of the file, got 1"),
        ({}, {"orders": '{"a": {"0": "0"}}'}, "a must have an order of the file, got '0'"),
        ({}, {"orders": '{"a": {"0": false}}'}, "a must have an order of the file, got False"),
        ({}, {"layers": '"x"'}, "layers must be an array, got 'x'"),
        ({}, {"layers": "[1]"}, r"layers must be names, got \[1\]"),
    ],
)
def test_an_arrangement_that_lies_is_refused(
    tmp_path: Path, tensors: Tensors, metadata: dict[str, str | None], said: str
) -> None:
    whole = {"format": arrangement.FORMAT, "orders": '{"a": {"0": 0}}', "layers": '["x"]'}
    given = {key: text for key, text in (whole | metadata).items() if text is not None}
    save_file({"order.0": torch.tensor([1, 0])} | tensors, tmp_path / "lie", metadata=given)
    with pytest.raises(CalibrationError, match=f"{tmp_path}/lie: {said}.* Run nmsparse calibrate."):
        arrangement.read(tmp_path / "lie")


@pytest.mark.parametrize(
    ("orders", "said"),
    [
        ({"weight": {0: torch.tensor([1, 0])}}, r"weight must have 2 places in dimension 0, got shape \[3, 2\]"),
        ({"weight": {2: torch.tensor([1, 0])}}, r"weight must have 2 places in dimension 2, got shape \[3, 2\]"),
        ({"other": {0: torch.tensor([1, 0])}}, "orders must be of the model's parameters, got other"),
    ],
)
def test_an_arrangement_of_another_model_is_refused(orders: Any, said: str) -> None:
    with pytest.raises(CalibrationError, match=f"{said}. Run nmsparse calibrate."):
        Arrangement(orders).apply(nn.Linear(2, 3))


@pytest.mark.parametrize("size", [0, 1, 7])
def test_only_a_permutation_has_nothing_that_strays(size: int) -> None:
    assert stray(torch.randperm(size)) == ""


@pytest.mark.parametrize(
    ("order", "said"),
    [([1], "1 at place 0"), ([0, 1, 1], "1 2 times"), ([0, 2**62], f"{2**62} at place 1"), ([0, -1], "-1 at place 1")],
)
def test_what_strays_is_named(order: list[int], said: str) -> None:
    assert stray(torch.tensor(order)) == said
