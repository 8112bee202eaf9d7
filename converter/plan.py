"""The plan: which linear layers of a model become sparse, at which pattern, and why the others do not."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import nn
from transformers import PreTrainedModel

from converter.errors import CheckpointError, RecipeError
from converter.recipe import Recipe


@dataclass(frozen=True)
class LayerPlan:
    """What is to happen to one linear layer; `keep` is 0 when it stays dense, and `reason` says why.

    `arranged` says that the channels of its groups lie side by side as they should, so that it needs no permutation.
    """

    name: str
    in_features: int
    out_features: int
    keep: int = 0
    group: int = 0
    reason: str = ""
    arranged: bool = False

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

    def arranged(self, names: Collection[str]) -> Plan:
        """Return this plan with the layers called `names` arranged."""
        return replace(self, layers=tuple(replace(layer, arranged=layer.name in names) for layer in self.layers))


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
        RecipeError: when a pattern does not fit a layer, or no layer is left to be sparse.
    """
    blocks, _ = find_blocks(model)
    head = model.get_output_embeddings()
    layers = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        reason = _reason_for_dense(name, module is head, blocks, recipe)
        keep, group = (0, 0) if reason else recipe.n_of_m.at(module.in_features, name)
        if not reason and keep == group:
            keep, group, reason = 0, 0, f"pattern {recipe.pattern} keeps every channel"
        layers.append(LayerPlan(name, module.in_features, module.out_features, keep, group, reason))
    found = Plan(blocks, tuple(layers))
    if not found.sparse:
        why = sorted({layer.reason for layer in layers}) or ["the model has no nn.Linear"]
        raise RecipeError(f"plan: at least one layer must be sparse, got none: {'; '.join(why)}.")
    return found


def _reason_for_dense(name: str, is_head: bool, blocks: str, recipe: Recipe) -> str:
    if is_head:
        return "output head"
    if not name.startswith(f"{blocks}."):
        return f"outside the blocks {blocks}"
    pattern = _first_match(name, recipe.ignore)
    if pattern:
        return f"ignored by {pattern!r}"
    return "" if _first_match(name, recipe.targets) else f"no target of {', '.join(recipe.targets)} matches"


def _first_match(name: str, patterns: Sequence[str]) -> str | None:
    return next((p for p in patterns if fnmatchcase(name, p)), None)
