"""What can go wrong for a user: each class has an exit code of its own and is shown without a traceback."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

Value = TypeVar("Value")


class ConverterError(Exception):
    """A mistake that the user can mend; the message says where, what and how."""

    exit_code = 1


class RecipeError(ConverterError):
    """The recipe asks for something that does not exist or cannot be."""

    exit_code = 10


class CheckpointError(ConverterError):
    """The model cannot be read, or is not one that can be converted."""

    exit_code = 11


class CalibrationError(ConverterError):
    """The calibration text or the statistics taken from it cannot be used."""

    exit_code = 12


class ExportError(ConverterError):
    """The model cannot be written as an ONNX graph."""

    exit_code = 13


class ValidationError(ConverterError):
    """ONNX Runtime and PyTorch differ by more than the limits allow."""

    exit_code = 14


class OutputError(ConverterError):
    """OUT cannot be written, or is not one of ours."""

    exit_code = 15


class BuildError(ConverterError):
    """An engine cannot be built from OUT."""

    exit_code = 16


class DeviceError(ConverterError):
    """What is asked for needs a GPU, and none is here."""

    exit_code = 17


class EvaluationError(ConverterError):
    """A task cannot be run: it is unknown, its data are not there, or its examples do not fit."""

    exit_code = 18


class RecoveryError(ConverterError):
    """The sparse model keeps less of the dense one's accuracy than was asked for."""

    exit_code = 19


class UsageError(ConverterError):
    """The command line asks for what cannot be asked for together, or for a number that means nothing."""

    exit_code = 2


LONGEST = 300  # characters of what somebody else wrote, in a message of ours


def said(error: BaseException | str) -> str:
    """Return the kind of an error of somebody else's and the first line that it says, cut where it is long."""
    if isinstance(error, str):
        return shortened(error)
    first = (str(error).strip().splitlines() or [""])[0]
    return shortened(f"{type(error).__name__}: {first}" if first else type(error).__name__)


def shortened(text: str) -> str:
    """Return the text, its middle left out where it is long."""
    half = LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[:half]} ... {text[-half:]}"


def lookup(table: Mapping[str, Value], what: str, name: str, error: type[ConverterError]) -> Value:
    """Return `table[name]`.

    Raises:
        ConverterError: of class `error`, listing what there is, when `name` is not in the table.
    """
    if name not in table:
        raise error(f"unknown {what} {shortened(repr(name))}; available: {listing(table)}.")
    return table[name]


def listing(names: Iterable[str]) -> str:
    """Return the sorted names, separated by commas, for a message."""
    return ", ".join(sorted(names))
