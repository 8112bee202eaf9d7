"""Parity: does ONNX Runtime compute what PyTorch does? Masks first, then values, layer by layer on the same input.

Four comparisons, the first three through polygraphy:
  layers  every `SparseLinear` node by itself, on inputs from the PyTorch model on real text: masks, then values; where
          a node asks for the phase, it is told by the graph's own nodes, in a prefill and in a decode
  dense   the whole graph with keep = group in every node against the dense model: everything around the nodes
  sparse  the whole graph as it is; reported and never judged, because a sparse forward amplifies rounding
  generated  the tokens of the graph run dense, across each length at which the model goes on otherwise
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import torch
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator, SimpleCompareFunc
from torch import Tensor
from transformers import PreTrainedModel

from converter.errors import ValidationError
from converter.evaluation.boundaries import generated
from converter.evaluation.limits import LIMITS
from converter.evaluation.overflow import ADVICE, beyond_float16
from converter.evaluation.reference import (
    layer_inputs,
    round_model,
    sparse_layer,
    use_fitted,
)
from converter.graph.forms import DTYPES, widens
from converter.graph.merge import parts
from converter.kinds import kind as kind_of_model
from converter.kinds.kind import Array
from converter.names import MODEL, Phases
from converter.quiet import quiet
from converter.records import LayerParity, Limits, ParitySummary
from converter.runtimes.onnxruntime import decoder, session
from converter.signature import DOMAIN, INPUTS, OP, TABLE
from converter.sparsity.linear import Baked, Params, install
from converter.sparsity.quantize import Storage

IDS, MASK = "input_ids", "attention_mask"


@dataclass
class Parity:
    """What `nmsparse validate` found; `failures` says what is beyond the limits."""

    dtype: str
    limits: Limits
    tokens: int
    layers: list[LayerParity] = field(default_factory=list)
    dense: dict[str, float] = field(default_factory=dict)
    sparse: dict[str, float] = field(default_factory=dict)
    generated: dict[str, int] = field(default_factory=dict)
    not_tried: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def summary(self) -> ParitySummary:
        """Return the figures that matter, for a table and for report.json."""
        return ParitySummary(
            passed=not self.failures,
            dtype=self.dtype,
            tokens=self.tokens,
            limits=self.limits,
            layers=len({part for layer in self.layers for part in parts(layer.layer)}),
            largest_flip_share=max((layer.flips for layer in self.layers), default=0.0),
            largest_flip_margin=max((layer.margin for layer in self.layers), default=0.0),
            largest_layer_error=max((layer.error for layer in self.layers), default=0.0),
            dense_error=self.dense,
            sparse_not_judged=self.sparse,
            generated=self.generated,
            not_tried=self.not_tried,
            failures=self.failures,
        )

    def check(self) -> None:
        """Raise when anything is beyond the limits.

        Raises:
            ValidationError: with the first failures.
        """
        if self.failures:
            shown = "\n  ".join(self.failures[:8])
            more = f"\n  and {len(self.failures) - 8} more" if len(self.failures) > 8 else ""
            raise ValidationError(f"validate: ONNX Runtime must agree with PyTorch, got:\n  {shown}{more}")


def validate(
    folder: Path,
    model: PreTrainedModel,
    params: dict[str, Params],
    storage: Storage,
    phases: Phases,
    ids: Tensor,
    progress: Callable[[int, int], None] = lambda done, total: None,
    text: Tensor | None = None,
) -> Parity:
    """Return how `folder/model.onnx` compares with the dense `model`, which is made sparse with `params` on the way.

    `ids [1, S]` is real text, `ids [B, C, H, W]` are images; where there is a cache the last token is decoded, the
    others are the prefill. `text [1, S]` is more of the text, to be gone on with across the model's boundaries.

    A bfloat16 graph is compared as ONNX Runtime's CPU provider can run it: in float32, on the bfloat16 weights.
    """
    dtype = storage.dtype
    report = Parity(dtype, LIMITS[dtype], 0)
    graph = onnx.load(folder / MODEL, load_external_data=False)
    element = np.float16 if dtype == "float16" else np.float32
    with torch.no_grad(), quiet():
        rounded = round_model(model, params, storage)
        unfitted = use_fitted(model, rounded)
        if dtype == "float16" and _overflows(report, model, ids):
            return report
        feeds = kind_of_model(model).feeds(model, ids, element)
        dense = session(_dense(graph), folder, prepack=False)
        _compare_dense(report, dense, model, feeds)
        if kind_of_model(model).boundaries(model.config):
            _compare_generated(report, dense, model, ids if text is None else text)
        del dense
        progress(1, 4)
        for name, layer in rounded.items():
            install(model, name, layer, unfitted[name], phases)
        if dtype == "float16" and _overflows(report, model, ids):
            return report
        inputs = layer_inputs(model, [_layer(node) for node in _nodes(graph)], ids, element)
        report.tokens = sum(len(next(iter(feed.values()))) for feed in inputs)
        if _phase_nodes(graph):
            # Of two rows, so that a graph that takes the batch for the sequence is found out.
            for feed, part in zip(inputs, (ids[:, :-1], ids[:, -1:]), strict=True):
                feed[IDS] = part.repeat(2, 1).numpy()
        flipped = _compare_masks(report, folder, graph, model, inputs)
        progress(2, 4)
        _compare_layers(report, folder, graph, model, inputs, flipped)
        progress(3, 4)
        _report_sparse(report, folder, graph, model, ids, element)
        progress(4, 4)
    return report


class _TorchRunner(BaseRunner):  # type: ignore[misc]
    """A polygraphy runner over a function of arrays."""

    def __init__(self, function: Callable[[Any], dict[str, Array]], metadata: TensorMetadata) -> None:
        super().__init__(name="pytorch")
        self.function, self.metadata = function, metadata

    def get_input_metadata_impl(self) -> TensorMetadata:
        return self.metadata

    def infer_impl(self, feed_dict: Any) -> Any:
        start = time.perf_counter()
        outputs = OrderedDict(self.function(feed_dict))
        self.inference_time = time.perf_counter() - start
        return outputs


def _compare(
    function: Callable[[Any], dict[str, Array]], ort: Any, feeds: list[Any], keep: Callable[[int, str, Array], Array]
) -> list[dict[str, tuple[float, float]]]:
    """Return, per feed and output, the largest error and the largest magnitude; `keep` drops what is not compared."""
    metadata = TensorMetadata()
    for name, array in feeds[0].items():
        metadata.add(name, dtype=array.dtype, shape=[None] * array.ndim)
    results = Comparator.run([OnnxrtRunner(ort, name="onnxruntime"), _TorchRunner(function, metadata)], feeds)
    largest: list[dict[str, float]] = []
    for _, iterations in results.items():
        largest = []
        for number, iteration in enumerate(iterations):
            for name in list(iteration):
                iteration[name] = keep(number, name, iteration[name].astype(np.float32))
            largest.append({name: float(np.abs(iteration[name]).max(initial=0)) for name in iteration})
    comparison = Comparator.compare_accuracy(results, compare_func=SimpleCompareFunc(check_error_stat="max"))
    (compared,) = comparison[0].values()
    return [
        {name: (float(result.max_absdiff), largest[number][name]) for name, result in outputs.items()}
        for number, outputs in enumerate(compared)
    ]


def _relative(error: float, magnitude: float) -> float:
    """Return error / magnitude; an error that is not a number is infinite."""
    return float("inf") if np.isnan(error) or np.isnan(magnitude) else error / max(magnitude, 1e-30)


def _seen(feed: Any, array: Array) -> Array:
    """Return `array` with the padding positions zero: nothing reads them, and runtimes fill them as they like."""
    if MASK not in feed:
        return array
    mask = feed[MASK].astype(bool)
    if array.ndim == 3:
        return np.where(mask[:, -array.shape[1] :, None], array, 0)
    return np.where(mask[:, None, :, None], array, 0)


def _overflows(report: Parity, model: PreTrainedModel, ids: Tensor) -> bool:
    """Note the first layer that needs larger numbers than the graph has, with which nothing is left to compare."""
    beyond = beyond_float16(model, ids)
    report.failures += [beyond] if beyond else []
    return bool(beyond)


def _dense(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph with nothing dropped in any node."""
    dense = onnx.ModelProto()
    dense.CopyFrom(graph)
    for node in _nodes(dense):
        attributes = {a.name: a for a in node.attribute}
        attributes["keep"].i = attributes["group"].i
    return dense


