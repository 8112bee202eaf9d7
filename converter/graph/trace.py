"""Trace a model into an ONNX graph: every linear layer one node, and blocks of one kind traced only once.

The skeleton that is traced has no weights, so the trace costs no memory for them. A block that equals an earlier one
(same classes, settings and shapes) is traced as one placeholder node; `converter.graph.stamp` replaces it by a copy of
the earlier block's nodes. So the time to trace does not grow with the number of blocks, and no model family needs
code of its own.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from onnxscript.optimizer import optimize_ir
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.rules.fusion._rms_normalization import rms_normalization_ruleset
from onnxscript.rewriter.rules.fusion._rotary_embedding import partial_embedding_rules, rotary_embedding_rules
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from converter.errors import ConverterError, ExportError, said
from converter.kinds import kind, output, takes_segments
from converter.plan import find_blocks
from converter.signature import DOMAIN, INPUTS, OP, OPSET, VERSION, Form

ATTENTION = "nmsparse_onnx"
PIXELS = "pixel_values"
BLOCK, ENTER, LEAVE = "Block", "Enter", "Leave"
# Sizes of the example inputs: all different, none 0 or 1, which torch.export would take for constants.
BATCH, SEQUENCE, PAST = 2, 3, 5


@dataclass(frozen=True)
class LinearNode:
    """How a linear layer appears in the graph: as the op, or as a MatMul.

    Its pattern is no part of this: blocks that differ in nothing else are traced once.
    """

    sparse: bool
    bias: bool
    rank: int = 0  # of the low-rank residual
    blocks: int = 0  # of a weight of integers, each with its scale


class TracedLinear(nn.Module):
    """A linear layer as one ONNX node over a weight `[K, N]`; its parameters have a shape and no content."""

    def __init__(self, linear: nn.Linear, node: LinearNode, form: Form, dtype: torch.dtype) -> None:
        """Declare the parameters that the node takes."""
        super().__init__()
        self.node, self.form, self.out_features = node, form, linear.out_features
        sizes = {"K": linear.in_features, "N": linear.out_features, "r": node.rank, "B": node.blocks}
        kinds = {"X": dtype, "int64": torch.int64, "float32": torch.float32}
        weight = dtype
        if node.sparse and form.weights != "dtype":
            weight = torch.int8 if form.quantized else getattr(torch, form.weights)
        self.weight = _placeholder((linear.in_features, linear.out_features), weight)
        if node.sparse:
            rows = form.stored()[1:]
            self.names = tuple(row.name for row in rows)
            for row in rows:
                shape = tuple(sizes[letter] for letter in row.dims)
                self.register_parameter(row.name, _placeholder(shape, kinds[row.dtype]))
        else:
            self.names = ("bias",) if node.bias else ()
            self.register_parameter("bias", _placeholder((linear.out_features,), dtype) if node.bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """Return the node's output, of which only the shape is known."""
        if not self.node.sparse:
            y = torch.matmul(x, self.weight)
            return y + self.bias if isinstance(self.bias, Tensor) else y
        given = dict(zip(self.names, (getattr(self, name) for name in self.names), strict=True))
        inputs = [x, self.weight, *(given.get(name) for name in INPUTS[2:])]
        while inputs[-1] is None:
            inputs.pop()
        attributes: dict[str, Any] = {
            "keep": 0,  # the patterns are set where the weights are
            "group": 0,
            "shift_mode": self.form.shift_mode,
            "variance": int(self.form.variance),
        }
        shape = (*x.shape[:-1], self.out_features)
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::{OP}", inputs, attributes, dtype=x.dtype, shape=shape, version=VERSION
        )


