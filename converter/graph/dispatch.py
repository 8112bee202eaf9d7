"""Which path of the TensorRT plugin a call takes: a table that `nmsparse bench --tune` measures, and its default."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from converter.errors import BuildError
from converter.place import write_whole

ANY = "*"
MOST_ROWS = 65535  # tokens of a call that reads only the weights they use: a grid has no more rows


class Row(NamedTuple):
    """For layers `k x n` of a pattern and dtype on a compute capability, each of which may be `*`: where paths meet.

    Calls of up to `gemv_tokens` tokens read only the weights that they use; those of `sparse_tokens` or more go through
    the sparse tensor cores where the pattern is 2:4 or 1:4, 0 being never; the rest is dense.
    """

    sm: str
    dtype: str
    pattern: str
    k: str
    n: str
    gemv_tokens: int
    sparse_tokens: int
    source: str


KEYS = Row._fields[:5]


def read(path: Path | None) -> list[Row]:
    """Return the rows of a table, or of the one that we ship.

    Raises:
        BuildError: naming the line that is not a row.
    """
    if path is None:
        text, where = files("converter.graph").joinpath("dispatch.csv").read_text("utf-8"), "dispatch.csv"
    else:
        try:
            text, where = path.read_text("utf-8"), str(path)
        except (OSError, UnicodeDecodeError) as error:
            raise BuildError(f"--dispatch: must be a table that can be read, got {error}.") from error
    reader = csv.DictReader(text.splitlines())
    if tuple(reader.fieldnames or ()) != Row._fields:
        raise BuildError(f"{where}: columns must be {', '.join(Row._fields)}, got {reader.fieldnames}.")
    return [_row(line, f"{where}, line {reader.line_num}") for line in reader]


def _row(line: Mapping[str, str], where: str) -> Row:
    for name, most in (("gemv_tokens", MOST_ROWS), ("sparse_tokens", 2**31 - 1)):
        text = line[name]
        if text is None or not (text.isascii() and text.isdigit()):
            raise BuildError(f"{where}: {name} must be 0 or more tokens, got {text!r}.")
        if int(text[:10]) > most:
            raise BuildError(f"{where}: {name} must be at most {most} tokens, got {text[:10]}.")
    sm, dtype, pattern, k, n = (line[key] for key in KEYS)
    return Row(sm, dtype, pattern, k, n, int(line["gemv_tokens"]), int(line["sparse_tokens"]), line["source"] or "")


def described(sm: str, dtype: str, keep: int, group: int, k: int, n: int) -> dict[str, str]:
    """Return a layer under the `KEYS`."""
    return dict(zip(KEYS, (sm, dtype, f"{keep}:{group}", str(k), str(n)), strict=True))


def fits_sparse(keep: int, group: int, k: int) -> bool:
    """Return whether the sparse tensor cores know a layer: 2:4, which 1:4 fits into, and steps of 64 channels."""
    return group == 4 and keep <= 2 and k % 64 == 0


def choose(rows: Sequence[Row], layer: Mapping[str, str]) -> Row:
    """Return the row that says most about a layer, described by the `KEYS`; of equals the first.

    Raises:
        BuildError: when no row is about it.
    """
    fitting = [row for row in rows if all(getattr(row, key) in {ANY, layer[key]} for key in KEYS)]
    if not fitting:
        about = ", ".join(f"{key} {layer[key]}" for key in KEYS)
        raise BuildError(f"--dispatch: the table must have a row for {about}, got none. Add one with {ANY} in it.")
    return max(fitting, key=lambda row: sum(getattr(row, key) != ANY for key in KEYS))


def write(path: Path, rows: Sequence[Row]) -> None:
    """Write a table that `read` reads back."""

    def to(beside: Path) -> None:
        with beside.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(Row._fields)
            writer.writerows(rows)

    write_whole(path, to)


def thresholds(best: Mapping[int, str]) -> tuple[int, int]:
    """Return `gemv_tokens, sparse_tokens` from the fastest path by tokens of a call.

    The GEMV runs up to where another path is faster for the first time, the sparse tensor cores from where none is
    faster any more.
    """
    gemv = sparse = 0
    for tokens in sorted(best):
        if best[tokens] != "gemv":
            break
        gemv = tokens
    for tokens in sorted(best, reverse=True):
        if best[tokens] != "sparse":
            break
        sparse = tokens
    return gemv, sparse


def paths(row: Row, layer: Mapping[str, str]) -> str:
    """Return the paths of a layer by tokens of a call, such as `gemv to 1, dense to 1023, sparse`."""
    keep, group = map(int, layer["pattern"].split(":"))
    fits = row.sparse_tokens > 0 and fits_sparse(keep, group, int(layer["k"]))
    from_tokens = max(row.gemv_tokens + 1, row.sparse_tokens)  # the GEMV goes first where both would
    names = [f"gemv to {row.gemv_tokens}"] if row.gemv_tokens else []
    if not fits:
        return ", ".join([*names, "dense"])
    if from_tokens > row.gemv_tokens + 1:
        names.append(f"dense to {from_tokens - 1}")
    return ", ".join([*names, "sparse"])
