"""Images: where a model of images reads from for calibration, validation and evaluation, as the pixels it is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from converter.errors import CalibrationError, CheckpointError, said
from converter.sources.texts import hub_name

SOURCES = "a folder of images, in one folder for each class where they have classes, or hub:NAME[:CONFIG[:SPLIT]]"


def images(source: str, processor: Any, count: int, seed: int) -> Tensor:
    """Return the pixels `[count, C, H, W]` of images of the source, drawn by the seed and made by the processor.

    Raises:
        CalibrationError: when there are fewer, they cannot be read, or the processor makes them of several shapes.
    """
    pictures = drawn(source, count, seed)
    if len(pictures) < count:
        raise CalibrationError(
            f"{source}: must have at least {count} images, got {len(pictures)}. "
            "Give more, or ask for fewer with --calibration-tokens N, a window's worth for each image."
        )
    shape = image_shape(processor)
    return torch.cat([pixels(row, source, processor, shape) for row in pictures])


def drawn(source: str, count: int, seed: int) -> Any:
    """Return at most `count` rows of a data set of images, drawn by the seed; 0 is all of them, in order.

    Raises:
        CalibrationError: when it cannot be read, or has no images.
    """
    try:
        import PIL  # noqa: F401 # what datasets reads images with
        from datasets import (
            Image,
            are_progress_bars_disabled,
            disable_progress_bars,
            enable_progress_bars,
            load_dataset,
        )
    except ImportError as error:
        raise CalibrationError(f"{source}: reading images needs {error.name}. Install nmsparse[images].") from error
    hub = source.startswith("hub:")
    if not hub and not Path(source).is_dir():
        raise CalibrationError(f"images: must be {SOURCES}; there is no folder {source!r}.")
    shown = not are_progress_bars_disabled()
    disable_progress_bars()  # the progress is ours
    try:
        if hub:
            name, config, split = hub_name(source)
            dataset = load_dataset(name, config, split=split)
        else:
            dataset = load_dataset("imagefolder", data_dir=source, split="train")
    except Exception as error:  # whatever a data set may raise
        raise CalibrationError(
            f"{source}: must be {SOURCES}, got {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        ) from error
    finally:
        if shown:
            enable_progress_bars()
    column = next((name for name, feature in dataset.features.items() if isinstance(feature, Image)), None)
    if column is None:
        raise CalibrationError(f"{source}: must have a column of images, got {', '.join(dataset.features)}.")
    dataset = dataset.rename_column(column, "image") if column != "image" else dataset
    return dataset.shuffle(seed=seed).select(range(min(count, len(dataset)))) if count else dataset


def pixels(row: Any, source: str, processor: Any, shape: tuple[int, ...]) -> Tensor:
    """Return the pixels `[1, C, H, W]` of one row.

    Raises:
        CalibrationError: when they are not of the `shape [C, H, W]`.
    """
    try:
        made: Tensor = processor(row["image"].convert("RGB"), return_tensors="pt")["pixel_values"].float()
    except Exception as error:  # of Pillow and of the processor
        raise CalibrationError(f"{source}: must hold images that can be read, got {said(error)}.") from error
    if tuple(made.shape[1:]) != shape:
        raise CalibrationError(
            f"{source}: images must be made {list(shape)} by the checkpoint's processor, got {list(made.shape[1:])}. "
            "Let its preprocessor_config.json resize or crop them to one size."
        )
    return made


def image_shape(processor: Any) -> tuple[int, ...]:
    """Return `[C, H, W]` of what a processor makes of an image, whatever its size."""
    try:
        made = processor(np.zeros((480, 640, 3), np.uint8), return_tensors="pt")["pixel_values"].numpy()
    except Exception as error:  # its settings may be anything
        raise CheckpointError(
            f"preprocessor_config.json: must make pixels of an image, got {said(error)}. Fetch it again."
        ) from error
    if not np.isfinite(made).all():
        raise CheckpointError("preprocessor_config.json: pixels must be finite, got NaN or Inf. Is image_std 0?")
    return tuple(made.shape[1:])
