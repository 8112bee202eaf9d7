"""The op's kernel for ONNX Runtime on CPUs against the reference; `make cpu-op` builds it."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 # gives numpy bfloat16 and int4 by name
import numpy as np
import onnx
import onnx.helper
import onnxruntime
import pytest
import torch
from conftest import QUICK, from_make
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument, RuntimeException
from pairs import pairs
from test_kernels import assert_same_bits, awkward, the_params
from torch import Tensor

from converter.doctor import examine
from converter.errors import ExportError
from converter.names import BITS, MODEL, Weights
from converter.runtimes.kernel import VARIABLE
from converter.runtimes.onnxruntime import session
from converter.runtimes.polygraphy import kernel_session
from converter.signature import DOMAIN, INPUTS, OP, OPSET, SHIFT_MODES, VERSION
from converter.sparsity.linear import Baked, Params, SparseLinear, bake, select, token_scale
from converter.sparsity.quantize import Storage

PATTERNS = [(1, 2), (2, 4), (1, 4), (8, 16), (16, 32), (5, 8), (7, 9), (15, 16), (40, 80), (96, 480), (480, 480)]
# On both sides of every threshold: streamed or held (2; 3 and 4 at 1:4), held or packed (18 and 19 at 1:4, 31 and 32 at
# 50 %, 51 and 52 at 5:8; with 16 bits 11 and 12, 19 and 20; with integers 7 and 8, 8 and 9, 9 and 10, and 14 and 15
# where all is kept), parts (32 and 33), two chunks (129).
TOKENS = [1, 2, 3, 4, 7, 8, 9, 10, 11, 12, 14, 15, 18, 19, 20, 31, 32, 33, 51, 52, 129]
# Libraries without the kernels for better processors: on this one they run as on one that has no better ones.
COPIES = ["avx2", "sse4", "sse2"]


@pytest.fixture(scope="session")
def cpu_op() -> Path:
    """The folder with the library and the mutant."""
    return from_make("NMSPARSE_TEST_CPU_OP", "the op for ONNX Runtime is")


@pytest.fixture(scope="session")
def library(cpu_op: Path) -> Path:
    return cpu_op / "libnmsparse_onnxruntime.so"


def opened(
    library: Path,
    names: Sequence[str],
    stored: dict[str, np.ndarray],
    fed: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    attributes: dict[str, Any],
    threads: int = 1,
    in_file: bool = True,
) -> onnxruntime.InferenceSession:
    """Return the session of a node for each output: all have the inputs `names`, in a file or not, or of each call.

    The file has no name any more when it is loaded.
    """
    nodes = [onnx.helper.make_node(OP, names, [y.name], domain=DOMAIN, **attributes) for y in outputs]
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in stored.items()]
    graph = onnx.helper.make_graph(nodes, "nodes", fed, outputs, tensors)
    domains = [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(DOMAIN, VERSION)]
    model = onnx.helper.make_model(graph, opset_imports=domains, ir_version=11)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_cpu_mem_arena = False  # a sanitizer then sees where each piece of memory ends
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library))
    with tempfile.TemporaryDirectory(prefix="nodes-") as folder:
        path = f"{folder}/{MODEL}"
        if in_file:
            onnx.save_model(model, path, save_as_external_data=True)
        graph_or_path = path if in_file else model.SerializeToString()
        return onnxruntime.InferenceSession(graph_or_path, options, ["CPUExecutionProvider"])


class Node:
    """Nodes of the op in a session of their own, with no function body: without the kernel they cannot run."""

    def __init__(
        self,
        library: Path,
        baked: Baked,
        phased: bool = False,
        threads: int = 1,
        storage: Storage | None = None,
        in_file: bool = True,
        count: int = 1,
    ) -> None:
        """Make the session of `count` equal nodes, with what they read in a file or not.

        They get `sparse` with each call where they are phased.
        """
        tensors = {name: getattr(baked, {"W": "w"}.get(name, name), None) for name in INPUTS[1:]}
        given = {name: t.contiguous().numpy() for name, t in tensors.items() if isinstance(t, Tensor)}
        if storage is not None:
            given |= stored_weight(baked.w, storage)
        names = [n if n in {"X", *given, *(["sparse"] if phased else [])} else "" for n in INPUTS]
        attributes = {"keep": baked.keep, "group": baked.group, "shift_mode": baked.shift_mode}
        attributes["variance"] = int(baked.variance)
        make = onnx.helper.make_tensor_value_info
        k, n = baked.w.shape
        inputs = [make("X", 1, ["batch", "tokens", k]), *([make("sparse", 9, [])] if phased else [])]
        outputs = [make(f"Y{number}", 1, ["batch", "tokens", n]) for number in range(count)]
        self.session = opened(library, names, given, inputs, outputs, attributes, threads, in_file)

    def all(self, x: Tensor, **feeds: np.ndarray) -> list[Tensor]:
        """Return what each node gives."""
        found = self.session.run(None, {"X": x.reshape(1, *x.shape[-2:]).numpy(), **feeds})
        return [torch.from_numpy(y)[0] for y in found]

    def __call__(self, x: Tensor, **feeds: np.ndarray) -> Tensor:
        return self.all(x, **feeds)[0]


def stored_weight(weight: Tensor, storage: Storage) -> dict[str, np.ndarray]:
    """Return W `[K, N]`, and where it is of integers weight_scale, as they are stored."""
    if not storage.bits:
        return {"W": weight.contiguous().numpy().astype(storage.weights)}
    whole, scale = storage.quantized(weight)
    return {"W": whole.numpy().astype(storage.weights), "weight_scale": scale.numpy()}


def identity(params: Params, k: int) -> Baked:
    return bake(torch.eye(k), None, params)


def layer(params: Params, k: int, n: int, bias: bool = True, rank: int = 0, seed: int = 0) -> Baked:
    generator = torch.Generator().manual_seed(seed)
    if rank:
        parts = {"residual_in": torch.randn(k, rank, generator=generator) / 8}
        parts |= {"residual_out": torch.randn(rank, n, generator=generator) / 8}
        params = Params(**{**vars(params), **parts})
    weight = torch.randn(n, k, generator=generator)
    return bake(weight, torch.randn(n, generator=generator) if bias else None, params)


def exact(x: Tensor, baked: Baked, sparse: bool = True, absolute: bool = False) -> Tensor:
    """Return y in float64 for the mask, the shift and the scale that the reference finds in float32.

    With `absolute`, what its products add up to without their signs.
    """

    def of(part: Tensor) -> Tensor:
        return part.double().abs() if absolute else part.double()

    z, zs, eta = select(x, baked)
    if not sparse:
        zs = z
    y = of(zs) @ of(baked.w)
    if baked.variance and sparse:
        y *= token_scale(z.double(), zs.double())
    if baked.row_sum is not None and eta is not None:
        y += of(eta) * of(baked.row_sum)
    if baked.residual_in is not None and baked.residual_out is not None and sparse:
        y += of(z - zs) @ of(baked.residual_in) @ of(baked.residual_out)
    return y if baked.bias is None else y + of(baked.bias)


def error(found: Tensor, expected: Tensor) -> float:
    """Return the largest error relative to the largest value, or to 10, which few of these sums stay below."""
    return float((found.double() - expected).abs().max() / expected.abs().max().clamp_min(10))


@pytest.mark.parametrize(
    ("keep", "group", "shift_mode", "permuted"), pairs(PATTERNS, ["none", "static", "token_median"], [False, True])
)
def test_masks_are_those_of_the_reference(
    library: Path, keep: int, group: int, shift_mode: str, permuted: bool
) -> None:
    k = group * (480 // group)
    params = the_params(keep, group, k, shift_mode, permuted, variance=False)
    x = awkward(65, k, torch.float32)
    x[2:4] = x[4:6]  # without Inf and NaN, which the identity's zeros would spread over the row
    node = Node(library, identity(params, k))
    _, zs, _ = select(x, params)
    # A per-token shift is added back, so it is taken off again before the comparison of what is kept.
    extra = SparseLinear(identity(params, k))(x[None])[0] - zs
    for tokens in (1, 3, 65):
        found = node(x[:tokens])
        if shift_mode == "none":
            assert_same_bits(found, zs[:tokens])
        else:
            torch.testing.assert_close(found, zs[:tokens] + extra[:tokens], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("tokens", "keep", "group", "weights"),
    pairs([1, 5, 70], [(1, 4), (2, 4), (8, 16), (15, 16), (40, 80)], ["dtype", "bfloat16", "int8", "int4"]),
)
def test_inf_and_nan_stay_visible_and_a_dropped_inf_is_gone(
    library: Path, tokens: int, keep: int, group: int, weights: Weights
) -> None:
    k = 240
    params = the_params(keep, group, k, "none", False, variance=False)
    x = awkward(max(tokens, 5), k, torch.float32)[-tokens:] if tokens < 5 else awkward(tokens, k, torch.float32)
    x[0, ::7], x[0, 3::11] = torch.inf, -torch.inf
    ones = bake(torch.ones(4, k), None, params)
    _, zs, _ = select(x, params)
    expected = zs.double().sum(-1, keepdim=True).expand(tokens, 4).float()
    node = Node(library, ones, storage=None if weights == "dtype" else Storage(weights=weights))
    torch.testing.assert_close(node(x), expected, equal_nan=True, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("keep", "group", "shift_mode", "variance", "permuted", "bias"),
    pairs(PATTERNS, SHIFT_MODES, [(True, True, True), (False, False, False)]),
)
def test_layer_is_the_reference_at_every_number_of_tokens(
    library: Path, keep: int, group: int, shift_mode: str, variance: bool, permuted: bool, bias: bool
) -> None:
    k = group * (960 // group)
    params = the_params(keep, group, k, shift_mode, permuted, variance)
    for n, rank in ((200, 0), (1, 5), (1100, 70)):
        baked = layer(params, k, n, bias, rank)
        node = Node(library, baked)
        for tokens in TOKENS if n == 200 else [1, 5, 64]:
            x = torch.randn(tokens, k, generator=torch.Generator().manual_seed(tokens)) + 0.3
            assert error(node(x), exact(x, baked)) < 2e-6


@pytest.mark.parametrize(("shift_mode", "rank"), list(itertools.product(SHIFT_MODES, [0, 5])))
def test_a_dense_phase_keeps_every_channel_and_corrects_nothing(library: Path, shift_mode: str, rank: int) -> None:
    baked = layer(the_params(2, 4, 96, shift_mode, True), 96, 40, rank=rank)
    node = Node(library, baked, phased=True)
    for tokens, sparse in itertools.product([1, 2, 5, 70], [False, True]):
        x = torch.randn(tokens, 96, generator=torch.Generator().manual_seed(tokens))
        assert error(node(x, sparse=np.array(sparse)), exact(x, baked, sparse)) < 2e-6


@pytest.mark.parametrize(
    ("weights", "block"), [("int8", 0), ("int8", 32), ("int4", 16), ("int4", 48), ("float16", 0), ("bfloat16", 0)]
)
@pytest.mark.parametrize(("keep", "group", "permuted"), [(8, 16, False), (8, 16, True), (5, 8, False), (1, 1, False)])
def test_weights_of_fewer_bits_are_the_reference_at_every_number_of_tokens(
    library: Path, weights: Weights, block: int, keep: int, group: int, permuted: bool
) -> None:
    storage = Storage(weights=weights, block=block)
    params = the_params(keep, group, 480, "token_mean", permuted, variance=True)
    for n, rank in ((200, 0), (2, 5), (1106, 70)):
        baked = layer(params, 480, n, True, rank)
        rounded = replace(baked, w=storage.rounded(baked.w.t()).t())
        nodes = [Node(library, baked, threads=threads, storage=storage) for threads in (1, 2)]
        x = torch.randn(129, 480, generator=torch.Generator().manual_seed(0)) + 0.3
        whole = nodes[0](x)
        for tokens in TOKENS if n == 200 else [1, 5, 64]:
            found = nodes[1](x[:tokens])
            assert torch.equal(found, whole[:tokens])
            assert error(found, exact(x[:tokens], rounded)) < 2e-6


@pytest.mark.parametrize("weights", ["dtype", "bfloat16", "int8"])
@pytest.mark.parametrize(("keep", "permuted"), [(8, False), (5, True)])
def test_panels_of_every_width(library: Path, weights: Weights, keep: int, permuted: bool) -> None:
    """Many tokens meet W in panels, as wide as the columns want and the registers allow."""
    params, storage = the_params(keep, 16, 160, "none", permuted), Storage(weights=weights)
    x = torch.randn(70, 160, generator=torch.Generator().manual_seed(0))
    for n in range(2, 500, 26):
        baked = layer(params, 160, n)
        rounded = replace(baked, w=storage.rounded(baked.w.t()).t())
        node = Node(library, baked, storage=None if weights == "dtype" else storage)
        assert error(node(x), exact(x, rounded)) < 2e-6, n


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-34, 1e-30, 1.0, 1e35])
def test_integers_are_multiplied_by_numbers_of_any_size(library: Path, weights: Weights, size: float) -> None:
    """A number counts beside the largest of its block, however small or large that is."""
    storage, baked = Storage(weights=weights, block=32), layer(Params(8, 16), 480, 200, bias=False)
    x = torch.randn(5, 480, generator=torch.Generator().manual_seed(0)) * size
    x[0, ::5] *= 1e-6
    x[1, :64] = 0
    expected = exact(x, replace(baked, w=storage.rounded(baked.w.t()).t()))
    # The steps of the smallest numbers that there are add up.
    allowed = 2e-6 * expected.abs().amax(-1, keepdim=True) + 480 * 2.0**-149
    assert ((Node(library, baked, storage=storage)(x).double() - expected).abs() <= allowed).all()


def test_integers_that_do_not_fit_are_refused(library: Path) -> None:
    x, params = torch.ones(1, 48), Params(8, 16)
    for storage, n, said in (
        (Storage(weights="int8", block=8), 4, "K / B must be K or a multiple of 16, got 8"),
        (Storage(weights="int4", block=16), 3, "W of int4 must have an even N, got 3"),
    ):
        with pytest.raises(Exception, match=said):
            Node(library, layer(params, 48, n), storage=storage)(x)


@pytest.mark.parametrize("copy", ["onnxruntime", *COPIES])
@pytest.mark.parametrize("weights", ["float16", "bfloat16"])
def test_every_number_of_sixteen_bits_is_read_exactly(cpu_op: Path, copy: str, weights: Weights) -> None:
    """Subnormal ones too; W has every finite number once, and one row of it is kept."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(getattr(torch, weights)).float()
    finite = every[every.isfinite()]
    baked = replace(layer(Params(1, 2), 2, 1, bias=False), w=torch.stack([finite, finite.flip(0)]))
    node = Node(cpu_op / f"libnmsparse_{copy}.so", baked, storage=Storage(weights=weights))
    assert torch.equal(node(torch.tensor([[1.0, 0.5], [0.0, -1.0]])), torch.stack([finite, -finite.flip(0)]) + 0.0)


