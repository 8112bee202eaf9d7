"""Polygraphy without its log."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator

from polygraphy.logger import G_LOGGER


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep polygraphy from writing to the terminal within the block."""
    severity = G_LOGGER.module_severity
    G_LOGGER.module_severity = G_LOGGER.CRITICAL
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        G_LOGGER.module_severity = severity
