"""Write a checkpoint and its calibration as one ONNX graph with its weights once, in one external-data file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor

from converter.checkpoint import Checkpoint
from converter.errors import ExportError
from converter.graph.merge import merge, parts
from converter.graph.op import function
from converter.graph.phase import give_phase
from converter.graph.placeholders import LinearNode
from converter.graph.stamp import stamp
from converter.graph.trace import trace
from converter.names import DATA, MODEL, Phases
from converter.plan import Plan
from converter.recipe import DTYPES
from converter.saved import tied_weights
from converter.signature import BY_NAME, DOMAIN, OP, TABLE, VERSION, Form
from converter.sparsity.linear import Baked, Params, bake
from converter.sparsity.quantize import Storage

IR_VERSION = 11
IR_DTYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
}
FOUR_BITS = ir.DataType.INT4


@dataclass(frozen=True)
class Sparse:
    """A checkpoint, what calibration made of its layers, and how their weights are stored and when they are sparse.

    With `share`, layers that read one tensor and choose the same of its channels are one node.
    """

    checkpoint: Checkpoint
    plan: Plan
    params: dict[str, Params]
    storage: Storage
    phases: Phases
    share: bool


def export(
    sparse: Sparse,
    folder: Path,
    metadata: dict[str, str],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write `model.onnx` and `model.onnx.data` into `folder`; the weight of one node at a time is in memory.

    `progress` is called with the number of tensors written and their total.

    Raises:
        ExportError: when the model cannot be traced, a number is too large for float16, or the disk is full.
    """
    checkpoint, plan, storage, phases = sparse.checkpoint, sparse.plan, sparse.storage, sparse.phases
    skeleton = checkpoint.skeleton()
    params, tied, dtype = storage.every_layer(skeleton, sparse.params), tied_weights(skeleton), DTYPES[storage.dtype]
    names = (name for name, _ in skeleton.named_parameters(remove_duplicate=False))
    biased = {name.removesuffix(".bias") for name in names if name.endswith(".bias")}
    form = _form(biased, params, storage, phases)
    # A dense layer that shares its weight keeps torch's layout.
    nodes = {
        layer.name: LinearNode(
            layer.name in params,
            layer.name in biased,
            _rank(params.get(layer.name)),
            storage.blocks(layer.name, layer.in_features, layer.out_features) if storage.bits else 0,
        )
        for layer in plan.layers
        if layer.name in params or f"{layer.name}.weight" not in tied
    }
    model = stamp(trace(skeleton, nodes, form, dtype, checkpoint.blank()), plan.blocks)
    if phases != "both":
        model = give_phase(model, phases)
    if sparse.share:
        model = merge(model, params)
    outputs = {layer.name: layer.out_features for layer in plan.layers}
    _attach_weights(model, WeightSource(checkpoint, params, storage, tied, biased), outputs, set(nodes))
    _attach_patterns(model, params)
    model.functions[(DOMAIN, OP, "")] = function(form)
    model.opset_imports[DOMAIN] = VERSION
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = "nmsparse", metadata["nmsparse.version"]
    model.metadata_props.clear()
    model.metadata_props.update(metadata)
    for node in model.graph:
        node.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    try:
        ir.save(
            model,
            folder / MODEL,
            external_data=DATA,
            callback=lambda _, info: progress(info.index + 1, info.total),
        )
    except OSError as error:
        raise ExportError(
            f"{folder}: model.onnx could not be written: {error}. Free some space and run again."
        ) from error


def _form(biased: set[str], params: dict[str, Params], storage: Storage, phases: Phases) -> Form:
    """Return what the op has to compute in this model; a layer that lacks an input gets a neutral one."""
    assert not any(p.sequence_norm for p in params.values()), "Recipe.require_exportable has refused it"
    modes = {(p.shift_mode, p.variance) for p in params.values()}
    if len(modes) != 1:
        raise ExportError(f"mitigations must be the same in every layer, got {sorted(modes)}.")
    shift_mode, variance = modes.pop()
    has = {row.name for row in TABLE for p in params.values() if getattr(p, row.name, None) is not None}
    affine = any(p.output_shift is not None for p in params.values())
    if shift_mode == "static" or affine or not biased.isdisjoint(params):
        has.add("bias")
    if phases != "both":
        has.add("sparse")
    return Form(storage.dtype, shift_mode, variance, frozenset(has), storage.weights)


def _rank(params: Params | None) -> int:
    return 0 if params is None or params.residual_in is None else params.residual_in.shape[1]


def _neutral(part: str, shape: tuple[int, ...]) -> Tensor:
    """Return what changes nothing, where this layer has no such input and another has one."""
    neutral = BY_NAME[part].neutral
    return torch.arange(shape[0]) if neutral == "order" else (torch.ones if neutral == "ones" else torch.zeros)(shape)


