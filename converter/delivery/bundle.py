"""OUT: a folder that clients load as it is, complete or not there at all, with the SHA-256 of every file."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from converter.checkpoint import Checkpoint, beside
from converter.errors import BuildError, OutputError
from converter.graph.export import MODEL

MANIFEST, REPORT, RECIPE, GENAI = "manifest.json", "report.json", "recipe.yaml", "genai_config.json"
EVALUATION, EXAMPLES, RESULTS = "evaluation", "examples.parquet", "results.json"  # what nmsparse evaluate leaves
FORMAT = "nmsparse-1"
PACKAGES = ("nmsparse", "torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "polygraphy")


def versions() -> dict[str, str]:
    """Return the versions of this tool and of the packages that shape its output."""
    return {name: version(name) for name in PACKAGES}


def manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of OUT (or of what `nmsparse calibrate` wrote).

    Raises:
        OutputError: when the folder is not one of ours.
    """
    try:
        data = json.loads((folder / MANIFEST).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(f"{folder}: must be a folder that nmsparse wrote, got no readable {MANIFEST}.") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise OutputError(f"{folder}: {MANIFEST} must have format {FORMAT}. Convert the model again.")
    return data


def is_bundle(folder: Path) -> bool:
    """Return whether the folder holds an exported model of ours."""
    return (folder / MANIFEST).is_file() and (folder / MODEL).is_file()


def exported(folder: Path) -> onnx.ModelProto:
    """Return the graph in OUT, without its weights.

    Raises:
        OutputError: when the folder holds no exported model of ours.
    """
    manifest(folder)
    if not is_bundle(folder):
        raise OutputError(f"{folder}: must hold {MODEL}, got none. Run nmsparse export on it.")
    return onnx.load(folder / MODEL, load_external_data=False)


@contextmanager
def staged(out: Path, needed: int) -> Iterator[Path]:
    """Give an empty folder that becomes `out` when the block ends well; else `out` is as it was.

    Raises:
        OutputError: when `out` exists and is not ours, its parent cannot be written, or `needed` bytes are not free.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        try:
            manifest(out)
        except OutputError as error:
            raise OutputError(
                f"{out}: must be new, empty, or a folder that nmsparse wrote, got something else. Choose another OUT."
            ) from error
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out.parent).free
        if free < needed:
            raise OutputError(
                f"{out}: the disk must have {needed / 1e9:.2f} GB free, got {free / 1e9:.2f} GB. Free some space."
            )
        with beside(out) as staging:
            yield staging
    except OSError as error:
        raise OutputError(f"{out}: cannot be written: {error}.") from error


def write_client_files(folder: Path, checkpoint: Checkpoint, dtype: str, kernel: Path | None) -> None:
    """Write configuration and tokenizer or image processor into `folder`; for a decoder what generates text, too.

    The library `kernel`, where one is given, goes along: onnxruntime-genai loads what lies beside the model.
    """
    config, processor = checkpoint.config, checkpoint.processor()
    config.dtype = dtype
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    if kernel is not None:
        shutil.copy(kernel, folder / kernel.name)
    if checkpoint.kind.images:
        return
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text("utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        # The name that transformers 4, and so optimum, knows for the same thing.
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        settings["model_input_names"] = ["input_ids", "attention_mask"]
        for key in ("backend", "is_local", "local_files_only"):
            settings.pop(key, None)
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", "utf-8")
    if checkpoint.kind.cached:
        generation = checkpoint.generation_config()
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
    context = getattr(text, "max_position_embeddings", 2048)
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


def context_length(folder: Path) -> int:
    """Return how many tokens a call of the decoder in OUT may have, its past included.

    Raises:
        BuildError: when OUT is no decoder: its calls have another shape.
    """
    if not (folder / GENAI).is_file():
        raise BuildError(f"{folder}: must be a decoder, got a model without a cache. Run it by ONNX Runtime.")
    found: int = json.loads((folder / GENAI).read_text("utf-8"))["model"]["context_length"]
    return found


def write_json(path: Path, data: Any) -> None:
    """Write `data` as readable JSON."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", "utf-8")


def write_manifest(folder: Path, about: dict[str, Any]) -> None:
    """Write manifest.json with `about` and the size and SHA-256 of every other file."""
    files = {}
    for path in sorted(p for p in folder.iterdir() if p.name != MANIFEST):
        with path.open("rb") as file:
            files[path.name] = {
                "bytes": path.stat().st_size,
                "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
            }
    write_json(folder / MANIFEST, {"format": FORMAT, **about, "files": files})


def check_files(folder: Path) -> None:
    """Compare every file of OUT with the manifest.

    Raises:
        OutputError: naming the first file that is missing or differs.
    """
    for name, expected in manifest(folder)["files"].items():
        path = folder / name
        if not path.is_file():
            raise OutputError(f"{path}: must exist, the manifest lists it. Convert the model again.")
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != expected["sha256"]:
            raise OutputError(f"{path}: must have SHA-256 {expected['sha256']}, got {found}. Convert the model again.")
