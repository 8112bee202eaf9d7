"""Profiles: the shapes that an engine of a TensorRT takes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import onnx

from converter.errors import BuildError, listing

AXES = ("batch", "tokens", "past")
DIMS = dict(zip(("batch_size", "sequence_length", "past_sequence_length"), AXES, strict=True))
TOTAL = "past_sequence_length + sequence_length"
LONGEST = 2048  # tokens of a default profile
Range = tuple[int, int, int]  # at least, tuned for, at most


@dataclass(frozen=True)
class Profile:
    """The shapes that an engine takes: sequences, new tokens of each, and tokens in its cache before them."""

    batch: Range
    tokens: Range
    past: Range

    @classmethod
    def parse(cls, text: str) -> Profile:
        """Return the profile of a text such as `batch=1,tokens=1:128:512,past=0:256:1023`.

        Raises:
            BuildError: when an axis is missing, unknown or no range.
        """
        ranges: dict[str, Range] = {}
        for part in text.split(","):
            match = re.fullmatch(r"\s*(\w+)=(\d+)(?::(\d+):(\d+))?\s*", part)
            if match is None or match[1] not in AXES:
                raise BuildError(
                    f"--profile: each part must be one of {', '.join(AXES)} with =N or =MIN:OPT:MAX, got {part!r}."
                )
            low = int(match[2])
            middle, high = (low, low) if match[3] is None else (int(match[3]), int(match[4]))
            if not (0 if match[1] == "past" else 1) <= low <= middle <= high:
                raise BuildError(
                    f"--profile: {match[1]} must have MIN <= OPT <= MAX from {int(match[1] != 'past')}, got {part!r}."
                )
            ranges[match[1]] = (low, middle, high)
        if set(ranges) != set(AXES):
            raise BuildError(f"--profile: must have {', '.join(AXES)}, got {listing(ranges)}.")
        return cls(**ranges)

    def __str__(self) -> str:
        """Return the text that `parse` reads back."""
        return ",".join(f"{axis}={':'.join(str(n) for n in getattr(self, axis))}" for axis in AXES)

    def shapes(self, value: onnx.ValueInfoProto) -> list[tuple[int, ...]]:
        """Return the least, the tuned and the largest shape of an input of the model."""

        def size(dim: onnx.TensorShapeProto.Dimension, at: int) -> int:
            if not dim.dim_param:
                return dim.dim_value
            if dim.dim_param == TOTAL:
                return self.tokens[at] + self.past[at]
            length: int = getattr(self, DIMS[dim.dim_param])[at]
            return length

        return [tuple(size(dim, at) for dim in value.type.tensor_type.shape.dim) for at in range(3)]


def fitting(profiles: Sequence[Profile], batch: int, tokens: int, past: int) -> tuple[int, int]:
    """Return the number of the profile that takes most of a call of `batch` sequences at once, and how many.

    Raises:
        BuildError: when none takes any.
    """
    fits = [
        (min(batch, profile.batch[2]), -number)
        for number, profile in enumerate(profiles)
        if profile.batch[0] <= batch
        and profile.tokens[0] <= tokens <= profile.tokens[2]
        and profile.past[0] <= past <= profile.past[2]
    ]
    if not fits:
        raise BuildError(
            f"--profile: must take {batch} sequences of {tokens} tokens after {past}, got {listing(map(str, profiles))}"
            ". Build the engine with one more."
        )
    rows, number = max(fits)
    return -number, rows


def default_profiles(context: int) -> tuple[Profile, Profile]:
    """Return one profile for decoding and one for prefill, of a sequence of `context` tokens but no more than 2048.

    More takes minutes and gigabytes to build, and scratch memory on the GPU: give a profile where it is needed.
    """
    context = min(context, LONGEST)
    half = context // 2
    return (
        Profile((1, 1, 1), (1, 1, 1), (0, half, context - 1)),
        Profile((1, 1, 1), (1, half, context), (0, 0, context - 1)),
    )
