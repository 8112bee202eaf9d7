"""The command `nmsparse`: one subcommand a stage, and `convert` for all. It parses, calls and prints."""

from __future__ import annotations

import io
import json
import os
import sys
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, TypeAlias

from cyclopts import App, CycloptsError, Parameter, validators
from cyclopts.types import NonNegativeInt, PositiveInt
from rich.console import Console

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TORCH_LOGS", "-all")
os.environ.setdefault("TQDM_DISABLE", "1")  # lm-eval's bars: the progress is ours

from converter import interrupt, json_rows, registry, show
from converter.errors import CheckpointError, ConverterError, EvaluationError, OutputError, UsageError, said, shortened
from converter.names import Dtype, Phases, Weights
from converter.options import BuildOptions, EngineOptions, EvaluationOptions, ParityOptions, Seed, TaskOptions, named
from converter.place import encodable, is_utf8
from converter.stages import Stages

if TYPE_CHECKING:
    from converter.recipe import Recipe
    from converter.records import Report

app = App(
    name="nmsparse",
    help="Convert language models, encoders and image models to ONNX with N:M activation sparsity.\n\n"
    "--debug prints the traceback of an unexpected error.",
    version=lambda: version("nmsparse"),
    version_flags=["--version"],
    suppress_keyboard_interrupt=False,
    default_parameter=Parameter(negative=()),
)
USAGE, UNFORESEEN, INTERRUPTED, CLOSED = 2, 70, 130, 141
DEBUG = "--debug"
LONGEST = 4000  # characters of an error
PLUGIN = Path("build/plugins/libnmsparse_tensorrt.so")
Device = Annotated[
    Literal["cpu", "cuda"], Parameter(help="Where to calibrate: on the CPU, or on a GPU that PyTorch can use.")
]


Json = Annotated[bool, Parameter(name="--json", help="Print the result as JSON.")]
DtypeOption = Annotated[Dtype | None, Parameter(help="The data type that the graph computes in (default float32).")]
WeightsOption = Annotated[
    Weights | None, Parameter(help="How weights are stored; narrower than --dtype only with float32 (default dtype).")
]
Revision = Annotated[str | None, Parameter(help="A branch, tag or commit of MODEL on the Hub.")]
Threads = Annotated[int, Parameter(validator=validators.Number(gte=1, lte=1024))]
Seconds = Annotated[float, Parameter(validator=validators.Number(gt=0, lte=3600))]
EmbedKernel = Annotated[
    bool, Parameter(help="Copy the CPU kernel's library into OUT, so that onnxruntime-genai loads it by itself.")
]
Group = Parameter(name="*")  # of options that are each an option of its own on the command line
if TYPE_CHECKING:
    Validated: TypeAlias = str
    Built: TypeAlias = str
    Evaluated: TypeAlias = str
else:  # the choices that are offered
    Validated, Built, Evaluated = (Literal[registry.names(use)] for use in ("validate", "build", "evaluate"))


