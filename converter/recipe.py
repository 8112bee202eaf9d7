"""The recipe: every choice that shapes a conversion, in one frozen object that is read from and written to YAML."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from converter.errors import RecipeError, listing
from converter.sparsity.criteria import criterion
from converter.sparsity.mitigations import Mitigation, mitigations
from converter.sparsity.pattern import Pattern

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Calibration(_Frozen):
    """Where the calibration text comes from and how much of it is used."""

    source: str = "self"
    tokens: int = Field(default=8192, gt=0)
    window: int = Field(default=512, gt=1)
    batch: int = Field(default=4, gt=0)
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


class Distillation(_Frozen):
    """How `distill`, `l_pts`, `ls` and a trained `r_sparse` are trained against the dense model."""

    tokens: int = Field(default=61440, gt=0)
    steps: int = Field(default=120, gt=0)
    batch: int = Field(default=1, gt=0)
    learning_rate: float = Field(default=3e-4, gt=0)
    warm_up: float = Field(default=0.1, ge=0, lt=1)


class Recipe(_Frozen):
    """Every choice of a conversion; the defaults are what `nmsparse convert MODEL OUT` does."""

    pattern: str = "8:16"
    criterion: str = "magnitude"
    mitigation: tuple[str, ...] = ("var",)
    s_pts: Literal["channel", "scalar"] = "channel"
    d_pts: Literal["median", "mean"] = "median"
    r_sparse: Literal["svd", "trained"] = "svd"
    permute: Literal["layer", "folded"] = "layer"
    rank: int = Field(default=64, gt=0)
    targets: tuple[str, ...] = ("*",)
    ignore: tuple[str, ...] = ()
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    seed: int = 0
    calibration: Calibration = Calibration()
    distillation: Distillation = Distillation()

    @field_validator("pattern", mode="before")
    @classmethod
    def _pattern(cls, value: object) -> str:
        return str(Pattern.parse(str(value)))

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
        self.methods()
        return self

    @property
    def n_of_m(self) -> Pattern:
        """The parsed pattern."""
        return Pattern.parse(self.pattern)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the exported model."""
        return DTYPES[self.dtype]

    def methods(self) -> list[Mitigation]:
        """Return the mitigations in the order given."""
        variants: dict[str, str] = {"s_pts": self.s_pts, "d_pts": self.d_pts, "r_sparse": self.r_sparse}
        variants["permute"] = self.permute
        return mitigations(self.mitigation or ("none",), variants)

    def needs_statistics(self) -> bool:
        """Return whether the layers' inputs on calibration text decide their parameters."""
        wanted = criterion(self.criterion).needs_statistics
        return wanted or any(method.needs_statistics for method in self.methods())

    def refits(self) -> bool:
        """Return whether each weight is fitted anew to the pruned inputs of its layer."""
        return any(method.refits for method in self.methods())

    def arranges(self) -> bool:
        """Return whether the checkpoint is reordered so that the channels of a group lie side by side."""
        return any(method.arranges for method in self.methods())

    def trains(self) -> tuple[str, ...]:
        """Return the names of the `Params` that are trained once every layer is fitted."""
        return tuple(part for method in self.methods() for part in method.trains)

    def windows(self) -> int:
        """Return how many windows of calibration text are used in all."""
        fitting = self.calibration.count if self.needs_statistics() else 0
        return max(fitting, self.distillation.tokens // self.calibration.window if self.trains() else 0)

    def needs_together(self) -> bool:
        """Return whether the statistics must say which channels are large together."""
        return any(method.needs_together for method in self.methods())

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

        Raises:
            RecipeError: for an unknown key or an impossible value.
        """
        data = self.model_dump()
        for key, value in changes.items():
            *path, last = key.split(".")
            table = data
            for part in path:
                if not isinstance(table.get(part), dict):
                    raise RecipeError(f"{where}: unknown key {key!r}; available: {listing(_keys(Recipe))}.")
                table = table[part]
            if isinstance(value, Mapping) and isinstance(table.get(last), dict):
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
        data = _yaml().load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise RecipeError(f"{path}: must be a YAML recipe, got {error}.") from error
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
            raise RecipeError(f"--set: must be key=value, got {text!r}.")
        try:
            changes[key.strip()] = _yaml().load(value)
        except YAMLError as error:
            raise RecipeError(f"--set {key}: must have a YAML value, got {value!r}.") from error
    return changes


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


def _checked(data: dict[str, Any], where: str) -> Recipe:
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise RecipeError(f"{where}: unknown key {key!r}; available: {listing(_keys(Recipe))}.") from None
        raise RecipeError(f"{where}: {key or 'recipe'}: {first['msg']}, got {first.get('input')!r}.") from None
