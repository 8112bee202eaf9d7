"""Fitting: what the recipe makes of a checkpoint, step after step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from converter import arrangement as arrangement_file
from converter.calibration.allocate import allocate, measured_with
from converter.calibration.arrange import arrange
from converter.calibration.blocks import siblings
from converter.calibration.distill import distill
from converter.calibration.train import Curve
from converter.calibration.walk import calibrate as walk
from converter.checkpoint import Checkpoint
from converter.plan import Plan, plan
from converter.recipe import Recipe
from converter.sparsity.linear import Params
from converter.stages import Stages

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Fitted:
    """How far fitting has come; at its end every pattern of recipe and plan is chosen, `curve` is that of training."""

    checkpoint: Checkpoint
    recipe: Recipe
    plan: Plan
    params: dict[str, Params] = field(default_factory=dict)
    curve: Curve = field(default_factory=list)


@dataclass(frozen=True)
class Means:
    """What the steps work with: the windows or images `text`, None when none is needed, and two folders.

    `scratch` is for hidden states and takes the arrangement; `state`, where given, keeps what an interrupted call goes
    on from.
    """

    text: Tensor | None
    scratch: Path
    state: Path | None = None

    def windows(self) -> Tensor:
        """Return the text, of a recipe that needs it."""
        assert self.text is not None
        return self.text


@dataclass(frozen=True)
class Step:
    """One step: its name and the unit of its progress, whether it is wanted, and what it makes of what is fitted."""

    name: str
    unit: str
    wanted: Callable[[Fitted], bool]
    run: Callable[[Fitted, Means, Progress], Fitted]


def fit(checkpoint: Checkpoint, layers: Plan, recipe: Recipe, means: Means, stages: Stages) -> Fitted:
    """Return what the recipe makes of the checkpoint; fitted where that puts its model, and then on the CPU.

    Raises:
        CalibrationError: by the step that cannot be done.
    """
    groups = siblings(checkpoint.model(), layers.sparse, checkpoint.blank()) if recipe.share else []
    now = Fitted(checkpoint, recipe, layers.sharing(groups))
    if now.plan.open and measured_with(recipe) != recipe.criterion:
        stages.console.print(f"effects are measured with {measured_with(recipe)}: {recipe.criterion} needs statistics")
    for step in STEPS:
        if step.wanted(now):
            with stages.stage(step.name, step.unit) as advance:
                now = step.run(now, means, advance)
    params = {name: layer.on("cpu") for name, layer in now.params.items()}
    return replace(now, checkpoint=now.checkpoint.on("cpu"), params=params)


def _allocated(now: Fitted, means: Means, progress: Progress) -> Fitted:
    """Return it with a pattern for every open layer."""
    chosen = allocate(now.checkpoint.model(), now.plan, now.recipe, means.windows(), progress)
    recipe = now.recipe.replace({"patterns": {**now.recipe.patterns, **chosen}})
    groups = list(dict.fromkeys(layer.siblings for layer in now.plan.layers if layer.siblings))
    return replace(now, recipe=recipe, plan=plan(now.checkpoint.skeleton(), recipe).sharing(groups))


def _arranged(now: Fitted, means: Means, progress: Progress) -> Fitted:
    """Return it with the checkpoint reordered."""
    walked, batch = _walked(now.recipe, means.windows()), now.recipe.calibration.batch
    arrangement = arrange(now.checkpoint.model(), now.plan, walked, batch, means.scratch, progress)
    arrangement.write(means.scratch / arrangement_file.NAME)
    return replace(now, checkpoint=now.checkpoint.arranged(arrangement), plan=now.plan.arranged(arrangement.layers))


def _calibrated(now: Fitted, means: Means, progress: Progress) -> Fitted:
    """Return it with the `Params` of every layer, and what is done block by block."""
    walked = _walked(now.recipe, means.windows()) if now.recipe.walks() else None
    model = now.checkpoint.model()
    return replace(now, params=walk(model, now.plan, now.recipe, walked, means.scratch, means.state, progress))


def _trained(now: Fitted, means: Means, progress: Progress) -> Fitted:
    """Return it with what the recipe trains, over the whole model."""
    state = means.state and means.state / "distill.pt"
    model = now.checkpoint.model()
    params, curve = distill(model, now.params, means.windows(), now.recipe, state, progress)
    return replace(now, params=params, curve=curve)


def _walked(recipe: Recipe, text: Tensor) -> Tensor:
    """Return the windows that statistics are taken from."""
    return text[: recipe.calibration.count]


# The phases of mitigations in their order, after the allocation, which says what is kept where; `layer` and `block` are
# one walk, so that each block is fitted to what the sparse blocks before it give.
STEPS = (
    Step("allocate", "windows", lambda now: bool(now.plan.open), _allocated),
    Step("arrange", "blocks", lambda now: bool(now.recipe.at("arrange")), _arranged),
    Step("calibrate", "blocks", lambda now: True, _calibrated),
    Step("distill", "steps", lambda now: bool(now.recipe.at("model")), _trained),
)
