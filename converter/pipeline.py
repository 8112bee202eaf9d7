"""The stages in order: checkpoint, calibrate, export, validate. Read this first.

Each stage is a plain function, and the file that it leaves is what the next one starts from.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict
from math import ceil
from pathlib import Path
from typing import Any

import onnx
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from converter import arrangement as arrangement_file
from converter.calibration import file as calibration_file
from converter.calibration.fitting import Fitted, Means, fit
from converter.calibration.resume import resumable
from converter.calibration.sample import sampled
from converter.checkpoint import Checkpoint, open_checkpoint
from converter.delivery.bundle import staged, write_client_files, write_json, write_manifest
from converter.delivery.manifest import RECIPE, REPORT, about, check_files, exported, is_bundle, versions
from converter.errors import CalibrationError, CheckpointError, OutputError, shortened
from converter.evaluation.boundaries import text_wanted
from converter.evaluation.overflow import check_range
from converter.evaluation.parity import Parity
from converter.evaluation.parity import validate as compare
from converter.evaluation.reference import make_sparse
from converter.graph.export import Sparse
from converter.graph.export import export as write_graph
from converter.graph.supported import check_supported
from converter.graph.trace import check_traceable
from converter.kinds import DECODER, completed, positions, vocabulary
from converter.names import MODEL
from converter.place import encodable, write_whole
from converter.plan import Plan, plan
from converter.recipe import Recipe, from_yaml
from converter.records import About, LayerCounts, Permutations, Report, Source
from converter.runtimes.genai import embedded
from converter.runtimes.onnxruntime import load_onnx
from converter.sparsity.linear import Params
from converter.stages import Stages

VALIDATION_TOKENS = 128
WIDTH = {"float32": 4, "float16": 2, "bfloat16": 2}


def convert(
    model: str,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    revision: str | None = None,
    device: str = "cpu",
    embed_kernel: bool = False,
) -> Path:
    """Return OUT: the checkpoint `model`, calibrated on `device`, exported and validated by `recipe`.

    With `embed_kernel` it holds the CPU kernel's library, which onnxruntime-genai then loads.

    Raises:
        ConverterError: a subclass says what the user can mend; OUT is then as it was before.
    """
    run(model, Path(out), recipe or Recipe(), revision, device, Stages(), embed_kernel=embed_kernel)
    return Path(out)


def load(path: str | Path) -> PreTrainedModel:
    """Return OUT on ONNX Runtime, or a checkpoint in PyTorch, as a transformers model."""
    return load_with_processor(path)[0]


def load_with_processor(path: str | Path) -> tuple[PreTrainedModel, Any]:
    """Return the model as `load` does, and what makes its input: the tokenizer, or the processor of images."""
    return _loaded(_opened(path))


def load_decoder(path: str | Path, use: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a causal language model and its tokenizer, as `load_with_processor` does; `use` is what for.

    Raises:
        CheckpointError: when it is a model of another kind.
    """
    opened = _opened(path)
    require_decoder(opened, use)
    return _loaded(opened)


def _opened(path: str | Path) -> Checkpoint:
    """Return OUT, whose files are what its manifest says, or a checkpoint."""
    folder = encodable(Path(path))
    if not is_bundle(folder):
        return open_checkpoint(str(path))
    exported(folder)
    return Checkpoint(str(path), None, folder)


def _loaded(opened: Checkpoint) -> tuple[PreTrainedModel, Any]:
    model = load_onnx(opened.folder) if is_bundle(opened.folder) else opened.model()
    return model, opened.processor()


def require_decoder(source: Checkpoint, use: str) -> None:
    """Raise where the model is not a causal language model; `use` is what one is asked for.

    Raises:
        CheckpointError: when it is a model of another kind.
    """
    if source.kind is not DECODER:
        raise CheckpointError(
            f"{source.source}: must be a {DECODER.name} for {use}, got one that is not: {source.kind.name}. "
            "Call it in Python: converter.load."
        )


