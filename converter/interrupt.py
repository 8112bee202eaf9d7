"""Ctrl-C and SIGTERM: an interruption that a library swallows still ends the command before OUT takes its place."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any

_asked = threading.Event()  # signals are the process's, and so is this


def install() -> None:
    """Raise KeyboardInterrupt at SIGINT and SIGTERM, unless whoever started the process has it ignore them."""
    _asked.clear()
    sys.unraisablehook = _unraisable
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)


def check() -> None:
    """Raise the interruption again that came since `install`; a bare `except` in a library may have taken it.

    Raises:
        KeyboardInterrupt: when there was one.
    """
    if _asked.is_set():
        raise KeyboardInterrupt


def _unraisable(about: Any) -> None:
    """Say nothing of an interruption that came where Python can raise none, such as in a `__del__`: `check` has it."""
    if not issubclass(about.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(about)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    _asked.set()
    raise KeyboardInterrupt
