"""What a checkpoint's files really hold: which tensors, of which shape and dtype, and whether they are the model's."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from converter.errors import CheckpointError, said, shortened

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
FLOATS = {"F64", "F32", "F16", "BF16"}
# What wraps a model in training, and puts its name before, or between, those of the weights.
WRAPPERS = {
    "_orig_mod": "torch.compile",
    "module": "DataParallel",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "_forward_module": "Lightning",
    "base_model": "PEFT",
}
# Buffers that older versions of transformers saved, and newer ones compute.
COMPUTED = re.compile(
    r"(^|\.)(inv_freq|cos_cached|sin_cached|causal_mask|masked_bias|position_ids|num_batches_tracked)$"
    r"|(attn|attention)\.bias$|(^|\.)decoder\.version$"
)
# Names of what means nothing without the rest of a quantised weight, or of an adapter.
PARTS = re.compile(r"\.lora_|weight_scale|input_scale|scale_inv|qweight|qzeros|g_idx|absmax|quant_state")

# Settings by what must be true of them, in the text model and in its rotary frequencies.
LENGTHS = ("max_position_embeddings", "original_max_position_embeddings", "sliding_window", "attention_chunk_size")
BASES = ("rope_theta", "factor")
EPSILON = re.compile(r"_eps(ilon)?$")


@dataclass(frozen=True)
class Stored:
    """A tensor of a file: its shape, and its dtype as safetensors has it, such as BF16."""

    path: Path
    shape: tuple[int, ...]
    dtype: str


def stored(folder: Path) -> dict[str, Stored]:
    """Return the tensors that transformers would read in a folder: of the single file, else those of the index.

    Raises:
        CheckpointError: when there is neither, or a file is not whole, not there, or not what the index says.
    """
    if (folder / SINGLE).is_file():
        return _tensors(folder / SINGLE)
    if not (folder / INDEX).is_file():
        there = ", ".join(sorted(path.name for path in folder.glob("*.safetensors")))
        raise CheckpointError(
            f"{folder}: weights must be in {SINGLE}, or in the files of {INDEX}, got {there}. "
            "Give the file of the weights that name."
        )
    try:
        table = json.loads((folder / INDEX).read_text("utf-8"))["weight_map"]
        names = {str(tensor): str(name) for tensor, name in table.items()}
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / INDEX}: must say which file holds each tensor, got {said(error)}") from error
    tensors: dict[str, Stored] = {}
    for name in sorted(set(names.values())):
        if Path(name).name != name or len(name) > 255 or not (folder / name).is_file():
            raise CheckpointError(
                f"{folder / INDEX}: must name files of the folder, got {shortened(repr(name))}. Fetch them all."
            )
        there_too = _tensors(folder / name)
        for tensor in (tensor for tensor, file in names.items() if file == name):
            if tensor not in there_too:
                raise CheckpointError(
                    f"{folder / name}: must hold {tensor}, as {INDEX} says, got none. Fetch it again."
                )
            tensors[tensor] = there_too[tensor]
    return tensors


def _tensors(path: Path) -> dict[str, Stored]:
    try:
        with safe_open(path, "pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            return {name: Stored(path, tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: must be a complete safetensors file, got {path.stat().st_size} bytes ({error}). Fetch it again."
        ) from error


def weight_names(model: nn.Module) -> list[str]:
    """Return the parameters and the saved buffers of the model, tied ones under the name that is stored."""
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    return [*parameters, *(name for name in model.state_dict() if name in buffers)]


def refuse_encoded(tensors: dict[str, Stored], source: str) -> None:
    """Refuse tensors that are no weights as they are: of a quantised model, or of an adapter.

    Raises:
        CheckpointError: naming the first.
    """
    for name, tensor in tensors.items():
        if COMPUTED.search(name):
            continue
        if tensor.dtype not in FLOATS:
            raise CheckpointError(
                f"{source}: {shortened(name)} must be of {', '.join(sorted(FLOATS))}, got {tensor.dtype}: the "
                "checkpoint is quantised. Dequantise it first, or take the original."
            )
        if PARTS.search(name):
            raise CheckpointError(
                f"{source}: must be a whole model of plain weights, got {shortened(name)}, part of an adapter or of a "
                "quantised weight. Merge or dequantise it first."
            )


def check_stored(model: nn.Module, tensors: dict[str, Stored], source: str) -> None:
    """Refuse weights of other shapes than the model of config.json has.

    Raises:
        CheckpointError: naming the first.
    """
    for name, wanted in model.state_dict().items():
        there = tensors.get(name)
        if there is None:  # tied to another
            continue
        if there.shape != tuple(wanted.shape):
            raise CheckpointError(
                f"{source}: {name} must have shape {list(wanted.shape)} by config.json, got {list(there.shape)}. "
                "Fetch config.json of these weights, or save the model again."
            )


def check_tied(model: nn.Module, tensors: dict[str, Stored], source: str) -> None:
    """Refuse weights that config.json ties and that are stored apart with other values: one of them would be lost.

    Raises:
        CheckpointError: naming the two.
    """
    for name, other in tied_weights(model).items():
        if other == name or name not in tensors or other not in tensors:
            continue
        one, two = (read_tensor(tensors[which].path, which) for which in (other, name))
        if not torch.equal(one, two):
            raise CheckpointError(
                f"{source}: {other} and {name} must be equal, as config.json ties them, got different weights. "
                "Set tie_word_embeddings to false in config.json, or fetch config.json of these weights."
            )


def tied_weights(model: nn.Module) -> dict[str, str]:
    """Return the names of the parameters that are one tensor under several names, each with the one that is stored."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    return {name: names[0] for names in owners.values() if len(names) > 1 for name in names}


