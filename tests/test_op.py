"""The function body in ONNX Runtime against the reference in torch, for every form of the op."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import onnx.helper
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from pairs import pairs

from converter.graph.op import function
from converter.names import Phases
from converter.signature import DOMAIN, INPUTS, OP, OPSET, SHIFT_MODES, VERSION, Form
from converter.sparsity.linear import Baked, Params, SparseLinear, bake

FORMS = pairs(["float32", "float16"], SHIFT_MODES, [False, True], [False, True], [False, True])
NUMPY = {"float32": np.float32, "float16": np.float16}


def run(form: Form, baked: Baked, x: np.ndarray, sparse: bool = True) -> np.ndarray:
    """Return Y of one node, run by a stock ONNX Runtime from a model that holds node and function body."""
    kind = onnx.helper.np_dtype_to_tensor_dtype(x.dtype)
    values = {name: getattr(baked, {"W": "w"}.get(name, name)) for name in (row.name for row in form.stored())}
    tensors = []
    for name, tensor in values.items():
        kinds = {"permutation": np.int64} | dict.fromkeys(("W", "residual_in", "residual_out"), x.dtype)
        array = tensor.contiguous().numpy().astype(kinds.get(name, np.float32))
        tensors.append(onnx.numpy_helper.from_array(array, name))
    given = {"X", *values, *(["sparse"] if "sparse" in form else [])}
    names = [n if n in given else "" for n in INPUTS]
    attributes = {
        "keep": baked.keep,
        "group": baked.group,
        "shift_mode": baked.shift_mode,
        "variance": int(baked.variance),
    }
    node = onnx.helper.make_node(OP, names, ["Y"], domain=DOMAIN, **attributes)
    graph = onnx.helper.make_graph(
        [node],
        "one",
        [
            onnx.helper.make_tensor_value_info("X", kind, ["tokens", x.shape[-1]]),
            *([onnx.helper.make_tensor_value_info("sparse", onnx.TensorProto.BOOL, [])] if "sparse" in form else []),
        ],
        [onnx.helper.make_tensor_value_info("Y", kind, ["tokens", baked.w.shape[1]])],
        tensors,
    )
    model = onnx.helper.make_model(
        graph,
        functions=[ir.to_proto(function(form))],
        opset_imports=[onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(DOMAIN, VERSION)],
        ir_version=11,
    )
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {"X": x, "sparse": np.array(sparse)} if "sparse" in form else {"X": x}
    y: np.ndarray = session.run(None, feeds)[0]
    return y


def having(
    bias: bool = False, scaled: bool = False, permutation: bool = False, residual: bool = False, phased: bool = False
) -> frozenset[str]:
    """Return the names of the optional inputs that are there."""
    names = {"bias": bias, "channel_scale": scaled, "permutation": permutation, "sparse": phased}
    names |= {"residual_in": residual, "residual_out": residual}
    return frozenset(name for name, there in names.items() if there)


def layer(form: Form, keep: int, group: int, seed: int = 0) -> Baked:
    generator = torch.Generator().manual_seed(seed)
    in_features, out_features = max(2 * group, 32) // group * group, 24
    residual = "residual_in" in form
    params = Params(
        keep,
        group,
        shift_mode=form.shift_mode,
        variance=form.variance,
        channel_scale=torch.rand(in_features, generator=generator) + 0.5 if "channel_scale" in form else None,
        shift=torch.randn(in_features, generator=generator) / 4 if form.shift_mode == "static" else None,
        permutation=torch.randperm(in_features, generator=generator) if "permutation" in form else None,
        residual_in=torch.randn(in_features, 3, generator=generator).half().float() if residual else None,
        residual_out=torch.randn(3, out_features, generator=generator).half().float()
        if "residual_in" in form
        else None,
    )
    weight = torch.randn(out_features, in_features, generator=generator)
    if form.dtype == "float16":
        weight = weight.half().float()
    bias = torch.randn(out_features, generator=generator)
    return bake(weight, bias if "bias" in form else None, params)


@pytest.mark.parametrize(("dtype", "shift_mode", "variance", "bias", "scaled"), FORMS)
def test_body_equals_reference(dtype: str, shift_mode: str, variance: bool, bias: bool, scaled: bool) -> None:
    check(Form(dtype, shift_mode, variance, having(bias or shift_mode == "static", scaled)))


@pytest.mark.parametrize(("permutation", "residual"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_body_with_permutation_and_residual(dtype: str, permutation: bool, residual: bool) -> None:
    for shift_mode, variance in itertools.product(SHIFT_MODES, [False, True]):
        check(Form(dtype, shift_mode, variance, having(True, True, permutation, residual)))


@pytest.mark.parametrize(("variance", "residual"), list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("shift_mode", SHIFT_MODES)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_body_in_both_phases(dtype: str, shift_mode: str, variance: bool, residual: bool) -> None:
    for bias, permutation in ((True, False), (shift_mode == "static", True)):
        check(Form(dtype, shift_mode, variance, having(bias, True, permutation, residual, True)))


def check(form: Form) -> None:
    dtype = form.dtype
    tolerance = 2e-6 if dtype == "float32" else 2e-3
    settings: tuple[Phases, ...] = ("prefill", "decode") if "sparse" in form else ("both",)
    for (keep, group), tokens, phases in itertools.product([(2, 4), (8, 16), (3, 33), (1, 4)], [1, 5], settings):
        baked = layer(form, keep, group)
        x = torch.randn(tokens, baked.w.shape[0], generator=torch.Generator().manual_seed(1)).numpy() + 0.3
        x = x.astype(NUMPY[dtype])
        layer_ = SparseLinear(baked, phases)
        given = torch.from_numpy(x).float()
        expected, found = layer_(given).numpy(), run(form, baked, x, layer_.sparse(given))
        assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


IDENTITY = Form("float32", "none", False)


def identity(keep: int, group: int, channels: int) -> Baked:
    return bake(torch.eye(channels), None, Params(keep, group))


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_ties_go_to_the_lower_channel(keep: int) -> None:
    x = np.array([[1, 1, 1, 1, -2, 2, 2, -2]], np.float32)
    expected = np.where(np.arange(8) % 4 < keep, x, 0)
    np.testing.assert_array_equal(run(IDENTITY, identity(keep, 4, 8), x), expected)


def test_many_ties_at_every_size() -> None:
    x = np.random.default_rng(0).integers(-3, 4, (64, 64)).astype(np.float32)
    for keep, group in [(2, 4), (4, 8), (8, 16), (16, 32), (32, 64), (5, 64)]:
        baked = identity(keep, group, 64)
        np.testing.assert_array_equal(run(IDENTITY, baked, x), SparseLinear(baked)(torch.from_numpy(x)).numpy())


def test_nan_and_infinity_stay_visible() -> None:
    weight = torch.ones(1, 4)
    for bad in (np.nan, np.inf):
        y = run(IDENTITY, bake(weight, None, Params(1, 4)), np.array([[1, bad, 3, 9]], np.float32))
        np.testing.assert_array_equal(y, [[bad]])
    # More infinities than are kept: the dropped one is gone, and leaves no NaN behind.
    y = run(IDENTITY, bake(weight, None, Params(1, 4)), np.array([[np.inf, np.inf, 3, 9]], np.float32))
    np.testing.assert_array_equal(y, [[np.inf]])


def test_body_holds_only_what_its_form_needs() -> None:
    def nodes(shift_mode: str, variance: bool) -> int:
        return len(list(function(Form("float32", shift_mode, variance))))

    assert nodes("none", False) < nodes("token_mean", False) < nodes("token_median", True)
    assert nodes("none", False) < nodes("none", True)


def test_only_a_form_with_phases_asks_for_the_phase() -> None:
    for phased in (False, True):
        body = function(Form("float32", "token_mean", True, having(True, True, residual=True, phased=phased)))
        assert sum(node.op_type == "If" for node in body) == 2 * phased
        assert sum(node.op_type == "MatMul" for node in body) == (1 if phased else 3)  # thin ones are in a branch


def test_a_dense_phase_corrects_nothing() -> None:
    """Where z has no variance nu would be 0, and an infinity that is not dropped has no remainder."""
    form = Form("float32", "none", True, having(residual=True, phased=True))
    parts = {"residual_in": torch.ones(4, 1), "residual_out": torch.ones(1, 1)}
    baked = bake(torch.ones(1, 4), None, Params(1, 4, variance=True, **parts))
    for x, y in (([2, 2, 2, 2], 8), ([np.inf, 1, 1, 1], np.inf)):
        np.testing.assert_array_equal(run(form, baked, np.array([x], np.float32), sparse=False), [[y]])
