"""The model that is run, with random weights, behind one small interface for each runtime.

Nothing is downloaded and no code of a model repository is run: a config is all that is needed, for
neither memory nor the time of a dense model depends on the values of its weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from planner import CacheSpec, ConfigError, Model
from planner.errors import check_choice
from planner.runtimes.transformers import cache_kind
from profiles.meters import module_bytes, tensor_bytes
from profiles.points import kept_dtype

Logits = Literal["last", "all"]

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

TRANSFORMERS_ATTENTION = ("sdpa", "eager")
"""Those that are part of torch; other names may make transformers look for a kernel on the hub."""


TRAINED_ALONE = {"bert": "BertForMaskedLM", "t5": "T5ForConditionalGeneration"}
"""Types that no AutoModelForCausalLM is for, and the class whose training is measured."""


def check_generates(model_type: str) -> None:
    """ConfigError for a type whose training alone is measured."""
    if model_type in TRAINED_ALONE:
        raise ConfigError(f"inference of model_type={model_type!r} is not measured: training alone")


class Workload(ABC):
    """A built model and its cache. Order: `begin`, `prefill`, `decode` …, then `reset` or `end`."""

    distribution: str  # the installed package whose version is the runtime's
    attention: str
    experts: str | None = None
    """What multiplies a mixture's experts, where the runtime says it."""
    module: torch.nn.Module
    vocab_size: int

    @property
    def weights_bytes(self) -> int:
        """Parameters (tied once) and buffers of the live module."""
        return module_bytes(self.module)

    def hide(self, mask: Tensor) -> None:
        """Attend to no padding from now on: int64 [batch, the longest context], 0 on padding."""
        raise ConfigError(f"padded=True is not measured in {self.distribution}: transformers")

    @abstractmethod
    def begin(self, *, batch: int, capacity_tokens: int) -> None:
        """Make an empty cache; the runtimes that preallocate do so for `capacity_tokens`."""

    @abstractmethod
    def forward(self, ids: Tensor, logits: Logits) -> Tensor:
        """Logits of tokens [B, T] that follow the cached ones: [B, T, V], "last" [B, 1, V]."""

    @abstractmethod
    def reset(self) -> None:
        """Forget the cached tokens; what is preallocated stays."""

    @abstractmethod
    def end(self) -> None:
        """Release the cache."""

    @abstractmethod
    def kv_cache_bytes(self) -> int:
        """numel × itemsize of the cache's live tensors."""

    @torch.no_grad()
    def tokens(self, ids: Tensor, *, output_tokens: int, logits: Logits) -> Iterator[Tensor]:
        """Each greedy token [B, 1] as its pass ends: the prefill's, then the decode steps'."""
        for _ in range(output_tokens):
            ids = self.forward(ids, logits)[:, -1:].argmax(-1)
            yield ids


class AttnlabWorkload(Workload):
    """Our own transformer over the cache that is asked for; none is: a preallocated one."""

    distribution = "transformer-planner"

    def __init__(
        self,
        model: Model,
        *,
        attention: str | None,
        dtype: str,
        device: torch.device,
        kv_dtype: str | None = None,
        cache: CacheSpec | None = None,
    ) -> None:
        from attnlab.backend import experts_name
        from attnlab.caches import build_cache
        from attnlab.transformer import Transformer

        in_dtype = TORCH_DTYPES[dtype]
        self.vocab_size = model.vocab_size
        self._make_cache = partial(
            build_cache, model, cache, dtype=in_dtype, device=device, kv_dtype=kv_dtype
        )
        self._cache: Any = None
        self._transformer = Transformer(
            model, attention=attention, dtype=in_dtype, device=device
        ).eval()
        self.module = self._transformer
        self.attention = self._transformer.attention
        self.experts = experts_name(self._transformer)

    def begin(self, *, batch: int, capacity_tokens: int) -> None:
        """Preallocate keys and values of every layer, in a cache that does."""
        self._cache = self._make_cache(batch=batch, tokens=capacity_tokens)

    def forward(self, ids: Tensor, logits: Logits) -> Tensor:
        """One pass of the transformer, its cache filled."""
        out: Tensor = self._transformer(ids, cache=self._cache, logits=logits)
        return out

    def reset(self) -> None:
        """Start the cache from its front again."""
        if self._cache is not None:
            self._cache.reset()

    def end(self) -> None:
        """Release the cache."""
        self._cache = None

    def kv_cache_bytes(self) -> int:
        """Bytes of the cache's tensors, filled or not."""
        return 0 if self._cache is None else self._cache.nbytes