@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """The recipe on the command line; what is not given comes from --recipe, else from the defaults."""

    pattern: Annotated[
        str | None,
        Parameter(help="What every layer keeps: N:M, K or P% of a token's channels (default: 8:16 on average)."),
    ] = None
    criterion: Annotated[
        str | None,
        Parameter(help="How channels are ranked: magnitude, clact, amber, amber_trimmed, wina or weight_variance."),
    ] = None
    mitigation: Annotated[
        str | None, Parameter(help="none, or methods joined by +, such as permute+var; see docs/reference/recipe.md.")
    ] = None
    calibration: Annotated[
        str | None, Parameter(help="The calibration text: self, python, a text file, or hub:NAME[:CONFIG[:SPLIT]].")
    ] = None
    calibration_tokens: Annotated[int | None, Parameter(help="How many tokens of the calibration text to use.")] = None
    phases: Annotated[Phases | None, Parameter(help="In which phases the layers are sparse (default both).")] = None
    dtype: DtypeOption = None
    weights: WeightsOption = None
    targets: Annotated[str | None, Parameter(help="Comma-separated name patterns of the layers to make sparse.")] = None
    ignore: Annotated[str | None, Parameter(help="Comma-separated name patterns of the layers to leave dense.")] = None
    seed: Seed | None = None
    recipe: Annotated[Path | None, Parameter(help="A recipe file in YAML.")] = None
    set: Annotated[
        list[str] | None, Parameter(help="A setting of the recipe as KEY=VALUE, such as s_pts=scalar; may be repeated.")
    ] = None

    def effective(self) -> Recipe:
        """Return the recipe: defaults, then the file, then --set, then the other options."""
        from converter.recipe import Recipe, from_yaml, parse_set

        recipe = from_yaml(self.recipe) if self.recipe else Recipe()
        given: dict[str, Any] = {
            "pattern": self.pattern,
            "criterion": self.criterion,
            "mitigation": self.mitigation,
            "calibration.source": self.calibration,
            "calibration.tokens": self.calibration_tokens,
            "phases": self.phases,
            "dtype": self.dtype,
            "weights": self.weights,
            "targets": self.targets,
            "ignore": self.ignore,
            "seed": self.seed,
        }
        options = {key: value for key, value in given.items() if value is not None}
        return recipe.replace({**parse_set(self.set or []), **options}, "command line")


@app.command
def convert(
    model: str,
    out: Path,
    /,
    options: Annotated[RecipeOptions | None, Group] = None,
    *,
    model_revision: Revision = None,
    device: Device = "cpu",
    dry_run: Annotated[bool, Parameter(help="Print the plan of every layer and write nothing.")] = False,
    embed_kernel: EmbedKernel = False,
    json_output: Json = False,
) -> None:
    """Convert MODEL (a Hub id, a folder with safetensors, or a GGUF file) to the folder OUT."""
    recipe = (options or RecipeOptions()).effective()
    if dry_run:
        _show_plan(model, model_revision, recipe, json_output)
        return
    from converter.pipeline import run

    report = run(model, out, recipe, model_revision, device, Stages(), embed_kernel=embed_kernel)
    _show_report(out, report, json_output)


@app.command
def calibrate(
    model: str,
    out: Path,
    /,
    options: Annotated[RecipeOptions | None, Group] = None,
    *,
    model_revision: Revision = None,
    device: Device = "cpu",
) -> None:
    """Fit the recipe to MODEL and write the calibration and the recipe to the folder OUT, for `nmsparse export`."""
    recipe = (options or RecipeOptions()).effective()
    from converter.pipeline import calibrate as stage

    stage(model, out, recipe, model_revision, device, Stages())
    print(out)
    _next(f"nmsparse export {out} OUT")


@app.command
def export(
    calibrated: Path,
    out: Path,
    /,
    *,
    dtype: DtypeOption = None,
    weights: WeightsOption = None,
    embed_kernel: EmbedKernel = False,
    json_output: Json = False,
) -> None:
    """Write OUT from a folder written by `nmsparse calibrate` or `nmsparse convert`."""
    from converter.pipeline import export as stage

    changes = {key: value for key, value in (("dtype", dtype), ("weights", weights)) if value is not None}
    _show_report(out, stage(calibrated, out, changes, Stages(), embed_kernel=embed_kernel), json_output)