def _compare_dense(report: Parity, dense: Any, model: PreTrainedModel, feeds: Any) -> None:
    errors = _compare(
        lambda feed: kind_of_model(model).run(model, feed),
        dense,
        feeds,
        lambda number, _, array: _seen(feeds[number], array),
    )
    for phase, outputs in zip(kind_of_model(model).calls, errors, strict=True):
        error, where = max((_relative(*pair), name) for name, pair in outputs.items())
        report.dense[phase] = error
        if not error <= report.limits.model:
            report.failures.append(
                f"{where} ({phase}, dense): error must be at most {report.limits.model:g} of the largest value, "
                f"got {error:.3g}.{_hint(report, error)}"
            )


def _hint(report: Parity, error: float) -> str:
    """Return what to do about a number that is none, which no layer's input or output shows."""
    return "" if np.isfinite(error) or report.dtype != "float16" else f" float16 ends at 65504. {ADVICE}"


def _compare_generated(report: Parity, dense: Any, model: PreTrainedModel, text: Tensor) -> None:
    written = generated(model, decoder(model.config, dense), text, report.limits)
    report.generated, report.not_tried = written.tokens, written.not_tried
    report.failures += written.failures


# The layers, each by itself.


def _nodes(graph: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in graph.graph.node if node.domain == DOMAIN and node.op_type == OP]


