"""Read a checkpoint: a Hub id, a folder with safetensors, or a GGUF file, all turned into one folder of safetensors."""

from __future__ import annotations

import hashlib
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from accelerate import init_empty_weights
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from converter.arrangement import Arrangement
from converter.errors import CheckpointError, DeviceError
from converter.kinds import DECODER, Kind, kind_of, without_pooler

WANTED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on this machine; `folder` holds config, tokenizer and weights under the names torch gives them.

    Every weight that it gives is reordered by `arrangement`; the files and their fingerprint are not. `device` is where
    `model` puts the model.
    """

    source: str
    revision: str | None
    folder: Path
    arrangement: Arrangement = field(default_factory=lambda: Arrangement({}))
    device: str = "cpu"

    def arranged(self, arrangement: Arrangement) -> Checkpoint:
        """Return the same checkpoint, reordered."""
        return replace(self, arrangement=arrangement)

    def on(self, device: str) -> Checkpoint:
        """Return the same checkpoint, whose model is put on `device`: `cpu` or `cuda`.

        Raises:
            DeviceError: when PyTorch finds no GPU.
        """
        if device != "cpu" and not torch.cuda.is_available():
            raise DeviceError(f"device: a GPU that PyTorch can use must be here for {device}, got none. Use cpu.")
        return replace(self, device=device)

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The model's configuration."""
        try:
            config: PreTrainedConfig = AutoConfig.from_pretrained(self.folder)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{self.source}: must hold a config.json that transformers knows, {error}") from error
        return config

    @cached_property
    def kind(self) -> Kind:
        """The kind of model that it is."""
        return kind_of(self.config, self.source)

    @cached_property
    def files(self) -> dict[str, Path]:
        """Which safetensors file holds each tensor."""
        found: dict[str, Path] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(path, "pt") as file:
                    found |= dict.fromkeys(file.keys(), path)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{path}: must be a complete safetensors file, got {path.stat().st_size} bytes ({error}). "
                    "Fetch it again."
                ) from error
        return found

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer."""
        tokenizer: PreTrainedTokenizerBase = self.processor()
        return tokenizer

    def processor(self) -> Any:
        """Return what makes the model's input: the tokenizer, or the processor of images.

        Raises:
            CheckpointError: when the checkpoint has none, or what it needs is not installed.
        """
        try:
            return _processor(self.kind, self.folder)
        except (OSError, ValueError, KeyError, ImportError) as error:
            what = "an image processor (nmsparse[images] reads images)" if self.kind.images else "a tokenizer"
            raise CheckpointError(f"{self.source}: must come with {what}, got {error}") from error

    def generation_config(self) -> GenerationConfig:
        """Return how the model wants to be sampled; from the configuration where the checkpoint does not say."""
        if (self.folder / "generation_config.json").exists():
            return GenerationConfig.from_pretrained(self.folder)
        return GenerationConfig.from_model_config(self.config)

    def skeleton(self) -> PreTrainedModel:
        """Return the model without its weights: parameters on the meta device, buffers real."""
        with init_empty_weights(include_buffers=False):
            try:
                model: PreTrainedModel = without_pooler(self.kind.auto.from_config(self.config))
            except ValueError as error:
                raise CheckpointError(
                    f"{self.source}: must be a {self.kind.name}, got {type(self.config).__name__}."
                ) from error
        model.tie_weights()
        model.eval()
        return model

    def model(self) -> PreTrainedModel:
        """Return the model in float32, in evaluation mode, on `device`.

        Raises:
            CheckpointError: when a weight is missing, NaN or infinite.
        """
        with quiet():
            model = without_pooler(self.kind.auto.from_pretrained(self.folder, dtype=torch.float32))
        model.eval()
        for name, parameter in model.named_parameters():
            self._finite(name, parameter.data)
        self.arrangement.apply(model)
        model.requires_grad_(False)
        model.to(self.device)  # type: ignore[arg-type] # transformers wraps `to`
        return model

    def blank(self) -> Tensor:
        """Return an input of the model that says nothing: two tokens, or a black image."""
        if self.kind.images:
            return torch.zeros(1, *image_shape(self.processor()))
        return torch.zeros(1, 2, dtype=torch.int64)

    def read(self, name: str) -> Tensor:
        """Return one weight; the file is closed again, so that its pages do not stay in memory.

        Raises:
            CheckpointError: when it is NaN or infinite.
        """
        with safe_open(self.files[name], "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return self.arrangement.of(name, self._finite(name, tensor))

    def _finite(self, name: str, tensor: Tensor) -> Tensor:
        bad = tensor.numel() - int(tensor.isfinite().sum())
        if bad:
            raise CheckpointError(f"{name}: weights must be finite, got {bad} NaN or Inf. The checkpoint is damaged.")
        return tensor

    def fingerprint(self) -> str:
        """Return the SHA-256 of the weights' files in the order of their names, in hexadecimal."""
        return _sha256(sorted(set(self.files.values())))

    def settings(self) -> str:
        """Return the SHA-256 of everything else that is read: configuration, tokenizer or image processor."""
        return _sha256([path for path in _read(self.folder) if path.suffix != ".safetensors"])


