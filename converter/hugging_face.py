"""transformers' own readers: silent, and running no code that lies in a folder."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.utils import logging

from converter.errors import CheckpointError, said


def from_saved(auto: Any, folder: Path, source: str, must: str, **options: Any) -> Any:
    """Return what transformers' class `auto` makes of a folder, by its own code and none that lies in the folder.

    Raises:
        CheckpointError: saying what `source` must do, when it does not, or needs its own code.
    """
    try:
        with quiet():
            return auto.from_pretrained(folder, trust_remote_code=False, **options)
    except Exception as error:  # transformers, tokenizers, JSON, safetensors and the system all raise here
        got = said(error)
        if "trust_remote_code" in str(error):
            got = (
                "one that needs its own Python code. nmsparse never runs code from a checkpoint: "
                "save it as one of transformers' own models where you trust it."
            )
        raise CheckpointError(f"{source}: must {must}, got {got}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what transformers says by the way: its warnings and progress bars."""
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