def run(
    model: str,
    out: Path,
    recipe: Recipe,
    revision: str | None,
    device: str,
    stages: Stages,
    *,
    embed_kernel: bool = False,
) -> Report:
    """Convert, and return the report that lies in OUT."""
    checkpoint, recipe, layers = begun(model, recipe, revision, device, stages)
    with staged(out, _bytes(checkpoint, recipe)) as folder:
        fitted = _calibrate(checkpoint, layers, recipe, folder, stages)
        about = _about(checkpoint, fitted.recipe, fitted.plan)
        _export(fitted, about, folder, stages, embed_kernel)
        parity = _validate(folder, fitted.checkpoint, fitted.params, fitted.recipe, None, stages)
        report = _report(fitted, folder, stages, parity)
        write_json(folder / REPORT, asdict(report))
        write_manifest(folder, asdict(about))
    return report


def calibrate(model: str, out: Path, recipe: Recipe, revision: str | None, device: str, stages: Stages) -> None:
    """Write recipe, calibration and manifest to the folder `out`, for `export` to start from."""
    checkpoint, recipe, layers = begun(model, recipe, revision, device, stages)
    with staged(out, 0) as folder:
        fitted = _calibrate(checkpoint, layers, recipe, folder, stages)
        write_manifest(folder, asdict(_about(checkpoint, fitted.recipe, fitted.plan)))


def export(
    calibrated: Path, out: Path, changes: Mapping[str, Any], stages: Stages, *, embed_kernel: bool = False
) -> Report:
    """Write OUT from what `calibrate` (or `convert`) left in `calibrated`, its recipe changed; return its report."""
    with stages.stage("checkpoint"):
        check_files(calibrated)
        recipe = from_yaml(calibrated / RECIPE)
        recipe.require_exportable()
        checkpoint = _source(calibrated, recipe, None)
        recipe = recipe.replace(changes)
        layers = plan(checkpoint.skeleton(), recipe)
        params = calibration_file.read(calibrated / calibration_file.NAME)
        about = _about(checkpoint, recipe, layers)
    with staged(out, _bytes(checkpoint, recipe)) as folder:
        for name in [calibration_file.NAME, *([arrangement_file.NAME] if recipe.at("arrange") else [])]:
            shutil.copy(calibrated / name, folder)
        (folder / RECIPE).write_text(recipe.to_yaml(), "utf-8")
        fitted = Fitted(checkpoint, recipe, layers, params)
        _export(fitted, about, folder, stages, embed_kernel)
        report = _report(fitted, folder, stages, None)
        write_json(folder / REPORT, asdict(report))
        write_manifest(folder, asdict(about))
    return report


def validate(folder: Path, source: str | None, text: str | None, stages: Stages) -> Parity:
    """Return how OUT compares with its checkpoint (`source` where that has moved) on `text`."""
    with stages.stage("checkpoint"):
        check_files(folder)
        recipe = from_yaml(folder / RECIPE)
        checkpoint = _source(folder, recipe, source)
        _check_client_files(Checkpoint(str(folder), None, folder), checkpoint)
        params = calibration_file.read(folder / calibration_file.NAME)
    return _validate(folder, checkpoint, params, recipe, text, stages)


def _check_client_files(out: Checkpoint, checkpoint: Checkpoint) -> None:
    """Refuse an OUT whose configuration or tokenizer cannot be read, or is not the checkpoint's."""
    if out.kind is not checkpoint.kind:
        raise OutputError(f"{out.source}: config.json must be of a {checkpoint.kind.name}, got a {out.kind.name}.")
    out.generation_config()
    if vocabulary(out.processor()) != vocabulary(checkpoint.processor()):
        raise OutputError(f"{out.source}: the tokenizer must be that of {checkpoint.source}, got another.")


def reference(folder: Path, source: str | None) -> PreTrainedModel:
    """Return the sparse model of OUT in PyTorch, of its checkpoint (`source` where that has moved)."""
    check_files(folder)
    recipe = from_yaml(folder / RECIPE)
    model = _source(folder, recipe, source).model()
    make_sparse(model, calibration_file.read(folder / calibration_file.NAME), recipe.storage(), recipe.phases)
    return model