def _layer(node: onnx.NodeProto) -> str:
    name: str = node.input[1]
    return name.removesuffix(".weight")


def _layers_graph(graph: onnx.ModelProto, probe: bool) -> onnx.ModelProto:
    """Return a graph of the op's nodes alone, each with an input LAYER.X and an output LAYER.Y.

    With `probe`, W is the identity and nothing is added, so that Y shows which channels of X are kept.
    """
    tensors = {tensor.name: tensor for tensor in graph.graph.initializer}
    stored = tensors[_nodes(graph)[0].input[1]].data_type
    element = onnx.TensorProto.FLOAT if widens(graph) else stored
    nodes: dict[str, list[onnx.NodeProto]] = {}
    phase = _phase_nodes(graph)
    inputs, outputs, weights = [value for value in graph.graph.input if phase and value.name == IDS], [], {}
    for node in _nodes(graph):
        name = _layer(node)
        width, size = tensors[node.input[1]].dims
        new = onnx.NodeProto()
        new.CopyFrom(node)
        new.input[0], new.output[0] = f"{name}.X", f"{name}.Y"
        for position, given in enumerate(node.input[1:], 1):
            row = TABLE[position]
            if probe and given and row.per_output:
                dims = [*tensors[given].dims[:-1], width]
                if row.name == "W":
                    stand_in, made = _identity(width, stored if stored in DTYPES else onnx.TensorProto.INT8)
                else:
                    stand_in, made = _filled(dims, tensors[given].data_type, row.probe)
                new.input[position] = stand_in
                nodes.setdefault(stand_in, made)
            elif given and row.stored:
                weights[given] = tensors[given]
        nodes[name] = [new]
        inputs.append(onnx.helper.make_tensor_value_info(f"{name}.X", element, ["tokens", width]))
        outputs.append(onnx.helper.make_tensor_value_info(f"{name}.Y", element, ["tokens", width if probe else size]))
    ordered = sorted(nodes, key=lambda key: not key.startswith(("identity.", "filled.")))
    body = onnx.helper.make_graph(
        [*phase, *(node for key in ordered for node in nodes[key])], "layers", inputs, outputs, list(weights.values())
    )
    return onnx.helper.make_model(
        body, opset_imports=graph.opset_import, functions=graph.functions, ir_version=graph.ir_version
    )


