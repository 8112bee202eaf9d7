"""Read a checkpoint: a Hub id, a folder with safetensors, or a GGUF file, all turned into one folder of safetensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from converter.arrangement import Arrangement
from converter.errors import CheckpointError, DeviceError, OutputError, said
from converter.hugging_face import from_saved, quiet
from converter.kinds import DECODER, Kind, kind_of, without_head, without_pooler
from converter.names import WANTED
from converter.place import encodable, private, replacing
from converter.saved import (
    Stored,
    check_stored,
    check_tied,
    has_head,
    left_over,
    read_tensor,
    refuse_adapter,
    refuse_encoded,
    refuse_lost,
    refuse_meaningless,
    refuse_quantised,
    refuse_wrapped,
    some,
    stored,
    weight_names,
)

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
ABOUT = "nmsparse.json"  # in an unpacked folder: what was left out when it was unpacked


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
    headless: bool = False  # the weights of the head that config.json speaks of are not stored

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
        return _config(self.folder, self.source)

    @cached_property
    def kind(self) -> Kind:
        """The kind of model that it is."""
        model_kind = kind_of(self.config, self.source)
        return (without_head(model_kind) if self.headless else None) or model_kind

    @cached_property
    def stored(self) -> dict[str, Stored]:
        """Each tensor that transformers would read: its file, its shape and its dtype."""
        return stored(self.folder)

    @cached_property
    def files(self) -> dict[str, Path]:
        """Which safetensors file holds each tensor."""
        return {name: tensor.path for name, tensor in self.stored.items()}

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer."""
        tokenizer: PreTrainedTokenizerBase = self.processor()
        return tokenizer

    def processor(self) -> Any:
        """Return what makes the model's input: the tokenizer, or the processor of images.

        Raises:
            CheckpointError: when the checkpoint has none, or what it needs is not installed.
        """
        return _processor(self.kind, self.folder, self.source)

    def generation_config(self) -> GenerationConfig | None:
        """Return how the model wants to be sampled, from the configuration where nothing else says; None of one that
        writes no text.

        Raises:
            CheckpointError: when it cannot be read.
        """  # noqa: D205
        return self.kind.sampling(self.folder, lambda: self.config, self.source) if self.kind.sampling else None

    def skeleton(self) -> PreTrainedModel:
        """Return the model without its weights: parameters on the meta device, buffers real.

        Raises:
            CheckpointError: when transformers cannot make a model of this kind by the configuration.
        """
        with quiet(), init_empty_weights(include_buffers=False):
            try:
                made = self.kind.auto.from_config(self.config, trust_remote_code=False)
                model: PreTrainedModel = without_pooler(made)
            except Exception as error:  # a configuration may be wrong in any way
                raise CheckpointError(
                    f"{self.source}: config.json must describe a {self.kind.name}, "
                    f"got {type(self.config).__name__}: {said(error)}"
                ) from error
        model.tie_weights()
        model.eval()
        return model

    def model(self) -> PreTrainedModel:
        """Return the model in float32, in evaluation mode, on `device`.

        Raises:
            CheckpointError: when a weight is missing, NaN or infinite.
        """
        options = {"dtype": torch.float32, "use_safetensors": True}
        must = "hold a model that transformers can read"
        model: PreTrainedModel = without_pooler(from_saved(self.kind.auto, self.folder, self.source, must, **options))
        model.eval()
        for name, parameter in model.named_parameters():
            self._finite(name, parameter.data)
        self.arrangement.apply(model)
        model.requires_grad_(False)
        model.to(self.device)  # type: ignore[arg-type] # transformers wraps `to`
        return model

    def blank(self) -> Tensor:
        """Return an input of the model that says nothing: two tokens, or a black image."""
        return self.kind.blank(self.processor)

    def read(self, name: str) -> Tensor:
        """Return one weight.

        Raises:
            CheckpointError: when it is NaN or infinite.
        """
        return self.arrangement.of(name, self._finite(name, read_tensor(self.files[name], name)))

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

    @cached_property
    def left_out(self) -> list[str]:
        """What the checkpoint has and OUT will not have, in words."""
        left: list[str] = []
        if self.folder.parent == private() and (self.folder / ABOUT).is_file():
            left += json.loads((self.folder / ABOUT).read_text("utf-8"))["left_out"]
        if self.config.get_text_config() is not self.config:
            left.append("images and all else but text: OUT is the text model alone")
        if any("pooler." in name for name in self.files):
            left.append("the pooling layer: OUT gives the states of every token")
        generation = self.generation_config()
        if generation is not None and (cache := generation.cache_implementation) not in {None, "dynamic"}:
            left.append(f"cache_implementation {cache} of generation_config.json: the graph keeps every position")
        if rest := left_over(self.skeleton(), self.files):
            left.append(f"{some(rest)}, which the {self.kind.name} of config.json has no place for")
        if nested := sorted(str(path.relative_to(self.folder)) for path in self.folder.glob("*/*.safetensors")):
            left.append(f"{some(nested)}, which other programs put behind the model")
        if others := sorted({path.name for path in self.folder.glob("*.safetensors")} - _names(self.files.values())):
            left.append(f"{some(others)}, which transformers would not read either")
        return left


def _read(folder: Path) -> list[Path]:
    """Return the files of a checkpoint, in the order of their names."""
    return sorted({path for pattern in WANTED for path in folder.glob(pattern)})