def read_tensor(path: Path, name: str) -> Tensor:
    """Return one tensor; the file is closed again, so that its pages do not stay in memory."""
    with safe_open(path, "pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor


def left_over(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """Return the tensors that the model has no place for, without what it would compute or never loads."""
    ignored = [re.compile(text) for text in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    known = {*model.state_dict(), *(name for name, _ in model.named_buffers())}
    return sorted(
        name
        for name in set(names) - known
        if not COMPUTED.search(name) and "pooler." not in name and not any(text.search(name) for text in ignored)
    )


def refuse_lost(model: PreTrainedModel, rest: list[str], source: str, *, heads: bool) -> None:
    """Refuse tensors that would be lost with what they mean: of blocks that the model does not have, or, with `heads`,
    any at all.

    Raises:
        CheckpointError: naming the first.
    """  # noqa: D205
    lists = {name: len(module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    base = getattr(model, "base_model_prefix", "")
    for name in rest:
        for blocks, count in lists.items():
            bare = re.escape(blocks.removeprefix(f"{base}."))
            place = re.match(rf"(?:.*\.)?{bare}\.(\d{{1,9}})\.", name)
            if place and int(place[1]) >= count:
                raise CheckpointError(
                    f"{source}: config.json must have as many blocks as the weights, got weights of further ones: "
                    f"{shortened(name)}. Fetch config.json of these weights."
                )
    if heads and rest:
        raise CheckpointError(
            f"{source}: must be a causal language model alone, got a head for another task as well: {some(rest)}. "
            "It would be lost: save the language model without it."
        )


def has_head(model: PreTrainedModel, names: Iterable[str]) -> bool:
    """Return whether any weight of the model is stored that is outside its base model."""
    base, there = f"{getattr(model, 'base_model_prefix', '')}.", set(names)
    return any(name in there for name in weight_names(model) if not name.startswith(base))


def some(names: list[str]) -> str:
    """Return the first names, and how many more there are."""
    return shortened(", ".join(names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def refuse_adapter(folder: Path, source: str) -> None:
    """Refuse an adapter, alone or beside its model.

    Raises:
        CheckpointError: naming its file.
    """
    there = [name for name in ADAPTERS if (folder / name).exists()]
    if there:
        raise CheckpointError(
            f"{source}: must be a whole model, got an adapter (such as LoRA) as well: {there[0]}. "
            "Merge it with peft's merge_and_unload and save the result, or move it away."
        )


def refuse_quantised(config: PreTrainedConfig, source: str) -> None:
    """Refuse a checkpoint whose configuration says that it is quantised.

    Raises:
        CheckpointError: naming the method.
    """
    for part in (config, config.get_text_config()):
        for name in ("quantization_config", "compression_config"):
            about: Any = getattr(part, name, None)
            if about:
                get = about.get if isinstance(about, dict) else lambda key, about=about: getattr(about, key, None)
                method = shortened(str(get("quant_method") or "an unnamed method"))
                raise CheckpointError(
                    f"{source}: weights must be numbers of 16 or 32 bits, got a quantised checkpoint ({method}). "
                    "Dequantise it first, or take the original."
                )


def refuse_meaningless(config: PreTrainedConfig, source: str) -> None:
    """Refuse settings that no weight's shape depends on and that mean nothing: no positions, a negative epsilon, NaN.

    Raises:
        CheckpointError: naming the setting.
    """
    text = config.get_text_config()
    for name, value in _numbers(text.to_dict()):
        key = name.rsplit(".", 1)[-1]
        wanted = ""
        if not math.isfinite(value):
            wanted = "a finite number"
        elif key in LENGTHS and (value < 1 or value != int(value)):
            wanted = "a whole number from 1 on"
        elif key in BASES and value <= 0:
            wanted = "above 0"
        elif EPSILON.search(key) and value < 0:
            wanted = "0 or more"
        if wanted:
            raise CheckpointError(f"{source}: {name} must be {wanted}, got {value:g}. Mend config.json.")


def _numbers(settings: dict[str, Any], where: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers among the settings, each with the names that lead to it."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{where}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{where}{name}", value


def refuse_wrapped(model: nn.Module, names: Iterable[str], source: str) -> None:
    """Refuse weights whose names have those of a wrapper in them, which say so and not which weights are missing.

    Raises:
        CheckpointError: naming the wrapper.
    """
    wanted, there = set(weight_names(model)), set(names)
    parts = {part for name in there for part in name.split(".")}
    if lora := sorted(name for name in there if ".lora_" in name):
        raise CheckpointError(
            f"{source}: must be a whole model, got a LoRA adapter's {lora[0]}. Merge it with peft's merge_and_unload."
        )
    for wrapper, who in WRAPPERS.items():
        bare = {".".join(part for part in name.split(".") if part != wrapper) for name in there}
        if wrapper in parts and len(wanted & bare) > len(wanted & there):
            raise CheckpointError(
                f"{source}: weights must have the model's own names, got {wrapper!r} in them, as {who} puts it there. "
                "Save the model that it wraps, or remove that part from the names."
            )
    before = {name[: -len(want)] for want in wanted for name in there if name.endswith(f".{want}")}
    ours = f"{getattr(model, 'base_model_prefix', '')}."
    for prefix in sorted(before - {ours}):
        if len(wanted & {name.removeprefix(prefix) for name in there}) > len(wanted & there):
            raise CheckpointError(
                f"{source}: weights must have the model's own names, got {prefix!r} before them. "
                "Save the model without what wraps it, or remove this prefix from the names."
            )