def test_any_shape_of_x(library: Path) -> None:
    baked = layer(the_params(2, 4, 64, "none", False), 64, 24)
    node = Node(library, baked)
    x = torch.randn(3, 5, 64)
    together = torch.from_numpy(node.session.run(None, {"X": x.numpy()})[0])
    assert together.shape == (3, 5, 24)
    assert torch.equal(together.reshape(15, 24), node(x.reshape(15, 64)))
    assert node.session.run(None, {"X": np.zeros((0, 5, 64), np.float32)})[0].shape == (0, 5, 24)


@pytest.mark.parametrize("shift_mode", ["none", "token_mean"])
@pytest.mark.parametrize(("keep", "group"), [(8, 16), (5, 8), (1, 4), (15, 16), (200, 800)])
def test_same_bits_for_any_threads_and_any_split_of_the_batch(
    library: Path, shift_mode: str, keep: int, group: int
) -> None:
    k = 800
    baked = layer(the_params(keep, group, k, shift_mode, False), k, 2100, rank=9)
    one, two, four = (Node(library, baked, threads=threads) for threads in (1, 2, 4))
    x = torch.randn(150, k)
    y = one(x)
    assert torch.equal(two(x), y)
    assert torch.equal(four(x), y)
    for part in (1, 2, 3, 7, 20, 75):
        assert torch.equal(torch.cat([two(piece) for piece in x.split(part)]), y)


