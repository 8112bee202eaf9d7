"""OUT in ONNX Runtime, behind the interface of a transformers model: `model(...)`, `model.generate(...)`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, ImageClassifierOutput, MaskedLMOutput

from converter.checkpoint import Checkpoint
from converter.errors import ExportError
from converter.graph.widen import is_bfloat16, widen
from converter.kinds import CLASSIFIER, DECODER, ENCODER, IMAGE_ENCODER, MASKED, kind_of
from converter.names import MODEL
from converter.runtimes import arguments
from converter.runtimes.decoder import PAST, CacheInput, GraphCausalLM, generation_config, graph_model
from converter.runtimes.kernel import has_kernel, library

# Dense products of integers, which OUT is timed against, are fastest with activations rounded to eight bits (level 4).
ACCURACY = "session.qdq_matmulnbits_accuracy_level"
INITIALIZERS = "session.model_external_initializers_file_folder_path"


def session(
    model: onnx.ModelProto, folder: Path, *, prepack: bool = True, threads: int = 0
) -> onnxruntime.InferenceSession:
    """Return a session for a graph whose weights lie in `folder`; without `prepack` each weight is in memory once.

    It has that many threads, or one per core, and none spins between calls, so that other processes get the core. The
    op runs in our kernel where its `library` is built and the graph is float32; else its function body runs. The CPU
    provider has no bfloat16 kernels: a bfloat16 graph is run in float32, on the same weights.

    Raises:
        ExportError: when ONNX Runtime has no kernel for the graph.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry(INITIALIZERS, os.path.abspath(folder))
    options.add_session_config_entry(ACCURACY, "4")
    if not prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    kernel = library() if has_kernel(model) else None
    try:
        if kernel is not None:
            options.register_custom_ops_library(str(kernel.resolve()))
        graph = (widen(model) if is_bfloat16(model) else model).SerializeToString()
        return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own classes derive from Exception alone
        raise ExportError(f"{folder / MODEL}: ONNX Runtime cannot run it: {str(error).splitlines()[0]}") from error


def call_feed(run: onnxruntime.InferenceSession, ids: Tensor, caches: Sequence[Any] | None) -> dict[str, Any]:
    """Return the inputs of a call with tokens `ids [B, S]` after `caches`, or after none."""
    batch, length = ids.shape
    inputs = run.get_inputs()
    if caches is None:
        element = np.float16 if "float16" in inputs[3].type else np.float32
        caches = [np.zeros((batch, value.shape[1], 0, value.shape[3]), element) for value in inputs[3:]]
    past = caches[0].shape[2]
    mask, positions = torch.ones(batch, past + length, dtype=torch.int64), torch.arange(past, past + length)
    arrays = [value.contiguous().numpy() for value in (ids, mask, positions.expand(batch, -1))]
    arrays += [np.ascontiguousarray(cache) for cache in caches]
    return {value.name: array for value, array in zip(inputs, arrays, strict=True)}


def call(run: onnxruntime.InferenceSession, feeds: dict[str, Tensor]) -> list[Tensor]:
    """Return the session's outputs for inputs by name.

    Raises:
        ValueError: when the graph cannot take them, as when there are more tokens than the model has positions.
    """
    try:
        arrays = run.run(None, {name: tensor.contiguous().numpy() for name, tensor in feeds.items()})
    except Exception as error:  # onnxruntime's own classes derive from Exception alone
        given = {name: list(tensor.shape) for name, tensor in feeds.items() if not name.startswith(PAST)}
        raise ValueError(
            f"{', '.join(given)}: must be what the graph can take, got {', '.join(map(str, given.values()))} and, from "
            f"ONNX Runtime, {str(error).splitlines()[0]} Are these more tokens than the model has positions?"
        ) from error
    return [torch.from_numpy(array) for array in arrays]


def decoder(config: PreTrainedConfig, run: onnxruntime.InferenceSession) -> GraphCausalLM:
    """Return the language model whose graph the session runs; `config` is that of the checkpoint."""
    inputs = [value for value in run.get_inputs() if value.name.startswith(PAST)]
    dtype = torch.float16 if "float16" in inputs[0].type else torch.float32
    caches = [CacheInput(value.name, value.shape[1], value.shape[3], dtype) for value in inputs]
    return graph_model(config, caches, partial(call, run))


