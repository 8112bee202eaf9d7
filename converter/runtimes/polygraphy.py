"""`polygraphy run OUT/model.onnx --nmsparse-ort`: OUT in ONNX Runtime with our kernel, as one of polygraphy's runners.

Polygraphy finds it by the entry point `polygraphy.run.plugins`; its `--onnxrt` runs the function body of the op.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.logger import G_LOGGER
from polygraphy.tools.args import ModelArgs, OnnxLoadArgs
from polygraphy.tools.args.base import BaseRunnerArgs
from polygraphy.tools.script import Script, make_invocable

from converter.errors import ConverterError, ExportError
from converter.runtimes.kernel import VARIABLE, has_kernel, library
from converter.runtimes.onnxruntime import session


class KernelRunnerArgs(BaseRunnerArgs):  # type: ignore[misc]
    """nmsparse Inference: running inference with ONNX Runtime and nmsparse's kernel.

    Depends on:

        - ModelArgs
        - OnnxLoadArgs
    """

    def get_name_opt_impl(self) -> tuple[str, str]:
        """Return the runner's name and its option."""
        return "ONNX Runtime with nmsparse's kernel", "nmsparse-ort"

    def add_to_script_impl(self, script: Script) -> None:
        """Add the runner to what polygraphy runs.

        Raises:
            PolygraphyException: when the model is to be changed before it is run.
        """
        if self.arg_groups[OnnxLoadArgs].must_use_onnx_loader():
            G_LOGGER.critical("--nmsparse-ort: the model must be run as it is. Leave out the options that change it.")
        script.add_import(imports=["KernelRunner"], frm=__name__)
        script.add_runner(make_invocable("KernelRunner", self.arg_groups[ModelArgs].path))


class KernelRunner(OnnxrtRunner):  # type: ignore[misc]
    """Runs a graph of ours by our kernel, and by nothing else."""

    def __init__(self, path: str) -> None:
        """Keep the path of the model; it is loaded when the runner is activated."""
        super().__init__(lambda: _loaded(Path(path)), name="nmsparse-ort")


def argument_groups() -> list[BaseRunnerArgs]:
    """Return what `polygraphy run` gets from us."""
    return [KernelRunnerArgs()]


def kernel_session(path: Path) -> onnxruntime.InferenceSession:
    """Return a session of the model in which the op runs by our kernel.

    Raises:
        ExportError: when the kernel is not built or not for this model, or ONNX Runtime cannot run it.
    """
    if library() is None:
        raise ExportError(f"{path}: the op's library must be built, or named by {VARIABLE}, got none. Run make cpu-op.")
    model = onnx.load(path, load_external_data=False)
    if not has_kernel(model):
        raise ExportError(f"{path}: dtype must be float32, as of the op's kernel, got another. Use --onnxrt.")
    return session(model, path.parent)


def _loaded(path: Path) -> onnxruntime.InferenceSession:
    try:
        return kernel_session(path)
    except ConverterError as error:
        G_LOGGER.critical(str(error))  # raises polygraphy's own error, of which it shows no traceback
        raise
