"""Where an interrupted calibration left its text and its training, so that the same command goes on with them."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import constants

from converter.errors import ConverterError
from converter.recipe import Recipe


@contextmanager
def resumable(fingerprint: str, recipe: Recipe, device: str) -> Iterator[Path]:
    """Give the folder of the calibration of these weights by this recipe; it outlives the block only when cut off."""
    folder = Path(constants.HF_HOME) / "nmsparse" / "training" / _key(fingerprint, recipe, device)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    except ConverterError:
        shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)


def _key(fingerprint: str, recipe: Recipe, device: str) -> str:
    files = [Path(source) for source in (recipe.calibration.source or "").split(",") if Path(source).is_file()]
    texts = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    parts = (fingerprint, recipe.to_yaml(), *texts, torch.__version__, str(torch.get_num_threads()), device)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
