"""The `litgpt` runtime: finetuning with Lightning-AI/lit-gpt, commit 0f021f3a of January 2024.

Training alone is planned. The commit is the first whose scripts run every row of the tables that
the project has published of itself (tutorials/resource-tables.md); what they are said to have run
with are torch 2.1 and bitsandbytes 0.41.1.
"""

from __future__ import annotations

from typing import NoReturn

from planner.catalog.gpus import Gpu
from planner.errors import ConfigError
from planner.layers import RoPE
from planner.ledger import Row, buffer_row
from planner.model import Model
from planner.parallel import Share
from planner.program import Number, Program
from planner.runtimes.base import (
    Phase,
    Pool,
    Setting,
    choose_attention,
    one_share,
    whole,
)
from planner.runtimes.writer import FLOAT32
from planner.workload import CacheSpec, Inference


class LitGPT:
    """lit-gpt's finetuning scripts on one device."""

    name = "litgpt"
    pooled = False
    on_torch = True
    version = "0f021f3a"
    kv_dtypes: tuple[str, ...] = ()

    def attention(self, model: Model, name: str | None) -> str:
        """F.scaled_dot_product_attention."""
        return choose_attention(self.name, model, name, ("sdpa",))

    def cache_rows(
        self,
        model: Model,
        *,
        batch: int,
        context_tokens: int,
        dtype: str,
        cache: CacheSpec | None,
        encoder_tokens: int,
        compute_dtype: str,
        decoded_tokens: int,
        blocks: tuple[int, int] | None = None,
    ) -> list[Row]:
        """ConfigError."""
        _refuse()

    def rank(self, model: Model, tensor_parallel: int) -> Model:
        """All of it: one GPU."""
        return whole(self.name, model, tensor_parallel)

    def shares(
        self, model: Model, tensor_parallel: int, pipeline_parallel: int
    ) -> tuple[Share, ...]:
        """All of it: one GPU."""
        return one_share(self.name, model, tensor_parallel, pipeline_parallel)

    def peak_note(self, model: Model) -> str:
        """Nothing: a training step has notes of its own."""
        return ""

    def cache_note(self, setting: Setting) -> str:
        """Nothing."""
        return ""

    def buffer_rows(self, model: Model, *, dtype: str, capability: str | None = None) -> list[Row]:
        """GPT.rope_cache: cosines and sines of all positions, in float32."""
        rope, S = model.positions, model.max_position_embeddings or 0
        if not isinstance(rope, RoPE):
            return []
        n = rope.rotary_dim
        values = (("S", S), ("d_rot", n))
        size = 2 * S * n * FLOAT32
        return [buffer_row("rotary tables", 2, f"S · d_rot · {FLOAT32}", values, size)]

    def alike(self, model: Model, work: Inference) -> Number:
        """ConfigError."""
        _refuse()

    def memory_phases(self, model: Model, work: Inference, setting: Setting) -> list[Phase]:
        """ConfigError."""
        _refuse()

    def pool(
        self, share: Share, setting: Setting, gpu: Gpu, *, budget_bytes: int, held_bytes: int
    ) -> Pool | None:
        """None."""
        return None

    def prefill(self, model: Model, work: Inference, setting: Setting) -> Program:
        """ConfigError."""
        _refuse()

    def decode(self, model: Model, work: Inference, setting: Setting) -> Program:
        """ConfigError."""
        _refuse()


def _refuse() -> NoReturn:
    raise ConfigError("runtime=litgpt plans training alone: a Training, or --train")
