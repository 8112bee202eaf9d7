"""OUT: a folder that clients load as it is, complete or not there at all, with the SHA-256 of every file."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

import onnx
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from converter.checkpoint import WANTED, Checkpoint
from converter.errors import BuildError, OutputError, said, shortened
from converter.graph.export import MODEL
from converter.kinds import causal_class, positions
from converter.place import HIDDEN, LEFT_ALONE, clear_stale, free_bytes, is_utf8, private, replacing, write_whole

MANIFEST, REPORT, RECIPE, GENAI = "manifest.json", "report.json", "recipe.yaml", "genai_config.json"
ENGINES = "engines"  # what nmsparse build leaves
EVALUATION, EXAMPLES, RESULTS = "evaluation", "examples.parquet", "results.json"  # what nmsparse evaluate leaves
FORMAT = "nmsparse-1"
# What something reads that it finds in a folder: of these, OUT holds none that its manifest does not list.
READ = (*WANTED, "*.onnx*", "*.yaml", "*.py", "*.so", "*.bin", "*.pkl", "*.pt")
LARGE, SETTLED = 1 << 27, 2.0  # bytes above which a check is remembered; seconds after which a file's times are its own
PACKAGES = ("nmsparse", "torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "polygraphy")


def versions() -> dict[str, str]:
    """Return the versions of this tool and of the packages that shape its output."""
    return {name: version(name) for name in PACKAGES}


def manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of OUT (or of what `nmsparse calibrate` wrote), its files not yet looked at.

    Raises:
        OutputError: when the folder is not one of ours, or lists what cannot be files of it.
    """
    try:
        if not (folder / MANIFEST).is_file():  # a pipe would be waited for
            raise FileNotFoundError(MANIFEST)
        data = json.loads((folder / MANIFEST).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise OutputError(f"{folder}: must be a folder that nmsparse wrote, got no readable {MANIFEST}.") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise OutputError(f"{folder}: {MANIFEST} must have format {FORMAT}. Convert the model again.")
    files = data.get("files")
    if not isinstance(files, dict) or not files:
        raise OutputError(f"{folder}: {MANIFEST} must list the files, got none. Convert the model again.")
    for name, entry in files.items():
        plain = PurePosixPath(name)
        inside = plain.as_posix() == name and not plain.is_absolute() and ".." not in plain.parts and "\0" not in name
        if not inside or name in {".", MANIFEST} or not is_utf8(name) or len(name) > 255:
            raise OutputError(
                f"{folder}: {MANIFEST} must name files of the folder, got {shortened(ascii(name))}. Do not use it."
            )
        listed = isinstance(entry, dict) and isinstance(entry.get("bytes"), int)
        if not listed or re.fullmatch("[0-9a-f]{64}", str(entry.get("sha256"))) is None:
            raise OutputError(f"{folder}: {MANIFEST} must have bytes and SHA-256 of {name}. Convert the model again.")
    return data


def made_from(folder: Path) -> dict[str, Any]:
    """Return name, revision and fingerprint of the checkpoint that OUT was made from.

    Raises:
        OutputError: when the manifest does not say.
    """
    source = manifest(folder).get("source")
    kinds: dict[str, Any] = {"name": str, "revision": (str, type(None)), "weights_sha256": str}
    if not isinstance(source, dict) or not all(isinstance(source.get(key), kind) for key, kind in kinds.items()):
        raise OutputError(f"{folder}: {MANIFEST} must say what it was made from, got no source. Convert it again.")
    return source


def is_bundle(folder: Path) -> bool:
    """Return whether the folder is one of ours, passes itself off as one, or is what is left of one."""
    return sum((folder / name).exists() for name in (MANIFEST, MODEL, RECIPE)) > 1


def exported(folder: Path) -> onnx.ModelProto:
    """Return the graph in OUT, without its weights, whose files are what the manifest says.

    Raises:
        OutputError: when the folder holds no exported model of ours, or other files than the manifest lists.
    """
    if MODEL not in check_files(folder)["files"]:
        raise OutputError(f"{folder}: must hold {MODEL}, got none. Run nmsparse export on it.")
    try:
        graph = onnx.load(folder / MODEL, load_external_data=False)
    except Exception as error:  # protobuf's own
        raise OutputError(f"{folder / MODEL}: must be a graph, got {said(error)}. Convert the model again.") from error
    if not graph.graph.node:
        raise OutputError(f"{folder / MODEL}: must be a graph, got one without nodes. Convert the model again.")
    return graph


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


def context_length(folder: Path) -> int:
    """Return how many tokens a call of the decoder in OUT may have, its past included.

    Raises:
        BuildError: when OUT is no decoder: its calls have another shape.
    """
    if not (folder / GENAI).is_file():
        raise BuildError(f"{folder}: must be a decoder, got a model without a cache. Run it by ONNX Runtime.")
    try:
        return int(json.loads((folder / GENAI).read_text("utf-8"))["model"]["context_length"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise OutputError(f"{folder / GENAI}: must say context_length, got {said(error)}. Convert it again.") from error


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


def check_files(folder: Path) -> dict[str, Any]:
    """Return the manifest of OUT, after every file has been compared with it.

    What a large OUT was compared with is remembered, and its files are read again only when one has another inode,
    size or time.

    Raises:
        OutputError: naming the first file that is missing, differs, is a link, or is not listed.
    """
    data = manifest(folder)
    files: dict[str, dict[str, Any]] = data["files"]
    for name, entry in files.items():
        _check_plain(folder, name, entry["bytes"])
    for path in sorted(folder.rglob("*")):
        within = path.relative_to(folder)
        later = within.parts[0] in {MANIFEST, ENGINES, EVALUATION} or within.parts[0].startswith(".")
        read = any(fnmatchcase(path.name, pattern) for pattern in READ)
        if read and not later and within.as_posix() not in files:
            raise OutputError(
                f"{path}: must be listed in {MANIFEST}, got a file that it does not name. Move it out of {folder}."
            )
    large = sum(entry["bytes"] for entry in files.values()) >= LARGE
    now = [_stamp(folder / name) for name in [MANIFEST, *files]]
    memory = _memory(folder) if large else None
    if memory is not None and _remembered(memory) == now:
        return data
    for name, entry in files.items():
        if sha256(folder / name) != entry["sha256"]:
            raise OutputError(
                f"{folder / name}: must have SHA-256 {entry['sha256']}, got another. Convert the model again."
            )
    if memory is not None and time.time() - max(max(stamp[2:]) for stamp in now) / 1e9 > SETTLED:
        write_whole(memory, lambda beside: beside.write_text(json.dumps(now)))
    return data


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_plain(folder: Path, name: str, size: int) -> None:
    """Refuse what is no file of that size in the folder itself: a link may lead anywhere."""
    path = folder
    for part in PurePosixPath(name).parts:
        path /= part
        if path.is_symlink():
            raise OutputError(f"{path}: must be a file, got a link. Copy the folder with its files: cp -rL.")
    if not path.is_file():
        raise OutputError(f"{path}: must exist, the manifest lists it. Convert the model again.")
    if path.stat().st_size != size:
        raise OutputError(f"{path}: must have {size} bytes, got {path.stat().st_size}. Convert the model again.")


def _stamp(path: Path) -> list[int]:
    about = path.stat()
    return [about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns]


def _memory(folder: Path) -> Path | None:
    """Return the file that says what OUT was when it was last compared, or None where nothing can be kept."""
    key = hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest()
    try:
        return private("verified") / f"{key}.json"
    except OutputError:
        return None


def _remembered(memory: Path) -> Any:
    try:
        return json.loads(memory.read_text("utf-8"))
    except (OSError, ValueError):
        return None
