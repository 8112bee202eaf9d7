"""The trainer: one loop for all that is trained; it stops early, and goes on where it was cut off."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from converter.calibration.products import bfloat16_products
from converter.errors import CalibrationError
from converter.place import write_whole
from converter.recipe import Training

CLIP = 1.0  # of the gradient's norm
CHECKS = 8  # of the loss on held-out text, evenly over the steps
Curve = list[tuple[int, float]]  # step, loss on held-out text


def train(
    parts: list[nn.Parameter],
    loss: Callable[[list[int]], Tensor],
    held_out: Callable[[], float],
    count: int,
    settings: Training,
    seed: int,
    state: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Curve:
    """Train `parts` in place, leave them as they were best on held-out text, and return the losses there.

    `loss` is called with `settings.batch` of the numbers 0 to `count`, every one once before any comes again.
    AdamW, linear warm-up and cosine decay, clipped gradients. With `state`, a file, an interrupted call can be made
    again: it goes on from the last check and ends with the same bits.

    Raises:
        CalibrationError: when the loss is not finite.
    """
    optimizer = torch.optim.AdamW(parts, lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, int(settings.warm_up * settings.steps), settings.steps)
    order = _order(count, settings.steps * settings.batch, seed)
    every = max(1, settings.steps // CHECKS)
    saved = None if state is None or not state.exists() else torch.load(state, weights_only=True)
    if saved is None:
        curve, best = [(0, held_out())], _copy(parts)
    else:
        curve, best = [tuple(point) for point in saved["curve"]], saved["best"]
        _restore(parts, saved["parts"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
    for step in range(curve[-1][0], settings.steps):
        with bfloat16_products():
            value = loss(order[step * settings.batch : (step + 1) * settings.batch])
            if not value.isfinite():
                raise CalibrationError(
                    f"training: loss must be finite, got {value.item()} at step {step + 1}. "
                    "Use a smaller --set training.learning_rate=R."
                )
            value.backward()
        nn.utils.clip_grad_norm_(parts, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        progress(step + 1, settings.steps)
        if (step + 1) % every and step + 1 < settings.steps:
            continue
        curve.append((step + 1, held_out()))
        least = min(range(len(curve)), key=lambda number: curve[number][1])
        if least == len(curve) - 1:
            best = _copy(parts)
        elif len(curve) - 1 - least >= settings.patience:
            break
        if state is not None:
            now = {
                "curve": curve,
                "best": best,
                "parts": _copy(parts),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
            }
            write_whole(state, partial(torch.save, now))
    _restore(parts, best)
    return curve


def _order(count: int, length: int, seed: int) -> list[int]:
    """Return `length` of the numbers 0 to `count`, shuffled anew for each round."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < length:
        order += torch.randperm(count, generator=generator).tolist()
    return order[:length]


def _copy(parts: list[nn.Parameter]) -> list[Tensor]:
    return [part.detach().clone() for part in parts]


def _restore(parts: list[nn.Parameter], values: list[Tensor]) -> None:
    with torch.no_grad():
        for part, value in zip(parts, values, strict=True):
            part.copy_(value)
