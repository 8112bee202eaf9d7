"""The op `SparseLinear` as an ONNX function of standard ops, which any runtime can run."""

from __future__ import annotations

from collections.abc import Sequence

import onnx.parser
import onnx_ir as ir

from converter.graph.forms import WIDENED
from converter.signature import ATTRIBUTES, DOMAIN, INPUTS, OP, OPSET, Form


def function(form: Form) -> ir.Function:
    """Return the op as an ONNX function of standard ops, for the nodes of a model of that form.

    Selection, statistics and epilogue are in float32 whatever the dtype of X; the GEMM is in the dtype of X, but in
    float32 for bfloat16, which ONNX Runtime's CPU kernels lack. TopK gives ties to the lower index, as its
    specification says, and NaN is ranked as infinity, so that it is kept.

    With `phased`, an ONNX `If` chooses what the GEMM is given, and whether its product is corrected. The GEMM itself
    is outside: in a branch ONNX Runtime would widen a float16 weight in every call, not once.
    """
    x = "X" if form.dtype == "float32" else "X32"
    start = [] if x == "X" else ["X32 = Cast <to = 1> (X)"]
    start += ["last = Constant <value_ints = [-1]> ()", *_shifted(form, x)]
    selection, zs = _if_sparse(form, _select(form), "zs", _z(form))
    correction, y = _if_sparse(form, *_corrected(form, zs), "product")
    lines = [*start, *_weight(form), *selection, *_product(form, zs), *correction, *_epilogue(form, y)]
    body = "\n".join(f"  {line}" for line in lines)
    text = (
        f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>\n'
        f"{OP} <{', '.join(ATTRIBUTES)}> ({', '.join(INPUTS)}) => (Y)\n{{\n{body}\n}}"
    )
    return ir.serde.deserialize_function(onnx.parser.parse_function(text))


def _if_sparse(form: Form, lines: Sequence[str], result: str, otherwise: str) -> tuple[Sequence[str], str]:
    """Return lines after which a name, returned too, is what `lines` call `found`; in a dense phase `otherwise`."""
    if "sparse" not in form or result == otherwise:
        return lines, result
    chosen, kept = f"{result}_or_dense", f"{result}_dense"
    return [
        f"{chosen} = If (sparse) <",
        f"  then_branch = sparse_phase () => ({result}) {{",
        *(f"    {line}" for line in lines),
        f"  }}, else_branch = dense_phase () => ({kept}) {{ {kept} = Identity ({otherwise}) }}",
        ">",
    ], chosen


def _select(form: Form) -> Sequence[str]:
    return [
        f"magnitude = Abs ({_z(form)})",
        *(["score = Mul (magnitude, channel_scale)"] if "channel_scale" in form else ["score = Identity (magnitude)"]),
        "is_nan = IsNaN (score)",
        "infinity = Constant <value = float {inf}> ()",
        "rank = Where (is_nan, infinity, score)",
        "group_size = Constant <value_int : int = @group> ()",
        "keep_size = Constant <value_int : int = @keep> ()",
        "one_axis = Constant <value_ints = [1]> ()",
        "keep_1d = Reshape (keep_size, one_axis)",
        "group_1d = Reshape (group_size, one_axis)",
        "groups = Concat <axis = 0> (last, group_1d)",
        *_arranged("rank_arranged", "rank", form),
        *_arranged("z_arranged", _z(form), form),
        "rank_groups = Reshape (rank_arranged, groups)",
        "z_groups = Reshape (z_arranged, groups)",
        "kept_rank, kept = TopK <axis = -1, largest = 1, sorted = 1> (rank_groups, keep_1d)",
        "kept_z = GatherElements <axis = -1> (z_groups, kept)",
        "groups_shape = Shape (z_groups)",
        "zero_groups = ConstantOfShape <value = float[1] {0.0}> (groups_shape)",
        "zs_groups = ScatterElements <axis = -1> (zero_groups, kept, kept_z)",
        f"z_shape = Shape ({_z(form)})",
        *(_back(form) if "permutation" in form else ["zs = Reshape (zs_groups, z_shape)"]),
    ]


def _arranged(name: str, of: str, form: Form) -> Sequence[str]:
    """Return lines that put the channels of a group side by side."""
    return [
        f"{name} = Gather <axis = -1> ({of}, permutation)" if "permutation" in form else f"{name} = Identity ({of})"
    ]


def _back(form: Form) -> Sequence[str]:
    """Return lines that put zs into the order of W's rows."""
    return [
        "zs_arranged = Reshape (zs_groups, z_shape)",
        "first = Constant <value_int = 0> ()",
        "step = Constant <value_int = 1> ()",
        "scalar_axis = Constant <value_ints = [0]> ()",
        f"width_1d = Shape <start = -1> ({_z(form)})",
        "end = Squeeze (width_1d, scalar_axis)",
        "places = Range (first, end, step)",
        # A place that no channel of the permutation takes has no index: then Gather refuses it.
        "nowhere = ConstantOfShape <value = int64[1] {2147483647}> (width_1d)",
        "inverse = ScatterElements <axis = 0> (nowhere, permutation, places)",
        "zs = Gather <axis = -1> (zs_arranged, inverse)",
    ]


def _z(form: Form) -> str:
    return "z" if form.shift_mode != "none" else "X" if form.dtype == "float32" else "X32"


