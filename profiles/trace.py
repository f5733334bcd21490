"""What the planner has no reader for, read off the class itself: transformers on fake tensors.

Nothing is downloaded, no code of a model repository runs, no weight is allocated. Parameters come
from the module tree; cache and peak from a real forward whose tensors have shapes and no values.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any

from planner import ConfigError
from planner.dtypes import from_torch_name
from planner.errors import check_size, shown

if TYPE_CHECKING:
    import pandas as pd

IGNORED = ("auto_map", "_name_or_path", "attn_implementation", "quantization_config", "torch_dtype")
CAUSAL, TEXT_OF_IMAGES, SEQ2SEQ, SPEECH, BARE = (
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSpeechSeq2Seq",
    "AutoModel",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TracedModel:
    """Parameters and cache of a class of transformers: traced, not predicted."""

    name: str
    model_type: str
    class_name: str
    transformers: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    dtype: str
    config_json: str

    @property
    def parameter_count(self) -> int:
        """Trained elements, tied weights once."""
        return sum(prod(shape) for _, shape in self.shapes)

    def parameter_table(self) -> pd.DataFrame:
        """A row for each trained tensor: name, shape, count."""
        import pandas as pd

        rows = [(name, shape, prod(shape)) for name, shape in self.shapes]
        return pd.DataFrame(rows, columns=["name", "shape", "count"])

    def weights_bytes(self, dtype: str | None = None) -> int:
        """Parameters and buffers, in the dtypes that the class gives them under `dtype`."""
        module = _built(self.config_json, dtype or self.dtype, False)
        held = {id(t): t for t in (*module.parameters(), *module.buffers())}
        return sum(t.numel() * t.element_size() for t in held.values())

    def kv_cache_bytes(self, *, batch: int, context_tokens: int, dtype: str = "bf16") -> int:
        """numel · itemsize of the cache's tensors after a prefill of `context_tokens`.

        Recurrent states in the dtype that the class keeps them in; 0 for encoders. Raises
        ConfigError for a class whose forward needs values, which fake tensors do not have.
        """
        check_size("batch", batch)
        check_size("context_tokens", context_tokens)
        return _cache_bytes(self.config_json, batch, context_tokens, dtype)

    def peak_bytes(
        self,
        *,
        batch: int,
        prompt_tokens: int,
        output_tokens: int = 1,
        logits: str = "all",
        dtype: str | None = None,
    ) -> int:
        """The most that storages created by prefill or a decode step hold, cache included.

        Every op of the class's forward runs on fake tensors under profiles.meters; composite
        kernels are those of a CPU. The decode step is the last one, over a cache made in one
        prefill. Raises ConfigError as `kv_cache_bytes` does.
        """
        from profiles.meters import LiveTensorMeter

        module = _built(self.config_json, dtype or self.dtype, True)
        takes = inspect.signature(module.forward).parameters
        last = {"logits_to_keep": 1} if logits == "last" and "logits_to_keep" in takes else {}
        cache_argument = "cache_params" if "cache_params" in takes else "past_key_values"
        passes = [(prompt_tokens, 0)]
        if output_tokens > 1:
            passes += [(prompt_tokens, 1), (prompt_tokens + output_tokens - 2, 1)]
        peak = 0
        for tokens, steps in dict.fromkeys(passes):
            prompt, token = _inputs(module, batch, tokens), _inputs(module, batch, 1)
            with LiveTensorMeter() as meter:
                made = _forward(module, {**prompt, **last})
                for _ in range(steps if _cache(made) is not None else 0):
                    cache, made = _cache(made), None
                    meter.reset_peak()
                    made = _forward(module, {**token, cache_argument: cache})
                peak = max(peak, meter.peak_bytes)
                del made
        return peak


def trace(config: Mapping[str, Any], *, name: str | None = None) -> TracedModel:
    """The class that transformers has for this config, built on the meta device.

    Raises ConfigError in one line for a type that transformers does not know, too, or that it
    cannot build from this config.
    """
    text = json.dumps(dict(config), sort_keys=True)
    dtype = from_torch_name(
        config.get("dtype", config.get("torch_dtype")) or "float32", field="dtype"
    )
    module = _built(text, dtype, False)
    import transformers

    return TracedModel(
        name=name or str(config.get("model_type")),
        model_type=str(config.get("model_type")),
        class_name=type(module).__name__,
        transformers=transformers.__version__,
        shapes=tuple((name, tuple(p.shape)) for name, p in module.named_parameters()),
        dtype=dtype,
        config_json=text,
    )


@lru_cache(maxsize=4)
def _built(config_json: str, dtype: str, fake: bool) -> Any:
    """The module on the meta device, or of fake CPU tensors, which can run a forward."""
    import torch
    import transformers

    from profiles.workloads import TORCH_DTYPES

    hub: Any = transformers  # without annotations
    hub.logging.set_verbosity_error()  # kernels that are not installed do not matter to shapes
    config = json.loads(config_json)
    kept = {name: value for name, value in config.items() if name not in (*IGNORED, "dtype")}
    model_type = kept.pop("model_type", None)
    if not isinstance(model_type, str) or model_type not in hub.CONFIG_MAPPING:
        raise ConfigError(f"model_type={shown(model_type)} is not known to transformers either")
    if dtype not in TORCH_DTYPES:
        raise ConfigError(f"dtype={shown(dtype)} is not allowed: one of {', '.join(TORCH_DTYPES)}")
    try:
        described = hub.AutoConfig.for_model(model_type, **kept)
        chosen = _class(hub, described, (config.get("architectures") or [None])[0])
        with torch.device("meta"):
            built = chosen._from_config(described, dtype=TORCH_DTYPES[dtype]).eval()
        if fake:  # not built as such: some classes compute with values while they are built
            with _fake_mode():
                built._apply(lambda t: torch.empty(t.shape, dtype=t.dtype))
        return built
    except Exception as error:
        raise ConfigError(_told(f"model_type={model_type} cannot be built", error)) from None


def _class(hub: Any, config: Any, wanted: str | None) -> Any:
    """The class that `architectures[0]` names; else the type's usual one.

    That is a causal LM for decoders, a text model for wrappers around images, a conditional
    generator for sequence-to-sequence types, and the bare model for everything else.
    """
    if wanted is not None:
        named = getattr(hub, wanted, None) if isinstance(wanted, str) else None
        if getattr(named, "config_class", None) is type(config):
            return named
        raise ConfigError(f"architectures[0]={shown(wanted)} is not a class of this type")
    order = [TEXT_OF_IMAGES, CAUSAL, SEQ2SEQ, SPEECH, BARE]
    if config.is_encoder_decoder:
        order.remove(CAUSAL)  # bart's has a decoder alone
    elif type(config) in hub.AutoModelForMaskedLM._model_mapping:
        order = [BARE]  # an encoder, though bert's class can be made causal
    for name in order:
        found = getattr(hub, name)._model_mapping.get(type(config), None)
        if found is not None:
            return found[0] if isinstance(found, tuple) else found
    raise ConfigError("transformers has no language or base model for it")


def _fake_mode() -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    return _one_mode(FakeTensorMode)


@contextmanager
def _shapes_only() -> Iterator[None]:
    """Three things that only fake tensors need.

    torch's log of an op that shapes are not enough for is off: the error says it. The shape rule of
    grouped_mm takes bf16 alone, so other dtypes go through transformers' own fallback, whose result
    is the same tensor. Whether positions are those of packed sequences depends on their values,
    and transformers would make a mask to be safe: they are not.
    """
    from transformers import masking_utils
    from transformers.integrations import moe

    rules: Any = moe
    masks: Any = masking_utils
    log, usual = logging.getLogger("torch._subclasses.fake_tensor"), rules._can_use_grouped_mm
    packed = masks.find_packed_sequence_indices
    log.disabled = True
    rules._can_use_grouped_mm = lambda x, weight, offs: "bfloat16" in str(weight.dtype)
    masks.find_packed_sequence_indices = lambda *_, **__: None
    try:
        yield
    finally:
        log.disabled, rules._can_use_grouped_mm = False, usual
        masks.find_packed_sequence_indices = packed


@lru_cache(maxsize=1)
def _one_mode(kind: Any) -> Any:
    """One mode for the whole process: tensors of different modes do not mix."""
    return kind()


@lru_cache(maxsize=64)
def _cache_bytes(config_json: str, batch: int, context_tokens: int, dtype: str) -> int:
    module = _built(config_json, dtype, True)
    with _without_experts(module):
        cache = _cache(_forward(module, _inputs(module, batch, context_tokens)))
    held = {id(t): t for layer in _layers(cache) for t in _tensors(vars(layer))}
    return sum(t.numel() * t.element_size() for t in held.values())


@contextmanager
def _without_experts(module: Any) -> Iterator[None]:
    """Routed experts hand their input on: some kinds need values, and none touches the cache."""
    experts = [part for part in module.modules() if type(part).__name__.endswith("Experts")]
    for part in experts:
        part.forward = lambda hidden, *_, **__: hidden
    try:
        yield
    finally:
        for part in experts:
            del part.forward


def _forward(module: Any, inputs: dict[str, Any]) -> Any:
    """One forward; ConfigError where shapes are not enough."""
    import torch

    try:
        with _fake_mode(), torch.no_grad(), _shapes_only():
            generates = "input_ids" in inputs
            return module(**inputs, **({"use_cache": True} if generates else {}))
    except Exception as error:
        raise ConfigError(_told(f"a forward of {module.config.model_type}", error)) from None


def _inputs(module: Any, batch: int, tokens: int) -> dict[str, Any]:
    """What a forward of this class takes: token ids, an image, a window of sound."""
    with _fake_mode():
        return _fake_inputs(module, batch, tokens)


def _fake_inputs(module: Any, batch: int, tokens: int) -> dict[str, Any]:
    import torch

    def ids() -> Any:
        return torch.zeros(batch, tokens, dtype=torch.long)

    config, name, dtype = module.config, module.main_input_name, module.dtype
    vision = getattr(config, "vision_config", config)
    if name == "input_features":  # mel spectrograms of the whole window
        shape = (batch, config.num_mel_bins, 2 * config.max_source_positions)
        return {name: torch.zeros(shape, dtype=dtype), "decoder_input_ids": ids()}
    if name == "pixel_values" and not hasattr(config.get_text_config(), "vocab_size"):
        side = vision.image_size
        height, width = side if isinstance(side, list | tuple) else (side, side)
        return {name: torch.zeros(batch, vision.num_channels, height, width, dtype=dtype)}
    if config.is_encoder_decoder:
        return {"input_ids": ids(), "decoder_input_ids": ids()}
    return {"input_ids": ids()}


def _cache(made: Any) -> Any:
    return getattr(made, "past_key_values", None) or getattr(made, "cache_params", None)


def _layers(cache: Any) -> list[Any]:
    if cache is None:
        return []
    if hasattr(cache, "self_attention_cache"):
        return [*_layers(cache.self_attention_cache), *_layers(cache.cross_attention_cache)]
    return list(getattr(cache, "layers", [cache]))  # xlstm's keeps all states itself


def _tensors(value: Any) -> list[Any]:
    """The tensors of a cache layer with elements per sequence: what is in lists and dicts, too."""
    import torch

    if isinstance(value, torch.Tensor):
        return [value] if value.dim() > 1 else []
    if isinstance(value, dict):
        return [t for item in value.values() for t in _tensors(item)]
    if isinstance(value, list | tuple):
        return [t for item in value for t in _tensors(item)]
    return []


def _told(what: str, error: Exception) -> str:
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{what}: {first[:160]}"
