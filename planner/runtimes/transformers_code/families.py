"""What the modelling code of each type does that no config says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Code:
    """How one type's classes are written; llama's where nothing else is said.

    `norm`: an RMSNorm that rounds before the weight ("narrow") or after it ("wide"), or multiplies
    what came, not its float32 copy ("mixed"); torch's
    LayerNorm of the input ("fused") or of a float32 copy ("float32"), one written in Python
    ("python"), one of 1 + weight ("shifted").
    `rotary`: rotate_half over all dimensions ("whole"), over the first ones with the rest joined
    ("joined", of queries and keys one by one; "joined late", both rotated before; "returned", both
    kept until both are joined), also where none is left; "held": so in attention's own forward,
    which keeps the rotated parts. `late_norms`: queries and keys are normed when all three are
    there.
    "complex": neighbouring dimensions are one complex number, turned in float32 (deepseek_v2).
    `pairs`: neighbouring dimensions turn together. `float32_rotary`: queries and keys are cast.
    `float32_tables`: sine and cosine stay float32.
    `projections`: how queries, keys and values are made. `scaled_queries`: before the heads (opt).
    `softmax`: in float32, or in the dtype of the scores ("narrow").
    `block`: the layer's forward. `loop`: the model's loop holds what a layer returned until the
    next one returns, eager attention's weights among it.
    `masked`: a mask is always made. `hands_positions`: layers are given the position ids.
    `counts_past`: these are torch.arange plus what is cached, not torch.arange alone.
    """

    norm: Literal["narrow", "wide", "mixed", "fused", "float32", "python", "shifted"] = "narrow"
    rotary: Literal["whole", "joined", "joined late", "returned", "held", "complex"] = "whole"
    late_norms: bool = False
    pairs: bool = False
    float32_rotary: bool = False
    float32_tables: bool = False
    projections: Literal["apart", "first", "sliced", "split", "chunked"] = "apart"
    scaled_queries: bool = False
    conv1d: bool = False
    softmax: Literal["wide", "narrow"] = "wide"
    block: Literal[
        "placed", "gpt2", "neox", "stablelm", "phi", "opt", "bloom", "falcon", "cohere"
    ] = "placed"
    loop: bool = False
    masked: bool = False
    hands_positions: bool = True
    counts_past: bool = True


LLAMA = Code()
FUSED = Code(norm="fused")
CODES: dict[str, Code] = {
    "bamba": Code(rotary="joined late", loop=True, counts_past=False),
    "bert": Code(norm="fused", softmax="narrow"),
    "bloom": Code(norm="fused", block="bloom", loop=True),
    "cohere": Code(norm="python", pairs=True, float32_rotary=True, late_norms=True, block="cohere"),
    "cohere2": Code(norm="python", pairs=True, float32_rotary=True, block="cohere"),
    "falcon": Code(
        norm="fused",
        softmax="narrow",
        block="falcon",
        loop=True,
        masked=True,
    ),
    "deepseek_v2": Code(rotary="complex"),
    "ernie4_5": Code(pairs=True, float32_rotary=True, float32_tables=True),
    "exaone4": Code(late_norms=True),
    "gemma3_text": Code(late_norms=True),
    "glm": Code(rotary="joined late", pairs=True),
    "glm4": Code(rotary="joined late", pairs=True),
    "gpt2": Code(norm="fused", projections="split", conv1d=True, softmax="narrow", block="gpt2"),
    "gpt_bigcode": Code(norm="fused", projections="split", block="gpt2", hands_positions=False),
    "gpt_neox": Code(norm="fused", rotary="joined late", projections="chunked", block="neox"),
    "nemotron": Code(norm="shifted", rotary="returned"),
    "olmo": Code(norm="float32", projections="first", float32_tables=True),
    "olmo2": Code(norm="wide", projections="first", float32_tables=True),
    "olmo3": Code(norm="wide", projections="first", float32_tables=True),
    "olmoe": Code(projections="first"),
    "opt": Code(norm="fused", projections="first", scaled_queries=True, block="opt"),
    "phi": Code(norm="fused", rotary="held", late_norms=True, block="phi"),
    "phi3": Code(rotary="joined", projections="sliced"),
    "stablelm": Code(norm="fused", rotary="held", projections="first", block="stablelm"),
    "starcoder2": FUSED,
    "t5": Code(norm="mixed", softmax="narrow"),
}
"""By model type; every other one is taken for a llama."""


def code_of(text_type: str) -> Code:
    """How this type's classes are written."""
    return CODES.get(text_type, LLAMA)


HELD = frozenset(
    (
        "bert", "bloom", "cohere", "cohere2", "ernie4_5", "exaone4", "falcon", "gemma", "gemma2",
        "gemma3_text", "glm", "glm4", "gpt2", "gpt_bigcode", "gpt_neox", "granite", "llama",
        "mistral", "mixtral", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "opt", "phi", "phi3",
        "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "stablelm", "starcoder2",
        "t5",
    )
)  # fmt: skip
"""Types whose programs, forward and back, equal what their classes allocate (tests/)."""