def _shifted(form: Form, x: str) -> Sequence[str]:
    if form.shift_mode == "static":
        return [f"z = Sub ({x}, shift)"]
    if form.shift_mode == "token_mean":
        return [f"eta = ReduceMean <keepdims = 1> ({x}, last)", f"z = Sub ({x}, eta)"]
    if form.shift_mode == "token_median":
        # The lower of the two middle channels is the smallest of the K/2 + 1 largest.
        return [
            f"width = Shape <start = -1> ({x})",
            "two = Constant <value_ints = [2]> ()",
            "one = Constant <value_ints = [1]> ()",
            "half = Div (width, two)",
            "upper_count = Add (half, one)",
            f"upper, upper_index = TopK <axis = -1, largest = 1, sorted = 1> ({x}, upper_count)",
            "eta = ReduceMin <keepdims = 1> (upper, last)",
            f"z = Sub ({x}, eta)",
        ]
    return []


def _weight(form: Form) -> Sequence[str]:
    """Return lines that make W of what is stored, which ONNX Runtime folds when it loads the graph.

    Not DequantizeLinear: with a MatMul, ONNX Runtime 1.32 makes that a kernel that for int8 is ten times slower.
    """
    if form.weights == "dtype":
        return []
    if not form.quantized:
        return [f"{WIDENED} = Cast <to = 1> (W)"]
    return [
        "whole = Cast <to = 1> (W)",
        "blocks = Shape <start = 0, end = 1> (weight_scale)",
        "outputs = Shape <start = 1> (weight_scale)",
        "parts_shape = Concat <axis = 0> (blocks, last, outputs)",
        "parts = Reshape (whole, parts_shape)",
        "block_axis = Constant <value_ints = [1]> ()",
        "scales = Unsqueeze (weight_scale, block_axis)",
        "scaled_parts = Mul (parts, scales)",
        "W_shape = Shape (W)",
        f"{WIDENED} = Reshape (scaled_parts, W_shape)",
    ]


def _product(form: Form, zs: str) -> Sequence[str]:
    if form.dtype == "float32":
        return [f"product = MatMul ({zs}, {'W' if form.weights == 'dtype' else WIDENED})"]
    if form.dtype == "bfloat16":
        return [
            f"zs_x = CastLike ({zs}, X)",
            "zs_32 = Cast <to = 1> (zs_x)",
            "W32 = Cast <to = 1> (W)",
            "product = MatMul (zs_32, W32)",
        ]
    return [
        f"zs_x = CastLike ({zs}, X)",
        "product_x = MatMul (zs_x, W)",
        "product = Cast <to = 1> (product_x)",
    ]


def _residual(form: Form, zs: str, y: str) -> Sequence[str]:
    """Return lines that add what is dropped through the product of low rank; the products in the GEMM's dtype."""
    lines = [f"dropped = Sub ({_z(form)}, {zs})"]
    if form.dtype == "float32":
        lines += ["thin = MatMul (dropped, residual_in)", "residual = MatMul (thin, residual_out)"]
    elif form.dtype == "bfloat16":
        lines += [
            "dropped_x = CastLike (dropped, X)",
            "dropped_32 = Cast <to = 1> (dropped_x)",
            "residual_in_32 = Cast <to = 1> (residual_in)",
            "residual_out_32 = Cast <to = 1> (residual_out)",
            "thin_32 = MatMul (dropped_32, residual_in_32)",
            "residual = MatMul (thin_32, residual_out_32)",
        ]
    else:
        lines += [
            "dropped_x = CastLike (dropped, X)",
            "thin = MatMul (dropped_x, residual_in)",
            "residual_x = MatMul (thin, residual_out)",
            "residual = Cast <to = 1> (residual_x)",
        ]
    return [*lines, f"repaired = Add ({y}, residual)"]


def _variance(name: str, of: str) -> Sequence[str]:
    return [
        f"{name}_mean = ReduceMean <keepdims = 1> ({of}, last)",
        f"{name}_centred = Sub ({of}, {name}_mean)",
        f"{name}_squares = ReduceSumSquare <keepdims = 1> ({name}_centred, last)",
        f"{name} = Div ({name}_squares, freedom)",
    ]


def _corrected(form: Form, zs: str) -> tuple[Sequence[str], str]:
    """Return lines that make up for what is dropped, and the name of the product that they leave."""
    lines, y = [], "product"
    if form.variance:
        lines += [
            f"channels = Shape <start = -1> ({_z(form)})",
            "channels_32 = Cast <to = 1> (channels)",
            "one_32 = Constant <value = float {1.0}> ()",
            "freedom = Sub (channels_32, one_32)",
            *_variance("variance_z", _z(form)),
            *_variance("variance_zs", zs),
            "floor = Constant <value = float {1e-9}> ()",
            "variance_floored = Max (variance_zs, floor)",
            "ratio = Div (variance_z, variance_floored)",
            "nu = Sqrt (ratio)",
            f"scaled = Mul ({y}, nu)",
        ]
        y = "scaled"
    if "residual_in" in form:
        lines += _residual(form, zs, y)
        y = "repaired"
    return lines, y


def _epilogue(form: Form, y: str) -> Sequence[str]:
    lines = []
    if "row_sum" in form:
        lines += ["rank_one = Mul (eta, row_sum)", f"shifted = Add ({y}, rank_one)"]
        y = "shifted"
    if "bias" in form:
        lines += [f"biased = Add ({y}, bias)"]
        y = "biased"
    return [*lines, f"Y = Identity ({y})" if form.dtype == "float32" else f"Y = CastLike ({y}, X)"]
