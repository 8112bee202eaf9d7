"""Calibration on a GPU against the same on the CPU: `make test-gpu` runs these, elsewhere all but the first skip."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PLAIN
from test_calibration import METHODS, SHORT

from converter.calibration.fitting import Fitted, Means
from converter.calibration.fitting import fit as fit_checkpoint
from converter.checkpoint import open_checkpoint
from converter.evaluation.perplexity import perplexity, window_losses
from converter.pipeline import calibration_text
from converter.plan import plan
from converter.recipe import Recipe
from converter.sources.texts import windows
from converter.sparsity.linear import install
from converter.sparsity.pattern import mask
from converter.stages import Stages

NO_GPU = os.environ.get("NMSPARSE_TEST_DEVICE", "cpu") == "cpu"
on_gpu = pytest.mark.skipif(NO_GPU, reason="needs a GPU: run `make test-gpu`")
SMALL = {
    "pattern": "2:8",
    "calibration.source": "python",
    "calibration.tokens": 512,
    "calibration.window": 32,
    "calibration.batch": 4,
}
MORE: list[dict[str, Any]] = [
    {"criterion": "weight_variance", "mitigation": "d_pts+var", "pattern": "50%"},
    {"criterion": "wina", "mitigation": "permute+var", "permute": "folded"},
    {"criterion": "wina", "mitigation": "var", "allocation.budget": "50%", "allocation.tokens": 256},
    *({"criterion": name, "mitigation": "none"} for name in ("amber", "wanda", "sparsegpt", "weight_magnitude")),
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_is_refused(
    tiny: Path, tmp_path: Path, nmsparse: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = nmsparse("calibrate", tiny, tmp_path / "out", "--device", "cuda")
    assert (done.returncode, done.stdout) == (17, "")
    assert "device: a GPU that PyTorch can use must be here for cuda, got none" in done.stderr
    assert not (tmp_path / "out").exists()


def fit(source: Path, recipe: Recipe, scratch: Path, device: str) -> tuple[Fitted, float]:
    """Return what calibration on `device` leaves, and the mean loss of the sparse model on the CPU."""
    checkpoint, stages = open_checkpoint(str(source)).on(device), Stages()
    text = calibration_text(checkpoint, recipe, None, stages)
    scratch.mkdir()
    layers = plan(checkpoint.skeleton(), recipe)
    found = fit_checkpoint(checkpoint, layers, recipe, Means(text, scratch), stages)
    model = found.checkpoint.model()
    for name, params in found.params.items():
        install(model, name, params)
    return found, window_losses(model, windows("python", checkpoint.tokenizer(), 4, 32)).mean().item()


@on_gpu
@pytest.mark.parametrize("changes", [*METHODS, *MORE], ids=lambda changes: "-".join(map(str, changes.values()))[:60])
def test_a_gpu_fits_what_the_cpu_fits(tiny: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    recipe = PLAIN.replace({**SMALL, **changes, "dtype": "float32"})
    ours, loss = fit(tiny, recipe, tmp_path / "gpu", "cuda")
    theirs, expected = fit(tiny, recipe, tmp_path / "cpu", "cpu")
    assert ours.recipe == theirs.recipe
    assert ours.checkpoint.device == "cpu"
    assert all(
        value.device.type == "cpu"
        for params in ours.params.values()
        for value in vars(params).values()
        if isinstance(value, torch.Tensor)
    )
    assert loss == pytest.approx(expected, rel=0.02 if recipe.trains() else 0.003)
    if recipe.trains():
        assert [point[0] for point in ours.curve] == [point[0] for point in theirs.curve]


@on_gpu
@pytest.mark.parametrize(("keep", "group"), [(1, 4), (2, 4), (8, 16), (5, 12), (16, 32), (64, 128), (96, 192)])
def test_masks_are_the_same_bits(keep: int, group: int) -> None:
    generator = torch.Generator().manual_seed(keep)
    scores = torch.rand(50, 384, generator=generator)
    scores[torch.rand(50, 384, generator=generator) < 0.4] = 0.5
    scores[3, ::5], scores[4, ::7] = torch.inf, torch.nan
    assert torch.equal(mask(scores.cuda(), keep, group).cpu(), mask(scores, keep, group))


@on_gpu
def test_text_that_a_gpu_writes(tiny: Path) -> None:
    checkpoint = open_checkpoint(str(tiny)).on("cuda")
    recipe = PLAIN.replace({**SMALL, **SHORT, "mitigation": "distill", "calibration.source": "self"})
    first, again = (calibration_text(checkpoint, recipe, None, Stages()) for _ in range(2))
    assert first.device.type == "cpu"
    assert torch.equal(first, again)
    assert first.shape == (recipe.windows(), 32)
    assert len(first.unique()) > 50


@on_gpu
def test_the_real_model_on_a_gpu(gguf: Path) -> None:
    """The same perplexity as on the CPU, dense and sparse, to what order of sums allows."""
    text = torch.randint(1000, 40000, (2, 128), generator=torch.Generator().manual_seed(0))
    found = []
    for device in ("cpu", "cuda"):
        checkpoint = open_checkpoint(str(gguf)).on(device)
        layers = plan(checkpoint.skeleton(), PLAIN)
        model = checkpoint.model()
        dense = perplexity(model, text, lambda done, total: None).perplexity
        result = fit_checkpoint(checkpoint, layers, PLAIN, Means(None, Path()), Stages())
        for name, params in result.params.items():
            install(model, name, params.on(device))
        found.append((dense, perplexity(model, text, lambda done, total: None).perplexity))
    assert found[1] == pytest.approx(found[0], rel=0.01)
