"""The recipe: every choice that shapes a conversion, in one frozen object that is read from and written to YAML."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping
from fractions import Fraction
from math import ceil, floor
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent

from converter.errors import RecipeError, listing, said, shortened
from converter.names import Phases, Weights
from converter.presets import preset
from converter.sparsity.criteria import criterion
from converter.sparsity.mitigations import Mitigation, Phase, mitigations
from converter.sparsity.pattern import Pattern
from converter.sparsity.quantize import Storage

DENSE = "dense"
LONGEST, DEEPEST = 100_000, 8  # characters and levels of a YAML text
MOST = 10**9  # of anything that is counted
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Calibration(_Frozen):
    """Where the calibration text comes from and how much of it is used."""

    source: str | None = None  # that of the model's kind, see converter.kinds
    tokens: int = Field(default=8192, gt=0, le=MOST)
    window: int = Field(default=256, gt=1, le=MOST)
    batch: int = Field(default=8, gt=0, le=MOST)
    field: str = "text"

    @model_validator(mode="after")
    def _one_window(self) -> Calibration:
        if self.tokens < self.window:
            raise ValueError(f"tokens must be at least one window ({self.window}), got {self.tokens}")
        return self

    @property
    def count(self) -> int:
        """The number of windows that the statistics are taken from."""
        return self.tokens // self.window


class Training(_Frozen):
    """How `distill`, `l_pts`, `ls` and a trained `r_sparse` are trained.

    objective: `logits` trains all layers at once by the divergence of the sparse model's tokens from the dense one's;
        `layer` trains block after block by the error of its output against the dense block on the same input.
    window: calibration windows are cut to this length; held_out: how many of these pieces to judge on; patience: how
        often they may fail to improve before training stops.
    """

    objective: Literal["logits", "layer"] = "logits"
    tokens: int = Field(default=25600, gt=0, le=MOST)
    window: int = Field(default=256, gt=1, le=MOST)
    steps: int = Field(default=96, gt=0, le=MOST)
    batch: int = Field(default=1, gt=0, le=MOST)
    learning_rate: float = Field(default=1e-4, gt=0)
    warm_up: float = Field(default=0.1, ge=0, lt=1)
    held_out: int = Field(default=4, gt=0, le=MOST)
    patience: int = Field(default=5, gt=0, le=MOST)


class Allocation(_Frozen):
    """Where the kept weights go: `budget` is their share, `menu` the patterns that a layer may get.

    Whoever gives a pattern and says nothing of the allocation has no budget: the pattern is meant for every layer.

    Without a menu it is what lies between half and one and a half of the recipe's pattern, and below all: every n:M
    for N:M, every sixteenth of P for P%.
    """

    budget: str | None = "50%"
    menu: tuple[str, ...] | None = None
    tokens: int = Field(default=4096, gt=0, le=MOST)

    @field_validator("budget", mode="before")
    @classmethod
    def _budget(cls, value: object) -> str | None:
        if value is None:
            return None
        share = re.fullmatch(r"(\d+(\.\d+)?)%", str(value).strip())
        if share is None or not 0 < float(share[1]) <= 100:
            raise ValueError("must be a share above 0% and at most 100%, such as 50%")
        return f"{float(share[1]):g}%"

    @field_validator("menu", mode="before")
    @classmethod
    def _menu(cls, value: object) -> tuple[str, ...] | None:
        if value is None:
            return None
        texts = value.split(",") if isinstance(value, str) else value
        if not isinstance(texts, list | tuple) or not texts:
            raise ValueError("must be one or more patterns, such as [4:16, 8:16]")
        return tuple(dict.fromkeys(str(Pattern.parse(str(text))) for text in texts))

    def limit(self, weights: int) -> int:
        """Return how many of `weights` may be kept: a whole number, so that no rounding exceeds the budget."""
        assert self.budget is not None
        return floor(weights * Fraction(self.budget.removesuffix("%")) / 100)


class Recipe(_Frozen):
    """Every choice of a conversion; the defaults are what `nmsparse convert MODEL OUT` does."""

    pattern: str = "8:16"
    patterns: dict[str, str] = {}
    preset: str = "all"
    criterion: str = "wina"
    mitigation: tuple[str, ...] = ("permute", "var", "distill")
    s_pts: Literal["channel", "scalar"] = "channel"
    d_pts: Literal["median", "mean"] = "median"
    r_sparse: Literal["svd", "trained"] = "svd"
    distill: Literal["full", "low_rank"] = "full"
    permute: Literal["layer", "folded"] = "layer"
    share: bool = False  # q, k and v choose their channels together, as do gate and up, and are one node
    rank: int = Field(default=64, gt=0, le=MOST)
    phases: Phases = "both"
    targets: tuple[str, ...] = ("*",)
    ignore: tuple[str, ...] = ()
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    weights: Weights = "dtype"
    block: int = Field(default=32, ge=0, le=MOST, multiple_of=16)
    seed: int = Field(default=0, ge=0, lt=2**32)  # as numpy has them
    allocation: Allocation = Allocation()
    calibration: Calibration = Calibration()
    training: Training = Training()

    @model_validator(mode="before")
    @classmethod
    def _pattern_of_every_layer(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and "pattern" in data and "allocation" not in data:
            return {**data, "allocation": {"budget": None}}
        return data

    @field_validator("pattern", mode="before")
    @classmethod
    def _pattern(cls, value: object) -> str:
        return str(Pattern.parse(str(value)))

    @field_validator("patterns", mode="before")
    @classmethod
    def _patterns(cls, value: object) -> dict[str, str]:
        if not isinstance(value, Mapping):
            raise ValueError('must be a table of name patterns, such as {"*.up_proj": "10:16"}')
        return {str(glob): DENSE if text == DENSE else str(Pattern.parse(str(text))) for glob, text in value.items()}

    @field_validator("preset")
    @classmethod
    def _preset(cls, value: str) -> str:
        preset(value)
        return value

    @field_validator("criterion")
    @classmethod
    def _criterion(cls, value: str) -> str:
        criterion(value)
        return value

    @field_validator("mitigation", "targets", "ignore", mode="before")
    @classmethod
    def _split(cls, value: object, info: ValidationInfo) -> object:
        separator = "+" if info.field_name == "mitigation" else ","
        return value.split(separator) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _combination(self) -> Recipe:
        methods, chosen = self.methods(), criterion(self.criterion)
        if chosen.prune is not None and any(method.role != "nothing" for method in methods):
            raise RecipeError(
                f"mitigation: must be none with the criterion {self.criterion}, which prunes the weight and keeps "
                f"every activation, got {'+'.join(self.mitigation)}. Set mitigation to none to compare in PyTorch; "
                "it cannot be exported."
            )
        if chosen.sequence_norm and any(method.phase == "block" for method in methods):
            raise RecipeError(
                f"mitigation: must be without refit with the criterion {self.criterion}, got "
                f"{'+'.join(self.mitigation)}: refit takes tokens one by one. Leave out refit."
            )
        own = [name for name, method in zip(self.mitigation, methods, strict=False) if method.own]
        if self.share and own:
            raise RecipeError(
                f"share: must be false with {own[0]}, which gives every layer its own inputs, got true. "
                f"Leave out share or {own[0]}."
            )
        if self.weights != "dtype" and self.dtype != "float32":
            raise ValueError(f"weights must be dtype with dtype {self.dtype}, got {self.weights}")
        whole, piece = self.calibration.window, self.training.window
        if self.at("model") and whole % min(piece, whole):
            raise ValueError(f"training.window must divide calibration.window ({whole}), got {piece}")
        if self.allocation.budget and not self.menu():
            raise ValueError(
                f"allocation.menu: must be given with a pattern that counts, got {self.pattern} and no menu"
            )
        if self.allocation.budget and self.allocation.tokens < self.calibration.window:
            raise ValueError(
                f"allocation.tokens must be at least one window ({self.calibration.window}), "
                f"got {self.allocation.tokens}"
            )
        return self

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the exported model."""
        return DTYPES[self.dtype]

    def storage(self) -> Storage:
        """Return how the exported weights are stored."""
        return Storage(self.dtype, self.weights, self.block)

    def methods(self) -> list[Mitigation]:
        """Return the mitigations in the order given."""
        variants: dict[str, str] = {
            name: getattr(self, name) for name in ("s_pts", "d_pts", "r_sparse", "permute", "distill")
        }
        return mitigations(self.mitigation or ("none",), variants)

    def menu(self) -> tuple[str, ...]:
        """Return the patterns that the allocation chooses from."""
        if self.allocation.menu is not None:
            return self.allocation.menu
        pattern = Pattern.parse(self.pattern)
        if pattern.percent:
            shares = [pattern.keep * part / 16 for part in range(8, 25)]
            return tuple(f"{share:g}%" for share in shares if share < 100)
        keep, group = int(pattern.keep), pattern.group
        return tuple(f"{n}:{group}" for n in range(ceil(keep / 2), min(3 * keep // 2, max(group - 1, 1)) + 1) if group)

    def needs_statistics(self) -> bool:
        """Return whether the layers' inputs on calibration text decide their parameters."""
        wanted = criterion(self.criterion).needs_statistics
        return wanted or any(method.needs_statistics for method in self.methods())

    def at(self, phase: Phase) -> list[Mitigation]:
        """Return the mitigations that do their work in `phase`; what is trained does it where the objective says."""
        trained: Phase = "model" if self.training.objective == "logits" else "block"
        return [method for method in self.methods() if (trained if method.trains else method.phase) == phase]

    def trains(self) -> tuple[str, ...]:
        """Return the names of the `Params` that are trained once every layer is fitted."""
        return tuple(part for method in self.methods() for part in method.trains)

    def windows(self) -> int:
        """Return how many windows of calibration text are used in all."""
        window = self.calibration.window
        fitting = self.calibration.count if self.walks() else 0
        training = self.training.tokens // window if self.at("model") else 0
        allocating = self.allocation.tokens // window if self.allocation.budget else 0
        return max(fitting, training, allocating)

    def walks(self) -> bool:
        """Return whether fitting goes block by block over calibration text."""
        return self.needs_statistics() or bool(self.at("block"))

    def needs_text(self) -> bool:
        """Return whether any step of fitting looks at calibration text, but for the allocation."""
        return self.walks() or bool(self.at("model"))

    def low_rank(self) -> int:
        """Return the rank of what `distill` adds to a weight, 0 for a full update."""
        return self.rank if self.distill == "low_rank" else 0

    def needs_together(self) -> bool:
        """Return whether the statistics must say which channels are large together."""
        return any(method.needs_together for method in self.methods())

    def needs_gram(self) -> bool:
        """Return whether the statistics must hold the Gram matrix of each layer's input."""
        return criterion(self.criterion).needs_gram

    def require_exportable(self) -> None:
        """Refuse a criterion that there is for comparison in PyTorch only.

        Raises:
            RecipeError: with the reason why it cannot be exported.
        """
        reason = criterion(self.criterion).reference
        if reason:
            raise RecipeError(
                f"criterion: must be one that can be exported, got {self.criterion}: {reason}, or measure it in "
                "PyTorch with benchmarks/accuracy.py."
            )

    def to_yaml(self) -> str:
        """Return the YAML text that `from_yaml` reads back."""
        text = io.StringIO()
        _yaml().dump(self.model_dump(mode="json"), text)
        return text.getvalue()

    def sha256(self) -> str:
        """Return the SHA-256 of the YAML text, in hexadecimal."""
        return hashlib.sha256(self.to_yaml().encode()).hexdigest()

    def replace(self, changes: Mapping[str, Any], where: str = "recipe") -> Recipe:
        """Return this recipe with `changes` (keys may be dotted, as in `calibration.tokens`).

        A pattern that comes without an allocation applies to every layer and disables the budget.

        Raises:
            RecipeError: for an unknown key or an impossible value.
        """
        data = self.model_dump()
        changes = {str(key): value for key, value in changes.items()}
        if not any(key.partition(".")[0] == "allocation" for key in changes) and "pattern" in changes:
            del data["allocation"]
        for key, value in changes.items():
            *path, last = key.split(".")
            table = data
            for part in path:
                if not isinstance(table.get(part), dict):
                    raise _unknown(key, where)
                table = table[part]
            # `patterns` is one value: what stands first wins, so rows added behind others might never be asked.
            if isinstance(value, Mapping) and isinstance(table.get(last), dict) and key != "patterns":
                table[last] = {**table[last], **value}
            else:
                table[last] = value
        return _checked(data, where)


def from_yaml(path: Path) -> Recipe:
    """Return the recipe in the file; keys that it lacks have their defaults.

    Raises:
        RecipeError: when the file cannot be read or is no recipe.
    """
    try:
        with path.open("rb") as file:
            text = file.read(LONGEST + 1).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: must be a YAML recipe, got {said(error)}.") from error
    data = _parsed(text, str(path))
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: must be a table of keys, got {type(data).__name__}.")
    return Recipe().replace(data, str(path))


def parse_set(assignments: list[str]) -> dict[str, Any]:
    """Return `key=value` texts as changes for `Recipe.replace`; values are YAML.

    Raises:
        RecipeError: for a text without `=` or a value that is not YAML.
    """
    changes = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals:
            raise RecipeError(f"--set: must be key=value, got {shortened(repr(text))}.")
        changes[key.strip()] = _parsed(value, f"--set {shortened(key)}")
    return changes


def _parsed(text: str, where: str) -> Any:
    """Return the value of a YAML text; before it is made, it is known to be small.

    Raises:
        RecipeError: when it is not YAML, too long or too deep, or a part of it stands for another.
    """
    if len(text) > LONGEST:
        raise RecipeError(f"{where}: must have at most {LONGEST} characters, got more. A recipe is a page at most.")
    depth = 0
    try:
        for event in _yaml().parse(io.StringIO(text)):
            depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
            if isinstance(event, AliasEvent):
                raise RecipeError(f"{where}: must be without anchors and aliases, got *{shortened(event.anchor)}.")
            if depth > DEEPEST:
                raise RecipeError(f"{where}: must have at most {DEEPEST} levels, got more.")
        return _yaml().load(text)
    except (YAMLError, ValueError, OverflowError) as error:  # a number may be too long for Python, or a date none
        raise RecipeError(f"{where}: must be YAML, got {shortened(' '.join(str(error).split()))}.") from error


def _yaml() -> Any:
    # YAML 1.2: to YAML 1.1 a bare 8:16 is the number 496, in base 60.
    yaml: Any = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False
    return yaml


def _keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    names = []
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            names += _keys(inner, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


def _unknown(key: str, where: str) -> RecipeError:
    return RecipeError(f"{where}: unknown key {shortened(repr(key))}; available: {listing(_keys(Recipe))}.")


def _checked(data: dict[str, Any], where: str) -> Recipe:
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise RecipeError(
                f"{where}: unknown key {shortened(repr(key))}; available: {listing(_keys(Recipe))}."
            ) from None
        got = shortened(repr(first.get("input")))
        raise RecipeError(f"{where}: {shortened(key) or 'recipe'}: {shortened(first['msg'])}, got {got}.") from None