def _placeholder(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    """Return a parameter of that shape whose storage is one number."""
    return nn.Parameter(torch.zeros(1, dtype=dtype).expand(shape), requires_grad=False)


class TracedBlock(nn.Module):
    """A block that leaves marks around its nodes, or, where it is like an earlier one, only a placeholder."""

    def __init__(self, block: nn.Module, index: int, like: TracedBlock | None) -> None:
        """Wrap `block`; with `like`, it is not run."""
        super().__init__()
        self.block, self.index = block, index
        self.__dict__["like"] = like  # not a child
        self.context: Any = ()
        self.is_tuple = False

    def __getattr__(self, name: str) -> Any:
        """Let the model's loop read what it reads of a block (such as its attention type)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return what the block returns; its cache layer is updated, a placeholder's is not."""
        self.context = (args, sorted(kwargs.items()))
        like: TracedBlock | None = self.__dict__["like"]
        if like is not None:
            out = _mark(BLOCK, hidden, {"index": self.index, "like": like.index})
            return (out,) if like.is_tuple else out
        result = self.block(_mark(ENTER, hidden, {"index": self.index}), *args, **kwargs)
        self.is_tuple = isinstance(result, tuple)
        out = result[0] if self.is_tuple else result
        out = _mark(LEAVE, out, {"index": self.index})
        return (out, *result[1:]) if self.is_tuple else out

    def differs(self) -> bool:
        """Return whether a placeholder was called with other things than the block it is like."""
        like: TracedBlock | None = self.__dict__["like"]
        return like is not None and not _same(self.context, like.context)


def _mark(name: str, hidden: Tensor, attributes: dict[str, Any]) -> Tensor:
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{name}", [hidden], attributes, dtype=hidden.dtype, shape=hidden.shape, version=VERSION
    )


def signature(module: nn.Module) -> str:
    """Return a text that two modules share when they compute the same function of their parameters and inputs."""
    settings = sorted(
        f"{key}={value!r}"
        for key, value in vars(module).items()
        if not key.startswith("_") and key not in {"layer_idx", "training", "config"}
    )
    tensors = [f"{name}:{tuple(p.shape)}:{p.dtype}" for name, p in module.named_parameters(recurse=False)]
    buffers = [f"{name}:{b.tolist()}" for name, b in module.named_buffers(recurse=False)]
    children = [f"{name}({signature(child)})" for name, child in module.named_children()]
    return f"{type(module).__qualname__}[{'; '.join(settings + tensors + buffers + children)}]"


def _same(left: Any, right: Any) -> bool:
    """Return whether two contexts of a block are the same: tensors and caches by identity, the rest by value."""
    if isinstance(left, tuple | list) and isinstance(right, tuple | list):
        return len(left) == len(right) and all(_same(a, b) for a, b in zip(left, right, strict=True))
    if isinstance(left, str | int | float | bool | None) and isinstance(right, str | int | float | bool | None):
        return left == right
    return left is right


class _Exported(nn.Module):
    """The model with the inputs and outputs of the ONNX graph, but the caches of the blocks in `own` only."""

    def __init__(self, model: PreTrainedModel, blocks: int, own: list[int]) -> None:
        super().__init__()
        self.model, self.blocks, self.own = model, blocks, own

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        cache: Any = DynamicCache()
        for index in range(self.blocks):
            # A placeholder's layer is asked for its length only, which is that of any other.
            key, value = past[self.own.index(index) if index in self.own else 0]
            cache.update(key[:, :, :0], value[:, :, :0], index)
            cache.layers[index].keys, cache.layers[index].values = key, value
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return out.logits, [(cache.layers[index].keys, cache.layers[index].values) for index in self.own]


class _ExportedEncoder(nn.Module):
    """The model with the inputs and the output of the ONNX graph, without a cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        torch._check(attention_mask.shape[1] == input_ids.shape[1])  # no other part of the model says so
        segments = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        result: Tensor = getattr(
            self.model(input_ids=input_ids, attention_mask=attention_mask, **segments), kind(self.model).output
        )
        return result


class _ExportedVision(nn.Module):
    """A model of images with the input and the output of the ONNX graph."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return output(self.model, pixel_values)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    shape = (*query.shape[:-1], value.shape[-1])
    given = [query, key, value, *([] if mask is None else [mask])]
    y = torch.onnx.ops.symbolic("Attention", given, {"scale": scale}, dtype=query.dtype, shape=shape)
    return y.transpose(1, 2), None