@pytest.mark.parametrize("tokens", TOKENS)
def test_a_wrong_product_is_noticed_at_every_number_of_tokens(cpu_op: Path, tokens: int) -> None:
    baked = layer(the_params(8, 16, 480, "none", False), 480, 200)
    x = torch.randn(tokens, 480)
    assert error(Node(cpu_op / "libnmsparse_mutant.so", baked)(x), exact(x, baked)) > 1e-4


def test_no_less_accurate_than_onnx_runtimes_gemm(library: Path) -> None:
    k, n = 4096, 512
    generator = torch.Generator().manual_seed(0)
    params = Params(8, 16)
    baked = bake(torch.randn(n, k, generator=generator), None, params)
    make = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["X", "W"], ["Y"])],
        "dense",
        [make("X", 1, ["tokens", k])],
        [make("Y", 1, ["tokens", n])],
        [onnx.numpy_helper.from_array(baked.w.contiguous().numpy(), "W")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=11)
    dense = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    node = Node(library, baked)
    for tokens in (1, 8, 40):
        x = torch.randn(tokens, k, generator=generator)
        _, zs, _ = select(x, params)
        expected = exact(x, baked)
        ours = (node(x).double() - expected).square().mean().sqrt()
        theirs = torch.from_numpy(dense.run(None, {"X": zs.numpy()})[0]).double()
        assert ours <= (theirs - expected).square().mean().sqrt()