class OnnxEncoder(PreTrainedModel):
    """An encoder or masked language model whose forward is an ONNX Runtime session."""

    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, config: PreTrainedConfig, onnx_session: onnxruntime.InferenceSession) -> None:
        """Keep the session; `config` is that of the checkpoint."""
        super().__init__(config)
        self.session = onnx_session
        self.inputs = [value.name for value in onnx_session.get_inputs()]
        self.output = onnx_session.get_outputs()[0].name

    @property
    def device(self) -> torch.device:
        """The CPU, where inputs are expected and outputs lie."""
        return torch.device("cpu")

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> Any:
        """Return last_hidden_state `[B, S, H]` or logits `[B, S, V]` in float32 for token ids `[B, S]`.

        Raises:
            ValueError: when an argument is given that the graph does not serve, or that does not fit.
        """
        arguments.refuse(others, ("input_ids", "attention_mask", "token_type_ids"))
        ids = arguments.whole("input_ids", input_ids, (None, None), getattr(self.config, "vocab_size", None))
        shape = (ids.shape[0], ids.shape[1])
        segments = torch.zeros_like(ids)
        if "token_type_ids" not in self.inputs:
            arguments.zeros("token_type_ids", token_type_ids, shape)
        elif token_type_ids is not None:
            segments = arguments.whole("token_type_ids", token_type_ids, shape, self.config.type_vocab_size)
        given = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids) if attention_mask is None else arguments.mask(attention_mask, shape),
            "token_type_ids": segments,
        }
        y = call(self.session, {name: given[name] for name in self.inputs})[0].float()
        out = MaskedLMOutput(logits=y) if self.output == "logits" else BaseModelOutput(last_hidden_state=y)
        return arguments.returned(self.config, out, return_dict)


class OnnxVision(PreTrainedModel):
    """A classifier or an encoder of images whose forward is an ONNX Runtime session."""

    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config: PreTrainedConfig, onnx_session: onnxruntime.InferenceSession) -> None:
        """Keep the session; `config` is that of the checkpoint."""
        super().__init__(config)
        self.session = onnx_session
        (pixels,), (logits,) = onnx_session.get_inputs(), onnx_session.get_outputs()
        self.shape, self.output = (None, *pixels.shape[1:]), logits.name
        self.pixels = torch.float16 if "float16" in pixels.type else torch.float32

    @property
    def device(self) -> torch.device:
        """The CPU, where inputs are expected and outputs lie."""
        return torch.device("cpu")

    def forward(self, pixel_values: Tensor | None = None, return_dict: bool | None = None, **others: Any) -> Any:
        """Return logits `[B, V]` or last_hidden_state `[B, S, H]` in float32 for pixels `[B, C, H, W]`.

        Raises:
            ValueError: when an argument is given that the graph does not serve, or that does not fit.
        """
        arguments.refuse(others, (self.main_input_name,))
        pixels = arguments.real(self.main_input_name, pixel_values, self.shape).to(self.pixels)
        y = call(self.session, {self.main_input_name: pixels})[0].float()
        out = ImageClassifierOutput(logits=y) if self.output == "logits" else BaseModelOutput(last_hidden_state=y)
        return arguments.returned(self.config, out, return_dict)


# By the name of the kind; each is made of the checkpoint's configuration and a session.
MODELS: dict[str, Callable[[PreTrainedConfig, onnxruntime.InferenceSession], PreTrainedModel]] = {
    DECODER.name: decoder,
    MASKED.name: OnnxEncoder,
    ENCODER.name: OnnxEncoder,
    CLASSIFIER.name: OnnxVision,
    IMAGE_ENCODER.name: OnnxVision,
}


def load_onnx(folder: Path) -> PreTrainedModel:
    """Return the model in OUT, ready to run."""
    config = Checkpoint(str(folder), None, folder).config
    run = session(onnx.load(folder / MODEL, load_external_data=False), folder)
    kind = kind_of(config, str(folder))
    model = MODELS[kind.name](config, run)
    if kind.sampling is not None:
        model.generation_config = generation_config(folder)
    return model
