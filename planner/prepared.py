"""A model made ready for a deployment: what does not depend on the sizes of the workload.

From here on an estimate and a grid of them go the same way: `cache_rows`, `phases` and the rows of
weights and overhead are asked for one workload, or for many at once (sizes that are arrays).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from planner.catalog.gpus import Gpu, gpu_named
from planner.errors import MAX_SIZE, ConfigError, check_kind
from planner.ledger import Row
from planner.model import Model
from planner.overhead import overhead_rows, workspace_bytes
from planner.parallel import Share
from planner.quantization.gguf import Gguf
from planner.quantization.on_load import quantised_on_load
from planner.quantization.unpacked import unpacked_on
from planner.runtimes import runtime_named
from planner.runtimes.base import Phase, Pool, Runtime, Setting
from planner.runtimes.quantised_cache import DEFAULT_DTYPE
from planner.runtimes.vllm import batch_limits
from planner.runtimes.vllm_groups import DEFAULT_BLOCK_TOKENS
from planner.runtimes.vllm_overhead import outside_rows
from planner.trained.sharding import Sharding
from planner.weights import weight_rows
from planner.workload import CacheSpec, Deployment, Inference, Training


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """`model` as the runtime holds it, on its GPUs, with every default filled in."""

    model: Model
    deploy: Deployment
    runtime: Runtime
    gpu: Gpu
    setting: Setting
    cache: CacheSpec | None
    weights_note: str
    peak_note: str

    @property
    def apart(self) -> bool:
        """Whether the cache lies apart from what the programs hold: a pool, or not torch's."""
        return self.runtime.pooled or not self.runtime.on_torch

    def shares(self) -> tuple[Share, ...]:
        """What one GPU of each kind holds of the model."""
        layout = self.deploy.tensor_parallel, self.deploy.pipeline_parallel
        return self.runtime.shares(self.model, *layout)

    def fixed_rows(self, share: Share) -> tuple[list[Row], list[Row]]:
        """Weights and overhead of one GPU: the same for every workload."""
        weights = weight_rows(
            share.model,
            self.runtime,
            self.setting.dtype,
            note="; ".join(filter(None, (self.weights_note, share.in_words))),
            capability=self.setting.capability,
        )
        on_torch, pooled = self.runtime.on_torch, self.runtime.pooled
        attention = self.setting.attention if on_torch and not pooled else None
        overhead = list(overhead_rows(self.gpu, attention=attention, dtype=self.setting.dtype))
        if pooled:
            overhead += outside_rows(share, self.setting, self.gpu)
        return weights, overhead

    def cache_rows(self, share: Share, work: Inference) -> list[Row]:
        """The finished cache of a workload on one GPU."""
        return self.runtime.cache_rows(
            share.whole,
            batch=work.batch,
            context_tokens=work.context_tokens,
            dtype=self.setting.kv_dtype,
            cache=self.cache,
            encoder_tokens=self.model.encoder_length(work.encoder_tokens, work.prompt_tokens),
            compute_dtype=self.setting.dtype,
            decoded_tokens=work.output_tokens - 1,
            blocks=share.blocks,
        )

    def phases(self, share: Share, work: Inference) -> list[Phase]:
        """The passes among which the peak lies."""
        return self.runtime.memory_phases(share.model, work, self.setting)

    def pool(self, share: Share, *, held_bytes: int) -> Pool | None:
        """vllm's pool beside weights and the profile run's peak; None elsewhere."""
        budget = int(self.gpu.memory_bytes * self.deploy.memory_utilization)
        return self.runtime.pool(
            share, self.setting, self.gpu, budget_bytes=budget, held_bytes=held_bytes
        )

    def longest_context_tokens(self) -> int:
        """The longest context that is not refused."""
        limit = self.model.max_position_embeddings or MAX_SIZE
        if self.runtime.pooled and self.deploy.max_model_tokens is not None:
            limit = min(limit, self.deploy.max_model_tokens - 1)
        return limit

    def check(self, work: Inference) -> None:
        """ConfigError for a context beyond the model's positions or what an engine is set to."""
        self.model.check_positions(work.context_tokens)
        check_padded(work, self.runtime.name)
        if self.runtime.pooled:
            _check_served(work, self.deploy)


def check_asked(model: Model, work: Inference | Training, deploy: Deployment) -> None:
    """ConfigError for a question put with something else, such as a model's name."""
    check_kind("model", model, Model)
    check_kind("work", work, Inference, Training)
    check_kind("deploy", deploy, Deployment)


def prepare(model: Model, deploy: Deployment) -> Prepared:
    """Make ready; ConfigError for what the runtime does not run."""
    if deploy.data_parallel_shards > 1:
        raise ConfigError(
            f"data_parallel_shards={deploy.data_parallel_shards} is not planned for inference: 1"
        )
    runtime, gpu = runtime_named(deploy.runtime), gpu_named(deploy.gpu)
    checkpoint = as_loaded(model, deploy)
    model = _as_held(checkpoint, deploy, gpu)
    setting = setting_of(model, deploy, runtime, gpu)
    cache = deploy.cache
    if runtime.pooled and (cache is None or cache.kind == "paged"):
        cache = replace(cache or CacheSpec(kind="paged"), block_tokens=setting.block_tokens)
    note = runtime.peak_note(model) or _quantised_note(model) or runtime.cache_note(setting)
    return Prepared(
        model=model,
        deploy=deploy,
        runtime=runtime,
        gpu=gpu,
        setting=setting,
        cache=cache,
        weights_note="" if model is checkpoint else _unpacked_note(checkpoint, gpu),
        peak_note=note,
    )