def every_path(library: Path, in_file: bool = True) -> None:
    """Run layers at every number of tokens; assert that they are right, and the same bits one token at a time.

    A sanitizer sees where W ends that is not in a file.
    """
    for (keep, group), shift_mode, k, n, rank, storage in (
        ((8, 16), "none", 1040, 300, 0, None),
        ((1, 4), "token_median", 600, 70, 5, None),
        ((5, 8), "token_mean", 1040, 1, 0, None),
        ((15, 16), "static", 80, 1100, 70, None),
        ((200, 601), "none", 601, 17, 9, None),
        ((8, 16), "token_mean", 1040, 301, 5, Storage(weights="int8", block=16)),
        ((1, 4), "none", 600, 70, 0, Storage(weights="int8")),
        ((5, 8), "static", 1040, 1102, 0, Storage(weights="int4", block=80)),
        ((8, 16), "token_mean", 1040, 301, 5, Storage(weights="float16")),
        ((1, 4), "none", 600, 1, 0, Storage(weights="bfloat16")),
    ):
        baked = layer(the_params(keep, group, k, shift_mode, permuted=rank > 0), k, n, rank=rank)
        node = Node(library, baked, phased=True, threads=2, storage=storage, in_file=in_file)
        if storage is not None:
            baked = replace(baked, w=storage.rounded(baked.w.t()).t())
        for tokens, sparse in itertools.product(TOKENS, [True, False]):
            x, flag = torch.randn(tokens, k, generator=torch.Generator().manual_seed(tokens)), np.array(sparse)
            y = node(x, sparse=flag)
            assert error(y, exact(x, baked, sparse)) < 2e-6
            assert torch.equal(torch.cat([node(row, sparse=flag) for row in x[:3].split(1)]), y[:3])


