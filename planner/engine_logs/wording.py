"""How versions of vLLM say what they hold: a regular expression for each figure and wording.

Collected from logs of 0.2 to 0.24. Sizes are GiB even where 0.3–0.8 print "GB"
(`consumed_memory / float(2**30)`, worker/model_runner.py). Each expression reads one line, with
bounded repetition only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Pick = Literal["first", "largest", "smallest", "last"]

SIZE = r"(?P<size>-?\d[\d,]{0,15}(?:\.\d{1,12})?) ?(?P<unit>TiB|GiB|MiB|KiB|GB|MB|KB|bytes|B)\b"
NUMBER = r"(?P<number>\d[\d,]{0,15}(?:\.\d{1,12})?)"

UNITS = {
    "TiB": 2**40,
    "GiB": 2**30,
    "MiB": 2**20,
    "KiB": 2**10,
    "GB": 2**30,
    "MB": 2**20,
    "KB": 2**10,
    "bytes": 1,
    "B": 1,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Wording:
    """One wording: `keyword` is a part of each line that may match, looked for first."""

    keyword: str
    pattern: re.Pattern[str]


PHRASES: dict[str, tuple[Pick, tuple[tuple[str, str], ...]]] = {
    "weights": (
        "largest",
        (
            ("weights took", "Loading model weights took SIZE"),
            ("loading took", "Model loading took SIZE"),
            ("weights take", "model weights take {1,8}SIZE"),
            ("weights memory:", "weights memory: SIZE"),
            ("Actual usage is", "Actual usage is SIZE for weight"),
        ),
    ),
    "activations": (
        "largest",
        (
            ("activation peak", "activation peak memory(?: takes)? {1,8}SIZE"),
            ("torch peak memory", "torch peak memory increase: SIZE"),
            ("Actual usage is", "SIZE for peak activation"),
        ),
    ),
    "peak_torch": ("largest", (("peak_torch_memory=", "peak_torch_memory=SIZE"),)),
    "outside": (
        "largest",
        (
            ("non_torch_memory", "non_torch_memory(?:=| takes | {1,8})SIZE"),
            ("non-torch", "non-torch forward increase memory: SIZE"),
            ("Actual usage is", "SIZE for non-torch memory"),
        ),
    ),
    "gpu_memory": (
        "first",
        (
            ("total_gpu_memory", r"total_gpu_memory(?:=| \(| {1,8})SIZE"),
            ("Free memory on device", r"Free memory on device \S{0,12} ?\(\S{1,12}/SIZE\)"),
        ),
    ),
    "budget": (
        "first",
        (
            ("gpu_memory_utilization (", r"gpu_memory_utilization \([\d.]{1,8}\) = SIZE"),
            ("instance can use", "the current vLLM instance can use {2,8}SIZE"),
            ("Requested memory", r"Requested memory: [\d.]{1,10} \(util\), SIZE"),
        ),
    ),
    "kv_pool": (
        "smallest",
        (
            ("reserved for KV", "reserved for KV Cache is SIZE"),
            ("kv_cache_size=", "kv_cache_size=SIZE"),
            ("available_kv_cache", "available_kv_cache_memory {1,8}SIZE"),
            ("Available KV cache", "Available KV cache memory: SIZE"),
            ("available KV cache", r"the available KV cache memory \(SIZE\)"),
            ("Actual usage is", "Current kv cache memory in use is SIZE"),
        ),
    ),
    "kv_blocks": (
        "smallest",
        (("GPU blocks", "GPU blocks: NUMBER"), (" blocks: ", r"# (?:cuda|rocm) blocks: NUMBER")),
    ),
    "kv_tokens": (
        "smallest",
        (
            ("GPU KV cache size", "GPU KV cache size: NUMBER tokens"),
            ("stored in KV cache", r"can be stored in KV cache \(NUMBER\)"),
        ),
    ),
    "concurrency": (
        "smallest",
        (("Maximum concurrency", r"concurrency for [\d,]{1,16} tokens per request: NUMBER"),),
    ),
    "concurrency_tokens": (
        "first",
        (
            ("Maximum concurrency", "Maximum concurrency for NUMBER tokens"),
            ("max seq len (", r"max seq len \(NUMBER\)"),
        ),
    ),
    "needed": ("largest", (("KV cache is needed", "SIZE KV cache is needed"),)),
    "longest_tokens": (
        "smallest",
        (("estimated maximum model length", "estimated maximum model length is NUMBER"),),
    ),
    "graphs": (
        "largest",
        (
            ("raph capturing finished", "raph capturing finished in .{1,20} took SIZE"),
            ("Actual usage is", "SIZE for CUDAGraph memory"),
        ),
    ),
    "utilization": (
        "first",
        (("gpu_memory_utilization", r"gpu_memory_utilization(?:=| {2,12}| \()NUMBER"),),
    ),
    "batched_tokens": (
        "first",
        (("max_num_batched_tokens=", "max_num_batched_tokens=NUMBER"),),
    ),
    "sampler_rows": ("first", (("dummy requests", "sampler with NUMBER dummy requests"),)),
    "tried": ("last", (("Tried to allocate", "Tried to allocate SIZE"),)),
    "capacity": (
        "last",
        (
            ("total capac", r"has a total capac\w{1,4} of SIZE"),
            ("total capacity", r"GPU \d{1,3}; SIZE total capacity"),
        ),
    ),
    "free": ("last", (("of which", "of which SIZE is free"), ("free;", "; SIZE free;"))),
    "process": (
        "last",
        (
            ("memory in use", "this process has SIZE memory in use"),
            ("memory in use", r"Process \d{1,9} has SIZE memory in use\. Of the alloc"),
        ),
    ),
    "allocated": (
        "last",
        (
            ("allocated by PyTorch", "memory SIZE is allocated by PyTorch"),
            ("already allocated", "SIZE already allocated"),
        ),
    ),
    "private": ("last", (("private pools", "with SIZE allocated in private pools"),)),
    "unallocated": ("last", (("reserved by", "SIZE is reserved by PyTorch but unallocated"),)),
    "reserved": ("last", (("reserved in total", "SIZE reserved in total by PyTorch"),)),
}
"""Each figure: whose counts where several workers print it, a part of the line that is looked for
first, and the words around the number."""


def _wording(phrase: tuple[str, str]) -> Wording:
    keyword, words = phrase
    return Wording(
        keyword=keyword,
        pattern=re.compile(words.replace("SIZE", SIZE).replace("NUMBER", NUMBER)),
    )


WORDINGS = {name: tuple(map(_wording, phrases)) for name, (_, phrases) in PHRASES.items()}

VERSIONS = (
    re.compile(r"LLM engine \(v(?P<version>[\w.+-]{1,60})\)"),
    re.compile(r"API server version (?P<version>\d[\w.+-]{1,60})"),
    re.compile(r"vLLM Version {0,40}: (?P<version>\d[\w.+-]{1,60})"),
    re.compile(r"\bversion +(?P<version>0\.\d{1,3}\.\d{1,3}[\w.+-]{0,40})[ \t\r]*$", re.MULTILINE),
)

FAILURES = {
    "No available memory for the cache blocks": "no blocks",
    "larger than the maximum number of tokens that can be stored in KV cache": "too long",
    "KV cache is needed, which is larger than the available KV cache memory": "too long",
    "CUDA out of memory": "out of memory",
    "is less than desired GPU memory utilization": "not free",
}
"""The words that a start-up ends with, and what they mean."""
