"""What the config checks look at: the config's own fields, the Model read from it, the load."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from planner.errors import MAX_SIZE, check_choice, check_size
from planner.model import Model
from planner.workload import Deployment

SPELLINGS = {
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "num_attention_heads": (
        "num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads",
    ),
    "num_key_value_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv"),
    "head_dim": ("head_dim", "d_kv"),
    "intermediate_size": ("intermediate_size", "n_inner", "d_ff", "ffn_dim", "decoder_ffn_dim"),
    "max_position_embeddings": (
        "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions",
    ),
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "vocab_size": ("vocab_size",),
}  # fmt: skip
"""Fields by Hugging Face's usual name, and what families call them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What the model is to carry, and on what. `gpu` None: no memory is checked."""

    context_tokens: int | None = None
    batch: int = 1
    gpu: str | None = None
    runtime: str = "transformers"
    tensor_parallel: int = 1
    dtype: str | None = None
    kv_dtype: str | None = None

    def __post_init__(self) -> None:
        check_size("batch", self.batch)
        check_size("tensor_parallel", self.tensor_parallel)
        if self.context_tokens is not None:
            check_size("context_tokens", self.context_tokens)
        self.deployment()  # checks the rest

    def deployment(self, **other: Any) -> Deployment:
        """The deployment of this load, with some of it replaced."""
        from planner.catalog.gpus import gpu_named
        from planner.runtimes import RUNTIMES

        check_choice("runtime", self.runtime, RUNTIMES)
        gpu = gpu_named(self.gpu).name if self.gpu is not None else "cpu"
        chosen = {
            "gpu": gpu,
            "runtime": self.runtime,
            "dtype": self.dtype,
            "kv_dtype": self.kv_dtype,
            # other runtimes are planned on one GPU; the split itself is checked all the same
            "tensor_parallel": self.tensor_parallel if self.runtime == "vllm" else 1,
        }
        return Deployment(**{**chosen, **other})


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """A config under check. `model` None: no reader took it, the reason is `unread`."""

    config: Mapping[str, Any]
    load: Load
    model: Model | None = None
    unread: str = ""
    folder: Path | None = None
    file: str = ""
    text: Mapping[str, Any] = field(default_factory=dict)

    @property
    def model_type(self) -> str:
        """Of the language model inside, else of the whole."""
        inner = self.text.get("model_type")
        return str(inner if isinstance(inner, str) else self.config.get("model_type"))

    def number(self, name: str) -> float | None:
        """A finite number above zero in the config, under any family's name for it."""
        for spelling in SPELLINGS.get(name, (name,)):
            value = self.text.get(spelling)
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if 0 < value <= MAX_SIZE and math.isfinite(value):
                return value
        return None

    def size(self, name: str) -> int | None:
        """As `number`, whole numbers alone."""
        value = self.number(name)
        return value if isinstance(value, int) else None

    def spelled(self, name: str) -> str:
        """What this config calls a field."""
        return next((s for s in SPELLINGS.get(name, ()) if s in self.text), name)

    def stated(self, name: str) -> bool:
        """Whether the config has the field, and not its class."""
        return any(self.text.get(s) is not None for s in SPELLINGS.get(name, (name,)))


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the language model inside a multimodal one; the config itself elsewhere."""
    for name in ("text_config", "decoder"):
        inner = config.get(name)
        if isinstance(inner, Mapping):
            return {**{k: v for k, v in config.items() if k != name}, **inner}
    return config