@pytest.mark.parametrize("copy", COPIES)
def test_the_copies_for_other_processors(cpu_op: Path, copy: str) -> None:
    """What a processor has not, the library does not use."""
    every_path(cpu_op / f"libnmsparse_{copy}.so")


def sanitizers(cpu_op: Path) -> tuple[Path, dict[str, str]] | None:
    """Return the library with sanitizers, and what a process that loads it needs in its environment; None without."""
    library = cpu_op / "libnmsparse_sanitized.so"
    if not library.exists():
        return None
    # When it starts, the sanitizer asks the C++ library what throws.
    names = [f"-print-file-name={name}" for name in ("libasan.so", "libstdc++.so.6")]
    found = [subprocess.run(["c++", name], capture_output=True, text=True, check=True).stdout.strip() for name in names]
    # Python leaks.
    return library, {"LD_PRELOAD": ":".join(found), "ASAN_OPTIONS": "detect_leaks=0"}


@pytest.mark.parametrize("in_file", [True, False])
def test_sanitizers_find_nothing(cpu_op: Path, in_file: bool) -> None:
    found = sanitizers(cpu_op)
    if found is None:
        pytest.skip("the compiler has no sanitizers")
    library, needed = found
    done = subprocess.run(
        [sys.executable, "-c", f"import test_cpu_op as t; t.every_path(t.Path({str(library)!r}), {in_file})"],
        cwd=Path(__file__).parent,
        env={**os.environ, **needed},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_many_sessions_in_many_threads_give_the_bits_of_a_lone_run(library: Path) -> None:
    made = [
        layer(the_params(keep, group, k, shift_mode, permuted=True), k, n, rank=rank)
        for keep, group, k, n, shift_mode, rank in (
            (8, 16, 800, 700, "token_median", 4),
            (1, 4, 1200, 300, "none", 0),
            (15, 16, 160, 2500, "token_mean", 0),
        )
    ]
    settings = [(baked, threads) for baked in made for threads in (1, 2, 3, 4)]
    with ThreadPoolExecutor(12) as pool:
        nodes = pool.map(lambda one: Node(library, one[0], threads=one[1]), settings)
        sessions = [(baked, node) for (baked, _), node in zip(settings, nodes, strict=True)]
    inputs = [(baked, torch.randn(tokens, baked.w.shape[0])) for baked in made for tokens in (1, 2, 5, 20, 130)]
    expected = [Node(library, baked)(x) for baked, x in inputs]
    work = [
        (node, x, y) for baked, node in sessions for (of, x), y in zip(inputs, expected, strict=True) if of is baked
    ]
    with ThreadPoolExecutor(12) as pool:
        assert all(pool.map(lambda one: torch.equal(one[0](one[1]), one[2]), work * 4))


def resident(wanted: Callable[[str, str], bool]) -> int:
    """Return the bytes in memory of those mappings of this process whose name and flags are wanted."""
    found = 0
    for text in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())[1:]:
        name, flags = text.splitlines()[0].split(maxsplit=5)[5:], re.search(r"VmFlags: (.*)", text)
        size = re.search(r"Rss: +(\d+) kB", text)
        assert flags
        assert size
        found += 1024 * int(size[1]) * wanted(*name or [""], flags[1])
    return found


