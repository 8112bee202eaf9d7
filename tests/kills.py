"""Kill commands at random moments and look at what is left: `python tests/kills.py --count N [--seed S]`.

The modules are imported once, and each command runs in a fork: so the moments lie in the work, not in the imports.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True)
class Case:
    """A command line, what it writes, and a word that says what lies there."""

    command: list[str]
    writes: Path
    state: Callable[[Path], str]


def run(command: list[str], after: float | None = None, number: signal.Signals = signal.SIGKILL) -> float:
    """Run a command in a fork, or kill it after so many seconds; return how long it took."""
    start = time.monotonic()
    child = os.fork()
    if not child:
        from converter import cli

        sys.argv = ["nmsparse", *command]
        nothing = os.open(os.devnull, os.O_RDWR)
        for handle in (0, 1, 2):
            os.dup2(nothing, handle)
        code = 0
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            os._exit(code)
    if after is not None:
        time.sleep(after)
        os.kill(child, number)
    _, status = os.waitpid(child, 0)
    if after is None and status:
        raise AssertionError(f"{' '.join(command)}: status {status}")
    return time.monotonic() - start


def kill(cases: dict[str, Case], count: int, seed: int, watched: list[Path]) -> dict[str, int]:
    """Kill commands, in turn, `count` times; return how often what was left was absent, old or new.

    Raises:
        AssertionError: when anything else was left, or something hidden after the next run.
    """
    generator, found = random.Random(seed), {"absent": 0, "old": 0, "new": 0}
    lengths = {}
    for name, case in cases.items():
        lengths[name] = run(case.command)
        assert case.state(case.writes) not in {"", "broken"}, name
    for turn in range(count):
        name = [*cases][turn % len(cases)]
        case = cases[name]
        if turn // len(cases) % 2:
            shutil.rmtree(case.writes)
        old = case.state(case.writes)
        # As often in the last tenth, where things take their places, as in all that is before it.
        share = generator.choice([generator.random(), generator.uniform(0.9, 1.05)])
        moment, number = share * lengths[name], generator.choice(SIGNALS)
        run(case.command, moment, number)
        left = case.state(case.writes)
        where = f"{name} killed by {number.name} after {moment:.3f} s of {lengths[name]:.3f} (seed {seed}, turn {turn})"
        if left == "":
            assert old == "", f"{where}: nothing is left of what was there"
            found["absent"] += 1
        else:
            assert left != "broken", f"{where}: what is left is not whole"
            found["old" if left == old else "new"] += 1
        run(case.command)
        assert case.state(case.writes) not in {"", "broken"}, where
        hidden = [str(path) for folder in watched for path in folder.rglob(".nmsparse-*")]
        assert not hidden, f"{where}: left behind {hidden}"
    return found


def cases(checkpoint: Path, data: Path, work: Path) -> dict[str, Case]:
    """Return the commands that write, on a tiny checkpoint; what they start from is made."""
    # Once, before the forks: what is imported, and what the first trace and the first evaluation make.
    import torch

    import converter.build
    import converter.evaluate
    import converter.pipeline  # noqa: F401
    from converter.checkpoint import open_checkpoint
    from converter.delivery.manifest import check_files
    from converter.errors import OutputError
    from converter.evaluation.tasks import load_tasks
    from converter.graph.trace import trace
    from converter.records import Setting
    from converter.signature import Form

    opened = open_checkpoint(str(checkpoint))
    trace(opened.skeleton(), {}, Form("float32", "none", False), torch.float32, opened.blank())
    load_tasks(Setting(("piqa", "boolq")), data)

    def folder(place: Path) -> str:
        if not place.exists():
            return ""
        try:
            check_files(place)
        except OutputError:
            return "broken"
        return str((place / "manifest.json").stat().st_ino)

    def evaluation(place: Path) -> str:
        if not place.exists():
            return ""
        try:
            json.loads((place / "results.json").read_text())
        except (OSError, ValueError):
            return "broken"
        whole = {path.name for path in place.iterdir()} == {"results.json", "compared.csv", "examples.parquet"}
        return str((place / "results.json").stat().st_ino) if whole else "broken"

    quick = ["--pattern", "8:16", "--criterion", "magnitude", "--mitigation", "none"]
    half, dense = work / "half", work / "single"
    run(["convert", str(checkpoint), str(half), *quick, "--dtype", "float16"])
    run(["convert", str(checkpoint), str(dense), *quick])
    asked = ["--data-dir", str(data), "--tasks", "piqa,boolq", "--context", "128"]
    return {
        "convert": Case(["convert", str(checkpoint), str(work / "converted"), *quick], work / "converted", folder),
        "export": Case(["export", str(dense), str(work / "exported")], work / "exported", folder),
        "build": Case(["build", str(half), "--runtime", "tensorrt"], half / "engines" / "tensorrt", folder),
        "evaluate": Case(["evaluate", str(dense), *asked], dense / "evaluation", evaluation),
    }


def main() -> None:
    """Kill as often as is asked."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seed", type=int, default=random.randrange(2**31))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        os.environ |= {"HF_HOME": str(work / "home"), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        import torch
        from conftest import make_tiny, write_data

        torch.set_num_threads(1)
        made = cases(make_tiny(work / "checkpoint"), write_data(work / "data"), work)
        print(json.dumps({"seed": given.seed, "kills": given.count}), flush=True)
        print(json.dumps(kill(made, given.count, given.seed, [work])))


if __name__ == "__main__":
    main()
