"""What the planner has no reader for, read off the class itself: transformers on the meta device.

Nothing is downloaded, no code of a model repository runs, no weight is allocated. Parameters come
from the module tree, the cache from its tensors after a real forward of shapes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from planner import ConfigError
from planner.errors import check_size, shown

if TYPE_CHECKING:
    import pandas as pd

REMOTE = ("auto_map", "_name_or_path", "attn_implementation", "quantization_config")


@dataclass(frozen=True, kw_only=True, slots=True)
class TracedModel:
    """Parameters and cache of a model type without a reader: traced, not predicted."""

    name: str
    model_type: str
    class_name: str
    transformers: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    config_json: str

    @property
    def parameter_count(self) -> int:
        """Trained elements, tied weights once."""
        return sum(_product(shape) for _, shape in self.shapes)

    def parameter_table(self) -> pd.DataFrame:
        """A row for each trained tensor: name, shape, count."""
        import pandas as pd

        rows = [(name, shape, _product(shape)) for name, shape in self.shapes]
        return pd.DataFrame(rows, columns=["name", "shape", "count"])

    def kv_cache_bytes(self, *, batch: int, context_tokens: int, dtype: str = "bf16") -> int:
        """numel · itemsize of the cache's tensors after a prefill of `context_tokens`.

        Recurrent states in the dtype that the class keeps them in. Raises ConfigError for a class
        that makes no cache, or whose forward needs values that the meta device does not have.
        """
        check_size("batch", batch)
        check_size("context_tokens", context_tokens)
        return _cache_bytes(self.config_json, batch, context_tokens, dtype)


def trace(config: Mapping[str, Any]) -> TracedModel:
    """The class that transformers has for this config, built on the meta device.

    Raises ConfigError in one line for a type that transformers does not know, too, or that it
    cannot build from this config.
    """
    text = json.dumps(dict(config), sort_keys=True)
    module = _build(text, "bf16")
    import transformers

    shapes = tuple((name, tuple(p.shape)) for name, p in module.named_parameters())
    return TracedModel(
        name=str(config.get("model_type")),
        model_type=str(config.get("model_type")),
        class_name=type(module).__name__,
        transformers=transformers.__version__,
        shapes=shapes,
        config_json=text,
    )


@lru_cache(maxsize=4)
def _build(config_json: str, dtype: str) -> Any:
    import torch
    import transformers

    from profiles.workloads import TORCH_DTYPES

    hub: Any = transformers  # without annotations
    config = json.loads(config_json)
    kept = {name: value for name, value in config.items() if name not in (*REMOTE, "torch_dtype")}
    model_type = kept.pop("model_type", None)
    kept.pop("dtype", None)
    if not isinstance(model_type, str) or model_type not in hub.CONFIG_MAPPING:
        raise ConfigError(f"model_type={shown(model_type)} is not known to transformers either")
    try:
        described = hub.AutoConfig.for_model(model_type, **kept)
        with torch.device("meta"):
            return (
                _auto_class(hub, described).from_config(described, dtype=TORCH_DTYPES[dtype]).eval()
            )
    except Exception as error:
        raise ConfigError(_told(f"model_type={model_type} cannot be built", error)) from None


def _auto_class(hub: Any, config: Any) -> Any:
    """The head that `architectures[0]` names; else causal LM, sequence to sequence, bare model."""
    names = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModel")
    classes = [getattr(hub, name) for name in names]
    wanted = (config.architectures or [None])[0]
    for auto in classes:
        known = auto._model_mapping.get(type(config), None)
        for made in known if isinstance(known, tuple) else (known,):
            if made is not None and wanted in (None, made.__name__):
                return auto
    if wanted is not None:
        raise ConfigError(f"architectures[0]={shown(wanted)} is not a class of this type")
    raise ConfigError("transformers has no language or base model for it")


def _cache_bytes(config_json: str, batch: int, context_tokens: int, dtype: str) -> int:
    import torch

    module = _build(config_json, dtype)
    for part in module.modules():  # routing needs values, and no expert touches the cache
        if type(part).__name__.endswith("Experts"):
            part.forward = lambda hidden, *_: hidden
    ids = torch.zeros(batch, context_tokens, dtype=torch.long, device="meta")
    try:
        with torch.no_grad():
            cache = module(ids, use_cache=True).past_key_values
        tensors = {id(t): t for layer in cache.layers for t in _tensors(vars(layer))}
    except Exception as error:
        raise ConfigError(_told("its cache cannot be traced", error)) from None
    return sum(t.numel() * t.element_size() for t in tensors.values())


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


def _product(shape: tuple[int, ...]) -> int:
    size = 1
    for extent in shape:
        size *= extent
    return size