def _phase_nodes(graph: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Return the nodes, in order, that tell the layers the phase from `input_ids`; none where no layer asks."""
    position = INPUTS.index("sparse")
    wanted = {node.input[position] for node in _nodes(graph) if len(node.input) > position}
    nodes: list[onnx.NodeProto] = []
    for node in reversed(graph.graph.node):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            nodes.insert(0, node)
    return nodes


def _filled(dims: list[int], element: int, value: float) -> tuple[str, list[onnx.NodeProto]]:
    """Return the name of a tensor of that shape filled with `value`, and the nodes that make it where they are run."""
    name, make = f"filled.{'x'.join(map(str, dims))}.{element}.{value}", onnx.helper.make_node
    filling = onnx.numpy_helper.from_array(np.array([value], np.float32))
    return name, [
        make("Constant", [], [f"{name}.shape"], value_ints=dims),
        make("ConstantOfShape", [f"{name}.shape"], [f"{name}.32"], value=filling),
        make("Cast", [f"{name}.32"], [name], to=element),
    ]


def _identity(width: int, element: int) -> tuple[str, list[onnx.NodeProto]]:
    """Return the name of the identity `[K, K]`, and the nodes that make it where they are run."""
    name, make = f"identity.{width}", onnx.helper.make_node
    return name, [
        make("Constant", [], [f"{name}.shape"], value_ints=[width, width]),
        make("ConstantOfShape", [f"{name}.shape"], [f"{name}.empty"]),
        make("EyeLike", [f"{name}.empty"], [f"{name}.32"]),
        make("Cast", [f"{name}.32"], [name], to=element),
    ]


def _compare_masks(
    report: Parity, folder: Path, graph: onnx.ModelProto, model: PreTrainedModel, feeds: list[Any]
) -> list[dict[str, Array]]:
    """Judge the masks of every layer; return, per phase and layer, the tokens whose masks differ."""
    ort = session(_layers_graph(graph, probe=True), folder, prepack=False)
    flipped: list[dict[str, Array]] = []
    names = [value.name for value in ort.get_outputs()]
    for phase, feed in zip(kind_of_model(model).calls, feeds, strict=True):
        rows: dict[str, Array] = {}
        for output, y in zip(names, ort.run(names, feed), strict=True):
            name = output.removesuffix(".Y")
            layer = sparse_layer(model, parts(name)[0])
            baked = layer.baked
            z, zs, _ = layer.selected(torch.from_numpy(feed[f"{name}.X"]).float())
            scores = z.abs() if baked.channel_scale is None else z.abs() * baked.channel_scale
            differ = (zs != 0) != torch.from_numpy(y != 0)
            margin = _margin(_arranged(scores, baked), _arranged(zs != 0, baked), _arranged(differ, baked), baked.group)
            share = float(differ.float().mean())
            rows[output] = differ.any(-1).numpy()
            report.layers.append(LayerParity(name, phase, share, margin, 0.0, True))
            if not (margin <= report.limits.margin and share <= report.limits.flips):
                report.failures.append(
                    f"{name} ({phase}): masks must differ in at most {report.limits.flips:g} of the channels and by "
                    f"at most {report.limits.margin:g} of the score, got {share:.3g} and {margin:.3g}."
                )
        flipped.append(rows)
    return flipped


def _arranged(part: Tensor, baked: Baked) -> Tensor:
    """Return `part [T, K]` with the channels of a group side by side."""
    return part if baked.permutation is None else part[:, baked.permutation]


def _margin(scores: Tensor, kept: Tensor, differ: Tensor, group: int) -> float:
    """Return the largest gap between two channels that were ranked the other way, relative to the token's largest."""
    if not differ.any():
        return 0.0
    largest = scores.amax(-1, keepdim=True).clamp_min(1e-30)
    share, ours, theirs = ((t.reshape(-1, group)) for t in (scores / largest, kept & differ, ~kept & differ))
    best = torch.where(ours, share, 0.0).amax(-1)
    worst = torch.where(theirs, share, torch.inf).amin(-1)
    gap = torch.where(worst.isinf(), best, best - worst)
    return float(gap.amax())


def _compare_layers(
    report: Parity,
    folder: Path,
    graph: onnx.ModelProto,
    model: PreTrainedModel,
    feeds: list[Any],
    flipped: list[dict[str, Array]],
) -> None:
    """Judge the values of every layer on the tokens whose masks agree."""

    def reference(feed: Any) -> dict[str, Array]:
        outputs = {}
        for given, x in feed.items():
            if given != IDS:
                name = given.removesuffix(".X")
                layers = (sparse_layer(model, part) for part in parts(name))
                outputs[f"{name}.Y"] = torch.cat([layer(torch.from_numpy(x).float()) for layer in layers], -1).numpy()
        return outputs

    ort = session(_layers_graph(graph, probe=False), folder, prepack=False)
    by_layer = _compare(
        reference, ort, feeds, lambda number, name, array: np.where(flipped[number][name][:, None], 0, array)
    )
    masks, report.layers = report.layers, []
    phases = kind_of_model(model).calls
    for entry in masks:
        outputs = by_layer[phases.index(entry.phase)]
        error = _relative(*outputs[f"{entry.layer}.Y"])
        good = error <= report.limits.layer
        report.layers.append(LayerParity(entry.layer, entry.phase, entry.flips, entry.margin, error, good))
        if not good:
            report.failures.append(
                f"{entry.layer} ({entry.phase}): error must be at most {report.limits.layer:g} of the largest value, "
                f"got {error:.3g}."
            )


def _report_sparse(
    report: Parity, folder: Path, graph: onnx.ModelProto, model: PreTrainedModel, ids: Tensor, element: Any
) -> None:
    found_kind = kind_of_model(model)
    feeds, name = found_kind.feeds(model, ids, element), found_kind.output
    ort = session(graph, folder, prepack=False)
    for phase, feed in zip(found_kind.calls, feeds, strict=True):
        got = _seen(feed, ort.run([name], feed)[0].astype(np.float32))
        expected = _seen(feed, found_kind.run(model, feed)[name])
        error = _relative(float(np.abs(got - expected).max()), float(np.abs(expected).max()))
        report.sparse[f"{phase}_{name}_error"] = error
        if not np.isfinite(error):
            report.failures.append(f"{name} ({phase}): must be finite, got NaN or Inf.{_hint(report, error)}")
        if name == "logits":
            same = got.argmax(-1) == expected.argmax(-1)
            seen = feed[MASK][:, -got.shape[1] :].astype(bool) if MASK in feed else slice(None)
            report.sparse[f"{phase}_same_top_token"] = float(same[seen].mean())
