"""Trace a model into an ONNX graph: every linear layer one node, and blocks that are alike traced only once.

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
from typing import Any

import onnx_ir as ir
import torch
from onnxscript.optimizer import optimize_ir
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.rules.fusion._rms_normalization import rms_normalization_ruleset
from onnxscript.rewriter.rules.fusion._rotary_embedding import partial_embedding_rules, rotary_embedding_rules
from torch import Tensor, nn
from transformers import PreTrainedModel

from converter.errors import ConverterError, ExportError, said
from converter.graph.attention import use_onnx_attention
from converter.graph.placeholders import LinearNode, TracedBlock, TracedLinear, placeholder
from converter.kinds import kind
from converter.kinds.kind import Wrapped
from converter.plan import find_blocks, signature
from converter.signature import OPSET, Form


def trace(
    model: PreTrainedModel, nodes: dict[str, LinearNode], form: Form, dtype: torch.dtype, blank: Tensor
) -> ir.Model:
    """Return the graph of a skeleton, with placeholder blocks and without weights; `model` is used up.

    `blank` is an input of the model, of whose content nothing is read.

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
        program, wrapped = _captured(model, dtype, blank)
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that torchvision is not there
        onnx_program = torch.onnx.export(program, opset_version=OPSET, optimize=False, verbose=False)
        assert onnx_program is not None
        traced_model = onnx_program.model
        _name(traced_model, wrapped)
        _forget_weights(traced_model, model, blocks_name)
        # It warns of every weight without content.
        logging.getLogger("onnx_ir.passes.common.initializer_deduplication").setLevel(logging.ERROR)
        optimize_ir(traced_model)
        for rules in (rms_normalization_ruleset, rotary_embedding_rules, partial_embedding_rules):
            RewritePass(rules)(traced_model)
    return traced_model


def check_traceable(model: PreTrainedModel, blank: Tensor) -> None:
    """Refuse a skeleton that cannot be traced on `blank`; it is used up. This takes a second, and spares a calibration.

    Raises:
        ExportError: saying what torch.export says.
    """
    with _told(model):
        _captured(model, torch.float32, blank)


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
    model: PreTrainedModel, dtype: torch.dtype, blank: Tensor
) -> tuple[torch.export.ExportedProgram, Wrapped]:
    """Return what torch.export makes of the skeleton, of blocks that are alike only the first, and how it is called."""
    _, blocks = find_blocks(model)
    _fill(model, dtype)
    signatures = [signature(block) for block in blocks]
    likes = [signatures.index(one) for one in signatures]
    bare = list(blocks)
    while True:
        traced: list[TracedBlock] = []
        for index, like in enumerate(likes):
            traced.append(TracedBlock(bare[index], index, None if like == index else traced[like]))
            blocks[index] = traced[index]
        own = [index for index, like in enumerate(likes) if like == index]
        with torch.no_grad():
            if getattr(model, "_supports_sdpa", False):  # else its own attention is traced as it is
                use_onnx_attention(model, dtype)
            wrapped = kind(model).wrap(model, len(blocks), own, blank, dtype)
            program = torch.export.export(
                wrapped.module, (), wrapped.examples, dynamic_shapes=wrapped.free, strict=False
            )
        differing = [block.index for block in traced if block.differs()]
        if not differing:
            return program, wrapped
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
    if kind(model).interface and not getattr(model, "_supports_sdpa", False):
        raise ExportError(f"{type(model).__name__}: must support transformers' attention interface, got none.")
    ropes = {str(rope) for module in model.modules() for rope in _rope_types(module)}
    if any("dynamic" in rope for rope in ropes):
        raise ExportError(
            f"{type(model).__name__}: rope_type must be one of fixed frequencies for a graph, got dynamic: it computes "
            "them anew as the text grows. Set rope_parameters in config.json to yarn, linear or default."
        )


def _rope_types(module: nn.Module) -> list[Any]:
    """Return the types of rotary embedding that the module computes, one for each type of block."""
    ropes = getattr(module, "rope_type", None)
    return list(ropes.values()) if isinstance(ropes, dict) else [ropes]


def _fill(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace every meta parameter by one of the same shape without content; tied ones stay tied."""
    done: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.device.type == "meta":
                if id(parameter) not in done:
                    own = dtype if parameter.is_floating_point() else parameter.dtype
                    done[id(parameter)] = placeholder(tuple(parameter.shape), own)
                setattr(module, name, done[id(parameter)])


def _name(model: ir.Model, wrapped: Wrapped) -> None:
    """Give inputs, outputs and their dimensions the names that optimum and onnxruntime-genai expect."""
    for value, name in zip(model.graph.inputs, wrapped.inputs, strict=True):
        value.name = name
    for value, name in zip(model.graph.outputs, wrapped.outputs, strict=True):
        value.name = name
    names = wrapped.dims([[str(dim) for dim in value.shape or ()] for value in model.graph.inputs])
    computed = [value for node in model.graph for value in node.outputs]
    for value in {*model.graph.inputs, *model.graph.outputs, *computed}:
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(dim, names) for dim in value.shape])


def _renamed(dim: int | ir.SymbolicDim, names: dict[str, str]) -> int | str | None:
    if isinstance(dim, int) or dim.value is None:
        return None if not isinstance(dim, int) else dim
    return names.get(str(dim))
