"""Options that go together, as the command line takes them and a stage reads them; an option not given is None or off.

A field `allow_host_code` is the option `--allow-host-code`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter, validators
from cyclopts.types import NonNegativeInt, PositiveInt

Seed = Annotated[int, Parameter(validator=validators.Number(gte=0, lt=2**32), help="seed of every random choice")]
Share = Annotated[float, Parameter(validator=validators.Number(gt=0, lte=10))]


@dataclass(frozen=True, kw_only=True)
class ParityOptions:
    """What ONNX Runtime is compared on.

    Attributes:
        text: The text to compare on: a file, hub:NAME, or python (default). Of an engine it is fixed when it is built.
        model: Where the checkpoint is now, when it has moved.
    """

    text: str | None = None
    model: str | None = None


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Which engine of OUT is run, and what it may bring.

    Attributes:
        target: With tensorrt-rtx: the compute capabilities of the engine, where OUT has several.
        plugin: With tensorrt: the plugin's library.
        allow_host_code: let the engine bring code for this CPU: only one that you have built yourself
    """

    target: str | None = None
    plugin: Path | None = None
    allow_host_code: bool = False


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How an engine is built.

    Attributes:
        target: Comma-separated compute capabilities, such as sm_89,sm_120. With tensorrt-rtx: one engine for all of
            them. With tensorrt: the one whose rows of the dispatch table are used.
        profile: Shapes to tune for, such as batch=1,tokens=1:128:512,past=0:256:1023 (MIN:OPT:MAX); may be repeated.
            By default one for decoding and one for prefill, of one sequence of up to 2048 tokens.
        workspace_mib: The most scratch memory of a layer on the GPU, in MiB; by default the runtime's own choice.
        dispatch: With tensorrt: the table of paths that nmsparse bench --tune writes; by default nmsparse's own.
        plugin: With tensorrt: the plugin's library, to build the engine here.
        version_compatible: With tensorrt: the engine also loads in later versions of TensorRT.
        hardware_compatible: With tensorrt: the engine runs on every GPU from Ampere on.
        embed_plugin: With tensorrt and --plugin: the engine carries the library in it.
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
        tasks: Comma-separated names of lm-eval's tasks, which may be empty; by default piqa, arc_easy, boolq,
            winogrande and wikitext.
        images: For an image classifier, instead of tasks: a folder that has one folder of images for each class, or
            hub:NAME[:CONFIG[:SPLIT]].
        limit: How many examples of each task, the first ones; by default all.
        shots: Examples in each prompt; by default as many as the task says.
        chat: Put the prompts into the model's chat template.
        prompts: From how many prompts, 64 tokens of --text each, both models write on: how much of it is the same.
        text: Where these prompts come from, as for nmsparse perplexity.
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
        against: The dense checkpoint, where it is no longer where OUT was made from.
        data_dir: A folder with the data of the tasks, such as piqa/valid.jsonl; by default they come from the Hub.
        context: The most tokens in a sequence, and in a window of a perplexity.
        batch: Sequences in a call.
        min_recovery: Exit code 19 when sparse / dense accuracy, the mean over the tasks, is less.
        out: Where to write each example's results and the comparison; by default OUT/evaluation, of a checkpoint
            nowhere.
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
