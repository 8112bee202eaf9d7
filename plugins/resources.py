"""What each kernel of the TensorRT plugin takes of a GPU, as the compiler reports it, as CSV.

    python plugins/resources.py build/plugins/libnmsparse_tensorrt.so > plugins/resources.csv

`shared` has what the GEMMs ask for when they start, which the library says itself.
"""

from __future__ import annotations

import csv
import ctypes
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

TOOLS = Path(__file__).parents[1] / "build" / "toolchain" / "nvidia" / "cu13" / "bin"
TABLE = Path(__file__).with_name("resources.csv")
GEMMS = {"SparseGemmWithEpilogueVisitor": "sparse_gemm", "DefaultGemmWithVisitor": "dense_gemm"}
TILES = {"128ELi128E": "wide", "128ELi64E": "tall", "64ELi64E": "small"}
TILE_NAMES = tuple(TILES.values())  # as launch.h numbers them
TYPES = {"float16": "__half", "bfloat16": "__nv_bfloat16"}


class Row(NamedTuple):
    """A kernel on a compute capability: 32-bit registers of a thread, bytes of its stack, bytes that a block shares."""

    kernel: str
    sm: str
    registers: int
    stack: int
    shared: int


def name(mangled: str) -> str:
    """Return the name of a kernel as the sources have it.

    Raises:
        ValueError: when it is none of ours.
    """
    dtype = "bfloat16" if re.search("bfloat16", mangled) else "float16"
    ours = re.search(r"8nmsparse3runINS_\d+([A-Z][a-z]+(?:[A-Z][a-z]+)?)(I|E)", mangled)
    if ours is not None:
        return f"{ours[1]}<{dtype}>" if ours[2] == "I" else ours[1]
    if wgmma := re.search(r"(Dense|Sparse)GemmSm90I.*4TileE(\d)E", mangled):
        return f"{wgmma[1].lower()}_gemm_sm90<{dtype}, {TILE_NAMES[int(wgmma[2])]}>"
    if "SkinnyGemmSm90I" in mangled:
        return f"skinny_gemm_sm90<{dtype}, wide>"
    for substring, kernel in GEMMS.items():
        tile = re.search(r"GemmShapeILi(\d+ELi\d+E)Li", mangled)
        if substring in mangled and tile is not None:
            return f"{kernel}<{dtype}, {TILES[tile[1]]}>"
    raise ValueError(f"kernel must be one of ours, got {mangled}")


def rows(library: Path) -> Iterator[Row]:
    """Yield the kernels of a library, one row for each compute capability."""
    report = subprocess.run(
        [TOOLS / "cuobjdump", "--dump-resource-usage", library], capture_output=True, text=True, check=True
    ).stdout
    loaded = ctypes.CDLL(str(library))
    sm = ""
    for line in report.splitlines():
        if arch := re.match(r"arch = (sm_\w+)", line):
            sm = arch[1]
        elif function := re.match(r"\s*Function (\S+):$", line):
            kernel = name(function[1])
        elif usage := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            shared = int(usage[3])
            if gemm := re.fullmatch(r"(\w+_gemm\w*)<(\w+), (\w+)>", kernel):
                shared += getattr(loaded, f"{gemm[1]}_shared_{TYPES[gemm[2]]}")(TILE_NAMES.index(gemm[3]))
            yield Row(kernel, sm, int(usage[1]), int(usage[2]) + int(usage[4]), shared)


def main() -> None:
    """Print the table of the library that is named."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(Row._fields)
    writer.writerows(sorted(rows(Path(sys.argv[1]))))


if __name__ == "__main__":
    main()
