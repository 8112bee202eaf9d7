"""OUT as it is written: a folder that clients load as it is, complete or not there at all."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from converter.checkpoint import Checkpoint
from converter.delivery.manifest import FORMAT, GENAI, MANIFEST, manifest, sha256
from converter.errors import OutputError
from converter.kinds import causal_class, positions
from converter.names import MODEL
from converter.place import HIDDEN, LEFT_ALONE, clear_stale, free_bytes, is_utf8, replacing


@contextmanager
def staged(out: Path, needed: int) -> Iterator[Path]:
    """Give an empty folder that becomes `out` when the block ends well; else `out` is as it was.

    Raises:
        OutputError: when `out` exists and is not ours, its parent cannot be written, or `needed` bytes are not free.
    """
    try:
        if out.is_dir():
            clear_stale(out)  # it may be what a killed run has left half exchanged
        if out.exists() and not (out.is_dir() and all(_is_nothing(path) for path in out.iterdir())):
            try:
                manifest(out)
            except OutputError as error:
                raise OutputError(
                    f"{out}: must be new, empty, or a folder that nmsparse wrote, got something else. "
                    "Choose another OUT."
                ) from error
        free = free_bytes(out)
        if free < needed:
            raise OutputError(
                f"{out}: the disk must have {needed / 1e9:.2f} GB free, got {free / 1e9:.2f} GB. Free some space."
            )
        with replacing(out) as staging:
            yield staging
    except OSError as error:
        raise OutputError(f"{out}: cannot be written: {error}. Free some space there, or give another.") from error


def _is_nothing(path: Path) -> bool:
    return path.name.startswith(HIDDEN) or path.name in LEFT_ALONE


def write_client_files(folder: Path, checkpoint: Checkpoint, dtype: str, kernel: Path | None) -> None:
    """Write configuration and tokenizer or image processor into `folder`; for a decoder what generates text, too.

    The library `kernel`, where one is given, goes along: onnxruntime-genai then runs that code by itself. Of a model of
    several kinds of input the configuration is that of the text model.
    """
    config, processor = checkpoint.config, checkpoint.processor()
    if config.get_text_config() is not config:
        config = copy.deepcopy(config.get_text_config())
        config.architectures = [causal_class(config)]
    else:
        config = copy.deepcopy(config)
        config.architectures = [type(checkpoint.skeleton()).__name__]  # the checkpoint need not say
    config.dtype = dtype
    for part in (config, getattr(processor, "init_kwargs", {})):  # Python of the checkpoint, which never ran here
        (part if isinstance(part, dict) else vars(part)).pop("auto_map", None)
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    if kernel is not None:
        shutil.copy(kernel, folder / kernel.name)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text("utf-8")) if path.exists() else {}  # of images there is none
    if settings.get("tokenizer_class") == "TokenizersBackend":
        # The name that transformers 4, and so optimum, knows for the same thing.
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        settings["model_input_names"] = ["input_ids", "attention_mask"]
        for key in ("backend", "is_local", "local_files_only"):
            settings.pop(key, None)
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", "utf-8")
    generation = checkpoint.generation_config()
    if generation is not None:
        generation.cache_implementation = None  # the graph keeps every position
        generation.save_pretrained(folder)
        about = genai_config(config, generation, processor)
        if kernel is not None:
            about["model"]["decoder"]["session_options"]["custom_ops_library"] = kernel.name
        write_json(folder / GENAI, about)


def genai_config(
    config: PreTrainedConfig, generation: GenerationConfig, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Return the configuration that onnxruntime-genai reads."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    context = positions(config) or 2048
    eos = generation.eos_token_id if generation.eos_token_id is not None else tokenizer.eos_token_id
    pad = generation.pad_token_id if generation.pad_token_id is not None else tokenizer.pad_token_id
    return {
        "model": {
            "type": text.model_type,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": eos,
            "pad_token_id": pad if pad is not None else (eos[0] if isinstance(eos, list) else eos),
            "vocab_size": text.vocab_size,
            "context_length": context,
            "decoder": {
                "session_options": {"provider_options": []},
                "filename": MODEL,
                "hidden_size": text.hidden_size,
                "head_size": getattr(text, "head_dim", None) or text.hidden_size // heads,
                "num_attention_heads": heads,
                "num_key_value_heads": getattr(text, "num_key_value_heads", None) or heads,
                "num_hidden_layers": text.num_hidden_layers,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {"do_sample": False, "max_length": context, "min_length": 0, "past_present_share_buffer": False},
    }


def write_json(path: Path, data: Any) -> None:
    """Write `data` as readable JSON."""
    text = json.dumps(data, indent=2, ensure_ascii=False)
    if not is_utf8(text):  # the name of a folder
        text = json.dumps(data, indent=2)
    path.write_text(text + "\n", "utf-8")


def write_manifest(folder: Path, about: dict[str, Any]) -> None:
    """Write manifest.json with `about` and the size and SHA-256 of every other file."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    write_json(folder / MANIFEST, {"format": FORMAT, **about, "files": files})
