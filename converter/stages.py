"""Stages: what each costs in time and memory, and how far it is, for people and for report.json."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from converter import interrupt
from converter.records import StageCost

Advance = Callable[[int, int], None]


@dataclass
class Stages:
    """The stages of one run, in order; progress goes to stderr, so that stdout stays for results."""

    console: Console = field(default_factory=lambda: Console(stderr=True, emoji=False))
    costs: list[StageCost] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str, unit: str = "") -> Iterator[Advance]:
        """Time the block under `name`, and give it a function that moves its progress bar."""
        forget_peak()
        start = time.perf_counter()
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(name, total=None)

            def advance(done: int, total: int) -> None:
                interrupt.check()
                progress.update(task, completed=done, total=total)

            yield advance
        cuda = _cuda()
        gpu_peak = cuda.max_memory_allocated() if cuda else 0
        cost = StageCost(name, time.perf_counter() - start, peak_bytes(), gpu_peak)
        self.costs.append(cost)
        on_gpu = f", {gpu_peak / 1e9:.2f} GB on the GPU" if gpu_peak else ""
        self.console.print(f"[green]✓[/] {name}: {cost.seconds:.1f} s, peak {cost.peak_bytes / 1e9:.2f} GB{on_gpu}")


def peak_bytes() -> int:
    """Return the largest resident memory of this process, in bytes, since the last stage began (Linux) or ever."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def _cuda() -> Any:
    """Return torch.cuda where it is in use; a stage without torch does not wait for its import."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def forget_peak() -> None:
    """Let the peaks count from now on, where the system can."""
    if cuda := _cuda():
        cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux, or not allowed: the peak is then that of the whole run so far
        return
