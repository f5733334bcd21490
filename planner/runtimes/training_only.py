"""What a runtime answers that plans training steps alone: inference is refused in one line."""

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


class TrainingOnly:
    """Finetuning on one device with F.scaled_dot_product_attention.

    `tables`: rotary tables of all positions, `elements_per_dim` numbers for a dimension in all.
    """

    name = ""
    version = ""
    pooled = False
    on_torch = True
    kv_dtypes: tuple[str, ...] = ()
    tables = 1
    elements_per_dim = 1

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
        self._refuse()

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
        """Cosines and sines of all positions, in float32."""
        rope, S = model.positions, model.max_position_embeddings or 0
        if not isinstance(rope, RoPE):
            return []
        n, factor = rope.rotary_dim, self.elements_per_dim
        size = factor * S * n * FLOAT32
        values = (("S", S), ("d_rot", n))
        return [
            buffer_row(
                "rotary tables", self.tables, f"{factor} · S · d_rot · {FLOAT32}", values, size
            )
        ]

    def alike(self, model: Model, work: Inference) -> Number:
        """ConfigError."""
        self._refuse()

    def memory_phases(self, model: Model, work: Inference, setting: Setting) -> list[Phase]:
        """ConfigError."""
        self._refuse()

    def pool(
        self, share: Share, setting: Setting, gpu: Gpu, *, budget_bytes: int, held_bytes: int
    ) -> Pool | None:
        """None."""
        return None

    def prefill(self, model: Model, work: Inference, setting: Setting) -> Program:
        """ConfigError."""
        self._refuse()

    def decode(self, model: Model, work: Inference, setting: Setting) -> Program:
        """ConfigError."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise ConfigError(f"runtime={self.name} plans training alone: a Training, or --train")