def _sha256(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _names(paths: Any) -> set[str]:
    return {path.name for path in paths}


def open_checkpoint(source: str, revision: str | None = None) -> Checkpoint:
    """Return the checkpoint that `source` names.

    Raises:
        CheckpointError: when it cannot be found or read, holds pickles only, is quantised or an adapter, does not fit
            its configuration, or is of no kind that can be converted.
    """
    path = encodable(Path(source))
    if _is(path.is_file):
        if path.suffix != ".gguf":
            raise CheckpointError(f"{source}: must be a folder, a .gguf file or a Hub id, got a {path.suffix} file.")
        return Checkpoint(source, None, _unpacked(path, DECODER))
    if _is(path.is_dir):
        folder = path
    else:
        folder = _from_hub(source, revision)
        revision = folder.name
    for entry in _read(folder):
        if entry.exists() and not entry.is_file() and not entry.is_dir():  # a pipe would be waited for
            raise CheckpointError(f"{source}: {entry.name} must be a file, got something else. Fetch it again.")
    refuse_adapter(folder, source)
    ggufs = sorted(folder.glob("*.gguf"))
    if not any(folder.glob("*.safetensors")):
        if len(ggufs) == 1:
            return Checkpoint(source, revision, _unpacked(ggufs[0], DECODER))
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
        if pickles:
            raise CheckpointError(
                f"{source}: weights must be safetensors, got {pickles[0]}. A pickle can run code when it is read: "
                "convert it with save_pretrained(..., safe_serialization=True) where you trust it."
            )
        there = f"{len(ggufs)} .gguf files: give one of them" if ggufs else "neither"
        raise CheckpointError(f"{source}: must hold one or more .safetensors files or one .gguf file, got {there}.")
    checkpoint = Checkpoint(source, revision, folder)
    refuse_quantised(checkpoint.config, source)
    refuse_meaningless(checkpoint.config, source)
    refuse_encoded(checkpoint.stored, source)
    blocks = getattr(checkpoint.config.get_text_config(), "num_hidden_layers", 0)
    if isinstance(blocks, int) and blocks > len(checkpoint.stored):  # told before so many are made
        raise CheckpointError(
            f"{source}: config.json must have at most as many blocks as there are weights, {len(checkpoint.stored)}, "
            f"got {blocks}. Fetch config.json of these weights."
        )
    skeleton = checkpoint.skeleton()
    if without_head(checkpoint.kind) and not has_head(skeleton, checkpoint.files):
        checkpoint = replace(checkpoint, headless=True)
        skeleton = checkpoint.skeleton()
    if not set(weight_names(skeleton)) <= set(checkpoint.files):
        refuse_wrapped(skeleton, checkpoint.files, source)
        return Checkpoint(source, revision, _unpacked(folder, checkpoint.kind))
    check_stored(skeleton, checkpoint.stored, source)
    check_tied(skeleton, checkpoint.stored, source)
    refuse_lost(skeleton, left_over(skeleton, checkpoint.files), source, heads=checkpoint.kind is DECODER)
    return checkpoint


def _is(asked: Callable[[], bool]) -> bool:
    """Return what a path says of itself; one that cannot be is nothing."""
    try:
        return asked()
    except OSError:  # such as a name that is too long
        return False


def _config(folder: Path, source: str) -> PreTrainedConfig:
    config: PreTrainedConfig = from_saved(AutoConfig, folder, source, "hold a config.json that transformers knows")
    return config


def _from_hub(source: str, revision: str | None) -> Path:
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=WANTED))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{source}: must be a folder, a .gguf file or a Hub id that can be reached, got {said(error)}"
        ) from error


def _processor(kind: Kind, folder: Path, source: str) -> Any:
    auto, must, options = kind.opened_by
    return from_saved(auto, folder, source, must, **options)


def _unpacked(path: Path, kind: Kind) -> Path:
    """Return a folder of safetensors, in the Hub cache, with the weights under the names that torch gives them."""
    # Configuration and tokenizer are unpacked with the weights.
    gguf = path.is_file()
    digest = _sha256([path] if gguf else _read(path))
    folder = private() / digest
    if folder.exists():
        return folder
    home, where = (path.parent, {"gguf_file": path.name}) if gguf else (path, {})
    # transformers opens the file anew for each of the three, and is silent about what it lacks.
    must = "hold a model that transformers can read"
    processor = from_saved(AutoTokenizer, home, str(path), must, **where) if gguf else _processor(kind, path, str(path))
    options: dict[str, Any] = {"dtype": torch.float32} if gguf else {"dtype": "auto", "use_safetensors": True}
    loaded: Any = from_saved(kind.auto, home, str(path), must, output_loading_info=True, **options, **where)
    model, info = without_pooler(loaded[0]), loaded[1]
    missing = sorted(set(info["missing_keys"]) & set(weight_names(model)))
    if missing:
        raise CheckpointError(f"{path}: must hold every weight of the model, got none for {some(missing)}.")
    lost = [] if gguf else sorted(set(left_over(model, info["unexpected_keys"])))
    refuse_lost(model, lost, str(path), heads=kind is DECODER)
    config = model.config
    config.architectures = [type(model).__name__]  # a GGUF file does not say; clients ask for it
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    try:
        with replacing(folder) as staging:
            weights = {name: model.get_parameter_or_buffer(name).contiguous() for name in weight_names(model)}
            save_file(weights, staging / "model.safetensors", metadata={"format": "pt"})
            config.save_pretrained(staging)
            processor.save_pretrained(staging)
            if getattr(model, "generation_config", None) is not None:
                model.generation_config.save_pretrained(staging)
            left_out = [f"{some(lost)}, which transformers has no place for"] if lost else []
            (staging / ABOUT).write_text(json.dumps({"left_out": left_out}), "utf-8")
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{folder}: cannot be written: {said(error)}. Free some space, or set HF_HOME.") from error
    return folder