@pytest.mark.parametrize("weights", ["dtype", "bfloat16", "int8", "int4"])
def test_weights_of_a_file_are_in_huge_pages_and_nowhere_else(library: Path, weights: Weights) -> None:
    if not next(found for found in examine(Path("none")) if found.part == "huge pages").works:
        pytest.skip("this system has no huge pages")
    k, n, slack = 3200, 2050, 2**18
    storage = Storage(weights=weights, block=k) if weights in BITS else Storage(weights=weights)
    baked = layer(Params(8, 16), k, n, bias=False)
    given, x = None if weights == "dtype" else storage, torch.randn(3, k)
    size = k * n * {"dtype": 32, "bfloat16": 16, "int8": 8, "int4": 4}[weights] // 8

    def huge() -> int:
        return resident(lambda name, flags: not name and "hg" in flags.split())

    expected, before = Node(library, baked, storage=given, in_file=False)(x), huge()
    node = Node(library, baked, storage=given, count=2)
    assert all(torch.equal(y, expected) for y in node.all(x))
    assert abs(huge() - before - size) < 2**21 + slack, "one copy for both nodes, with a page that is another's too"
    assert resident(lambda name, _: "/nodes-" in name) < slack
    del node
    assert huge() <= before + slack


ORDER = torch.arange(8)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"keep": 5}, "keep must be from 1 to group, got 5:4"),
        ({"group": 7}, "K must be a multiple of group, got 8 and 7"),
        ({"group": 2**62}, "K must be a multiple of group, got 8 and 4611686018427387904"),
        ({"variance": 2}, "variance must be 0 or 1, got 2"),
        ({"shift_mode": "mean"}, 'shift_mode must be none, static, token_mean or token_median, got "mean"'),
        ({"shift_mode": "none\0"}, r'shift_mode must be .*, got "none\\x00"'),
        ({"shift_mode": "static\0", "shift": torch.ones(8)}, r'shift_mode must be .*, got "static\\x00"'),
        ({"bias": torch.ones(3)}, r"bias must be of shape \[2\], got \[3\]"),
        ({"w": torch.ones(0, 2)}, "K must be from 1 to 1073741824, got 0"),
        ({"shift_mode": "static"}, "shift must be there where shift_mode is static, and nowhere else, got none"),
        ({"shift": torch.ones(8)}, "shift must be there where shift_mode is static, and nowhere else, got one"),
        ({"shift_mode": "token_mean"}, "row_sum must be there where shift_mode is token_mean or token_median"),
        ({"shift_mode": "token_median"}, "row_sum must be there where shift_mode is token_mean or token_median"),
        ({"row_sum": torch.ones(2)}, "row_sum must be there where .*, and nowhere else, got one"),
        ({"residual_in": torch.ones(8, 3)}, "residual_out must be there where residual_in is, .* got none"),
        ({"residual_out": torch.ones(3, 2)}, "residual_out must be there where residual_in is, .* got one"),
        ({"permutation": ORDER[:7]}, r"permutation must be of shape \[8\], got \[7\]"),
        *(
            ({"permutation": ORDER.where(ORDER != 3, wrong)}, f"every channel from 0 to 7 once, got {said} at place")
            for wrong, said in [(n, n) for n in (8, 9, 100, -1, 10**6, 2**62, -(2**63))] + [(4, "4 again")]
        ),
    ],
)
def test_a_wrong_node_is_refused_when_its_session_is_made(library: Path, changes: dict[str, Any], said: str) -> None:
    baked = bake(torch.ones(2, 8), None, Params(2, 4))
    with pytest.raises(RuntimeException, match=f"nmsparse::SparseLinear: .*{said}"):
        Node(library, Baked(**{**vars(baked), **changes}))


