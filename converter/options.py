"""Options that go together, as the command line takes them and a stage reads them; an option not given is None or off.

A field `allow_host_code` is the option `--allow-host-code`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter, validators
from cyclopts.types import NonNegativeInt, PositiveInt

Seed = Annotated[int, Parameter(validator=validators.Number(gte=0, lt=2**32), help="Seed of every random choice.")]
Share = Annotated[float, Parameter(validator=validators.Number(gt=0, lte=10))]


@dataclass(frozen=True, kw_only=True)
class ParityOptions:
    """What ONNX Runtime is compared on.

    Attributes:
        text: The text to compare on: a file, hub:NAME, or python (the default). An engine's is fixed when it is built.
        model: Where the checkpoint is now, if it has moved.
    """

    text: str | None = None
    model: str | None = None


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Which engine of OUT is run, and what it may bring.

    Attributes:
        target: With tensorrt-rtx: the compute capabilities of the engine to use, if OUT has several engines.
        plugin: With tensorrt: the library of the plugin.
        allow_host_code: Allow the engine to run its own code on this CPU. Use it only with engines that you built.
    """

    target: str | None = None
    plugin: Path | None = None
    allow_host_code: bool = False


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How an engine is built.

    Attributes:
        target: Comma-separated compute capabilities, such as sm_89,sm_120. With tensorrt-rtx: one engine for all of
            them. With tensorrt: the one whose rows of the dispatch table apply.
        profile: Shapes to tune for, such as batch=1,tokens=1:128:512,past=0:256:1023 (MIN:OPT:MAX); may be repeated.
            By default one for decoding and one for prefill, each for one sequence of up to 2048 tokens.
        workspace_mib: Limit on the scratch memory of a layer on the GPU, in MiB; the runtime decides by default.
        dispatch: With tensorrt: a table of paths written by nmsparse bench --tune, in place of the one shipped.
        plugin: With tensorrt: the library of the plugin; with it the engine is built here.
        version_compatible: With tensorrt: make the engine loadable by later versions of TensorRT.
        hardware_compatible: With tensorrt: make the engine run on every GPU since Ampere.
        embed_plugin: With tensorrt and --plugin: store the library inside the engine.
    """

    target: str | None = None
    profile: list[str] | None = None
    workspace_mib: int | None = None
    dispatch: Path | None = None
    plugin: Path | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    embed_plugin: bool = False

    def workspace(self) -> int | None:
        """Return the most scratch memory of a layer in bytes, where it is bounded."""
        return None if self.workspace_mib is None else self.workspace_mib << 20


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """What OUT and its checkpoint are asked.

    Attributes:
        tasks: Comma-separated names of lm-eval tasks, or an empty text for none; by default piqa, arc_easy, boolq,
            winogrande and wikitext.
        images: For an image classifier, instead of tasks: a folder with one subfolder of images for each class, or
            hub:NAME[:CONFIG[:SPLIT]].
        limit: Use only the first so many examples of each task; all by default.
        shots: Solved examples in each prompt; by default the number that the task sets.
        chat: Put the prompts into the model's chat template.
        prompts: Let both models continue so many prompts, 64 tokens of --text each, and measure how much agrees.
        text: Where the prompts come from, as for nmsparse perplexity.
    """

    tasks: str | None = None
    images: str | None = None
    limit: PositiveInt | None = None
    shots: int | None = None
    chat: bool = False
    prompts: NonNegativeInt = 0
    text: str = "python"
    seed: Seed = 0


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """What OUT is held against, how it is asked, and where the results go.

    Attributes:
        against: Where the dense checkpoint is now, if it has moved since OUT was made.
        data_dir: A folder with the tasks' data, such as piqa/valid.jsonl; by default the data come from the Hub.
        context: Limit on the tokens in a sequence, and the window in which perplexity is measured.
        batch: Sequences in one call of the model.
        min_recovery: Exit with code 19 if sparse / dense accuracy, averaged over the tasks, is below this.
        out: Where to write the results of each example and the comparison. By default OUT/evaluation; results of a
            checkpoint are not written by default.
    """

    against: str | None = None
    data_dir: Path | None = None
    context: PositiveInt = 2048
    batch: PositiveInt = 8
    min_recovery: Share | None = None
    out: Path | None = None


def named(*groups: Any) -> dict[str, Any]:
    """Return the options of some groups by their names on the command line; one that is off has None."""
    values = {field.name: getattr(group, field.name) for group in groups for field in fields(group)}
    return {"--" + name.replace("_", "-"): None if value is False else value for name, value in values.items()}