def check_padded(work: Inference | Training, runtime: str) -> None:
    """ConfigError for padding, or logits that are cast, in a runtime whose programs know none."""
    if work.padded and runtime != "transformers":
        raise ConfigError(f"padded=True is not planned for runtime={runtime}: transformers")
    if isinstance(work, Inference) and work.float32_logits and runtime != "transformers":
        raise ConfigError(f"float32_logits=True is not in runtime={runtime}: transformers")


def check_accumulation(work: Training, runtime: str) -> None:
    """ConfigError for accumulated gradients in a runtime whose programs know none."""
    if work.accumulation_steps > 1 and runtime != "transformers":
        raise ConfigError(
            f"accumulation_steps={work.accumulation_steps} is not planned for runtime={runtime}: "
            "1, or transformers"
        )


def check_unfrozen(work: Training, runtime: str) -> None:
    """ConfigError for frozen parts in a runtime whose programs train all."""
    if work.freezes and runtime != "transformers":
        raise ConfigError(
            f"frozen={work.frozen!r} with frozen_layers={work.frozen_layers} is not planned for "
            f"runtime={runtime}: none, or transformers"
        )


def setting_of(model: Model, deploy: Deployment, runtime: Runtime, gpu: Gpu) -> Setting:
    """The deployment with its defaults filled in."""
    dtype = deploy.dtype or model.dtype
    longest = deploy.max_model_tokens or model.max_position_embeddings
    batched, sequences = batch_limits(
        gpu,
        longest_tokens=longest,
        max_batched_tokens=deploy.max_batched_tokens,
        max_sequences=deploy.max_sequences,
    )
    quantised = deploy.cache is not None and deploy.cache.kind == "quantised"
    return Setting(
        attention=runtime.attention(model, deploy.attention),
        dtype=dtype,
        kv_dtype=deploy.kv_dtype or (DEFAULT_DTYPE if quantised else dtype),
        device="cpu" if gpu.is_cpu else "cuda",
        max_batched_tokens=batched,
        max_sequences=sequences,
        multiprocessors=gpu.multiprocessors or 0,
        block_tokens=_block_tokens(deploy),
        cache=deploy.cache,
        mode=deploy.mode,
        cuda_graphs=deploy.cuda_graphs,
        workspace_bytes=workspace_bytes(gpu),
        l2_bytes=gpu.l2_bytes or 0,
        capability=gpu.compute_capability,
        longest_tokens=longest,
        tensor_parallel=deploy.tensor_parallel,
        pipeline_parallel=deploy.pipeline_parallel,
        host_add_s=deploy.host_add_s,
        power_limit_w=deploy.power_limit_w,
        sharding=_sharding(deploy, dtype),
    )


def _sharding(deploy: Deployment, dtype: str) -> Sharding | None:
    if deploy.data_parallel_shards == 1:
        return None
    return Sharding(
        shards=deploy.data_parallel_shards,
        held_dtype=deploy.weight_dtype or dtype,
        reduce_dtype=deploy.reduce_dtype,
        reshards=deploy.reshard_after_forward,
    )


def as_loaded(model: Model, deploy: Deployment) -> Model:
    """The model with the weights that the runtime makes of it on loading, or as it has them."""
    wanted = deploy.weight_dtype
    if wanted in (None, deploy.dtype or model.dtype) or deploy.data_parallel_shards > 1:
        return model
    made = quantised_on_load(deploy.runtime, str(wanted))
    if model.quantization not in (None, made):
        raise ConfigError(
            f"weight_dtype={wanted!r} is not allowed: the checkpoint is quantised already "
            f"({model.quantization.method})"
        )
    return replace(model, quantization=made)


def _as_held(model: Model, deploy: Deployment, gpu: Gpu) -> Model:
    """The model with plain weights, where transformers dequantises them for want of kernels."""
    quantization = model.quantization
    if deploy.runtime != "transformers" or quantization is None:
        return model
    if isinstance(quantization, Gguf):  # modeling_gguf_pytorch_utils.py: always
        return replace(model, quantization=None)
    return replace(model, quantization=None) if unpacked_on(gpu, quantization.method) else model


def _unpacked_note(checkpoint: Model, gpu: Gpu) -> str:
    assert checkpoint.quantization is not None
    method = checkpoint.quantization.method
    return f"dequantised on loading: transformers 5.23 runs no {method} kernels on {gpu.label}"


def _quantised_note(model: Model) -> str:
    """What is left out of the peak and the times of quantised weights."""
    if model.quantization is None:
        return ""
    return f"approximate: the scratch of {model.quantization.method} kernels is not planned"


def _check_served(work: Inference, deploy: Deployment) -> None:
    """ConfigError for a sequence longer than the engine is set to take."""
    longest = deploy.max_model_tokens
    tokens = work.prompt_tokens + work.output_tokens
    if longest is not None and tokens > longest:
        raise ConfigError(
            f"prompt_tokens + output_tokens = {tokens} is more than max_model_tokens={longest}"
        )


def _block_tokens(deploy: Deployment) -> int:
    """The page of a paged cache, said once."""
    paged = deploy.cache.block_tokens if deploy.cache is not None else None
    if paged is None:
        return deploy.block_tokens
    if deploy.block_tokens not in (paged, DEFAULT_BLOCK_TOKENS):
        raise ConfigError(
            f"cache.block_tokens={paged} contradicts block_tokens={deploy.block_tokens}"
        )
    return paged
