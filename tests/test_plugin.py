"""The TensorRT plugin as far as it is proved without a GPU: what is compiled, and how it loads and answers."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import WITH_RTX
from resources import TABLE, TOOLS, Row, rows

from converter.errors import BuildError
from converter.graph import dispatch
from converter.graph.op import function
from converter.graph.plugin import to_plugin
from converter.signature import DOMAIN, OP, OPSET, VERSION, Form, header

SPEC = (TABLE.parent / "op_spec.h").read_text()
SMS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120")
WGMMA = "sm_90a"  # what runs on compute capability 9.0 and nowhere else


@pytest.fixture(scope="module")
def library(plugins: Path) -> Path:
    return plugins / "libnmsparse_tensorrt.so"


def test_op_spec_is_the_op() -> None:
    assert header() == SPEC, "run python plugins/op_spec.py"


def test_every_method_of_the_plugin(plugins: Path) -> None:
    """With the address and undefined-behaviour sanitizers; the program says which check failed."""
    run = subprocess.run([plugins / "plugin_test"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_sparse_gemm_of_an_h100_copies_whole_tensors_and_no_more(plugins: Path) -> None:
    run = subprocess.run([plugins / "maps_test"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_kernels_take_no_more_than_the_table_says(library: Path) -> None:
    """`python plugins/resources.py build/plugins/libnmsparse_tensorrt.so` prints the table anew."""
    with TABLE.open() as file:
        table = {(row["kernel"], row["sm"]): row for row in csv.DictReader(file)}
    found = {(row.kernel, row.sm): row for row in rows(library)}
    assert set(found) == set(table)
    assert {sm for _, sm in found} == {*SMS, WGMMA}
    worse = [
        f"{row.kernel} on {row.sm}: {what} {getattr(row, what)}, {table[key][what]} in the table"
        for key, row in found.items()
        for what in Row._fields[2:]
        if getattr(row, what) > int(table[key][what])
    ]
    assert not worse
    assert all(row.stack == 0 for row in found.values()), "no kernel spills"


def machine_code(library: Path, sm: str) -> list[str]:
    sass = subprocess.run(
        [TOOLS / "cuobjdump", "--dump-sass", "--gpu-architecture", sm, library],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    # Of sm_90 the tool prints what is for sm_90a too.
    parts = [part for part in sass.split("\narch = ") if part.startswith(f"{sm}\n")]
    return [function for part in parts for function in re.split(r"\n\s*Function : ", part)[1:]]


@pytest.mark.parametrize("sm", SMS)
def test_sparse_gemm_is_sparse_tensor_core_instructions(library: Path, sm: str) -> None:
    functions = machine_code(library, sm)
    sparse = [text for text in functions if "SparseGemm" in text.splitlines()[0]]
    dense = [text for text in functions if "DefaultGemmWithVisitor" in text.splitlines()[0]]
    assert len(sparse) == len(dense) == 6  # three tiles in two dtypes
    assert all("HMMA.SP.16832.F32" in text for text in sparse)
    assert all("HMMA.16816.F32" in text and "HMMA.SP" not in text for text in dense)
    assert not any(re.search(r"\b(LDL|STL)\b", text) for text in functions), "no local memory"


def test_gemms_of_an_h100_are_wgmma(library: Path) -> None:
    functions = machine_code(library, WGMMA)
    assert len(functions) == 14  # in two dtypes: three tiles of the sparse and of the dense one, and the skinny one
    for text in functions:
        products = set(re.findall(r"HGMMA\S*", text))
        sparse = "SparseGemmSm90" in text.splitlines()[0]
        assert len(products) == 1, "nothing but sparse products, or but dense ones"
        assert products.pop().startswith("HGMMA.SP.64x128x32.F32" if sparse else "HGMMA.64x")
        assert not re.search(r"\b(LDL|STL)\b", text), "no local memory"


LOAD = """
import json, sys
import numpy, tensorrt_rtx_bindings as trt
said = []
class Log(trt.ILogger):
    def log(self, severity, message):
        said.append(message)
logger = Log.__new__(Log)
trt.ILogger.__init__(logger)
trt.init_libnvinfer_plugins(logger, "") if hasattr(trt, "init_libnvinfer_plugins") else None
registry = trt.get_plugin_registry()
assert registry.load_library(sys.argv[1]) is not None
creator = registry.get_creator("SparseLinear", "1", "nmsparse")
def create(**fields):
    def field(name, value):
        return trt.PluginField(name, numpy.array([value], dtype=numpy.int32), trt.PluginFieldType.INT32)
    given = [field(*item) for item in fields.items()]
    plugin = creator.create_plugin("a", trt.PluginFieldCollection(given), trt.TensorRTPhase.BUILD)
    return plugin is not None
good = dict(keep=2, group=4, shift_mode=0, variance=1, inputs=3, gemv_tokens=8, sparse_tokens=1024)
print(json.dumps({
    "listed": sum(c.name == "SparseLinear" for c in registry.all_creators),
    "fields": [f.name for f in creator.field_names],
    "good": create(**good),
    "bad keep": create(**{**good, "keep": 5}),
    "nodes": [create(**fields) for fields in json.loads(sys.argv[2])],
    "bad field": create(**{**good, "prune_n": 2}),
    "said": said,
}))
"""


@WITH_RTX
def test_tensorrt_rtx_loads_the_library(library: Path) -> None:
    """In a process of its own: the ONNX parser of TensorRT-RTX ends the process that meets a plugin of the graph."""
    run = subprocess.run([sys.executable, "-c", LOAD, library, "[]"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["listed"] == 1
    assert found["fields"] == ["keep", "group", "shift_mode", "variance", "inputs", "gemv_tokens", "sparse_tokens"]
    assert (found["good"], found["bad keep"], found["bad field"]) == (True, False, False)


@pytest.mark.parametrize(("entry", "said"), [(16, "16 at place 3"), (-1, "-1 at place 3"), (4, "4 2 times")])
def test_a_permutation_that_is_none_makes_no_plugin_node(entry: int, said: str) -> None:
    """What is wrong in the graph is known before there is an engine, where it would be NaN."""

    def stored(name: str, array: np.ndarray) -> ir.Value:
        return ir.Value(name=name, const_value=ir.tensor(array, name=name))

    order = np.arange(16)
    order[3] = entry
    x, w = ir.Value(name="X"), stored("model.a.weight", np.ones((16, 8), np.float16))
    inputs = [x, w, *[None] * 4, stored("model.a.permutation", order)]
    attributes = {"keep": 2, "group": 4, "shift_mode": "none", "variance": 0}
    node = ir.node(OP, inputs, attributes, domain=DOMAIN)
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": OPSET, DOMAIN: VERSION})
    body = function(Form("float16", "none", False, frozenset({"permutation"})))
    model = ir.Model(graph, ir_version=10, functions=[body])
    with pytest.raises(BuildError, match=f"model.a: permutation must hold every channel once, got {said}"):
        to_plugin(model, dispatch.read(None), dispatch.ANY)
