"""The `vllm` runtime, version 0.19: a pool of KV blocks out of what everything else leaves.

What a layer declares is in `vllm_specs`, how layers share the pool in `vllm_groups`, what requests
hold of it in `vllm_cache`, what one of several GPUs keeps in `vllm_ranks`; the profile run is
`vllm_program` and `vllm_sampler`, what is not torch's `vllm_overhead`.
Pool (v1/worker/gpu_worker.py): utilisation × memory − weights − profile-run peak − what is not
torch's.
"""

from __future__ import annotations

from planner.catalog.gpus import Gpu
from planner.ledger import Row
from planner.model import Model
from planner.parallel import Share
from planner.program import Dims, Number, Program
from planner.runtimes.base import (
    Phase,
    Pool,
    Setting,
    check_cache_kind,
    check_kv_dtype,
    check_planned,
    choose_attention,
)
from planner.runtimes.vllm_buffers import buffer_rows
from planner.runtimes.vllm_cache import VERSION, held_rows
from planner.runtimes.vllm_experts import padding_rows, workspace_elements
from planner.runtimes.vllm_groups import default_block_tokens, stage_layout
from planner.runtimes.vllm_overhead import graphs_bytes, growth_bytes
from planner.runtimes.vllm_program import vllm_program
from planner.runtimes.vllm_ranks import rank, shares
from planner.runtimes.vllm_sampler import ProfileRun
from planner.runtimes.vllm_vision import kept_images
from planner.runtimes.vllm_widened import widened_rows
from planner.workload import CacheSpec, Inference


def batch_limits(
    gpu: Gpu,
    *,
    longest_tokens: int | None,
    max_batched_tokens: int | None,
    max_sequences: int | None,
) -> tuple[int, int]:
    """(tokens a pass, sequences) of `vllm serve`, which sets what is None: more from 70 GiB on,
    A100 apart.

    No more tokens than all sequences have, no more sequences than tokens.
    EngineArgs.get_batch_defaults and _set_default_max_num_seqs_and_batched_tokens_args
    (engine/arg_utils.py, 0.19).
    """
    large = gpu.memory_bytes >= 70 * 2**30 and not gpu.name.startswith("a100")
    batched, sequences = (8192, 1024) if large else (2048, 256)
    sequences = max_sequences or sequences
    if max_batched_tokens is None:
        max_batched_tokens = min(batched, sequences * (longest_tokens or batched))
    if max_sequences is None:
        sequences = min(sequences, max_batched_tokens)
    return max_batched_tokens, sequences


class Vllm:
    """vLLM's V1 engine."""

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
        blocks: tuple[int, int] | None = None,
    ) -> list[Row]:
        """Blocks that `batch` requests hold, each after the step that made `context_tokens`."""
        check_cache_kind(self.name, cache, ("paged",))
        check_kv_dtype(self.name, dtype, self.kv_dtypes)
        block = (cache.block_tokens if cache else None) or default_block_tokens(model)
        pool = stage_layout(model, blocks, block=block, kv_dtype=dtype, compute_dtype=compute_dtype)
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

    def shares(
        self, model: Model, tensor_parallel: int, pipeline_parallel: int
    ) -> tuple[Share, ...]:
        """One GPU of each stage."""
        return shares(model, tensor_parallel, pipeline_parallel)

    def peak_note(self, model: Model) -> str:
        """Written from the source, not traced."""
        beside = "; without the profile run of its encoders" if model.towers else ""
        return f"written from vLLM's source, held against 25 start-up logs{beside}"

    def cache_note(self, setting: Setting) -> str:
        """Nothing."""
        return ""

    def buffer_rows(self, model: Model, *, dtype: str, capability: str | None = None) -> list[Row]:
        """Scales of attention layers, rotary tables, what pads experts."""
        return [
            *buffer_rows(model, dtype=dtype, capability=capability),
            *widened_rows(model, dtype),
            *padding_rows(model, capability),
        ]

    def alike(self, model: Model, work: Inference) -> Number:
        """All cells run the same programs."""
        return 0

    def memory_phases(self, model: Model, work: Inference, setting: Setting) -> list[Phase]:
        """The profile run at start-up, whatever the workload: it sets the pool."""
        tokens = setting.max_batched_tokens
        rows = min(setting.max_sequences, tokens)
        profiled = ProfileRun(
            rows=rows,
            sorters=min(1 << (rows - 1).bit_length(), setting.multiprocessors),
            workspace_bytes=setting.workspace_bytes,
            flush_bytes=setting.l2_bytes,
            compiled=setting.mode != "eager",
            experts_elements=workspace_elements(model, setting.capability),
            gpus=setting.tensor_parallel,
            later_stage=model.first_layer > 0,
            kept=kept_images(model, batched_tokens=tokens, dtype=setting.dtype),
        )
        program = vllm_program(model, setting.dtype, setting.kv_dtype, profiled)
        dims = Dims(batch=1, tokens=tokens, context=tokens)
        return [Phase(name="profile run", program=program, dims=dims)]

    def pool(
        self, share: Share, setting: Setting, gpu: Gpu, *, budget_bytes: int, held_bytes: int
    ) -> Pool | None:
        """Whole blocks out of budget − weights − profile-run peak − what grows outside torch.

        The context is not subtracted: 0.19 snapshots the device after creating it.
        """
        available = budget_bytes - held_bytes - growth_bytes(share, setting, gpu)
        if setting.cuda_graphs == "inside":
            available -= graphs_bytes(share, setting)
        shared = stage_layout(
            share.whole,
            share.blocks,
            block=setting.block_tokens,
            kv_dtype=setting.kv_dtype,
            compute_dtype=setting.dtype,
        )
        if shared is None:
            return None
        longest = setting.longest_tokens or setting.block_tokens
        return Pool(
            available_bytes=available,
            block_bytes=shared.block_bytes,
            groups=shared.groups,
            block_tokens=shared.shortest_block(longest),
            longest_blocks=shared.longest_blocks(
                longest, batched_tokens=setting.max_batched_tokens
            ),
            longest_tokens=longest,
        )

    def prefill(self, model: Model, work: Inference, setting: Setting) -> Program:
        """The whole prompt, logits of each sequence's last token."""
        return vllm_program(model, setting.dtype, setting.kv_dtype)

    def decode(self, model: Model, work: Inference, setting: Setting) -> Program:
        """One token for every sequence over the paged cache."""
        return vllm_program(model, setting.dtype, setting.kv_dtype, decodes=True)
