"""What is run, and on what: Inference, Training, Deployment, CacheSpec."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from planner.dtypes import COMPUTE_DTYPES, KV_DTYPES
from planner.errors import ConfigError, check_choice, check_flags, check_size, shown
from planner.routing import UNIFORM, Routing

CACHE_KINDS = ("dynamic", "static", "ring", "paged", "quantised")
CACHE_BACKENDS = ("quanto", "hqq")
CACHE_SCALES = ("token-head",)
QUANTISED_FIELDS = ("residual_tokens", "backend", "axis_key", "axis_value", "q_group_size")
SHARD_DTYPES = ("fp32", "bf16")
"""What data-parallel shards are kept and reduced in: fp16 would need a scaler."""
RESHARDED = ("all", "all-but-last", "none")
"""Which layers' gathered weights go after the forward."""
LOADED_DTYPES = ("fp8", "int8", "int4", "nf4", "nf4-double")
"""What some runtime quantises plain weights to while it loads them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheSpec:
    """How a runtime keeps its cache. A kind that the runtime lacks is refused by the runtime.

    `capacity_tokens` is what a static cache is allocated for (None: what the workload needs);
    `block_tokens` the page of a paged one. The rest sets a quantised one, by the names of
    transformers' QuantizedCache: `backend` quanto or hqq (None: the one that has the dtype, quanto
    first), `axis_key` and `axis_value` (None: 0), `q_group_size` (None: 64 elements share a scale)
    and `residual_tokens`, its residual_length (None: 128). The bits are those of the KV dtype. In
    attnlab it is KIVI's, which has the last two alone (None: groups of 32, 128 tokens).

    `scales`: "token-head", one for each token and head, or for `q_group_size` channels of it, in a
    cache of any other kind (attnlab). None: what the KV dtype needs; int8 and int4 cannot be
    without, fp8 is a plain cast.
    """

    kind: str
    block_tokens: int | None = None
    capacity_tokens: int | None = None
    residual_tokens: int | None = None
    backend: str | None = None
    axis_key: int | None = None
    axis_value: int | None = None
    q_group_size: int | None = None
    scales: str | None = None

    def __post_init__(self) -> None:
        check_choice("cache.kind", self.kind, CACHE_KINDS)
        if self.scales is not None:
            check_choice("cache.scales", self.scales, CACHE_SCALES)
        for field in ("scales",) if self.kind == "quantised" else QUANTISED_FIELDS:
            value = getattr(self, field)
            if value is not None and (field != "q_group_size" or self.scales is None):
                raise ConfigError(
                    f"cache.{field}={shown(value)} is not allowed: None for cache.kind="
                    f"{self.kind!r}"
                )
        for field in ("block_tokens", "capacity_tokens", "q_group_size"):
            value = getattr(self, field)
            if value is not None:
                check_size(f"cache.{field}", value)
        if self.residual_tokens is not None:
            check_size("cache.residual_tokens", self.residual_tokens, minimum=0)
        if self.backend is not None:
            check_choice("cache.backend", self.backend, CACHE_BACKENDS)
        for field in ("axis_key", "axis_value"):
            value = getattr(self, field)
            if value is not None:
                check_size(f"cache.{field}", value, minimum=-1, maximum=1)


def cache_spec(text: str) -> CacheSpec:
    """A CacheSpec written in one word: `quantised:backend=hqq,q_group_size=32`, or a kind alone."""
    kind, _, rest = text.partition(":")
    known = [field.name for field in fields(CacheSpec) if field.name != "kind"]
    settings: dict[str, str | int] = {}
    for part in rest.split(",") if rest else ():
        name, _, value = part.strip().partition("=")
        if name not in known or not value:
            raise ConfigError(
                f"cache={shown(text)} is not understood at {shown(part)}: KIND or "
                f"KIND:FIELD=VALUE,… with {', '.join(known)}"
            )
        digits = value.removeprefix("-")
        is_number = digits.isdecimal() and digits.isascii() and len(digits) <= 20
        settings[name] = int(value) if is_number else value
    return CacheSpec(kind=kind, **settings)  # type: ignore[arg-type]


def _check_routing(routing: object) -> None:
    if not isinstance(routing, Routing):
        raise ConfigError(f"routing={shown(routing)} is not allowed: a Routing")


@dataclass(frozen=True, kw_only=True, slots=True)
class Inference:
    """One prefill that yields the first output token, then output_tokens − 1 decode steps.

    `logits`: "all", a plain forward over the prompt; "last", what `generate` does.
    `encoder_tokens`: what a sequence-to-sequence model's encoder reads; None: as the prompt.
    `padded`: shorter sequences are padded, and an attention mask hides that (transformers).
    `float32_logits`: logits are cast, as transformers before 4.46 does to all of them.
    `routing`: how a mixture's tokens are dealt out to its experts; times depend on it alone.
    """

    batch: int
    prompt_tokens: int
    output_tokens: int = 1
    logits: Literal["all", "last"] = "all"
    encoder_tokens: int | None = None
    padded: bool = False
    float32_logits: bool = False
    routing: Routing = UNIFORM

    def __post_init__(self) -> None:
        _check_routing(self.routing)
        for field in ("batch", "prompt_tokens", "output_tokens"):
            check_size(field, getattr(self, field))
        check_choice("logits", self.logits, ("all", "last"))
        check_flags(self, "padded", "float32_logits")
        if self.encoder_tokens is not None:
            check_size("encoder_tokens", self.encoder_tokens)

    @property
    def context_tokens(self) -> int:
        """KV length when the last output token has been produced."""
        return self.prompt_tokens + self.output_tokens - 1

    @property
    def inputs_bytes(self) -> int:
        """The token ids of the prompts, int64; a mask of padding, as long as it gets."""
        mask_tokens = self.context_tokens if self.padded else 0
        return 8 * self.batch * (self.prompt_tokens + mask_tokens)

    @property
    def in_words(self) -> str:
        """What is run, for people."""
        return (
            f"batch {self.batch}, {self.prompt_tokens} prompt + {self.output_tokens} output tokens"
        )


MAX_GPUS = 65_536
LEAST_W, MOST_W = 50, 5000
"""Limits that a GPU's driver takes lie well inside."""

