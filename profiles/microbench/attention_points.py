"""Attention by torch's scaled_dot_product_attention, split by (heads, kv heads, head dim)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from profiles.microbench.point import OpPoint, Split

Heads = tuple[int, int, int]
"""Query heads, key-value heads, head dim."""

LLAMA: Heads = (32, 8, 128)
CALIBRATION: tuple[Heads, ...] = (
    LLAMA,  # Llama-3.1-8B, Mistral-7B
    (16, 16, 64),  # GPT-2 medium
    (32, 32, 128),  # Llama-2-7B
    (16, 8, 256),  # Gemma-2-9B
    (32, 8, 64),  # Llama-3.2-1B
    (64, 8, 128),  # Llama-3.1-70B
)
HELD_OUT: tuple[Heads, ...] = (
    (28, 4, 128),  # Qwen2.5-7B
    (12, 12, 64),  # GPT-2
    (40, 8, 128),  # Qwen2.5-14B
    (8, 4, 256),  # Gemma-2-2B
)
PHI_2: Heads = (32, 32, 80)
CPU_CALIBRATION: tuple[Heads, ...] = (
    (8, 8, 64),
    (8, 2, 64),
    (4, 4, 128),
    (16, 16, 64),
    (16, 4, 64),
)
CPU_HELD_OUT: tuple[Heads, ...] = ((6, 6, 64), (12, 4, 64))

PREFILL = ((1, 128), (1, 512), (1, 2048), (1, 8192), (4, 1024), (16, 512), (1, 16384), (2, 4096))
PREFILL_FEW = ((1, 256), (1, 1024), (1, 4096), (8, 2048), (64, 128))
DECODE_BATCH = (1, 2, 4, 8, 16, 32, 64, 128)
DECODE_CONTEXT = (128, 512, 1024, 2048, 4096, 8192, 32768, 131072)
LARGEST_CACHE_BYTES = 5 * 2**30
LARGEST_PREFILL_FLOPS = 3e12


def split_of(heads: Heads) -> Split:
    """Whether a fit may see attention of these heads."""
    return "held-out" if heads in (*HELD_OUT, PHI_2, *CPU_HELD_OUT) else "calibration"


def prefill_points() -> Iterator[OpPoint]:
    """Causal attention of a whole prompt: flash everywhere, the other backends at fewer sizes."""
    for heads in (*CALIBRATION, *HELD_OUT):
        sizes = (*PREFILL, *PREFILL_FEW) if heads in (LLAMA, HELD_OUT[0]) else PREFILL[:6]
        for batch, tokens in sizes:
            yield from _prefill(heads, batch, tokens, "flash")
    for heads in (LLAMA, HELD_OUT[0], (16, 16, 64), (16, 8, 256)):
        for batch, tokens in ((1, 512), (1, 2048), (1, 8192), (4, 1024)):
            yield from _prefill(heads, batch, tokens, "default")
    for heads in (LLAMA, HELD_OUT[0]):
        for batch, tokens in ((1, 512), (1, 2048), (1, 8192), (16, 512)):
            yield from _prefill(heads, batch, tokens, "cudnn")
    for heads in ((16, 16, 64), (32, 32, 128), (12, 12, 64)):  # efficient knows no groups
        for batch, tokens in ((1, 2048), (4, 1024)):
            yield from _prefill(heads, batch, tokens, "efficient")


def masked_points() -> Iterator[OpPoint]:
    """A prompt behind an explicit mask, heads not grouped: what a window or padding takes."""
    for heads in ((32, 32, 128), (16, 16, 64), (16, 16, 256)):
        for batch, tokens in ((1, 1024), (1, 4096), (1, 8192), (4, 2048)):
            yield OpPoint(
                family="prefill",
                op="sdpa_masked",
                shape=shape_of(heads, batch, tokens, tokens),
                split=split_of(heads),
            )


def masked_backward_points() -> Iterator[OpPoint]:
    """The way back behind a mask, and the same kernel's way there."""
    for heads in ((32, 32, 128), (16, 16, 64), HELD_OUT[1]):
        for batch, tokens in ((1, 1024), (1, 4096), (4, 512), (4, 2048)):
            for family, backend in (
                ("backward", "efficient"),
                ("backward", "default"),
                ("prefill", "efficient"),
            )[: 1 if tokens == 512 else 3]:
                yield OpPoint(
                    family=family,
                    op="sdpa_masked",
                    shape=shape_of(heads, batch, tokens, tokens),
                    backend=backend,
                    split=split_of(heads),
                )


def decode_points() -> Iterator[OpPoint]:
    """One query a sequence over its cache: a chequerboard of batch and context, denser for two."""
    for heads in (*CALIBRATION, *HELD_OUT):
        dense = heads in (LLAMA, HELD_OUT[0])
        for i, batch in enumerate(DECODE_BATCH):
            for j, context in enumerate(DECODE_CONTEXT):
                wanted = (i + j) % 2 == 0 if dense else (i + 3 * j) % 6 == 0
                if wanted and _cache_bytes(heads, batch, context) <= LARGEST_CACHE_BYTES:
                    yield _decode(heads, batch, context, "flash")
    for heads in (LLAMA, HELD_OUT[0], (16, 16, 64)):
        for batch, context in ((1, 1024), (1, 8192), (8, 2048), (32, 2048), (64, 1024)):
            yield _decode(heads, batch, context, "default")


def cpu_prefill_points() -> Iterator[OpPoint]:
    """fp32, by whatever backend the CPU has."""
    for heads in (*CPU_CALIBRATION, *CPU_HELD_OUT):
        for batch, tokens in ((1, 32), (1, 128), (4, 128), (1, 512)):
            yield from _prefill(heads, batch, tokens, "default", "fp32")


def cpu_decode_points() -> Iterator[OpPoint]:
    """fp32, by whatever backend the CPU has."""
    for heads in (*CPU_CALIBRATION, *CPU_HELD_OUT):
        for batch, context in ((1, 64), (1, 512), (1, 4096), (4, 1024), (8, 256)):
            yield _decode(heads, batch, context, "default", "fp32")


def shape_of(heads: Heads, batch: int, tokens: int, context: int) -> Mapping[str, int]:
    """The sizes of an attention point, by the names that records carry."""
    H, G, D = heads
    return {
        "batch": batch,
        "heads": H,
        "kv_heads": G,
        "head_dim": D,
        "tokens": tokens,
        "context": context,
    }


def _cache_bytes(heads: Heads, batch: int, context: int) -> int:
    return 4 * batch * heads[1] * heads[2] * context


def _prefill(
    heads: Heads, batch: int, tokens: int, backend: str, dtype: str = "bf16"
) -> Iterator[OpPoint]:
    if 2 * batch * heads[0] * heads[2] * tokens**2 <= LARGEST_PREFILL_FLOPS:
        yield OpPoint(
            family="prefill",
            op="sdpa",
            shape=shape_of(heads, batch, tokens, tokens),
            dtype=dtype,
            backend=backend,
            split=split_of(heads),
        )


def _decode(heads: Heads, batch: int, context: int, backend: str, dtype: str = "bf16") -> OpPoint:
    return OpPoint(
        family="decode",
        op="sdpa",
        shape=shape_of(heads, batch, 1, context),
        dtype=dtype,
        backend=backend,
        split=split_of(heads),
    )