@app.command
def validate(
    out: Path,
    /,
    *,
    parity: Annotated[ParityOptions | None, Group] = None,
    runtime: Validated = "onnxruntime",
    engine: Annotated[EngineOptions | None, Group] = None,
    json_output: Json = False,
) -> None:
    """Compare OUT in ONNX Runtime with its checkpoint in PyTorch, or an engine of OUT with ONNX Runtime.

    Exit code 14 means that they differ too much; 17, that an engine could not run because there is no GPU.

    Parameters
    ----------
    runtime
        What runs OUT: ONNX Runtime, or an engine built by `nmsparse build`.
    """
    given, run = parity or ParityOptions(), engine or EngineOptions()
    _refuse_others(f"with --runtime {runtime}", named(given, run), registry.own(runtime, "validate"))
    if registry.builds(runtime):
        from converter.build import validate_engine

        about = validate_engine(out, runtime, run, Stages())
        print(json.dumps(about, indent=2) if json_output else f"{runtime} agrees with ONNX Runtime")
        return
    from converter.pipeline import validate as stage

    result = stage(out, given.model, given.text, Stages())
    if json_output:
        print(
            json.dumps(
                asdict(result.summary()) | {"parity_layers": [asdict(layer) for layer in result.layers]}, indent=2
            )
        )
    else:
        show.parity(result.summary())


@app.command
def build(
    out: Path,
    /,
    *,
    runtime: Built = "tensorrt-rtx",
    options: Annotated[BuildOptions | None, Group] = None,
    json_output: Json = False,
) -> None:
    """Build an engine of OUT: for TensorRT-RTX on any machine, for TensorRT with our plugin on one with a GPU.

    An engine for TensorRT-RTX contains no plugin and computes the sparse model with dense GEMMs. For TensorRT, the
    graph with plugin nodes and a script that builds it with polygraphy are written; with --plugin, the engine too.
    """
    given = options or BuildOptions()
    _refuse_others(f"with --runtime {runtime}", named(given), registry.own(runtime, "build"))
    from converter.build import build as stage

    report = stage(out, runtime, given, Stages())
    if json_output:
        print(json.dumps(report.to_json(), indent=2))
        return
    console = Console(emoji=False)
    for profile in report.profiles:
        console.print(f"profile {profile}")
    console.print(report.written.said)


@app.command
def bench(
    out: Path,
    /,
    *,
    threads: list[Threads] | None = None,
    prefill: list[PositiveInt] | None = None,
    seconds: Seconds | None = None,
    tune: Path | None = None,
    plugin: Path | None = None,
    json_file: Annotated[Path | None, Parameter(name="--json")] = None,
) -> None:
    """Measure the speed of OUT on this machine's CPU beside the same model run dense, both in ONNX Runtime.

    With --tune, measure the layers of OUT on the GPU instead, beside PyTorch's dense product.

    Parameters
    ----------
    threads
        Number of ONNX Runtime's threads; may be repeated. By default 1, then as many as there are cores.
    prefill
        Number of tokens in a prompt; may be repeated. By default 128, then 512.
    seconds
        Duration of each measurement, 10 by default; there are at least five rounds.
    tune
        Where to write the table of paths, for nmsparse build --dispatch.
    plugin
        With --tune: the library of the TensorRT plugin.
    json_file
        Where to write the results: rows of name, value, unit, goal and met; without --tune also call, threads and what.
    """
    from converter import bench as stage

    ours, theirs = {"--threads": threads, "--prefill": prefill, "--seconds": seconds}, {"--plugin": plugin}
    if tune is None:
        _refuse_others("without --tune", theirs, ())
        how, times = stage.speed(out, threads, prefill, seconds, Stages())
        show.speed(how, times)
        rows = stage.speed_rows(times)
    else:
        _refuse_others("with --tune", ours, ())
        timings = stage.tune(out, plugin or PLUGIN, tune, Stages())
        show.timings(timings)
        rows = stage.tune_rows(timings)
    json_rows.write(json_file, rows)


@app.command
def inspect(
    out: Path,
    /,
    *,
    target: str | None = None,
    dispatch: Path | None = None,
    json_output: Json = False,
) -> None:
    """List the sparse layers of OUT: shapes, patterns, the dense and sparse cost of a token, and paths on TensorRT.

    The sparse figures hold for a kernel that reads only the weights that a token uses. The ONNX function body, which
    runs where there is no kernel, reads all of them. Layers of one name and shape share a row, except with --json.

    Parameters
    ----------
    target
        The compute capability to show the paths for, such as sm_89.
    dispatch
        A table of paths written by nmsparse bench --tune; by default the one shipped with nmsparse.
    """
    from converter.delivery.inspect import inspect as stage

    layers = stage(out, dispatch, target)
    if json_output:
        print(json.dumps([asdict(cost) | {"paths": paths} for cost, paths in layers], indent=2))
        return
    show.layers(layers)


