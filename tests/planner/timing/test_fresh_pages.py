"""Pages that malloc gives a pass anew, against Linux' own count of faults."""

import platform
import subprocess
import sys

import pytest

from planner.program import Buffer, Dims, Op, Program, Segment
from planner.timing.fresh_pages import fresh_bytes

MIB = 2**20
COUNTED = """
import ctypes, resource, sys
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
libc.free.argtypes = (ctypes.c_void_p,)
libc.memset.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
steps, held = eval(sys.argv[1]), {}
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for name, size in steps:
        if size:
            held[name] = libc.malloc(size)
            libc.memset(held[name], 1, size)
        else:
            libc.free(held.pop(name))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print((after - before) * resource.getpagesize())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc")
@pytest.mark.parametrize(
    "steps",
    [
        [("a", 4 * MIB), ("a", 0)] * 3,  # kept, and used again
        [("a", 4 * MIB), ("b", 4 * MIB), ("b", 0), ("a", 0)] * 3,  # twice the largest: given back
        [("a", 8 * MIB), ("b", 2 * MIB), ("b", 0), ("a", 0)] * 3,  # less than that
        [("a", 48 * MIB), ("a", 0)] * 2,  # mapped for itself
    ],
)  # fmt: skip
def test_pages_given_anew_are_those_that_fault(steps):
    buffers = {name: Buffer(name=name, shape=(size,), itemsize=1) for name, size in steps if size}
    ops = tuple(
        Op(name=name, **{"allocates" if size else "frees": (buffers[name],)})
        for name, size in steps
    )
    program = Program(name="", segments=(Segment(label="", ops=ops),))
    command = [sys.executable, "-c", COUNTED, repr(steps)]
    counted = int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    given = fresh_bytes(program, Dims(batch=1, tokens=1, context=1))
    assert given == pytest.approx(counted, rel=0.05, abs=MIB // 4)