@pytest.mark.parametrize("entry", [4, 16, 17, 100, -1, 10**6, 2**62])
def test_an_order_that_is_fed_is_looked_at_in_every_call(library: Path, entry: int) -> None:
    params = the_params(2, 4, 16, "none", permuted=True)
    baked = layer(params, 16, 8)
    make, order = onnx.helper.make_tensor_value_info, np.arange(16)
    stored = {"W": baked.w.numpy(), "channel_scale": baked.channel_scale.numpy(), "bias": baked.bias.numpy()}
    names = [name if name in {"X", "permutation", *stored} else "" for name in INPUTS]
    inputs, attributes = [make("X", 1, None), make("permutation", 7, None)], {"keep": 2, "group": 4, "variance": 1}
    run = opened(library, names, stored, inputs, [make("Y", 1, None)], attributes | {"shift_mode": "none"})
    x, wrong = torch.randn(3, 16), np.where(order == 5, entry, order)
    for right in (order, params.permutation.numpy()):
        with pytest.raises(InvalidArgument, match=f"permutation must hold .* once, got {entry}( again)? at place 5"):
            run.run(None, {"X": x.numpy(), "permutation": wrong})
        found = torch.from_numpy(run.run(None, {"X": x.numpy(), "permutation": right})[0])
        assert error(found, exact(x, replace(baked, permutation=torch.from_numpy(right)))) < 2e-6


def test_a_call_for_which_there_is_no_memory_ends_with_an_error(library: Path) -> None:
    node = Node(library, bake(torch.ones(2**22, 1), None, Params(1, 1)), in_file=False)
    with pytest.raises(Exception, match="SparseLinear"):  # 16 TiB
        node(torch.ones(2**20, 1))
    assert torch.equal(node(torch.ones(1, 1)), torch.ones(1, 2**22))