def _additive_mask(*args: Any, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Tensor:
    """Return the mask `[B, 1, S, T]`: 0 where a key is seen and a large negative number elsewhere.

    Half the lowest number, not infinity: the query of a padding token sees no key, and must not become NaN.
    """
    kwargs["allow_is_causal_skip"] = False
    kwargs["allow_is_bidirectional_skip"] = False
    seen = sdpa_mask(*args, **kwargs)
    assert seen is not None
    return torch.where(seen, torch.zeros((), dtype=dtype), torch.full((), torch.finfo(dtype).min / 2, dtype=dtype))


def trace(
    model: PreTrainedModel, nodes: dict[str, LinearNode], form: Form, dtype: torch.dtype, image: tuple[int, ...] = ()
) -> ir.Model:
    """Return the graph of a skeleton, with placeholder blocks and without weights; `model` is used up.

    A model of images takes those of the shape `image [C, H, W]`.

    Raises:
        ExportError: when the model does not have the shape of a decoder with a key/value cache, or of an encoder, or
            cannot be traced.
    """
    blocks_name, _ = find_blocks(model)
    check_blocks(model)
    for layer, node in nodes.items():
        linear = model.get_submodule(layer)
        assert isinstance(linear, nn.Linear)
        model.set_submodule(layer, TracedLinear(linear, node, form, dtype))
    with _told(model):
        program, own = _captured(model, dtype, image)
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that torchvision is not there
        onnx_program = torch.onnx.export(program, opset_version=OPSET, optimize=False, verbose=False)
        assert onnx_program is not None
        traced_model = onnx_program.model
        _name(traced_model, own if kind(model).cached else [], input_names(model), kind(model).output)
        _forget_weights(traced_model, model, blocks_name)
        # It warns of every weight without content.
        logging.getLogger("onnx_ir.passes.common.initializer_deduplication").setLevel(logging.ERROR)
        optimize_ir(traced_model)
        for rules in (rms_normalization_ruleset, rotary_embedding_rules, partial_embedding_rules):
            RewritePass(rules)(traced_model)
    return traced_model


def check_traceable(model: PreTrainedModel, image: tuple[int, ...] = ()) -> None:
    """Refuse a skeleton that cannot be traced; it is used up. This takes a second, and spares a calibration.

    Raises:
        ExportError: saying what torch.export says.
    """
    with _told(model):
        _captured(model, torch.float32, image)


@contextmanager
def _told(model: PreTrainedModel) -> Iterator[None]:
    """Turn what goes wrong when a model is traced into an error of ours."""
    try:
        yield
    except ConverterError:
        raise
    except Exception as error:  # torch.export and torch.onnx have no class of their own for what they cannot do
        raise ExportError(
            f"{type(model).__name__}: must be a model that torch can trace, got {said(error)} "
            "Such models cannot be converted yet."
        ) from error


def _captured(
    model: PreTrainedModel, dtype: torch.dtype, image: tuple[int, ...]
) -> tuple[torch.export.ExportedProgram, list[int]]:
    """Return what torch.export makes of the skeleton, and the blocks in it, like one of which is every other."""
    _, blocks = find_blocks(model)
    _fill(model, dtype)
    kinds = [signature(block) for block in blocks]
    likes = [kinds.index(kind) for kind in kinds]
    bare = list(blocks)
    while True:
        traced: list[TracedBlock] = []
        for index, like in enumerate(likes):
            traced.append(TracedBlock(bare[index], index, None if like == index else traced[like]))
            blocks[index] = traced[index]
        own = [index for index, like in enumerate(likes) if like == index]
        if kind(model).cached:
            program = _program(model, len(blocks), own, dtype)
        elif kind(model).images:
            program = _image_program(model, image, dtype)
        else:
            program = _encoder_program(model, input_names(model), dtype)
        differing = [block.index for block in traced if block.differs()]
        if not differing:
            return program, own
        likes[differing[0]] = differing[0]


def _forget_weights(traced: ir.Model, model: PreTrainedModel, blocks: str) -> None:
    """Name the parameters as the checkpoint does, and take away their content, which is not theirs.

    Without it the optimiser would fold and merge parameters as if they were the zeros of a placeholder.
    """
    stored = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        value = traced.graph.initializers.get(f"model.{name}")
        if value is not None:
            value.const_value = None
            value.name = re.sub(rf"^({re.escape(blocks)}\.\d+)\.block\.", r"\1.", stored[id(parameter)])


def _program(model: PreTrainedModel, blocks: int, own: list[int], dtype: torch.dtype) -> torch.export.ExportedProgram:
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    kv = torch.zeros(BATCH, heads, PAST, head_dim, dtype=dtype)
    inputs: dict[str, Any] = {
        "input_ids": torch.zeros(BATCH, SEQUENCE, dtype=torch.int64),
        "attention_mask": torch.ones(BATCH, PAST + SEQUENCE, dtype=torch.int64),
        "position_ids": torch.zeros(BATCH, SEQUENCE, dtype=torch.int64),
        "past": [(kv.clone(), kv.clone()) for _ in own],
    }
    batch, sequence, past = torch.export.Dim("batch"), torch.export.Dim("sequence"), torch.export.Dim("past")
    dims: dict[str, Any] = {
        "input_ids": {0: batch, 1: sequence},
        "attention_mask": {0: batch, 1: torch.export.Dim.AUTO},
        "position_ids": {0: batch, 1: sequence},
        "past": [({0: batch, 2: past}, {0: batch, 2: past}) for _ in own],
    }
    with torch.no_grad():
        _use_onnx_attention(model, dtype)
        exported = _Exported(model, blocks, own)
        return torch.export.export(exported, (), inputs, dynamic_shapes=dims, strict=False)


def _encoder_program(model: PreTrainedModel, names: list[str], dtype: torch.dtype) -> torch.export.ExportedProgram:
    ids = torch.zeros(BATCH, SEQUENCE, dtype=torch.int64)
    inputs = {name: torch.ones_like(ids) if name == "attention_mask" else ids.clone() for name in names}
    # As long as the model has positions for; tracing finds out.
    dims: dict[str, Any] = {name: {0: torch.export.Dim("batch"), 1: torch.export.Dim.AUTO} for name in names}
    with torch.no_grad():
        if getattr(model, "_supports_sdpa", False):  # else its own attention is traced as it is
            _use_onnx_attention(model, dtype)
        return torch.export.export(_ExportedEncoder(model), (), inputs, dynamic_shapes=dims, strict=False)


def _image_program(model: PreTrainedModel, image: tuple[int, ...], dtype: torch.dtype) -> torch.export.ExportedProgram:
    inputs = {PIXELS: torch.zeros(BATCH, *image, dtype=dtype)}
    with torch.no_grad():
        _use_onnx_attention(model, dtype)
        dims = {PIXELS: {0: torch.export.Dim("batch")}}
        return torch.export.export(_ExportedVision(model), (), inputs, dynamic_shapes=dims, strict=False)


def input_names(model: PreTrainedModel) -> list[str]:
    """Return the names of the graph's inputs besides the caches."""
    if kind(model).cached:
        return ["input_ids", "attention_mask", "position_ids"]
    if kind(model).images:
        return [PIXELS]
    return ["input_ids", "attention_mask", *(["token_type_ids"] if takes_segments(model) else [])]


def check_blocks(model: PreTrainedModel) -> None:
    """Refuse a model that cannot be traced, which its skeleton shows.

    Raises:
        ExportError: when its blocks are not all attention blocks, it has no attention interface, or its rotary
            frequencies follow the length of the text.
    """
    _, blocks = find_blocks(model)
    config = model.config.get_text_config()
    if getattr(config, "num_hidden_layers", None) != len(blocks) or not hasattr(config, "num_attention_heads"):
        raise ExportError(
            f"{type(model).__name__}: must be a model whose blocks are all attention blocks, each its own."
        )
    if (kind(model).cached or kind(model).images) and not getattr(model, "_supports_sdpa", False):
        raise ExportError(f"{type(model).__name__}: must support transformers' attention interface, got none.")
    ropes = {str(rope) for module in model.modules() for rope in _rope_types(module)}
    if any("dynamic" in rope for rope in ropes):
        raise ExportError(
            f"{type(model).__name__}: rope_type must be one of fixed frequencies for a graph, got dynamic: it computes "
            "them anew as the text grows. Set rope_parameters in config.json to yarn, linear or default."
        )


def _rope_types(module: nn.Module) -> list[Any]:
    """Return the kinds of rotary embedding that the module computes, one for each kind of block."""
    found = getattr(module, "rope_type", None)
    return list(found.values()) if isinstance(found, dict) else [found]


def tied_weights(model: nn.Module) -> dict[str, str]:
    """Return the names of the parameters that are one tensor under several names, each with the one that is stored."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    return {name: names[0] for names in owners.values() if len(names) > 1 for name in names}


def _fill(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace every meta parameter by one of the same shape without content; tied ones stay tied."""
    done: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.device.type == "meta":
                if id(parameter) not in done:
                    kind = dtype if parameter.is_floating_point() else parameter.dtype
                    done[id(parameter)] = _placeholder(tuple(parameter.shape), kind)
                setattr(module, name, done[id(parameter)])


def _use_onnx_attention(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Let the model use the ONNX attention operator and its mask."""

    def mask(*args: Any, **kwargs: Any) -> Tensor:
        kwargs["dtype"] = dtype
        return _additive_mask(*args, **kwargs)

    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, mask)
    model.set_attn_implementation(ATTENTION)


def cache_names(kind: str, index: int) -> list[str]:
    """Return the names of a block's key and value, `kind` being past_key_values or present."""
    return [f"{kind}.{index}.{part}" for part in ("key", "value")]


def _name(model: ir.Model, own: list[int], inputs: list[str], output: str) -> None:
    """Give inputs, outputs and their dimensions the names that optimum and onnxruntime-genai expect."""
    past = [name for index in own for name in cache_names("past_key_values", index)]
    present = [name for index in own for name in cache_names("present", index)]
    for value, name in zip(model.graph.inputs, inputs + past, strict=True):
        value.name = name
    for value, name in zip(model.graph.outputs, [output, *present], strict=True):
        value.name = name
    ids = model.graph.inputs[0].shape
    assert ids is not None
    names = {str(ids[0]): "batch_size"}
    if inputs != [PIXELS]:
        names[str(ids[1])] = "sequence_length"
    sums: dict[str, str] = {}
    if own:
        mask, key = model.graph.inputs[1].shape, model.graph.inputs[3].shape
        assert mask is not None
        assert key is not None
        total = "past_sequence_length + sequence_length"
        names[str(key[2])] = "past_sequence_length"
        sums = {str(mask[1]): total, f"{key[2]} + {ids[1]}": total, f"{ids[1]} + {key[2]}": total}
    computed = [value for node in model.graph for value in node.outputs]
    for value in {*model.graph.inputs, *model.graph.outputs, *computed}:
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(dim, names | sums) for dim in value.shape])


def _renamed(dim: int | ir.SymbolicDim, names: dict[str, str]) -> int | str | None:
    if isinstance(dim, int) or dim.value is None:
        return None if not isinstance(dim, int) else dim
    return names.get(str(dim))