OPTIMIZERS = (
    "adamw",
    "sgd",
    "sgd-momentum",
    "adamw-8bit",
    "adafactor",
    "adafactor-transformers",
    "muon",
)
"""torch's with the arguments that they have by default (sgd has no momentum), bitsandbytes'
AdamW8bit, transformers' Adafactor as its Trainer sets it; muon: torch's for the matrices of hidden
layers, AdamW for all else."""
OWN_WAY = ("adamw-8bit", "adafactor-transformers")
"""Those to which `optimizer_impl` means nothing."""
OPTIMIZER_IMPLS = ("foreach", "fused", "for-loop")
MODES = ("graph", "captured", "eager")
PRECISIONS = ("pure", "autocast", "master")
CHECKPOINTING = ("none", "full", "selective")
ALL_LINEAR = "all-linear"
LOW_RANK = ("lora", "qlora")
METHODS = ("full", *LOW_RANK, "adapter", "adapter-v2")
FROZEN_PARTS = ("embeddings", "head")
"""What stands before the first layer; the head, which freezes the table that it is tied to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoRA:
    """Low-rank adapters as peft puts them in: nothing else is trained.

    `targets`: "all-linear", every linear layer but the head, or the last words of the names of
    some, "q_proj" say. `dtype`: what the adapters are kept and computed in; None: fp32, as peft
    does by default whatever the model's. `dora`: a magnitude is trained beside each, use_dora=True
    (arXiv:2402.09353).
    """

    rank: int = 8
    targets: str | tuple[str, ...] = ALL_LINEAR
    dtype: str | None = None
    dora: bool = False

    def __post_init__(self) -> None:
        check_size("lora.rank", self.rank)
        if not isinstance(self.dora, bool):
            raise ConfigError(f"lora.dora={shown(self.dora)} is not allowed: True or False")
        if self.targets != ALL_LINEAR:
            named = isinstance(self.targets, tuple) and all(
                isinstance(t, str) for t in self.targets
            )
            if not named or not self.targets:
                raise ConfigError(
                    f"lora.targets={shown(self.targets)} is not allowed: {ALL_LINEAR!r} or a tuple "
                    "of names"
                )
        if self.dtype is not None:
            check_choice("lora.dtype", self.dtype, COMPUTE_DTYPES)


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """One step: forward and backward in train mode, dropout 0, labels given, no cache.

    `.grad` is None before, and of the model's output only the loss is kept. `optimizer` None ends
    there; with one it is a step of the steady state, its states made before, gradients set to None
    after. `optimizer_impl` is how torch walks through the parameters (muon: AdamW's part).
    `method`, `checkpointing` and `precision` that a runtime does not plan are refused by it.
    `precision` "pure": all of it in the deployment's dtype; "autocast": weights, gradients and
    states in fp32 (of adapters; frozen weights stay in that dtype), torch.autocast to it around
    the forward; "master": weights and gradients in that dtype, of 16 bits, the optimizer steps fp32
    copies of them (planner/autograd/master_weights.py: in which order). Both scale the loss in fp16
    by a torch.amp.GradScaler. `checkpointing` "full": a
    layer keeps its input alone and runs again on the way back, the first one and every
    `checkpoint_every`-th after it; "selective": it runs again but for its linear layers and
    attention, of the former the first and each `keep_every`-th behind it alone (2: torchtitan's
    "op"). `loss_chunk_tokens`: logits and cross-entropy of so many tokens at a time; None: of
    all at once. `encoder_tokens`: what a sequence-to-sequence model's encoder reads; None: as many
    as the labels' `sequence_tokens`.
    `lora`: the adapters of methods "lora" and "qlora"; None: a LoRA() of all defaults. "qlora": the
    weights are of 4 bits, and prepare_model_for_kbit_training has made all others fp32. "adapter"
    and "adapter-v2": prefixes that LLaMA-Adapter trains, in its two versions (litgpt). `padded`:
    as of Inference. `accumulation_steps`: forwards and backwards, each of `batch` sequences and its
    loss dropped before the next, whose gradients are added up before the optimizer's step.
    `frozen`: FROZEN_PARTS that "full" does not train, `frozen_layers`: nor the first so many layers
    (requires_grad_(False); planner/trained/frozen.py: what each name stands for). `routing`: as of
    Inference.
    """

    batch: int
    sequence_tokens: int
    optimizer: str | None = "adamw"
    method: Literal["full", "lora", "qlora", "adapter", "adapter-v2"] = "full"
    checkpointing: Literal["none", "full", "selective"] = "none"
    precision: Literal["pure", "autocast", "master"] = "pure"
    optimizer_impl: Literal["foreach", "fused", "for-loop"] = "foreach"
    encoder_tokens: int | None = None
    lora: LoRA | None = None
    padded: bool = False
    accumulation_steps: int = 1
    checkpoint_every: int = 1
    loss_chunk_tokens: int | None = None
    keep_every: int = 1
    frozen: tuple[str, ...] = ()
    frozen_layers: int = 0
    routing: Routing = UNIFORM

    def __post_init__(self) -> None:
        _check_routing(self.routing)
        self._check_frozen()
        sizes = ("batch", "sequence_tokens", "accumulation_steps", "checkpoint_every", "keep_every")
        for field in sizes:
            check_size(field, getattr(self, field))
        check_flags(self, "padded")
        if self.keep_every != 1 and self.checkpointing != "selective":
            raise ConfigError(
                f"keep_every={self.keep_every} is not allowed: 1 for checkpointing="
                f"{self.checkpointing!r}, any for 'selective'"
            )
        if self.optimizer is not None:
            check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_choice("method", self.method, METHODS)
        if self.lora is not None and (
            not isinstance(self.lora, LoRA) or self.method not in LOW_RANK
        ):
            raise ConfigError(
                f"lora={shown(self.lora)} is not allowed: None for method={self.method!r}, "
                "a LoRA for 'lora'"
            )
        check_choice("checkpointing", self.checkpointing, CHECKPOINTING)
        if self.checkpoint_every != 1 and self.checkpointing != "full":
            raise ConfigError(
                f"checkpoint_every={self.checkpoint_every} is not allowed: 1 for checkpointing="
                f"{self.checkpointing!r}, any for 'full'"
            )
        if self.loss_chunk_tokens is not None:
            check_size("loss_chunk_tokens", self.loss_chunk_tokens)
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("optimizer_impl", self.optimizer_impl, OPTIMIZER_IMPLS)
        if self.optimizer == "adafactor" and self.optimizer_impl == "fused":
            raise ConfigError(
                "optimizer_impl='fused' is not what optimizer='adafactor' has: foreach, for-loop"
            )
        if self.encoder_tokens is not None:
            check_size("encoder_tokens", self.encoder_tokens)

    def _check_frozen(self) -> None:
        if not isinstance(self.frozen, tuple):
            raise ConfigError(
                f"frozen={shown(self.frozen)} is not allowed: a tuple of {', '.join(FROZEN_PARTS)}"
            )
        for name in self.frozen:
            check_choice("frozen", name, FROZEN_PARTS)
        if len(set(self.frozen)) != len(self.frozen):
            raise ConfigError(f"frozen={self.frozen!r} is not allowed: each name once")
        check_size("frozen_layers", self.frozen_layers, minimum=0)
        if self.freezes and self.method != "full":
            raise ConfigError(
                f"frozen={self.frozen!r} with frozen_layers={self.frozen_layers} is not allowed: "
                f"none for method={self.method!r}, which freezes the weights itself; any for 'full'"
            )

    @property
    def freezes(self) -> bool:
        """Whether some parts of the model stay as they are."""
        return bool(self.frozen or self.frozen_layers)

    def held_dtype(self, dtype: str) -> str:
        """What weights and gradients are kept in, computing in `dtype`."""
        whole = self.precision == "autocast" and self.method == "full"
        return "fp32" if whole or self.method == "qlora" else dtype

    def scales_loss(self, dtype: str) -> bool:
        """Whether a GradScaler keeps small gradients of float16 from vanishing."""
        return self.precision != "pure" and dtype == "fp16"

    @property
    def steps_copies(self) -> bool:
        """Whether an optimizer steps master weights."""
        return self.precision == "master" and self.optimizer is not None

    @property
    def adapters(self) -> LoRA | None:
        """The low-rank adapters that are trained; None where none are."""
        return self.lora or LoRA() if self.method in LOW_RANK else None

    @property
    def inputs_bytes(self) -> int:
        """Token ids and labels, int64."""
        return 16 * self.batch * self.sequence_tokens

    @property
    def in_words(self) -> str:
        """What is run, for people."""
        optimizer = "no optimizer"
        if self.optimizer is not None:
            optimizer = self.optimizer
            if optimizer not in OWN_WAY:
                optimizer = f"{optimizer} ({self.optimizer_impl})"
        method = ""
        if self.adapters is not None:
            named = "dora" if self.adapters.dora else self.method
            method = f"{named} of rank {self.adapters.rank}, "
        elif self.method != "full":
            method = f"{self.method}, "
        words = {"pure": "", "autocast": "autocast, ", "master": "master weights, "}
        return (
            f"one training step of batch {self.batch} × {self.sequence_tokens} tokens, {method}"
            f"{self._frozen}{words[self.precision]}{self._checkpointing}{optimizer}"
        )

    @property
    def _frozen(self) -> str:
        if not self.freezes:
            return ""
        layers = self.frozen_layers
        first = {0: (), 1: ("the first layer",)}.get(layers, (f"the first {layers} layers",))
        return f"{' and '.join((*self.frozen, *first))} frozen, "

    @property
    def _checkpointing(self) -> str:
        if self.checkpointing == "none":
            return ""
        every = "" if self.checkpoint_every == 1 else f", every {self.checkpoint_every} layers"
        if self.keep_every != 1:
            every = f" of every {self.keep_every} products"
        return f"checkpointing {self.checkpointing}{every}, "


@dataclass(frozen=True, kw_only=True, slots=True)
class Deployment:
    """The GPU, the runtime on it and how it is set. None: what the model or the runtime takes.

    `mode` is how steps are launched: one kernel at a time ("eager"), those same kernels replayed by
    a CUDA graph ("captured"), or as the runtime makes its graphs ("graph"): attnlab's are compiled
    first, which fuses what only moves bytes (as gpt-fast does); the others' are captured.
    `weight_dtype`: what plain weights are quantised to on loading (fp8 in vllm; int8, nf4,
    nf4-double in transformers), in place of `dtype`. `kv_dtype`: what keys and values are kept in;
    where a plain cache keeps what is computed (transformers), another dtype takes a quantised one.
    `gpus` are those of the layout (1: as many as that): `tensor_parallel` · `pipeline_parallel`,
    which vllm alone plans yet, or `data_parallel_shards`, GPUs with batches of their own among
    which training divides weights, gradients and states (torch's fully_shard; transformers): they
    are kept in `weight_dtype` (None: `dtype`), gathered in `dtype` and reduced in `reduce_dtype`;
    layers that `reshard_after_forward` does not name stay gathered until the way back (torchtitan
    keeps the last one). The last six are vllm's: of the memory it takes `memory_utilization`, of a
    sequence at most `max_model_tokens`. `cuda_graphs` "inside": the pool pays for them, as with
    VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS=1 and by default since 0.21.
    `host_add_s`: how fast the host issues ops, as the seconds of `x + x` over 64 elements on the
    GPU, in a loop (profiles/meters.py); None: as fast as the one whose op times are known.
    `power_limit_w`: watts that the GPU is held to (nvidia-smi -pl); None: its TDP.
    """

    gpu: str
    gpus: int = 1
    runtime: str = "transformers"
    attention: str | None = None
    dtype: str | None = None
    weight_dtype: str | None = None
    kv_dtype: str | None = None
    cache: CacheSpec | None = None
    mode: Literal["graph", "captured", "eager"] = "graph"
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    data_parallel_shards: int = 1
    reshard_after_forward: Literal["all", "all-but-last", "none"] = "all"
    reduce_dtype: str = "fp32"
    memory_utilization: float = 0.9
    max_model_tokens: int | None = None
    max_batched_tokens: int | None = None
    max_sequences: int | None = None
    block_tokens: int = 16
    cuda_graphs: Literal["outside", "inside"] = "outside"
    host_add_s: float | None = None
    power_limit_w: float | None = None

    def __post_init__(self) -> None:
        if self.dtype is not None:
            check_choice("dtype", self.dtype, COMPUTE_DTYPES)
        if self.kv_dtype is not None:
            check_choice("kv_dtype", self.kv_dtype, KV_DTYPES)
        if self.weight_dtype is not None:
            check_choice("weight_dtype", self.weight_dtype, (*COMPUTE_DTYPES, *LOADED_DTYPES))
        check_choice("mode", self.mode, MODES)
        host = self.host_add_s
        if host is not None and not (isinstance(host, int | float) and 0 < host < 1):
            raise ConfigError(
                f"host_add_s={shown(self.host_add_s)} is not allowed: seconds, 0 to 1"
            )
        self._check_power()
        check_choice("cuda_graphs", self.cuda_graphs, ("outside", "inside"))
        if self.cache is not None and not isinstance(self.cache, CacheSpec):
            raise ConfigError(f"cache={shown(self.cache)} is not allowed: a CacheSpec or None")
        self._check_layout()
        check_size("block_tokens", self.block_tokens)
        for field in ("max_batched_tokens", "max_sequences", "max_model_tokens"):
            if getattr(self, field) is not None:
                check_size(field, getattr(self, field))
        batched, sequences = self.max_batched_tokens, self.max_sequences
        if batched is not None and sequences is not None and batched < sequences:
            raise ConfigError(
                f"max_batched_tokens={batched} is less than max_sequences={sequences}: "
                "vLLM refuses to start"
            )
        utilization = self.memory_utilization
        known = isinstance(utilization, int | float) and not isinstance(utilization, bool)
        if not known or not 0 < utilization <= 1:
            raise ConfigError(
                f"memory_utilization={utilization!r} is not allowed: above 0, at most 1"
            )

    @property
    def world_size(self) -> int:
        """GPUs that one copy of the model is spread over."""
        return self.tensor_parallel * self.pipeline_parallel * self.data_parallel_shards

    def _check_power(self) -> None:
        watts = self.power_limit_w
        known = isinstance(watts, int | float) and not isinstance(watts, bool)
        if watts is not None and not (known and LEAST_W <= watts <= MOST_W):
            raise ConfigError(
                f"power_limit_w={shown(watts)} is not allowed: watts, {LEAST_W} to {MOST_W}"
            )

    def _check_layout(self) -> None:
        for field in ("gpus", "tensor_parallel", "pipeline_parallel", "data_parallel_shards"):
            check_size(field, getattr(self, field), maximum=MAX_GPUS)
        for field in ("tensor_parallel", "pipeline_parallel"):
            planned = ("vllm", "attnlab") if field == "tensor_parallel" else ("vllm",)
            if getattr(self, field) != 1 and self.runtime not in planned:
                raise ConfigError(
                    f"{field}={getattr(self, field)} is not planned yet for runtime="
                    f"{self.runtime}: 1 (one GPU), or runtime=vllm"
                )
        self._check_shards()
        if self.gpus not in (1, self.world_size):
            raise ConfigError(
                f"gpus={self.gpus} is not planned yet: tensor_parallel · pipeline_parallel · "
                f"data_parallel_shards = {self.world_size}, no copies of the model"
            )

    def _check_shards(self) -> None:
        check_choice("reduce_dtype", self.reduce_dtype, SHARD_DTYPES)
        check_choice("reshard_after_forward", self.reshard_after_forward, RESHARDED)
        n = self.data_parallel_shards
        if n == 1:
            return
        if self.runtime != "transformers":
            raise ConfigError(
                f"data_parallel_shards={n} is not planned for runtime={self.runtime}: 1, or "
                "transformers"
            )
        if self.weight_dtype is not None:
            check_choice("weight_dtype", self.weight_dtype, SHARD_DTYPES)