@pytest.fixture(scope="module")
def out(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cpu_op") / "out"
    subprocess.run([sys.executable, "-m", "converter", "convert", str(tiny), str(folder), *QUICK], check=True)
    return folder


def ran(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> set[str]:
    """Return the op types that really ran, from ONNX Runtime's own profile."""
    options = onnxruntime.SessionOptions

    def profiled() -> onnxruntime.SessionOptions:
        made = options()
        made.enable_profiling = True
        made.profile_file_prefix = str(tmp_path / "profile")
        return made

    with monkeypatch.context() as patch:
        patch.setattr(onnxruntime, "SessionOptions", profiled)
        run = session(onnx.load(folder / MODEL, load_external_data=False), folder)
    feeds: dict[str, np.ndarray] = {}
    for value in run.get_inputs():
        shape = [{"batch_size": 1, "sequence_length": 4}.get(d, d) for d in value.shape]
        if value.name == "attention_mask":
            shape = [1, 4]
        shape = [d if isinstance(d, int) else 0 for d in shape]
        feeds[value.name] = np.ones(shape, np.int64 if "int64" in value.type else np.float32)
    run.run(None, feeds)
    events = json.loads(Path(run.end_profiling()).read_text())
    return {event["args"]["op_name"] for event in events if event.get("args", {}).get("op_name")}


def test_a_session_runs_the_kernel_by_itself(
    library: Path, out: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(VARIABLE, str(library))
    assert OP in ran(out, monkeypatch, tmp_path)
    monkeypatch.setenv(VARIABLE, "")
    names = ran(out, monkeypatch, tmp_path)
    assert OP not in names
    assert "TopK" in names


def test_validate_passes_with_the_kernel_and_finds_the_mutant(
    cpu_op: Path, library: Path, out: Path, nmsparse: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(library))
    done = nmsparse("validate", out)
    assert done.returncode == 0, done.stderr
    monkeypatch.setenv(VARIABLE, str(cpu_op / "libnmsparse_mutant.so"))
    done = nmsparse("validate", out)
    assert done.returncode == 14, done.stderr


def test_float16_keeps_the_function_body(
    library: Path, out: Path, tmp_path: Path, nmsparse: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(library))
    half = tmp_path / "half"
    assert nmsparse("export", out, half, "--dtype", "float16").returncode == 0
    session(onnx.load(half / MODEL, load_external_data=False), half)
    with pytest.raises(ExportError, match=r"dtype must be float32, as of the op's kernel, got another"):
        kernel_session(half / MODEL)


def test_doctor_says_which_library(library: Path, nmsparse: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for named, works, said in ((library, True, "for float32"), (Path("none.so"), False, "must be a library")):
        monkeypatch.setenv(VARIABLE, str(named))
        found = next(f for f in json.loads(nmsparse("doctor", "--json").stdout) if f["part"] == "ONNX Runtime op")
        assert found["works"] == works
        assert said in found["found"]


def test_a_library_that_is_not_there_is_an_error(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "none.so")
    with pytest.raises(ExportError, match=r"NMSPARSE_ORT_LIBRARY: must be a library, or empty for none, got 'none.so'"):
        session(onnx.load(out / MODEL, load_external_data=False), out)


def polygraphy(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the tool as its own command does."""
    command = [sys.executable, "-c", "import sys; from polygraphy.tools import main; sys.exit(main())", "run"]
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, check=False)


def test_polygraphy_compares_the_kernel_with_the_body_and_with_saved_outputs(
    cpu_op: Path, library: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, outputs = tmp_path / "inputs.json", tmp_path / "outputs.json"
    # Three tokens after one.
    made = ["--input-shapes", "attention_mask:[1,4]", "input_ids:[1,3]", "position_ids:[1,3]", "--val-range"]
    made += ["input_ids:[0,255]", "attention_mask:[1,1]", "position_ids:[1,3]"]
    limits = ["--rtol", "1e-4", "--atol", "1e-4"]
    monkeypatch.setenv(VARIABLE, str(library))
    saved = ["--save-inputs", inputs, "--save-outputs", outputs]
    done = polygraphy(out / MODEL, "--onnxrt", "--nmsparse-ort", *made, *saved, *limits)
    assert done.returncode == 0, done.stdout
    assert "nmsparse-ort | Passed: 1/1 iterations" in done.stdout

    kept = [out / MODEL, "--nmsparse-ort", "--load-inputs", inputs, "--load-outputs", outputs, *limits]
    monkeypatch.setenv(VARIABLE, str(cpu_op / "libnmsparse_mutant.so"))
    done = polygraphy(*kept)
    assert (done.returncode, "Passed: 0/1 iterations" in done.stdout) == (1, True), done.stdout


def test_polygraphy_does_not_run_the_body_in_silence(library: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "")
    done = polygraphy(out / MODEL, "--nmsparse-ort")
    assert (done.returncode, "Traceback" in done.stdout + done.stderr) == (1, False)
    assert "the op's library must be built, or named by NMSPARSE_ORT_LIBRARY, got none" in done.stdout + done.stderr
    monkeypatch.setenv(VARIABLE, str(library))
    done = polygraphy(out / MODEL, "--nmsparse-ort", "--onnx-outputs", "*")
    assert (done.returncode, "the model must be run as it is" in done.stdout + done.stderr) == (1, True)
