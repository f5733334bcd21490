"""Oracle: bitsandbytes' own choice, out of its source (the module itself wants a GPU)."""

from __future__ import annotations

import ast
import functools
import importlib.util
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from planner.quantization.packed_products import multiplies_packed

library = importlib.util.find_spec("bitsandbytes")
if library is None or library.origin is None:
    pytest.skip("bitsandbytes is not installed", allow_module_level=True)
SOURCE = Path(library.origin).parent / "backends" / "cuda" / "ops.py"
FUNCTION, FLOOR = "_gemm_4bit_use_custom_cuda", "_GEMM_4BIT_CUSTOM_FLOOR_M"
CAPABILITIES = ("7.0", "7.5", "8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "11.0", "12.0", "12.1")


@functools.cache
def library_code():
    """The function, with the constant that it reads."""
    kept = [
        node
        for node in ast.parse(SOURCE.read_text()).body
        if (isinstance(node, ast.FunctionDef) and node.name == FUNCTION)
        or (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == FLOOR)
    ]
    return compile(ast.Module(kept, []), str(SOURCE), "exec")


def chosen(rows, out, into, capability, multiprocessors):
    """gemm_4bit's choice: the limits around the function, and the function itself."""
    device = (multiprocessors, *(int(part) for part in capability.split(".")))
    space = {"functools": functools, "torch": torch, "_gpu_dispatch_props": lambda _: device}
    exec(library_code(), space)
    return rows <= 1536 and not into % 64 and space[FUNCTION](0, torch.bfloat16, rows, out, into)


SIZES = st.integers(1, 24).map(lambda n: 1024 * n) | st.integers(1, 400).map(lambda n: 64 * n)


@settings(max_examples=400, deadline=None)
@given(
    rows=st.integers(1, 1600) | st.integers(1, 70),
    out=SIZES | st.integers(1, 30_000),
    into=SIZES | st.integers(1, 30_000),
    capability=st.sampled_from(CAPABILITIES),
    multiprocessors=st.sampled_from((40, 46, 58, 72, 84, 108, 114, 128, 132, 148, 170, 188)),
)
@example(rows=16, out=4096, into=4096, capability="9.0", multiprocessors=132)
@example(rows=17, out=14336, into=4096, capability="9.0", multiprocessors=132)
@example(rows=1537, out=64, into=64, capability="8.0", multiprocessors=108)
@example(rows=64, out=64, into=65, capability="8.0", multiprocessors=108)
def test_a_product_reads_packed_weights_where_the_library_says_so(
    rows, out, into, capability, multiprocessors
):
    expected = chosen(rows, out, into, capability, multiprocessors)
    assert multiplies_packed(rows, out, into, capability, multiprocessors) == expected


def test_the_limits_around_it_are_the_librarys():
    text = SOURCE.read_text()
    assert "_gemm_4bit_custom_max_m = 1536" in text
    assert "_GEMM_4BIT_CUSTOM_FLOOR_M = 4" in text
    assert "elif K % blocksize != 0" in text
