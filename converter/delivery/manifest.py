"""What an OUT is by its manifest: its files are looked at before anything reads them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

import onnx

from converter.errors import BuildError, OutputError, said, shortened
from converter.names import MODEL, WANTED
from converter.place import is_utf8, private, write_whole
from converter.records import About, FileEntry, Manifest, parsed

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


def manifest(folder: Path) -> Manifest:
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
    entries = {name: FileEntry(entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    return Manifest(entries, {key: value for key, value in data.items() if key not in {"format", "files"}})


def about(folder: Path) -> About:
    """Return what OUT was made from and by what.

    Raises:
        OutputError: when the manifest does not say.
    """
    try:
        return parsed(About, manifest(folder).more)
    except ValueError as error:
        raise OutputError(
            f"{folder}: {MANIFEST} must say what it was made from, got {said(error)}. Convert it again."
        ) from error


def is_bundle(folder: Path) -> bool:
    """Return whether the folder is one of ours, passes itself off as one, or is what is left of one."""
    return sum((folder / name).exists() for name in (MANIFEST, MODEL, RECIPE)) > 1


def exported(folder: Path) -> onnx.ModelProto:
    """Return the graph in OUT, without its weights, whose files are what the manifest says.

    Raises:
        OutputError: when the folder holds no exported model of ours, or other files than the manifest lists.
    """
    if MODEL not in check_files(folder).files:
        raise OutputError(f"{folder}: must hold {MODEL}, got none. Run nmsparse export on it.")
    try:
        graph = onnx.load(folder / MODEL, load_external_data=False)
    except Exception as error:  # protobuf's own
        raise OutputError(f"{folder / MODEL}: must be a graph, got {said(error)}. Convert the model again.") from error
    if not graph.graph.node:
        raise OutputError(f"{folder / MODEL}: must be a graph, got one without nodes. Convert the model again.")
    return graph


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


def check_files(folder: Path) -> Manifest:
    """Return the manifest of OUT, after every file has been compared with it.

    What a large OUT was compared with is remembered, and its files are read again only when one has another inode,
    size or time.

    Raises:
        OutputError: naming the first file that is missing, differs, is a link, or is not listed.
    """
    data = manifest(folder)
    files = data.files
    for name, entry in files.items():
        _check_plain(folder, name, entry.bytes)
    for path in sorted(folder.rglob("*")):
        within = path.relative_to(folder)
        later = within.parts[0] in {MANIFEST, ENGINES, EVALUATION} or within.parts[0].startswith(".")
        read = any(fnmatchcase(path.name, pattern) for pattern in READ)
        if read and not later and within.as_posix() not in files:
            raise OutputError(
                f"{path}: must be listed in {MANIFEST}, got a file that it does not name. Move it out of {folder}."
            )
    large = sum(entry.bytes for entry in files.values()) >= LARGE
    now = [_stamp(folder / name) for name in [MANIFEST, *files]]
    memory = _memory(folder) if large else None
    if memory is not None and _remembered(memory) == now:
        return data
    for name, entry in files.items():
        if sha256(folder / name) != entry.sha256:
            raise OutputError(
                f"{folder / name}: must have SHA-256 {entry.sha256}, got another. Convert the model again."
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
