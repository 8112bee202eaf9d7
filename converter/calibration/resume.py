"""Where an interrupted calibration left its text and its training, so that the same command goes on with them."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file

from converter.checkpoint import Checkpoint
from converter.place import clear_stale, private, taken
from converter.recipe import Recipe


@contextmanager
def resumable(checkpoint: Checkpoint, recipe: Recipe, say: Callable[[str], None]) -> Iterator[Path]:
    """Give the folder of the calibration of this checkpoint by this recipe; it outlives the block only when cut off.

    While another run has it, it is a folder of this run alone, and an interruption loses what is in it.
    """
    folder = private("training", _key(checkpoint, recipe))
    with taken(folder) as free:
        if not free:
            say("the same calibration is running already: this one cannot be resumed")
            with tempfile.TemporaryDirectory(prefix="nmsparse-") as own:
                yield Path(own)
            return
        clear_stale(folder)  # what was being written when it was killed
        if not all(_is_whole(path) for path in folder.iterdir()):
            say(f"the calibration that was interrupted is damaged, in {folder}: it begins anew")
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        try:
            yield folder
        except Exception as error:
            # Of a full disk or memory what is there is good; of anything else the next run is not to meet it again.
            if not isinstance(error, (OSError, MemoryError)) and "memory" not in str(error):
                shutil.rmtree(folder)
            raise
        shutil.rmtree(folder)


def _is_whole(path: Path) -> bool:
    try:
        if path.suffix == ".safetensors":
            load_file(path)
        else:
            torch.load(path, weights_only=True)
    except Exception:  # of torch's, safetensors' and the system's
        return False
    return True


def _key(checkpoint: Checkpoint, recipe: Recipe) -> str:
    files = [Path(source) for source in (recipe.calibration.source or "").split(",") if Path(source).is_file()]
    texts = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    here = (torch.__version__, str(torch.get_num_threads()), checkpoint.device)
    parts = (checkpoint.fingerprint(), checkpoint.settings(), recipe.to_yaml(), *texts, *here)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
