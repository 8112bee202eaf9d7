"""The plan: which linear layers of a model become sparse, at which pattern, and why the others do not."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import ceil

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from converter.errors import CheckpointError, RecipeError
from converter.presets import preset
from converter.recipe import DENSE, Recipe
from converter.sparsity.pattern import Pattern


@dataclass(frozen=True)
class LayerPlan:
    """What is to happen to one linear layer; `keep` is 0 when it stays dense, and `reason` says why.

    An `open` layer is one that the allocation is to choose a pattern for; until then it has the first of the menu.
    `arranged` says that the channels of its groups lie side by side as they should, so that it needs no permutation.
    `siblings` are the layers, itself among them, that choose their channels together; none where it chooses alone.
    """

    name: str
    in_features: int
    out_features: int
    keep: int = 0
    group: int = 0
    reason: str = ""
    open: bool = False
    arranged: bool = False
    siblings: tuple[str, ...] = ()

    @property
    def sparse(self) -> bool:
        """Whether the layer becomes a `SparseLinear`."""
        return self.keep > 0


@dataclass(frozen=True)
class Plan:
    """Every linear layer of a model, in the order of the model."""

    blocks: str
    layers: tuple[LayerPlan, ...]

    @property
    def sparse(self) -> list[LayerPlan]:
        """The layers that become sparse."""
        return [layer for layer in self.layers if layer.sparse]

    @property
    def open(self) -> list[LayerPlan]:
        """The layers whose pattern the allocation is to choose."""
        return [layer for layer in self.layers if layer.open]

    def arranged(self, names: Collection[str]) -> Plan:
        """Return this plan with the layers called `names` arranged."""
        return replace(self, layers=tuple(replace(layer, arranged=layer.name in names) for layer in self.layers))

    def sharing(self, groups: Sequence[tuple[str, ...]]) -> Plan:
        """Return this plan with the layers of each group as siblings."""
        of = {name: group for group in groups for name in group}
        return replace(self, layers=tuple(replace(layer, siblings=of.get(layer.name, ())) for layer in self.layers))


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the name and the list of the model's blocks: the list of modules that holds most parameters.

    Raises:
        CheckpointError: when the model has no list of modules.
    """
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise CheckpointError(f"{type(model).__name__}: must have a list of blocks, got none.")
    return max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def plan(model: PreTrainedModel, recipe: Recipe) -> Plan:
    """Return the plan of `recipe` for `model` (a skeleton is enough).

    Raises:
        RecipeError: when a pattern does not fit a layer, a row of `patterns` matches none, no layer is left to be
            sparse, or the budget is below what the menu can reach.
    """
    blocks, _ = find_blocks(model)
    head = model.get_output_embeddings()
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for glob in recipe.patterns:
        if not any(fnmatchcase(name, glob) for name in linears):
            raise RecipeError(
                f"patterns: {glob!r} must match a layer of the model, got none. "
                "See the names with nmsparse convert MODEL OUT --dry-run."
            )
    config = model.config.get_text_config()
    layers = []
    for name, module in linears.items():
        reason = _reason_for_dense(name, module is head, blocks, recipe, config)
        layers.append(_layer(name, module, reason, recipe))
    planned = Plan(blocks, tuple(layers))
    if not planned.sparse:
        why = sorted({layer.reason for layer in layers}) or ["the model has no nn.Linear"]
        raise RecipeError(f"plan: at least one layer must be sparse, got none: {'; '.join(why)}.")
    _check_budget(planned, recipe)
    if (storage := recipe.storage()).bits:
        for layer in layers:
            storage.blocks(layer.name, layer.in_features, layer.out_features)
    return planned


def kept_weights(layer: LayerPlan, keep: int, group: int) -> int:
    """Return how many of the layer's weights a token meets when `keep` of every `group` channels are kept."""
    return layer.in_features // group * keep * layer.out_features


def _layer(name: str, linear: nn.Linear, reason: str, recipe: Recipe) -> LayerPlan:
    sizes = (name, linear.in_features, linear.out_features)
    if reason:
        return LayerPlan(*sizes, reason=reason)
    row = _first_match(name, tuple(recipe.patterns))
    if row is None and recipe.allocation.budget:
        keep, group = Pattern.parse(recipe.menu()[0]).at(linear.in_features, name)
        return LayerPlan(*sizes, keep, group, open=True)
    text = recipe.pattern if row is None else recipe.patterns[row]
    if text == DENSE:
        return LayerPlan(*sizes, reason=f"dense by patterns {row!r}")
    keep, group = Pattern.parse(text).at(linear.in_features, name)
    if keep == group:
        return LayerPlan(*sizes, reason=f"pattern {text} keeps every channel")
    return LayerPlan(*sizes, keep, group)


def _check_budget(planned: Plan, recipe: Recipe) -> None:
    """Refuse a menu that does not fit an open layer, and a budget that it cannot reach."""
    total = least = 0
    for layer in planned.open:
        menu = [Pattern.parse(text).at(layer.in_features, layer.name) for text in recipe.menu()]
        total += kept_weights(layer, 1, 1)
        least += min(kept_weights(layer, *pattern) for pattern in menu)
    if total and least > recipe.allocation.limit(total):
        raise RecipeError(
            f"allocation.budget: must be at least {ceil(10000 * least / total) / 100:g}%, what the sparsest of the "
            f"menu keeps, got {recipe.allocation.budget}. Raise it, or add a sparser pattern to allocation.menu."
        )


def _reason_for_dense(name: str, is_head: bool, blocks: str, recipe: Recipe, config: PretrainedConfig) -> str:
    if is_head:
        return "output head"
    if not name.startswith(f"{blocks}."):
        return f"outside the blocks {blocks}"
    ignored = _first_match(name, recipe.ignore)
    if ignored:
        return f"ignored by {ignored!r}"
    if not _first_match(name, recipe.targets):
        return f"no target of {', '.join(recipe.targets)} matches"
    block, *_, projection = name.removeprefix(f"{blocks}.").split(".")
    return preset(recipe.preset)(projection, int(block), config)


def _first_match(name: str, patterns: Sequence[str]) -> str | None:
    return next((p for p in patterns if fnmatchcase(name, p)), None)


def signature(module: nn.Module) -> str:
    """Return a text that two modules share when they compute the same function of their parameters and inputs."""
    settings = sorted(
        f"{key}={value!r}"
        for key, value in vars(module).items()
        if not key.startswith("_") and key not in {"layer_idx", "training", "config"}
    )
    tensors = [f"{name}:{tuple(p.shape)}:{p.dtype}" for name, p in module.named_parameters(recurse=False)]
    buffers = [f"{name}:{b.tolist()}" for name, b in module.named_buffers(recurse=False)]
    children = [f"{name}({signature(child)})" for name, child in module.named_children()]
    return f"{type(module).__qualname__}[{'; '.join(settings + tensors + buffers + children)}]"
