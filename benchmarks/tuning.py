"""From how many tokens on the CPU kernel's panels pay on this machine, written into plugins/kernels/cpu/tuning.h.

    make cpu-op && python benchmarks/tuning.py --write && make cpu-op

The kernel multiplies several tokens in one of two ways: it holds the kept rows in registers as they come, or it packs
them into a panel first. A panel pays from t tokens on where t * (read * group - 6 * keep) >= cost * group, which
product.cpp computes. The kernel is built twice here, once for each way alone; the two take turns on layers of several
patterns and of every width of weights, and `cost` and `read` are those that put the crossing where it was measured,
by least squares. Where one way is faster for every number of tokens there is no crossing to learn from.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import record
from cpu import one_product, seconds, session
from cyclopts import App
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from converter.names import Weights

app = App(help_format="plaintext")
PLUGINS = Path(__file__).parents[1] / "plugins"
TUNING = Path("kernels/cpu/tuning.h")
# The field of `Tuning` for weights of a width, and the weights that are measured for it.
FIELDS: dict[str, Weights] = {"of_float": "dtype", "of_sixteen_bits": "bfloat16", "of_integers": "int8"}
CONSTANTS = r"Panels of_float\{\d+, \d+\}, of_sixteen_bits\{\d+, \d+\}, of_integers\{\d+, \d+\};"
MEASURED = re.compile(r"// Measured on .*? by benchmarks/\w+\.py;")
NEVER, ALWAYS = (10**9, 5), (0, 10**6)  # cost, read


def built(pair: tuple[int, int], folder: Path) -> Path:
    """Return the op's library with one pair of constants for every width, compiled in `folder`."""
    shutil.copytree(PLUGINS, folder / "plugins")
    header = folder / "plugins" / TUNING
    header.write_text(with_constants(header.read_text(), dict.fromkeys(FIELDS, pair)))
    build, root = folder / "build", PLUGINS.parent
    options = {
        "ONNXRUNTIME_INCLUDE_DIR": root / "build/onnxruntime/usr/include/onnxruntime",
        "HIGHWAY_DIR": root / "build/highway",
        "CMAKE_MAKE_PROGRAM": Path(sys.executable).parent / "ninja",
    }
    cmake = str(Path(sys.executable).parent / "cmake")
    given = [f"-D{name}={value}" for name, value in options.items()]
    source = ["-S", str(folder / "plugins/onnxruntime"), "-B", str(build), "-G", "Ninja", "--log-level=WARNING"]
    subprocess.run([cmake, *source, *given], check=True)
    subprocess.run([cmake, "--build", str(build), "--target", "nmsparse_onnxruntime"], check=True, stdout=sys.stderr)
    return build / "libnmsparse_onnxruntime.so"


def with_constants(text: str, pairs: dict[str, tuple[int, int]]) -> str:
    """Return the header with these constants (cost, read)."""
    line = "Panels " + ", ".join(f"{name}{{{cost}, {read}}}" for name, (cost, read) in pairs.items()) + ";"
    changed, count = re.subn(CONSTANTS, line, text)
    if count != 1:
        sys.exit(f"benchmarks/tuning.py: {TUNING} must have one line of constants, got {count}. Mend CONSTANTS.")
    return changed


def crossing(counts: list[int], gains: list[float]) -> int | None:
    """Return the least number of tokens from which on panels are faster; None where they are at all, or never."""
    slower = [index for index, gain in enumerate(gains) if gain < 1]
    if not slower or slower[-1] == len(counts) - 1:
        return None
    return counts[slower[-1] + 1]


def fitted(crossings: dict[str, int]) -> tuple[int, int] | None:
    """Return cost and read that fit the crossings t of patterns best: t * read - cost = 6 t keep / group."""
    if len(crossings) < 2:
        return None
    tokens = np.array([*crossings.values()], float)
    shares = np.array([keep / group for keep, group in (map(int, text.split(":")) for text in crossings)])
    (read, cost), *_ = np.linalg.lstsq(np.stack([tokens, -np.ones_like(tokens)], 1), 6 * tokens * shares, rcond=None)
    return (round(cost), max(round(read), 1)) if cost > 0 else None


@app.default
def main(
    *,
    shapes: str = "1536x576,2048x8192",
    tokens: str = "4,6,8,9,10,12,14,16,20,24,28,32,40,48,64",
    patterns: str = "4:16,8:16,12:16,16:16",
    rounds: int = 15,
    write: bool = False,
    result: str | None = None,
) -> None:
    """Measure layers of `shapes` (in x out, in a multiple of 128) on one thread; with `write`, change tuning.h."""
    counts, generator = [int(text) for text in tokens.split(",")], np.random.default_rng(0)
    sizes = [tuple(map(int, size.split("x"))) for size in shapes.split(",")]
    table = Table("weights", "pattern", *map(str, counts), "panels from", box=MARKDOWN, title="held / packed time")
    pairs: dict[str, tuple[int, int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        libraries = [built(pair, Path(folder) / name) for name, pair in (("held", NEVER), ("packed", ALWAYS))]
        for field, weights in FIELDS.items():
            crossings: dict[str, int] = {}
            for pattern in patterns.split(","):
                gains = np.ones(len(counts))
                for k, n in sizes:
                    w = generator.standard_normal((k, n), np.float32)
                    runs = [session(one_product(w, pattern, weights), library, 1) for library in libraries]
                    for at, count in enumerate(counts):
                        x = generator.standard_normal((count, k), np.float32)
                        times = np.array([[seconds(run, x) for run in runs] for _ in range(rounds)])[2:]
                        gains[at] *= np.median(times[:, 0] / times[:, 1]) ** (1 / len(sizes))
                found = crossing(counts, gains.tolist())
                if found is not None:
                    crossings[pattern] = found
                table.add_row(weights, pattern, *(f"{gain:.2f}" for gain in gains), str(found or "no crossing"))
            if (pair := fitted(crossings)) is not None:
                pairs[field] = pair
    record.show(table, result)
    for field in FIELDS:
        Console().print(f"{field}: cost, read = {pairs.get(field, 'too few crossings to tell')}", highlight=False)
    if write:
        if missing := FIELDS.keys() - pairs.keys():
            sys.exit(f"benchmarks/tuning.py: {', '.join(missing)} must have crossings, got too few. Give --tokens.")
        header = PLUGINS / TUNING
        text = with_constants(header.read_text(), {field: pairs[field] for field in FIELDS})
        about = record.stamp()
        header.write_text(MEASURED.sub(f"// Measured on {about['machine']} by benchmarks/tuning.py;", text))


if __name__ == "__main__":
    app()
