"""float16 ends at 65504: which layer of a model goes beyond that, told by a forward in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from converter.errors import ExportError
from converter.evaluation.reference import make_sparse
from converter.kinds import output
from converter.names import Phases
from converter.sparsity.linear import Params
from converter.sparsity.quantize import Storage

LARGEST = torch.finfo(torch.float16).max
ADVICE = "Export with --dtype bfloat16 or float32."


def check_range(
    model: PreTrainedModel, params: dict[str, Params], storage: Storage, phases: Phases, given: Tensor
) -> None:
    """Refuse float16 where the dense `model`, or the sparse one that it is made into, needs larger numbers on `given`.

    Raises:
        ExportError: naming the first layer that does.
    """
    for sparse in (False, True):
        if sparse:
            make_sparse(model, params, storage, phases)
        beyond = beyond_float16(model, given)
        if beyond:
            raise ExportError(beyond)


def beyond_float16(model: PreTrainedModel, given: Tensor) -> str:
    """Return which layer is the first, in the order of a forward, with a number beyond float16; empty where all fit.

    `given` are token ids `[B, S]` or images. The inputs of layers are checked as well: they are the sums and products
    between layers.
    """
    beyond: list[str] = []

    def note(name: str, where: str, tensors: Any) -> None:
        for tensor in tensors if isinstance(tensors, tuple | list) else (tensors,):
            if not beyond and isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel():
                largest = float(tensor.abs().max())
                if not largest <= LARGEST:
                    beyond.append(
                        f"{name}: numbers must be at most {LARGEST:g} for float16, got {largest:.2g} at its {where}. "
                        f"{ADVICE}"
                    )

    def watch(name: str, module: nn.Module) -> list[Any]:
        return [
            module.register_forward_pre_hook(lambda _module, inputs: note(name, "input", inputs)),
            module.register_forward_hook(lambda _module, _inputs, outputs: note(name, "output", outputs)),
        ]

    leaves = [(name, module) for name, module in model.named_modules() if not any(module.children())]
    handles = [handle for name, module in leaves for handle in watch(name, module)]
    try:
        with torch.no_grad():
            note(type(model).__name__, "output", output(model, given))
    finally:
        for handle in handles:
            handle.remove()
    return beyond[0] if beyond else ""