@dataclass(frozen=True)
class WeightSource:
    """Where the weights of layers come from: those with `params` are baked, `tied` names another tensor to read."""

    checkpoint: Checkpoint
    params: dict[str, Params]
    storage: Storage
    tied: dict[str, str]
    biased: set[str]

    def read(self, name: str) -> Tensor:
        """Return a tensor of the checkpoint."""
        return self.checkpoint.read(self.tied.get(name, name))

    def baked(self, layer: str) -> Baked:
        """Return the inputs of a layer's op."""
        # Rounded before it is baked, so that bias and row sums belong to the weight that is stored.
        fitted = self.params[layer].weight
        weight = self.storage.rounded(self.read(f"{layer}.weight") if fitted is None else fitted)
        dtype = DTYPES[self.storage.dtype]
        bias = self.read(f"{layer}.bias").to(dtype).float() if layer in self.biased else None
        return bake(weight, bias, self.params[layer])


@dataclass(frozen=True)
class Initializers:
    """What the initializers of the graph hold; `baked` remembers the layers of one node.

    The dense layers of `transposed` have their weight as the op has it; `outputs` are each layer's.
    """

    layers: WeightSource
    baked: Callable[[str], Baked]
    quantized: Callable[[str], tuple[Tensor, Tensor]]
    outputs: dict[str, int]
    transposed: set[str]

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return the content of the initializer of that name.

        Raises:
            ExportError: when it has another shape, or numbers that float16 has not.
        """
        layer, _, part = name.rpartition(".")
        nodes = parts(layer)
        if nodes[0] in self.layers.params and (part == "weight" or BY_NAME[part].per_output):
            tensor = torch.cat([self._of_layer(one, part, (*shape[:-1], self.outputs[one])) for one in nodes], -1)
        elif nodes[0] in self.layers.params:
            tensor = self._of_layer(nodes[0], part, shape)
        else:
            tensor = self.layers.read(name)
            if layer in self.transposed and part == "weight":
                tensor = tensor.t()
        if tuple(tensor.shape) != shape:
            raise ExportError(f"{name}: must have shape {shape} in the graph, got {tuple(tensor.shape)}.")
        converted = tensor.to(dtype).contiguous()
        if dtype == torch.float16 and not converted.isfinite().all():
            raise ExportError(
                f"{name}: numbers must be at most 65504 for float16, got {tensor.abs().max():g}. Use --dtype bfloat16."
            )
        return converted

    def stored(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, stored: ir.DataType) -> ir.TensorProtocol:
        """Return the initializer's content as it is stored."""
        tensor = self.tensor(name, shape, dtype)
        # Torch has no numbers of four bits.
        return TorchTensor(tensor, name=name) if stored != FOUR_BITS else ir.tensor(tensor.numpy(), stored, name=name)

    def _of_layer(self, layer: str, part: str, shape: tuple[int, ...]) -> Tensor:
        if self.layers.storage.bits and part in {"weight", "weight_scale"}:
            return self.quantized(layer)[part == "weight_scale"]
        own: Tensor | None = getattr(self.baked(layer), "w" if part == "weight" else part)
        return _neutral(part, shape) if own is None else own


def _attach_weights(model: ir.Model, layers: WeightSource, outputs: dict[str, int], transposed: set[str]) -> None:
    """Give every initializer that has none a content, which is read when it is written."""
    most = max(len(parts(name.rpartition(".")[0])) for name in model.graph.initializers)  # layers of a node
    remember, storage = lru_cache(maxsize=most), layers.storage
    baked = remember(layers.baked)
    quantized = remember(lambda layer: storage.quantized(baked(layer).w))
    initializers = Initializers(layers, baked, quantized, outputs, transposed)
    dtypes = {value: DTYPES[key] for key, value in IR_DTYPES.items()}
    dtypes |= {ir.DataType.INT64: torch.int64, ir.DataType.INT8: torch.int8}
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            assert value.shape is not None
            assert value.dtype is not None
            shape, dtype = value.shape.numpy(), dtypes[value.dtype]
            if value.dtype == ir.DataType.INT8 and storage.bits == 4:
                value.type = ir.TensorType(FOUR_BITS)  # its own: copies of a block share theirs
            value.const_value = ir.LazyTensor(
                partial(initializers.stored, name, shape, dtype, value.dtype),
                dtype=value.dtype,
                shape=ir.Shape(shape),
                name=name,
            )


def _attach_patterns(model: ir.Model, params: dict[str, Params]) -> None:
    """Give every node the pattern of the layer whose weight it takes."""
    for node in model.graph:
        if node.domain == DOMAIN and node.op_type == OP:
            weight = node.inputs[1]
            assert weight is not None
            layer = params[parts((weight.name or "").removesuffix(".weight"))[0]]
            node.attributes["keep"] = ir.AttrInt64("keep", layer.keep)
            node.attributes["group"] = ir.AttrInt64("group", layer.group)
