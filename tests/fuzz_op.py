"""Nodes of the op by chance, valid ones and invalid ones: each call gives the right value, or is refused.

    python tests/fuzz_op.py --library build/plugins-cpu --seconds 60 --seed 1

A folder stands for its library with sanitizers, or for the usual one where the compiler has none. A case is made of the
seed and its number alone: `--seed 1 --first 17 --cases 1` runs one again. The number is on stderr before the case runs,
so a library that ends the process leaves it there.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnxruntime.capi import onnxruntime_pybind11_state as errors
from test_cpu_op import PATTERNS, TOKENS, exact, opened, sanitizers, stored_weight

from converter.signature import INPUTS, SHIFT_MODES
from converter.sparsity.linear import Baked, Params, bake
from converter.sparsity.quantize import Storage

Array = np.ndarray[Any, Any]
Generator = np.random.Generator

OURS = "nmsparse::SparseLinear: "
PER_TOKEN = ("token_mean", "token_median")
OF_K = ("channel_scale", "shift", "permutation", "residual_in")
OF_N = ("bias", "row_sum")
FAR = (10**6, 2**31, 2**32, 2**62, -(2**62), 2**63 - 1, -(2**63))
MOST_CHANNELS = 640


@dataclass
class Case:
    """A node, what it reads from the model, and what it is fed with a call; `baked` says what it computes."""

    baked: Baked
    attributes: dict[str, Any]
    names: list[str]
    stored: dict[str, Array]
    fed: dict[str, Array]
    threads: int
    in_file: bool

    def copy(self) -> Case:
        """Return a case whose parts can be changed."""
        return replace(
            self,
            attributes=dict(self.attributes),
            names=list(self.names),
            stored={name: array.copy() for name, array in self.stored.items()},
            fed={name: array.copy() for name, array in self.fed.items()},
        )

    def has(self, name: str) -> bool:
        return name in self.stored or name in self.fed

    def get(self, name: str) -> Array:
        return self.fed[name] if name in self.fed else self.stored[name]

    def put(self, name: str, array: Array) -> None:
        """Give an input other numbers, or an input that the node had not."""
        (self.fed if name in self.fed else self.stored)[name] = np.ascontiguousarray(array).reshape(array.shape)
        self.names[INPUTS.index(name)] = name

    def remove(self, name: str) -> None:
        self.names[INPUTS.index(name)] = ""
        self.stored.pop(name, None)
        self.fed.pop(name, None)

    def open(self, library: Path) -> Any:
        """Return the session, which knows of what it is fed the types alone."""
        make = onnx.helper.make_tensor_value_info
        inputs = [make(n, onnx.helper.np_dtype_to_tensor_dtype(a.dtype), None) for n, a in self.fed.items()]
        attributes = {name: value for name, value in self.attributes.items() if value is not None}
        output = make("Y", 1, None)
        return opened(library, self.names, self.stored, inputs, [output], attributes, self.threads, self.in_file)

    def model(self) -> Any:
        """Return what the session is made of, to be compared."""
        stored = {name: (str(a.dtype), a.shape, a.tobytes()) for name, a in self.stored.items()}
        return self.names, repr(self.attributes), stored, list(self.fed)

    def __str__(self) -> str:
        tensors = {**{f"{n} (fed)": a for n, a in self.fed.items()}, **self.stored}
        shapes = ", ".join(f"{name} {array.dtype}{list(array.shape)}" for name, array in tensors.items())
        return f"{self.attributes} {self.names} {shapes}, {self.threads} threads, in a file {self.in_file}"


def activations(rng: Generator, shape: Sequence[int], exact_sums: bool) -> Array:
    """Return numbers with ties and zeros of both signs, and rows that are constant, tiny or large, or have Inf or NaN.

    With `exact_sums` they add up without being rounded, so every way to a mean finds the same bits.
    """
    rows = rng.standard_normal((int(np.prod(shape[:-1])), shape[-1]), np.float32)
    for value in (0.5, -0.5, -0.0):
        rows[rng.random(rows.shape) < 0.3 * rng.random()] = value
    if exact_sums:
        rows = np.round(rows * 64) / 64
    for row in rows:
        match rng.integers(12):
            case 0:
                row[rng.integers(len(row))] = np.nan
            case 1:
                row[:: rng.integers(1, 9)] = rng.choice([np.inf, -np.inf])
            case 2:
                row[:] = rng.choice([0, 0.5, -2])
            case 3 if not exact_sums:
                # None whose squares are subnormal, for these have few digits in a variance of float32.
                row *= np.float32(rng.choice([1e-42, 1e-38, 1e-15, 1e10]))
    return rows.reshape(shape)


def valid(rng: Generator) -> Case:
    """Return a node that means something."""
    keep, group = PATTERNS[rng.integers(len(PATTERNS))]
    if rng.random() < 0.3:
        group = int(rng.integers(1, 100))
        keep = int(rng.integers(1, group + 1))
    k = group * int(rng.integers(1, max(MOST_CHANNELS // group, 1) + 1))
    if rng.random() < 0.15:
        group, keep = k, int(rng.integers(1, k + 1))
    kind, block = str(rng.choice(["dtype", "float16", "bfloat16", "int8", "int4"], p=[0.5, 0.1, 0.1, 0.15, 0.15])), k
    if blocks := [size for size in range(16, k, 16) if k % size == 0]:
        block = int(rng.choice([k, *blocks]))
    n = int(rng.choice([0, 1, 2, 7, 8, 33, 64, 130, 301], p=[0.04, *[0.12] * 8]))
    n += n % 2 if kind == "int4" else 0
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    mode, rank = str(rng.choice(SHIFT_MODES)), int(rng.choice([-1, 0, 1, 5, 70], p=[0.6, 0.1, 0.1, 0.1, 0.1]))
    params = Params(
        keep,
        group,
        shift_mode=mode,
        variance=bool(rng.random() < 0.4),
        channel_scale=normal(k).abs().round(decimals=1) if rng.random() < 0.5 else None,
        shift=normal(k) if mode == "static" else None,
        permutation=torch.from_numpy(rng.permutation(k)) if rng.random() < 0.6 else None,
        residual_in=normal(k, rank) / 8 if rank >= 0 else None,
        residual_out=normal(rank, n) / 8 if rank >= 0 else None,
    )
    baked = bake(normal(n, k), normal(n) if rng.random() < 0.5 else None, params)
    tensors = {name: getattr(baked, {"W": "w"}.get(name, name), None) for name in INPUTS}
    stored = {name: t.contiguous().numpy() for name, t in tensors.items() if t is not None}
    if kind != "dtype":
        storage = Storage(weights=kind, block=block)  # type: ignore[arg-type]
        stored |= stored_weight(baked.w, storage)
        baked = replace(baked, w=storage.rounded(baked.w.t()).t())
    if rng.random() < 0.3:
        stored["sparse"] = np.array(rng.random() < 0.5)
    # numpy has no name for two of the kinds, and so they cannot be fed.
    can_be_fed = [name for name in stored if name != "W" or kind not in {"bfloat16", "int4"}]
    often = 0.5 if "permutation" in stored and rng.random() < 0.5 else 0.15
    fed = {name: stored.pop(name) for name in can_be_fed if rng.random() < often}
    attributes = {"keep": keep, "group": group, "shift_mode": mode, "variance": int(params.variance)}
    case = Case(baked, attributes, [], stored, {"X": np.zeros(0), **fed}, int(rng.integers(1, 4)), rng.random() < 0.3)
    case.names = [name if case.has(name) else "" for name in INPUTS]
    while rng.random() < 0.5 and not case.names[-1]:
        case.names.pop()
    case.names += [""] * (len(INPUTS) - len(case.names)) if rng.random() < 0.5 else []
    return refed(rng, case)


def refed(rng: Generator, case: Case) -> Case:
    """Return the same node with what another call may be fed."""
    case, k = case.copy(), len(case.baked.w)
    if "permutation" in case.fed:
        case.fed["permutation"] = rng.permutation(k)
        case.baked = replace(case.baked, permutation=torch.from_numpy(case.fed["permutation"]))
    if "sparse" in case.fed:
        # A byte that is neither 0 nor 1 is no bool, but true.
        case.fed["sparse"] = np.array(rng.choice([0, 1, 2, 255]), np.uint8).view(bool)
    tokens = int(rng.choice([0, *TOKENS]))
    around: list[list[int]] = [[tokens], [1, tokens], [tokens, 1], [tokens // 3, 3]]
    shape = [*around[rng.integers(len(around))], k] if tokens != 1 or rng.random() < 0.5 else [k]
    case.fed["X"] = activations(rng, shape, case.baked.shift_mode == "token_mean")
    if rng.random() < 0.2:
        case.fed = {name: anywhere(array) for name, array in case.fed.items()}
    return case


def anywhere(array: Array) -> Array:
    """Return the same numbers at an address that their type has no number at."""
    room = np.empty(array.nbytes + 1, np.uint8)
    place = room[1:].view(array.dtype) if array.nbytes else array
    place = place.reshape(array.shape)
    place[...] = array
    return place


def differs(case: Case, found: Array) -> str:
    """Return what is wrong with the value of a call, or nothing."""
    x = torch.from_numpy(case.fed["X"])
    sparse = bool(case.get("sparse")) if case.has("sparse") else True
    k, n = case.baked.w.shape
    if found.shape != (*x.shape[:-1], n):
        return f"shape {found.shape}"
    rows = x.reshape(-1, k)
    expected, size = (exact(rows, case.baked, sparse, absolute).reshape(found.shape) for absolute in (False, True))
    y = torch.from_numpy(found).double()
    for name, same in (("NaN", y.isnan() == expected.isnan()), ("Inf", y.isinf() == expected.isinf())):
        if not same.all():
            return f"{name} in other places, {int((~same).sum())} of them"
    if not (y[y.isinf()] == expected[y.isinf()]).all():
        return "Inf of another sign"
    finite = y.isfinite()
    if not finite.any():
        return ""
    # Integers are multiplied by numbers that count beside the largest of their block, and the smallest steps add up.
    allowed = 2e-6 * size.nan_to_num(0, 0).amax(-1, keepdim=True).expand(size.shape) + k * 2.0**-149
    apart = (y - expected).abs()
    worst = (apart / allowed)[finite].max()
    return f"error {float(worst)} times what is allowed" if worst > 1 else ""


Change = Callable[[Generator, Case], bool]  # makes a case invalid; false where it cannot


def entry_out_of_range(rng: Generator, case: Case) -> bool:
    if not case.has("permutation"):
        return False
    order = case.get("permutation")
    k = len(order)
    order[rng.integers(k)] = rng.choice(np.array([k, k + 1, k + 100, -1, -k, *FAR], np.int64))
    return True


def entry_given_twice(rng: Generator, case: Case) -> bool:
    if not case.has("permutation") or len(case.get("permutation")) < 2:
        return False
    order = case.get("permutation")
    first, second = rng.choice(len(order), 2, replace=False)
    if rng.random() < 0.5:
        order[first] = order[second]
    else:
        order[:] = order[first]
    return True


def another_attribute(rng: Generator, case: Case) -> bool:
    given, k = case.attributes, len(case.baked.w)
    mode = given["shift_mode"].encode()
    needs = {"static": "static", **dict.fromkeys(PER_TOKEN, "row_sum")}
    modes = [m for m in SHIFT_MODES if needs.get(m) != needs.get(given["shift_mode"])]
    values: dict[str, list[Any]] = {
        "keep": [0, -1, given["group"] + 1, 2**62, -(2**63), 1.0, "1", [1], None],
        "group": [0, -1, k + 1, 2 * k, 2**62, -(2**63), 1.5, "4", [4], None],
        "variance": [2, -1, 2**32, 2**62, 0.5, "0", [0], None],
        "shift_mode": [
            "mean",
            "",
            "None",
            b"\0",
            mode + b"\0",
            mode + b"\0x",
            mode + b" ",
            b"\xff\xfe",
            0,
            None,
            *modes,
        ],
    }
    name = str(rng.choice(list(values)))
    given[name] = values[name][rng.integers(len(values[name]))]
    return True


def input_missing(rng: Generator, case: Case) -> bool:
    needed = ["X", "W", "shift", "row_sum", "residual_in", "residual_out", "weight_scale"]
    name = str(rng.choice([name for name in needed if case.has(name)]))
    if name == "X":
        case.names[0] = ""
    else:
        case.remove(name)
    return True


def input_too_many(rng: Generator, case: Case) -> bool:
    k, n = case.baked.w.shape
    case.names += [""] * (len(INPUTS) - len(case.names))
    shapes = {"shift": (k,), "row_sum": (n,), "residual_in": (k, 2), "residual_out": (2, n), "weight_scale": (1, n)}
    name = str(rng.choice([*(name for name in shapes if not case.has(name)), "X"]))
    if name == "X":
        case.names.append(name)
    else:
        case.put(name, np.ones(shapes[name], np.float32))
    return True


def another_shape(rng: Generator, case: Case) -> bool:
    name = str(rng.choice([name for name in INPUTS if case.has(name)]))
    array = case.get(name)
    shapes = [array[None], array.ravel(), array[..., None], array.reshape(-1)[:0]]
    if array.size:
        shapes.append(array.reshape(-1)[0])
    if array.ndim:
        shapes += [array[:-1], np.concatenate([array, array[:1]]), array.T]
        # Without any vector of outputs every N is one.
        if name != "W":
            shapes += [array[..., :-1], np.concatenate([array, array[..., :1]], -1)]
    if name == "X":
        shapes = [
            array[..., :-1],
            np.concatenate([array, array[..., :1]], -1),
            array[..., :0],
            np.zeros((), np.float32),
        ]
    found = np.asarray(shapes[rng.integers(len(shapes))], array.dtype)
    if found.shape == array.shape:
        return False
    k = len(case.baked.w)
    if name == "weight_scale" and found.ndim == 2 and found.shape[1] == array.shape[1] and len(found):
        return False
    if name == "X" and found.ndim and found.shape[-1] == k:
        return False
    case.put(name, found)
    return True


def another_block(rng: Generator, case: Case) -> bool:
    """Scales for blocks of other sizes than are allowed."""
    if not case.has("weight_scale"):
        return False
    k, n = case.baked.w.shape
    blocks = [b for b in range(2, 2 * k + 2) if k % b or k // b % 16]
    if not blocks:
        return False
    case.put("weight_scale", np.ones((rng.choice(blocks), n), np.float32))
    return True


def another_type(rng: Generator, case: Case) -> bool:
    name = str(rng.choice([name for name in INPUTS if case.has(name)]))
    types = {"permutation": ["int32", "uint64", "float32"], "sparse": ["uint8", "int64", "float32"]}
    usual = ["float64", "float16", "int32", "int64", "bool"]
    if name == "W":
        usual = ["float64", "int16", "int32", "uint8", "uint16", "bool", "uint4"]
    dtype = str(rng.choice(types.get(name, usual)))
    if dtype == "uint4" and name in case.fed:
        return False
    case.put(name, np.zeros(case.get(name).shape, dtype))
    return True


def odd_outputs_of_int4(rng: Generator, case: Case) -> bool:
    if case.get("W").dtype != "int4" or not case.baked.w.shape[1]:
        return False
    for name in (*OF_N, "W", "weight_scale", "residual_out"):
        if case.has(name):
            case.put(name, case.get(name)[..., :-1])
    return True


def no_channels(rng: Generator, case: Case) -> bool:
    for name in (*OF_K, "W"):
        if case.has(name):
            case.put(name, case.get(name)[:0])
    case.put("X", case.fed["X"][..., :0])
    return True


CHANGES: list[Change] = [
    entry_out_of_range,
    entry_given_twice,
    another_attribute,
    input_missing,
    input_too_many,
    another_shape,
    another_block,
    another_type,
    odd_outputs_of_int4,
    no_channels,
]


class WrongError(Exception):
    """A call that is neither right nor refused."""


def right(session: Any, case: Case) -> str:
    """Let the session run a valid call.

    Raises:
        WrongError: when it gives another value, or none.
    """
    try:
        (found,) = session.run(None, case.fed)
    except Exception as error:
        raise WrongError(f"a valid call is refused: {error}") from error
    if wrong := differs(case, found):
        raise WrongError(f"a valid call gives another value: {wrong}")
    return "right"


def refused(run: Callable[[], Any]) -> str:
    """Let a call run that must be refused, and return who refuses it.

    Raises:
        WrongError: when nobody does, or not as an invalid argument.
    """
    try:
        run()
    except (errors.InvalidArgument, errors.InvalidGraph, errors.Fail, errors.RuntimeException) as error:
        text = str(error)
        # ONNX Runtime says RUNTIME_EXCEPTION about all that goes wrong while a session is made.
        if OURS in text and (isinstance(error, errors.InvalidArgument) or "during initialization" in text):
            return "refused by the op"
        if OURS not in text and isinstance(error, errors.InvalidArgument | errors.InvalidGraph):
            return "refused by ONNX Runtime"
        raise WrongError(f"a call is not refused as an invalid argument: {type(error).__name__} {error}") from error
    raise WrongError("an invalid call gives a number")


def run_case(library: Path, seed: int, number: int) -> list[str]:
    """Run a case and return how its calls ended.

    Raises:
        WrongError: when one is neither right nor refused.
    """
    rng = np.random.default_rng([seed, number])
    case = valid(rng)
    change = CHANGES[rng.integers(len(CHANGES))] if rng.random() < 0.6 else None
    bad = case.copy()
    while change is not None and not change(rng, bad):
        case = valid(rng)
        bad = case.copy()
    try:
        if bad.model() != case.model():
            return [refused(lambda: bad.open(library).run(None, bad.fed))]
        # The session is valid, and so are its calls before an invalid one and after it.
        session = case.open(library)
        ended = [right(session, case)]
        for _ in range(rng.integers(3)):
            if change is not None:
                ended.append(refused(lambda: session.run(None, bad.fed)))
            ended.append(right(session, refed(rng, case)))
        return ended
    except WrongError as wrong:
        name = change.__name__ if change else "valid"
        raise WrongError(f"seed {seed}, case {number} ({name}): {wrong}\n{bad}") from wrong


def run_cases(library: Path, seed: int, numbers: Sequence[int], seconds: float = float("inf")) -> Counter[str]:
    """Run cases until the time is over, and return how many calls ended in which way.

    Raises:
        WrongError: at the first call that is neither right nor refused.
    """
    ended: Counter[str] = Counter()
    end = time.monotonic() + seconds
    for number in numbers:
        if time.monotonic() > end:
            break
        print(f"\rcase {number} ", end="", file=sys.stderr, flush=True)
        ended.update(["cases", *run_case(library, seed, number)])
    print(file=sys.stderr)
    return ended


def main() -> None:
    """Run cases as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**32))
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--cases", type=int, default=2**62)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    given = parser.parse_args()
    if given.library.is_dir():
        library, needed = sanitizers(given.library) or (given.library / "libnmsparse_onnxruntime.so", {})
        os.execve(sys.executable, [sys.executable, *sys.argv, "--library", str(library)], {**os.environ, **needed})
    torch.set_num_threads(1)  # its threads are many times slower than one where a processor is busy
    print(f"{given.library.name}, seed {given.seed}", flush=True)
    try:
        ended = run_cases(given.library, given.seed, range(given.first, given.first + given.cases), given.seconds)
    except WrongError as wrong:
        sys.exit(str(wrong))
    print(", ".join(f"{count} {way}" for way, count in ended.items()))


if __name__ == "__main__":
    main()
