"""One thread for each worker: tiny models gain nothing from more, and two workers would fight."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
# Some virtual machines announce AMX and then refuse it: oneDNN's bf16 products die there of an
# illegal instruction. Without it the same tensors are made.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
