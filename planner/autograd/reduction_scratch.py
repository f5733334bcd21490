"""What reductions of CUDA allocate: a sum split over several blocks, softmax on its way back.

ATen/native/cuda/Reduce.cuh, setReduceConfig: the sum of [rows, outputs] over its rows, a gradient
of a bias or of a norm's weight. Blocks that share an output meet in device memory, in float32, with
a semaphore for each column of blocks. Checked against histories of an H200's allocator
(profiles/data/histories): 128 MiB for 4 096 rows of 4 096.
"""

from __future__ import annotations

from planner.program import Dims, Number, Shape, Symbol, evaluate, formula, maximum, minimum

MAX_THREADS, WARP = 512, 32
MIN_VALUES, MAX_VALUES = 16, 256  # of a thread: what it should have at least, and at most
RESIDENT_THREADS = 2048  # of a multiprocessor: 8.0, 9.0, 10.0
FLOAT32 = INT32 = 4


def column_sum_scratch(rows: Shape, outputs: int, multiprocessors: int) -> list[tuple[Shape, int]]:
    """(shape, itemsize) of the meeting place and of the semaphores; empty where neither can be."""
    vector = next(n for n in (4, 2, 1) if outputs % n == 0)
    columns = outputs // vector
    if not multiprocessors or columns < WARP:
        return []
    threads = MAX_THREADS // vector
    height = threads // WARP
    grid = -(-columns // WARP)
    room = multiprocessors * (RESIDENT_THREADS // threads)
    if grid > room:
        return []

    def blocks(dims: Dims) -> Number:
        """Blocks that share an output; 0 where one does it alone."""
        values = -(-evaluate(rows, dims) // height)
        shared = maximum(
            minimum(-(-room // grid), -(-values // MIN_VALUES)), -(-values // MAX_VALUES)
        )
        return shared * ((values >= MAX_VALUES) & (shared > 1))

    what = f"blocks that sum {formula(rows)} rows of {outputs}"
    return [
        ((Symbol(f"({what})", blocks), outputs, WARP * vector), FLOAT32),
        ((Symbol(f"(are there {what})", lambda d: (blocks(d) > 0) * 1), grid), INT32),
    ]


def softmax_scratch(shape: Shape, itemsize: int) -> list[tuple[Shape, int]]:
    """Gradient · result, which is then summed up: SoftMax.cu, softmax_backward_cuda_out.

    Seen in a history of Gemma-2's step with eager attention; log-softmax does without.
    """
    return [(shape, itemsize)]