@app.command
def report(
    out: Path,
    /,
    *,
    bench: Annotated[Path | None, Parameter(help="A file written by nmsparse bench OUT --json.")] = None,
    to: Annotated[Path | None, Parameter(help="Where to write the page; by default OUT/report.html.")] = None,
) -> None:
    """Write one HTML page about OUT, readable offline: verdict, accuracy, layers, parity, training, speed, recipe."""
    from converter.delivery import report as stage

    rows = json_rows.read_speed(bench) if bench else []
    _write_page(to or out / "report.html", stage.report(stage.read(out), rows))


@app.command
def compare(
    outs: Annotated[list[Path], Parameter(help="Two or more OUTs.")],
    /,
    *,
    to: Annotated[Path, Parameter(help="Where to write the page.")] = Path("comparison.html"),
) -> None:
    """Write one HTML page that compares several OUTs side by side."""
    from converter.delivery import report as stage

    _write_page(to, stage.compare([stage.read(out) for out in outs]))


@app.command
def doctor(*folders: Path, plugin: Path = PLUGIN, json_output: Json = False) -> None:
    """Report what works on this machine and how to get the rest; remove what killed runs left behind.

    Parameters
    ----------
    folders
        Folders in which OUTs were written; by default the working folder.
    plugin
        The library of the TensorRT plugin.
    """
    from converter.doctor import examine

    findings = examine(plugin, folders)
    if json_output:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
        return
    show.findings(findings)


@app.command
def genai_overlay() -> None:
    """Print JSON for Config.overlay that makes onnxruntime-genai load the CPU kernel installed here."""
    from converter.runtimes.genai import overlay

    print(overlay())


@app.command
def generate(
    model: str,
    prompt: str,
    /,
    *,
    max_new_tokens: Annotated[PositiveInt, Parameter(help="Limit on the number of tokens to generate.")] = 128,
    chat: Annotated[bool, Parameter(negative="--no-chat")] = True,
    sample: bool = False,
    seed: Seed = 0,
) -> None:
    """Continue PROMPT with OUT (in ONNX Runtime) or a checkpoint (dense, in PyTorch), printing text as it is generated.

    Parameters
    ----------
    chat
        Put the prompt into the model's chat template, if it has one.
    sample
        Sample by the model's generation config; otherwise the most likely token is taken each time.
    """
    import torch
    from transformers import TextStreamer

    from converter.kinds import positions
    from converter.pipeline import load_decoder
    from converter.sources.texts import check_ids

    if not prompt or not is_utf8(prompt):
        raise UsageError(f"PROMPT: must have text, got {shortened(ascii(prompt)) if prompt else 'none'}. Give some.")
    loaded, tokenizer = load_decoder(model, "generate")
    try:
        if chat and tokenizer.chat_template:
            messages = [{"role": "user", "content": prompt}]
            inputs: Any = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            inputs = tokenizer(prompt, return_tensors="pt")
        ids = inputs["input_ids"]
    except Exception as error:  # a template may do anything, and a tokenizer say anything to it
        raise CheckpointError(
            f"{model}: must make tokens of the prompt, got {said(error)}. Try --no-chat, or mend its tokenizer."
        ) from error
    length, most = ids.shape[1], positions(loaded.config)
    if not length:
        raise UsageError(f"PROMPT: must have tokens, got none of {shortened(repr(prompt))}. Give another.")
    if most is not None and length + max_new_tokens > most:
        raise UsageError(
            f"--max-new-tokens: must be at most {max(most - length, 0)} after a prompt of {length} tokens, got "
            f"{max_new_tokens}: the model takes {most} in all. Give less, or a shorter prompt."
        )
    check_ids(ids, loaded.config)
    torch.manual_seed(seed)
    try:
        loaded.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=sample,
            num_beams=1,  # as text comes there is one
            num_return_sequences=1,
            tokenizer=tokenizer,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
    except (ValueError, TypeError, AttributeError, LookupError, RuntimeError) as error:
        raise CheckpointError(
            f"{model}: must write by its generation_config.json, got {said(error)}. Mend it, or leave it out."
        ) from error


