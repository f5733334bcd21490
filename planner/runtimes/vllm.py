"""The `vllm` runtime, version 0.19: a pool of KV blocks out of what everything else leaves.

What a layer declares is in `vllm_specs`, how layers share the pool in `vllm_groups`, what requests
hold of it in `vllm_cache`, what one of several GPUs keeps in `vllm_ranks`.
Pool (v1/worker/gpu_worker.py): utilisation × memory − weights − profile-run peak − what is not
torch's.
"""

from __future__ import annotations

from planner.catalog.gpus import Gpu
from planner.dtypes import element_bytes
from planner.layers import GQA, MLA, RoPE
from planner.ledger import Row
from planner.model import Model
from planner.program import Dims, Program
from planner.runtimes.base import (
    Phase,
    Pool,
    Setting,
    check_cache_kind,
    check_kv_dtype,
    check_planned,
    choose_attention,
)
from planner.runtimes.vllm_cache import VERSION, held_rows
from planner.runtimes.vllm_groups import default_block_tokens, layout
from planner.runtimes.vllm_program import vllm_program
from planner.runtimes.vllm_ranks import rank
from planner.workload import CacheSpec, Inference

NON_TORCH_BYTES = int(0.25 * 2**30)
"""Growth outside torch while profiling: the median of vLLM 0.19's start-up logs on one H100 (18
published runs of one GPU, 0.24–0.26 GiB in 17 of them; llm-d-planner@d3121e059da8)."""


SCALES = 7  # of an attention layer


def batch_defaults(gpu: Gpu) -> tuple[int, int]:
    """(tokens a pass, sequences) that `vllm serve` takes: more from 70 GiB on, A100 apart.

    engine/arg_utils.py EngineArgs.get_batch_defaults, vLLM 0.19.
    """
    large = gpu.memory_bytes >= 70 * 2**30 and not gpu.name.startswith("a100")
    return (8192, 1024) if large else (2048, 256)


class Vllm:
    """vLLM's V1 engine on one GPU."""

    name = "vllm"
    pooled = True
    on_torch = True
    version = VERSION
    kv_dtypes = ("fp32", "bf16", "fp16", "fp8")

    def attention(self, model: Model, name: str | None) -> str:
        """Its own fused kernels; which one it picks does not change what it holds."""
        check_planned(self.name, model)
        return choose_attention(self.name, model, name, ("flash",))

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
    ) -> list[Row]:
        """Blocks that `batch` requests hold, each after the step that made `context_tokens`."""
        check_cache_kind(self.name, cache, ("paged",))
        check_kv_dtype(self.name, dtype, self.kv_dtypes)
        block = (cache.block_tokens if cache else None) or default_block_tokens(model)
        pool = layout(model, block=block, kv_dtype=dtype, compute_dtype=compute_dtype)
        if pool is None:
            return []
        held = held_rows(
            pool,
            batch=batch,
            context_tokens=context_tokens,
            encoder_tokens=encoder_tokens,
            note="scales are among the weights' buffers" if dtype == "fp8" else "",
        )
        return list(held)

    def rank(self, model: Model, tensor_parallel: int) -> Model:
        """One GPU's heads and channels."""
        return rank(model, tensor_parallel)

    def peak_note(self, model: Model) -> str:
        """Written from the source, not traced."""
        beside = "; without the profile run of its encoders" if model.towers else ""
        return f"uncalibrated: written from vLLM's source, not traced{beside}"

    def cache_note(self, setting: Setting) -> str:
        """Nothing."""
        return ""

    def buffer_rows(self, model: Model, *, dtype: str) -> list[Row]:
        """Scales of every attention layer, and the rotary table: cos and sin of every position.

        The scales (set_default_quant_scales, layers/attention/attention.py, 0.19.1) are there
        whatever the KV dtype: float32 scalars of q, k, v and the probabilities, ranges of q, k, v.
        The table is in the model's dtype.
        """
        layers = sum(isinstance(layer.attention, GQA | MLA) for layer in model.layers)
        rows = [
            Row(
                component="weights",
                item="attention scales (buffers)",
                count=layers,
                formula="7 · 4",
                values=(),
                size_bytes=layers * SCALES * 4,
            )
        ]
        if isinstance(model.positions, RoPE):
            length, D = model.max_position_embeddings or 0, model.positions.rotary_dim
            b = element_bytes(dtype)
            table = Row(
                component="weights",
                item="rotary table (buffer)",
                count=1,
                formula="positions · d_rot · b",
                values=(("positions", length), ("d_rot", D), ("b", b)),
                size_bytes=length * D * b,
            )
            rows.append(table)
        return rows

    def memory_phases(self, model: Model, work: Inference, setting: Setting) -> list[Phase]:
        """The profile run at start-up, whatever the workload: it sets the pool."""
        tokens, rows = setting.max_batched_tokens, setting.max_sequences
        rows = min(rows, tokens)
        program = vllm_program(
            model, setting.dtype, setting.kv_dtype, rows, min(rows, setting.multiprocessors)
        )
        dims = Dims(batch=1, tokens=tokens, context=tokens)
        return [Phase(name="profile run", program=program, dims=dims)]

    def pool(
        self, model: Model, setting: Setting, *, budget_bytes: int, held_bytes: int
    ) -> Pool | None:
        """Whole blocks out of budget − weights − profile-run peak − what grows outside torch.

        The context is not subtracted: 0.19 snapshots the device after creating it.
        """
        outside = NON_TORCH_BYTES if setting.device == "cuda" else 0
        available = budget_bytes - held_bytes - outside
        shared = layout(
            model,
            block=setting.block_tokens,
            kv_dtype=setting.kv_dtype,
            compute_dtype=setting.dtype,
        )
        if shared is None:
            return None
        blocks = max(0, available) // shared.block_bytes
        longest = model.max_position_embeddings or setting.block_tokens
        return Pool(
            size_bytes=blocks * shared.block_bytes,
            tokens=shared.tokens(blocks, longest_tokens=longest),
            available_bytes=available,
        )

    def prefill(self, model: Model, work: Inference, setting: Setting) -> Program:
        """The whole prompt, logits of each sequence's last token."""
        return vllm_program(model, setting.dtype, setting.kv_dtype)

    def decode(self, model: Model, work: Inference, setting: Setting) -> Program:
        """One token for every sequence over the paged cache."""
        return vllm_program(model, setting.dtype, setting.kv_dtype)
