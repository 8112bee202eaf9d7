"""What the JSON files of OUT say, one type for who writes a file and for who reads it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

Record = TypeVar("Record")


def read(of: type[Record], path: Path) -> Record:
    """Return the record of that type in a JSON file.

    Raises:
        OSError, ValueError: when the file cannot be read, or says something else.
    """
    return parsed(of, json.loads(path.read_text("utf-8")))


def parsed(of: type[Record], said: Any) -> Record:
    """Return the record of that type in what a JSON file says; keys that it has besides are left out.

    Raises:
        ValueError: when it is of another form.
    """
    from pydantic import TypeAdapter  # not for those who only write

    return TypeAdapter(of).validate_python(said)  # not as JSON, whose text cannot hold a name of any bytes


@dataclass(frozen=True)
class FileEntry:
    """What a manifest says of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The files of a folder, and what else its manifest says, which those read who wrote it."""

    files: dict[str, FileEntry]
    more: dict[str, Any]


@dataclass(frozen=True)
class Source:
    """The checkpoint that OUT was made from."""

    name: str
    revision: str | None
    weights_sha256: str

    def text(self) -> str:
        """Return its name as UTF-8 can hold it: a path may be any bytes."""
        return self.name.encode("utf-8", "backslashreplace").decode()


@dataclass(frozen=True)
class LayerCounts:
    """How many linear layers became sparse, and how many stayed dense."""

    sparse: int
    dense: int


@dataclass(frozen=True)
class About:
    """manifest.json: what the folder was made from and by what; its files stand beside it."""

    versions: dict[str, str]
    source: Source
    recipe_sha256: str
    layers: LayerCounts
    left_out: list[str]


@dataclass(frozen=True)
class StageCost:
    """What one stage took; the bytes are the process's largest resident memory and the GPU's while it ran."""

    stage: str
    seconds: float
    peak_bytes: int
    gpu_peak_bytes: int = 0


@dataclass(frozen=True)
class Limits:
    """How far ONNX Runtime may be from PyTorch computing in float32 on weights rounded to the model's dtype.

    margin: two channels whose scores differ by less, relative to the token's largest, may be ranked either way.
    flips: the share of channels that may be ranked differently at all.
    layer: largest error of a layer's output on the same input and mask, relative to its largest magnitude.
    model: the same for the logits and caches of the whole graph run dense (every layer with keep = group).
    """

    margin: float
    flips: float
    layer: float
    model: float


@dataclass(frozen=True)
class LayerParity:
    """One node in one phase, called as its `parts` are; errors are relative to the largest magnitude of its output."""

    layer: str
    phase: str
    flips: float
    margin: float
    error: float
    passed: bool


@dataclass(frozen=True)
class ParitySummary:
    """How far ONNX Runtime is from PyTorch: the worst of all layers, and the whole graph run dense and sparse."""

    passed: bool
    dtype: str
    tokens: int
    limits: Limits
    layers: int
    largest_flip_share: float
    largest_flip_margin: float
    largest_layer_error: float
    dense_error: dict[str, float]
    sparse_not_judged: dict[str, float]
    generated: dict[str, int]
    not_tried: dict[str, str]
    failures: list[str]


@dataclass(frozen=True)
class Permutations:
    """In how many layers a permutation is folded into the weights, and in how many it is an input of the op."""

    folded: int
    inputs: int


@dataclass(frozen=True)
class Choices:
    """What the pages say of a recipe."""

    criterion: str
    mitigation: list[str]
    weights: str


@dataclass(frozen=True)
class Report:
    """report.json: what a conversion was, took and found; `parity` is None where it was not validated.

    `recipe` is as `converter.recipe` dumps it; `training` holds steps, and the loss on held-out text at each.
    """

    recipe: dict[str, Any]
    layers: LayerCounts
    permutations: Permutations
    training: list[tuple[int, float]]
    stages: list[StageCost]
    bytes: int
    parity: ParitySummary | None
    parity_layers: list[LayerParity]


@dataclass(frozen=True)
class Setting:
    """How the tasks are asked; two models are compared under one setting.

    Both also write on from `prompts` prompts of `text`. Classifiers of images are asked for the classes of `images`.
    OUT runs in `runtime`, a checkpoint always in PyTorch.
    """

    tasks: tuple[str, ...]
    limit: int | None = None
    shots: int | None = None
    chat: bool = False
    seed: int = 0
    prompts: int = 0
    text: str = "python"
    images: str | None = None
    runtime: str = "onnxruntime"


@dataclass(frozen=True)
class Paired:
    """One metric of one task: dense, sparse, sparse - dense with its 95 % interval, and the tests of no difference.

    `effect` is the mean difference in standard deviations of the differences (Cohen's d of paired samples); `recovery`,
    of an accuracy, is sparse / dense with its interval.
    """

    task: str
    metric: str
    examples: int
    dense: float
    sparse: float
    difference: float
    low: float
    high: float
    t_test: float
    mcnemar: float | None
    effect: float
    recovery: tuple[float, float, float] | None  # low, value, high


@dataclass(frozen=True)
class Results:
    """evaluation/results.json: which models were compared, how and by what, and what was found."""

    model: str
    dense: str
    setting: Setting
    context: int
    versions: dict[str, str]
    recovery: float | None
    f1: dict[str, float]
    compared: list[Paired]

    def under(self) -> tuple[Any, ...]:
        """Return all that two evaluations must share to be compared."""
        return self.setting, self.context, tuple(sorted(self.versions.items()))