@app.command
def perplexity(
    model: str,
    /,
    *,
    text: str = "python",
    context: PositiveInt = 512,
    tokens: NonNegativeInt = 0,
    bos: bool = False,
    field: Annotated[
        str, Parameter(help="The field of a .jsonl, .parquet or Hub data set that holds the text.")
    ] = "text",
    json_output: Json = False,
) -> None:
    """Measure the perplexity of OUT (in ONNX Runtime) or a checkpoint (dense, in PyTorch) on a text.

    Parameters
    ----------
    text
        A file, hub:NAME[:CONFIG[:SPLIT]], or python: the language reference that comes with every Python.
    context
        Number of tokens in a window; windows do not overlap.
    tokens
        Number of tokens of the text to use, in whole windows; 0 means all.
    bos
        Begin each window with the beginning-of-text token, which some models expect.
    """
    from converter.evaluation.perplexity import perplexity as measure
    from converter.kinds import positions
    from converter.pipeline import load_decoder
    from converter.sources.texts import check_ids, windows

    if context < 2:
        raise UsageError("--context: must be at least 2, got 1: the first token of a window is not predicted.")
    if 0 < tokens < context:
        raise UsageError(f"--tokens: must be 0, or at least one window of {context}, got {tokens}. Lower --context.")
    loaded, tokenizer = load_decoder(model, "perplexity")
    most = positions(loaded.config)
    if most is not None and context > most:
        raise UsageError(f"--context: must be at most {most}, what the model takes, got {context}. Give less.")
    if bos and tokenizer.bos_token_id is None:
        raise UsageError("--bos: the tokenizer must have a token that begins a text, got none. Leave it out.")
    begin = [int(tokenizer.bos_token_id)] if bos else []
    ids = windows(text, tokenizer, tokens // context, context, field, begin=begin)
    check_ids(ids, loaded.config)
    with Stages().stage("perplexity", "windows") as advance:
        measured = measure(loaded, ids, advance)
    if json_output:
        print(json.dumps(asdict(measured)))
    else:
        print(
            f"perplexity {measured.perplexity:.3f} on {measured.tokens} tokens of {text} (context {measured.context})"
        )


def _write_page(to: Path, page: str) -> None:
    from converter.place import write_whole

    try:
        write_whole(to, lambda beside: beside.write_text(page, "utf-8"))
    except OSError as error:
        raise OutputError(
            f"{to}: must be a file that can be written, got {error}. Choose another with --to."
        ) from error
    print(to)


@app.command
def evaluate(
    model: str,
    /,
    *,
    asked: Annotated[TaskOptions | None, Group] = None,
    runtime: Evaluated = "onnxruntime",
    engine: Annotated[EngineOptions | None, Group] = None,
    options: Annotated[EvaluationOptions | None, Group] = None,
    json_output: Json = False,
) -> None:
    """Measure lm-evaluation-harness tasks on OUT beside its dense checkpoint in PyTorch.

    Given a checkpoint, measure it alone. Answers are cached beside the Hub's files: an interrupted evaluation resumes,
    and a dense model is asked only once, however many OUTs were made of it.

    Parameters
    ----------
    runtime
        What runs OUT: ONNX Runtime; PyTorch, whose sparse model is the reference of validate; or, on a machine with a
        GPU, an engine built by `nmsparse build`.
    """
    wanted, run = asked or TaskOptions(), engine or EngineOptions()
    _refuse_others(f"with --runtime {runtime}", named(run), registry.own(runtime, "evaluate"))
    try:
        from converter import evaluate as stage
        from converter.evaluation.tasks import setting
    except ModuleNotFoundError as error:
        raise EvaluationError(
            f"nmsparse evaluate: needs the package {error.name}, got none. pip install 'nmsparse[evaluate]'."
        ) from error
    evaluation = stage.evaluate(model, setting(wanted, runtime), options or EvaluationOptions(), run, Stages())
    if json_output:
        about = {
            "recovery": evaluation.recovery,
            "f1": evaluation.f1,
            "compared": [asdict(one) for one in evaluation.compared],
        }
        print(json.dumps(about, indent=2))
    else:
        show.evaluation(evaluation)


def _refuse_others(use: str, options: dict[str, Any], own: Iterable[str]) -> None:
    """Refuse an option that is given but is not one of a use's `own`."""
    for name, value in options.items():
        if value is not None and name not in own:
            raise UsageError(f"{name}: must not be given {use}, got {value}. Leave it out.")


def _show_plan(model: str, revision: str | None, recipe: Recipe, json_output: bool) -> None:
    from converter.pipeline import begun

    checkpoint, recipe, layer_plan = begun(model, recipe, revision, "cpu", Stages(), dry=True)
    layers, left_out = layer_plan.layers, checkpoint.left_out
    if json_output:
        about = {"recipe": recipe.model_dump(mode="json"), "layers": [asdict(layer) for layer in layers]}
        print(json.dumps({**about, "left_out": left_out}))
        return
    show.plan(layers)
    print(recipe.to_yaml())


def _show_report(out: Path, report: Report, json_output: bool) -> None:
    if json_output:
        print(json.dumps(asdict(report), indent=2))
        return
    from converter.delivery.manifest import GENAI

    show.report(report)
    print(out)
    writes = (out / GENAI).is_file()
    _next(f'nmsparse generate {out} "Why is the sky blue?"' if writes else f"nmsparse report {out}")


def _next(command: str) -> None:
    """Say on stderr which command follows; stdout stays for results."""
    Console(stderr=True, emoji=False, highlight=False, soft_wrap=True).print(f"next: {command}", markup=False)


def main() -> None:
    """Run the command line: an error is one line and an exit code; --debug adds the traceback of an unexpected one."""
    interrupt.install()
    warnings.simplefilter("ignore")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            plain = stream is sys.stderr or stream.encoding.lower().replace("-", "") != "utf8"
            # The name of a folder need not be UTF-8, and a terminal not know every letter.
            stream.reconfigure(errors="backslashreplace" if plain else "surrogateescape")
    arguments = sys.argv[1:]
    for number, text in enumerate(arguments):
        if not is_utf8(text) and os.path.exists(text):
            arguments[number] = str(encodable(Path(text)))
    debug = DEBUG in arguments
    if debug:
        arguments.remove(DEBUG)
    errors = Console(stderr=True, soft_wrap=True, highlight=False, emoji=False)

    def fail(name: str, what: str, code: int) -> NoReturn:
        errors.print(f"[red]error:[/] {name}:", end=" ")
        errors.print(what if len(what) <= LONGEST else f"{what[:LONGEST]} ...", markup=False)
        sys.exit(code)

    try:
        app(arguments, exit_on_error=False, print_error=False)
        sys.stdout.flush()
    except CycloptsError as error:
        fail("UsageError", shortened(" ".join(str(error).split())), USAGE)
    except ConverterError as error:
        fail(type(error).__name__, str(error), error.exit_code)
    except KeyboardInterrupt:
        errors.print("Interrupted; OUT was left unchanged.")
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python tries once more at its end
        sys.exit(CLOSED)
    except (SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of a library in Rust is no Exception
        if debug:
            raise
        if isinstance(error, OSError):
            fail("OutputError", f"{said(error)}. Free some space, or give another folder.", OutputError.exit_code)
        fail("unforeseen", f"{said(error)}. Run it again with {DEBUG} to see where, and report it.", UNFORESEEN)