class TransformersWorkload(Workload):
    """The class that transformers has for the config, over a DynamicCache or what is asked for."""

    distribution = "transformers"

    def __init__(
        self,
        model: Model,
        *,
        attention: str | None,
        dtype: str,
        device: torch.device,
        kv_dtype: str | None = None,
        cache: CacheSpec | None = None,
    ) -> None:
        import transformers

        hub: Any = transformers  # without annotations
        config = model.config
        self._kind = cache_kind(cache, kept_dtype(dtype, kv_dtype, cache), dtype)
        if self._kind == "quantised" and kept_dtype(dtype, kv_dtype, cache) != "fp8":
            raise ConfigError(
                f"kv_dtype={kept_dtype(dtype, kv_dtype, cache)} is not measured in transformers: "
                "fp8 (the kernels of other backends are compiled where they run)"
            )
        if attention is not None:
            check_choice("attention", attention, TRANSFORMERS_ATTENTION)
        if not model.lm_head:
            raise ConfigError("lm_head=False is not measured: a causal language model")
        if config.get("quantization_config") is not None:
            raise ConfigError("quantization_config is not measured: weights are built in one dtype")
        for name in ("auto_map", "_name_or_path", "dtype", "torch_dtype", "attn_implementation"):
            config.pop(name, None)
        config = hub.AutoConfig.for_model(config.pop("model_type"), **config)
        named = TRAINED_ALONE.get(model.model_type)
        self._model_type = model.model_type
        make = hub.AutoModelForCausalLM.from_config if named is None else _maker(hub, model, named)
        with device:
            built = make(config, dtype=TORCH_DTYPES[dtype], attn_implementation=attention).eval()
        self.module, self.vocab_size = built, model.vocab_size
        makers: dict[str, Callable[[int], Any]] = {
            "dynamic": lambda tokens: hub.DynamicCache(config=built.config),
            "static": lambda tokens: hub.StaticCache(config=built.config, max_cache_len=tokens),
            "quantised": lambda tokens: hub.QuantizedCache("fp8", built.config),
        }
        self._make_cache = makers[self._kind]
        self._capacity = None if cache is None else cache.capacity_tokens
        self._cache: Any = None
        self._mask: Tensor | None = None
        self._tokens = 0
        self.attention = str(built.config._attn_implementation)
        self.loss_arguments = {} if model.model_type == "bert" else {"use_cache": False}

    def hide(self, mask: Tensor) -> None:
        """As Workload.hide: each pass is given the mask of the tokens so far."""
        self._mask = mask

    def begin(self, *, batch: int, capacity_tokens: int) -> None:
        """An empty cache: it grows by concatenation, or takes its room in the first pass."""
        check_generates(self._model_type)
        self._tokens = 0
        self._cache = self._make_cache(self._capacity or capacity_tokens)

    def forward(self, ids: Tensor, logits: Logits) -> Tensor:
        """One call of the model, as `generate` makes it."""
        self._tokens += ids.shape[1]
        out: Tensor = self.module(
            ids,
            attention_mask=None if self._mask is None else self._mask[:, : self._tokens],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1 if logits == "last" else 0,
        ).logits
        return out

    def reset(self) -> None:
        """A new cache where this one cannot be emptied in place: one that grows."""
        self._tokens = 0
        if self._kind == "static":
            self._cache.reset()
        else:
            self._cache = self._make_cache(0)

    def end(self) -> None:
        """Release the cache."""
        self._cache = None

    def kv_cache_bytes(self) -> int:
        """Bytes of what is visible of keys, values and states, not of the storages behind them."""
        layers = () if self._cache is None else self._cache.layers
        return tensor_bytes(t for layer in layers for t in _cached(layer))


def _maker(hub: Any, model: Model, named: str) -> Callable[..., Any]:
    """What makes the class that the config has to name."""
    if (model.config.get("architectures") or [named])[0] != named:
        raise ConfigError(f"architectures of model_type={model.model_type!r} not measured: {named}")
    make: Callable[..., Any] = getattr(hub, named)._from_config
    return make


def _cached(layer: Any) -> Iterator[Tensor]:
    """A layer's tensors: keys and values, or a mixer's states, or both (falcon_h1).

    Where keys and values are quantised, codes and scales of them; the plain ones are empty then.
    """
    for name in ("keys", "values"):
        if (held := getattr(layer, name, None)) is not None:
            yield held
        yield from getattr(layer, f"_quantized_{name}", None) or ()
    for name in ("conv_states", "recurrent_states"):
        states = getattr(layer, name, {})
        yield from (state for state in states.values() if state is not None)


RUNTIMES: dict[str, type[AttnlabWorkload] | type[TransformersWorkload]] = {
    "attnlab": AttnlabWorkload,
    "transformers": TransformersWorkload,
}


def build(
    model: Model,
    *,
    runtime: str,
    attention: str | None,
    dtype: str,
    device: torch.device,
    kv_dtype: str | None = None,
    cache: CacheSpec | None = None,
) -> Workload:
    """The model on the device, directly in `dtype`, in evaluation mode.

    `kv_dtype` and `cache` as of a Deployment.
    """
    check_choice("runtime", runtime, RUNTIMES)
    check_choice("dtype", dtype, TORCH_DTYPES)
    return RUNTIMES[runtime](
        model, attention=attention, dtype=dtype, device=device, kv_dtype=kv_dtype, cache=cache
    )


def attention_name(asked: str, passes: list[set[str]]) -> str:
    """The backend by its real name, from the aten ops of each kind of pass: "sdpa:flash+math".

    sdpa's kernels are ops of their own; the math backend has none and shows by their absence.
    """
    if asked != "sdpa":
        return asked
    prefix, suffix = "_scaled_dot_product_", "_attention"
    names = set()
    for ops in passes:
        fused = {op.removeprefix(prefix).split(".")[0] for op in ops if op.startswith(prefix)}
        names |= {op.replace(suffix, "").replace("_for", "") for op in fused} or {"math"}
    return "sdpa:" + "+".join(sorted(names))
