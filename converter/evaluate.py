"""`nmsparse evaluate`: tasks on OUT and on its dense checkpoint under one setting, and what the difference means."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import PreTrainedModel

from converter import registry
from converter.build import runnable
from converter.checkpoint import Checkpoint, open_checkpoint
from converter.delivery.bundle import write_json
from converter.delivery.manifest import (
    EVALUATION,
    EXAMPLES,
    RESULTS,
    about,
    check_files,
    is_bundle,
    manifest,
    sha256,
)
from converter.errors import CheckpointError, EvaluationError, OutputError, RecoveryError, UsageError
from converter.evaluation.answers import Answers
from converter.evaluation.classify import classify, labelled
from converter.evaluation.greedy import PROMPT, compared, write_on
from converter.evaluation.harness import HarnessLM, longest
from converter.evaluation.statistics import compare, f1, recovery
from converter.evaluation.tasks import ask, load_tasks
from converter.kinds import CLASSIFIER
from converter.options import EngineOptions, EvaluationOptions
from converter.pipeline import require_decoder
from converter.place import private, replacing
from converter.records import Paired, Results, Setting
from converter.runtimes.engine import ENGINE
from converter.runtimes.engine_model import load_engine
from converter.runtimes.gpu import gpu
from converter.runtimes.protocol import Runnable, Served
from converter.sources.images import SOURCES
from converter.sources.texts import windows
from converter.stages import Stages

TABLE = "compared.csv"
Side = tuple[Callable[[], tuple[PreTrainedModel, Any]], str]  # loads a model and its processor; names both


@dataclass(frozen=True)
class Evaluation:
    """What was found: a row for each model, example and metric; the comparisons; sparse / dense accuracy; F1."""

    examples: pd.DataFrame
    compared: list[Paired]
    recovery: float | None
    f1: dict[str, float]


def evaluate(
    model: str, setting: Setting, options: EvaluationOptions, engine: EngineOptions, stages: Stages
) -> Evaluation:
    """Return how OUT does beside its dense checkpoint, or how a checkpoint does alone, and write it to a folder.

    `engine` says which one runs OUT, where the setting's runtime has engines.

    Raises:
        BuildError, DeviceError: when there is no engine of that runtime, or no GPU that can run it.
        EvaluationError: when a task is unknown, its data are not there, or its examples do not fit.
        CheckpointError: when the checkpoint has another tokenizer than OUT.
        RecoveryError: when less of the accuracy is left than `min_recovery`; the results are written.
    """
    folder, out, context = Path(model), options.out, options.context
    sparse = is_bundle(folder)
    if sparse:
        with stages.stage("check"):
            check_files(folder)
    if not sparse:
        given = {"--min-recovery": options.min_recovery, "--against": options.against, "--prompts": setting.prompts}
        for option, value in given.items():
            if value:
                raise UsageError(f"{option}: must be given with an OUT of nmsparse, got {model}. Leave it out.")
    checkpoint = _dense(folder, options.against) if sparse else open_checkpoint(model)
    _check_setting(checkpoint, setting)
    if sparse:
        out = out or folder / EVALUATION
        if checkpoint.kind is not CLASSIFIER:
            _same_tokenizer(folder, checkpoint)
    with stages.stage("tasks"):
        tasks = load_tasks(setting, options.data_dir)
        shown = (
            labelled(setting.images, checkpoint.config, setting.limit or 0, setting.seed) if setting.images else None
        )
        prompts = windows(setting.text, checkpoint.tokenizer(), setting.prompts, PROMPT) if setting.prompts else None
    sides = {"dense": _dense_side(checkpoint)}
    if sparse:
        sides["sparse"] = _sparse_side(folder, checkpoint, setting.runtime, options, engine)
    by_model: dict[str, pd.DataFrame] = {}
    wrote: list[list[int]] = []  # the dense model, after the prompts
    for name, (load, key) in sides.items():
        loaded, frames = load(), []
        with Answers(_kept(key, context)) as answers:
            if shown is not None:
                with stages.stage(name, "images") as advance:
                    frames.append(classify(loaded[0], loaded[1], *shown, options.batch, answers, advance))
            if tasks:
                with stages.stage(name, "answers") as advance:
                    frames.append(ask(HarnessLM(*loaded, context, options.batch, advance, answers), tasks, setting))
            if prompts is not None:
                with stages.stage(f"{name}, prompts", "prompts") as advance:
                    written = write_on(*loaded, prompts, answers, advance)
                    wrote = wrote or written
                    frames.append(compared(loaded[0], prompts, wrote, written))
        by_model[name] = pd.concat(frames, ignore_index=True)
    both = compare(by_model["dense"], by_model.get("sparse", by_model["dense"]), setting.seed)
    scores = {name: score for name, rows in by_model.items() if (score := f1(rows)) is not None}
    examples = pd.concat([rows.assign(model=name) for name, rows in by_model.items()], ignore_index=True)
    result = Evaluation(examples, both, recovery(both) if sparse else None, scores)
    if out is not None:
        _write(out, result, setting, context, model, checkpoint.source)
    _check(result, options.min_recovery)
    return result


def _dense_side(checkpoint: Checkpoint) -> Side:
    """Return what loads the checkpoint, dense, and what tells it from all others."""
    return (
        lambda: (checkpoint.model(), checkpoint.processor()),
        f"dense {checkpoint.fingerprint()} {checkpoint.settings()}",
    )


def _sparse_side(
    folder: Path, checkpoint: Checkpoint, runtime: str, options: EvaluationOptions, engine: EngineOptions
) -> Side:
    """Return what loads OUT in the runtime, and what tells it and what runs it from all others."""
    if registry.builds(runtime):
        served = _serve(folder, checkpoint, runnable(folder, runtime, engine.target), options.context, engine)
    else:
        served = registry.runtime(runtime).serve(folder, options.against)
    processor = Checkpoint(str(folder), None, folder).processor
    return lambda: (served.load(), processor()), _fingerprint(folder, served.runs)


def _serve(folder: Path, checkpoint: Checkpoint, ready: Runnable, context: int, options: EngineOptions) -> Served:
    """Return OUT on an engine; a context that its profiles cannot take is refused, before anything is asked."""
    most = max((p.tokens[2] for p in ready.engine.shapes() if p.past[0] == 0 and p.batch[0] == 1), default=0)
    wanted = longest(checkpoint.config, context)
    if wanted > most:
        raise EvaluationError(
            f"--context: must be at most {most}, what a profile of {ready.place} takes in one call, got {wanted}. "
            "Lower it, or build the engine again with --profile."
        )
    library = sha256(options.plugin) if options.plugin else ""
    runs = f"{gpu()[1]} {ready.manifest.files[ENGINE].sha256} {library}"
    return Served(lambda: load_engine(folder, ready, options), runs)


def _check_setting(checkpoint: Checkpoint, setting: Setting) -> None:
    """Refuse what the kind of model cannot be asked."""
    if checkpoint.kind is not CLASSIFIER:
        require_decoder(checkpoint, "evaluate")
        if setting.images:
            raise UsageError(f"--images: must be given with a {CLASSIFIER.name}, got a {checkpoint.kind.name}.")
        if not setting.tasks and not setting.prompts:
            raise EvaluationError("--tasks: must name a task of lm-eval, got none. Name one, or give --prompts.")
        return
    if setting.tasks or setting.prompts:
        raise UsageError(f"--tasks, --prompts: must not be given with an {CLASSIFIER.name}. Give --images alone.")
    if not setting.images:
        raise EvaluationError(f"--images: must be given with an {CLASSIFIER.name}, got none: {SOURCES}.")


def _dense(folder: Path, against: str | None) -> Checkpoint:
    source = about(folder).source
    try:
        return open_checkpoint(against or source.name, None if against else source.revision)
    except CheckpointError as error:
        raise CheckpointError(f"{error} Say with --against where the dense checkpoint is now.") from error


def _same_tokenizer(folder: Path, checkpoint: Checkpoint) -> None:
    ours, theirs = Checkpoint(str(folder), None, folder).tokenizer().get_vocab(), checkpoint.tokenizer().get_vocab()
    if ours != theirs:
        raise CheckpointError(
            f"{checkpoint.source}: must have the tokenizer of {folder}, got another ({len(theirs)} tokens, not the "
            f"same {len(ours)}). The two would answer different questions: give the checkpoint of OUT with --against."
        )


def _fingerprint(folder: Path, runs: str) -> str:
    """Return what tells this OUT and what `runs` it from all others."""
    files = json.dumps({name: asdict(entry) for name, entry in manifest(folder).files.items()}, sort_keys=True)
    return f"sparse {hashlib.sha256(files.encode()).hexdigest()} {runs}"


def _kept(key: str, context: int) -> Path:
    """Return the file for the answers of a model, which also depend on its context and on the packages that run it."""
    packages = [f"{package} {version(package)}" for package in ("lm-eval", "torch", "transformers", "onnxruntime")]
    digest = hashlib.sha256("\n".join([key, str(context), *packages]).encode()).hexdigest()
    return private("evaluation") / f"{digest}.sqlite"


def _write(out: Path, result: Evaluation, setting: Setting, context: int, model: str, dense: str) -> None:
    if out.exists() and any(out.iterdir()) and not (out / RESULTS).is_file():
        raise OutputError(f"{out}: must be new, empty, or an evaluation of nmsparse, got something else. Choose --out.")
    try:
        with replacing(out) as staging:
            result.examples.to_parquet(staging / EXAMPLES)
            pd.DataFrame(map(asdict, result.compared)).to_csv(staging / TABLE, index=False)
            versions = {package: version(package) for package in ("nmsparse", "lm-eval", "torch", "onnxruntime")}
            results = Results(model, dense, setting, context, versions, result.recovery, result.f1, result.compared)
            write_json(staging / RESULTS, asdict(results))
    except OSError as error:
        raise OutputError(f"{out}: cannot be written: {error}. Choose another with --out.") from error


def _check(result: Evaluation, least: float | None) -> None:
    if least is None:
        return
    if result.recovery is None:
        raise EvaluationError("--min-recovery: a task must have an accuracy, got none. Add one to --tasks.")
    if result.recovery < least:
        raise RecoveryError(
            f"accuracy: sparse / dense must be at least {least:g}, got {result.recovery:.3f}. "
            "Use a finer pattern or a larger budget."
        )