def begun(
    model: str, recipe: Recipe, revision: str | None, device: str, stages: Stages, *, dry: bool = False
) -> tuple[Checkpoint, Recipe, Plan]:
    """Return the checkpoint, the recipe for it and its plan; what cannot be converted is refused here.

    What OUT will not have is said. Where the trace is far off, or with `dry` never comes, it is tried.

    Raises:
        ConverterError: a subclass says what stands in the way.
    """
    recipe.require_exportable()
    with stages.stage("checkpoint"):
        checkpoint = open_checkpoint(model, revision).on(device)
        recipe, skeleton = completed(recipe, checkpoint.kind, checkpoint.config), checkpoint.skeleton()
        check_supported(skeleton)
        layers = plan(skeleton, recipe)
        checkpoint.processor()  # where there is none, this is said now
        if dry or layers.open or recipe.needs_text():
            check_traceable(skeleton, checkpoint.blank())
            if recipe.dtype == "float16" and not dry:
                given = _validation(checkpoint, recipe, None)
                check_range(checkpoint.model(), {}, recipe.storage(), recipe.phases, given)
    for what in checkpoint.left_out:
        stages.console.print(f"left out: {shortened(what)}", markup=False, highlight=False)
    return checkpoint, recipe, layers


def _calibrate(checkpoint: Checkpoint, layers: Plan, recipe: Recipe, folder: Path, stages: Stages) -> Fitted:
    with resumable(checkpoint, recipe, stages.console.print) if recipe.trains() else nullcontext() as state:
        wanted = layers.open or recipe.needs_text()
        text = calibration_text(checkpoint, recipe, state, stages) if wanted else None
        fitted = fit(checkpoint, layers, recipe, Means(text, folder, state), stages)
    calibration_file.write(folder / calibration_file.NAME, fitted.params)
    (folder / RECIPE).write_text(fitted.recipe.to_yaml(), "utf-8")
    return fitted


def calibration_text(checkpoint: Checkpoint, recipe: Recipe, state: Path | None, stages: Stages) -> Tensor:
    """Return the windows `[count, window]` of calibration text, or the images, in turn from each source of the recipe.

    What the model has written for an interrupted run, in the folder `state`, is not written anew.
    """
    settings = completed(recipe, checkpoint.kind, checkpoint.config).calibration
    sources = (settings.source or "").split(",")
    each = ceil(recipe.windows() / len(sources))
    parts = [
        _written(checkpoint, recipe, each, state, stages)
        if source == "self"
        else _read(checkpoint, source, each, settings.window, settings.field, recipe.seed)
        for source in sources
    ]
    return torch.stack(parts, 1).flatten(0, 1)[: recipe.windows()]


def _read(checkpoint: Checkpoint, source: str, count: int, window: int, field: str, seed: int) -> Tensor:
    """Return so many windows of a text, or images."""
    return checkpoint.kind.read(source, checkpoint.processor(), checkpoint.config, count, window, field, seed)


def _written(checkpoint: Checkpoint, recipe: Recipe, count: int, state: Path | None, stages: Stages) -> Tensor:
    kept = None if state is None else state / "text.safetensors"
    if kept is not None and kept.exists():
        stages.console.print(f"goes on with the calibration that was interrupted, in {state}")
        return load_file(kept)["text"]
    with stages.stage("sample", "tokens") as advance:
        window, tokenizer = recipe.calibration.window, checkpoint.tokenizer()
        text = sampled(checkpoint.model(), tokenizer, count, window, recipe.seed, advance)
    if kept is not None:
        write_whole(kept, lambda path: save_file({"text": text.contiguous()}, path))
    return text


def _export(fitted: Fitted, about: About, folder: Path, stages: Stages, embed_kernel: bool) -> None:
    checkpoint, recipe, params = fitted.checkpoint, fitted.recipe, fitted.params
    metadata = {
        "nmsparse.version": about.versions["nmsparse"],
        "nmsparse.recipe_sha256": about.recipe_sha256,
        "nmsparse.source": about.source.text(),
        "nmsparse.source_revision": about.source.revision or about.source.weights_sha256,
    }
    with stages.stage("export", "tensors") as advance:
        sparse = Sparse(checkpoint, fitted.plan, params, recipe.storage(), recipe.phases, recipe.share)
        write_graph(sparse, folder, metadata, advance)
        if recipe.dtype == "float16":
            given = _validation(checkpoint, recipe, None)
            check_range(checkpoint.model(), params, recipe.storage(), recipe.phases, given)
        kernel = embedded(onnx.load(folder / MODEL, load_external_data=False)) if embed_kernel else None
        write_client_files(folder, checkpoint, recipe.dtype, kernel)


