"""An engine on a GPU, behind the interface of a transformers model. None has run on a GPU yet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from converter.checkpoint import Checkpoint
from converter.errors import DeviceError, ExportError
from converter.options import EngineOptions
from converter.runtimes.decoder import PAST, CacheInput, GraphCausalLM, generation_config, graph_model
from converter.runtimes.engine import ENGINE, log
from converter.runtimes.profile import Profile, fitting
from converter.runtimes.protocol import Runnable

DTYPES = {"float": torch.float32, "half": torch.float16, "bf16": torch.bfloat16, "int64": torch.int64}
ALIGNMENT = 256  # bytes, of every address that TensorRT is given


class Engine:
    """An engine of the bindings `trt` on the GPU, and the dtypes of what it takes and gives, by name."""

    device = "cuda"

    def __init__(
        self,
        trt: Any,
        place: Path,
        inputs: dict[str, torch.dtype],
        outputs: dict[str, torch.dtype],
        *,
        host_code: bool = False,
    ) -> None:
        """Load the engine in the folder `place`; with `host_code` it may bring code for this CPU.

        Raises:
            DeviceError: when this GPU, or this version of TensorRT, cannot run it.
        """
        self.place, self.inputs, self.outputs, self.profile = place, inputs, outputs, -1
        self.log = log(trt)
        self.runtime = trt.Runtime(self.log)
        self.runtime.engine_host_code_allowed = host_code
        self.engine = self.runtime.deserialize_cuda_engine((place / ENGINE).read_bytes())
        if self.engine is None:
            raise DeviceError(
                f"{place / ENGINE}: must be built for this GPU and for {trt.__version__}, got an engine that cannot be "
                f"loaded: {'; '.join(self.log.errors[-3:])}. Build it again."
            )
        self.context, self.stream = self.engine.create_execution_context(), torch.cuda.Stream()

    def run(self, profile: int, feeds: dict[str, Tensor]) -> list[Tensor]:
        """Return the outputs for inputs by name, under the profile of that number.

        Raises:
            ExportError: when TensorRT cannot run it.
        """
        context, stream = self.context, self.stream
        stream.wait_stream(torch.cuda.current_stream())
        if profile != self.profile:
            self._check(context.set_optimization_profile_async(profile, stream.cuda_stream))
            self.profile = profile
        given = {name: feeds[name].to(dtype) for name, dtype in self.inputs.items()}
        placed = {name: _placed(tensor) for name, tensor in given.items()}
        for name, tensor in given.items():
            self._check(context.set_input_shape(name, tuple(tensor.shape)))
            self._check(context.set_tensor_address(name, placed[name].data_ptr()))
        outputs = []
        for name, dtype in self.outputs.items():
            outputs.append(torch.empty(tuple(context.get_tensor_shape(name)), dtype=dtype, device=self.device))
            self._check(context.set_tensor_address(name, outputs[-1].data_ptr()))
        self._check(context.execute_async_v3(stream.cuda_stream))
        stream.synchronize()
        return outputs

    def _check(self, done: bool) -> None:
        if not done:
            raise ExportError(f"{self.place / ENGINE}: TensorRT cannot run it: {'; '.join(self.log.errors[-3:])}")


def load_engine(folder: Path, ready: Runnable, options: EngineOptions) -> GraphCausalLM:
    """Return the engine that was found for OUT, ready to run.

    Where the options allow host code it may bring some for this CPU, as one that is version-compatible or has the
    plugin in it does.

    Raises:
        BuildError: when TensorRT or the plugin's library is missing.
        DeviceError: when this GPU cannot run it.
    """
    engine = ready.engine
    trt = ready.runtime.ready(ready.place, engine, options.plugin)
    inputs, outputs = ({t["name"]: DTYPES[t["dtype"]] for t in side} for side in (engine.inputs, engine.outputs))
    loaded = Engine(trt, ready.place, inputs, outputs, host_code=options.allow_host_code)
    caches = [
        CacheInput(t["name"], t["shape"][1], t["shape"][3], inputs[t["name"]])
        for t in engine.inputs
        if t["name"].startswith(PAST)
    ]
    run = by_profile(loaded.run, engine.shapes())
    model = graph_model(Checkpoint(str(folder), None, folder).config, caches, run, loaded.device)
    model.generation_config = generation_config(folder)
    return model


def by_profile(
    run: Callable[[int, dict[str, Tensor]], list[Tensor]], profiles: Sequence[Profile]
) -> Callable[[dict[str, Tensor]], list[Tensor]]:
    """Return `run` as a function of the inputs alone: in parts of as many sequences as a profile takes."""

    def call(feeds: dict[str, Tensor]) -> list[Tensor]:
        batch, tokens = feeds["input_ids"].shape
        past = feeds["attention_mask"].shape[1] - tokens
        parts, done = [], 0
        while done < batch:
            number, rows = fitting(profiles, batch - done, tokens, past)
            parts.append(run(number, {name: tensor[done : done + rows] for name, tensor in feeds.items()}))
            done += rows
        return [torch.cat(rows) for rows in zip(*parts, strict=True)]

    return call


def _placed(tensor: Tensor) -> Tensor:
    """Return the tensor at an address that TensorRT takes, which an empty one must have, too."""
    if not tensor.numel():
        return tensor.new_empty(1)
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()