def _read(folder: Path) -> list[Path]:
    """Return the files of a checkpoint, in the order of their names."""
    return sorted({path for pattern in WANTED for path in folder.glob(pattern)})


def image_shape(processor: Any) -> tuple[int, ...]:
    """Return `[C, H, W]` of what a processor makes of an image, whatever its size."""
    found: tuple[int, ...] = processor(np.zeros((480, 640, 3), np.uint8), return_tensors="pt")["pixel_values"].shape[1:]
    return tuple(found)


def _sha256(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def open_checkpoint(source: str, revision: str | None = None) -> Checkpoint:
    """Return the checkpoint that `source` names.

    Raises:
        CheckpointError: when it cannot be found or read, holds pickles only, or is of no kind that can be converted.
    """
    path = Path(source)
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(f"{source}: must be a folder, a .gguf file or a Hub id, got a {path.suffix} file.")
        return Checkpoint(source, None, _unpacked(path, gguf=True))
    if path.is_dir():
        folder = path
    else:
        folder = _from_hub(source, revision)
        revision = folder.name
    ggufs = sorted(folder.glob("*.gguf"))
    if not any(folder.glob("*.safetensors")):
        if len(ggufs) == 1:
            return Checkpoint(source, revision, _unpacked(ggufs[0], gguf=True))
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
        if pickles:
            raise CheckpointError(
                f"{source}: weights must be safetensors, got {pickles[0]}. A pickle can run code when it is read: "
                "convert it with save_pretrained(..., safe_serialization=True) where you trust it."
            )
        raise CheckpointError(f"{source}: must hold one or more .safetensors files or one .gguf file, got neither.")
    checkpoint = Checkpoint(source, revision, folder)
    if set(weight_names(checkpoint.skeleton())) <= set(checkpoint.files):
        return checkpoint
    return Checkpoint(source, revision, _unpacked(folder, gguf=False))


def weight_names(model: nn.Module) -> list[str]:
    """Return the parameters and the saved buffers of the model, tied ones under the name that is stored."""
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    return [*parameters, *(name for name in model.state_dict() if name in buffers)]


def _from_hub(source: str, revision: str | None) -> Path:
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=WANTED))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{source}: must be a folder, a .gguf file or a Hub id that can be reached, got "
            f"{type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error


def _processor(kind: Kind, folder: Path, **where: Any) -> Any:
    # Pillow is enough: torchvision would have to be of the very version that PyTorch is of.
    return (
        AutoImageProcessor.from_pretrained(folder, backend="pil")
        if kind.images
        else AutoTokenizer.from_pretrained(folder, **where)
    )


def _unpacked(path: Path, *, gguf: bool) -> Path:
    """Return a folder of safetensors, in the Hub cache, with the weights under the names that torch gives them."""
    # Configuration and tokenizer are unpacked with the weights.
    digest = _sha256([path] if gguf else _read(path))
    folder = Path(constants.HF_HOME) / "nmsparse" / digest
    if folder.exists():
        return folder
    where = {"gguf_file": path.name} if gguf else {}
    home = path.parent if gguf else path
    try:
        with quiet():
            # transformers opens the file anew for each of the three, and is silent about what it lacks.
            kind = DECODER if gguf else kind_of(AutoConfig.from_pretrained(home), str(path))
            processor = _processor(kind, home, **where)
            dtype = torch.float32 if gguf else "auto"
            options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True, **where}
            loaded: Any = kind.auto.from_pretrained(home, **options)
            model, info = without_pooler(loaded[0]), loaded[1]
    except (ValueError, KeyError, TypeError, OSError, RuntimeError, IndexError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: must hold a model that transformers can read, got "
            f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        ) from error
    missing = sorted(set(info["missing_keys"]) & set(weight_names(model)))
    if missing:
        raise CheckpointError(f"{path}: must hold every weight of the model, got none for {missing}.")
    config = model.config
    config.architectures = [type(model).__name__]  # a GGUF file does not say; clients ask for it
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    folder.parent.mkdir(parents=True, exist_ok=True)
    with beside(folder) as staging:
        weights = {name: model.get_parameter_or_buffer(name).contiguous() for name in weight_names(model)}
        save_file(weights, staging / "model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(staging)
        processor.save_pretrained(staging)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(staging)
    return folder


@contextmanager
def beside(target: Path) -> Iterator[Path]:
    """Give an empty folder beside `target` that takes its place when the block ends well, and is removed else."""
    # Named before they are made: an interruption may come as soon as a folder is there.
    staging, old = (target.with_name(f".{target.name}.{uuid4().hex}") for _ in range(2))
    try:
        staging.mkdir(0o700)
        yield staging
        staging.chmod(0o755)
        if target.exists():
            target.rename(old)
        staging.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    finally:
        for folder in [staging, old]:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what transformers says by the way: its warnings and progress bars."""
    from transformers.utils import logging

    level: Any = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()