def _validate(
    folder: Path, checkpoint: Checkpoint, params: dict[str, Params], recipe: Recipe, text: str | None, stages: Stages
) -> Parity:
    with stages.stage("validate", "comparisons") as advance:
        ids = _validation(checkpoint, recipe, text)
        wanted = text_wanted(checkpoint.kind.boundaries(checkpoint.config))
        more = _validation(checkpoint, recipe, text, wanted) if wanted > ids.shape[1] else None
        parity = compare(folder, checkpoint.model(), params, recipe.storage(), recipe.phases, ids, advance, more)
    parity.check()
    return parity


def _validation(checkpoint: Checkpoint, recipe: Recipe, text: str | None, wanted: int = 0) -> Tensor:
    """Return what OUT is compared on: the images of the recipe, or `[1, S]` of a text, more of it where it has more."""
    source, count = checkpoint.kind.validated(recipe)
    source = text or source
    # RoBERTa counts positions from after two that no token has.
    most = positions(checkpoint.config) or VALIDATION_TOKENS + 2
    least = min(VALIDATION_TOKENS, most - 2)
    if wanted > least:
        with suppress(CalibrationError):
            return _read(checkpoint, source, count, wanted, "text", recipe.seed)
    return _read(checkpoint, source, count, least, "text", recipe.seed)


def _about(checkpoint: Checkpoint, recipe: Recipe, layers: Plan) -> About:
    """Return what the manifest says besides the files."""
    local = Path(checkpoint.source).exists()
    name = str(Path(checkpoint.source).resolve()) if local else checkpoint.source
    return About(
        versions=versions(),
        source=Source(name, checkpoint.revision, checkpoint.fingerprint()),
        recipe_sha256=recipe.sha256(),
        layers=_counts(layers),
        left_out=checkpoint.left_out,
    )


def _counts(layers: Plan) -> LayerCounts:
    return LayerCounts(len(layers.sparse), len(layers.layers) - len(layers.sparse))


def _source(folder: Path, recipe: Recipe, moved: str | None) -> Checkpoint:
    """Return the checkpoint that the folder was made from, arranged as there.

    Raises:
        CheckpointError: when its weights are not the ones that the manifest names.
        CalibrationError: when the folder's arrangement cannot be read.
    """
    source = about(folder).source
    checkpoint = open_checkpoint(moved or source.name, None if moved else source.revision)
    fingerprint = checkpoint.fingerprint()
    if fingerprint != source.weights_sha256:
        raise CheckpointError(
            f"{checkpoint.source}: weights must have SHA-256 {source.weights_sha256}, got {fingerprint}. "
            f"{folder} was made from others: give them with --model, or convert again."
        )
    return (
        checkpoint.arranged(arrangement_file.read(folder / arrangement_file.NAME))
        if recipe.at("arrange")
        else checkpoint
    )


def _bytes(checkpoint: Checkpoint, recipe: Recipe) -> int:
    """Return how much room OUT needs on the disk, with a tenth to spare."""
    numbers = sum(p.numel() for p in checkpoint.skeleton().parameters())
    return int(1.1 * numbers * WIDTH[recipe.dtype]) + 50_000_000


def _report(fitted: Fitted, folder: Path, stages: Stages, parity: Parity | None) -> Report:
    return Report(
        recipe=fitted.recipe.model_dump(mode="json"),
        layers=_counts(fitted.plan),
        permutations=Permutations(
            folded=len(fitted.checkpoint.arrangement.layers),
            inputs=sum(layer.permutation is not None for layer in fitted.params.values()),
        ),
        training=fitted.curve,
        stages=list(stages.costs),
        bytes=sum(path.stat().st_size for path in folder.iterdir()),
        parity=None if parity is None else parity.summary(),
        parity_layers=[] if parity is None else parity.layers,
    )
