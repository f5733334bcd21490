"""The smallest Triton kernel: what loading Triton and a first kernel of it costs a process.

Triton reads a kernel's source from its file, so it has one. Imported where it is launched alone:
Triton is not on every machine.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, attr-defined"

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _add_one_kernel(x_ptr, n_elements, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < n_elements
    tl.store(x_ptr + offsets, tl.load(x_ptr + offsets, mask=inside) + 1, mask=inside)


def add_one_(x: Tensor) -> None:
    """Add one to every element, in place."""
    grid = (triton.cdiv(x.numel(), BLOCK),)
    _add_one_kernel[grid](x, x.numel(), BLOCK=BLOCK)
