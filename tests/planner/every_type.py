"""One small config of every type that has a reader, out of the readers' own tests."""

from __future__ import annotations

from typing import Any

from tests.planner import test_readers_gpt_like as gpt_like
from tests.planner import test_readers_later_decoders as later
from tests.planner import test_readers_mamba_like as mamba_like
from tests.planner import test_readers_norms_and_mixtures as mixtures
from tests.planner import test_readers_recurrent as recurrent
from tests.planner.configs import TINY

_ALL: list[dict[str, Any]] = [
    *TINY.values(),
    *(later.variant(kind, {}) for kind in later.TYPES),
    *(mixtures.config_of(name) for name in mixtures.CONFIGS),
    *({"model_type": kind, **change} for kind, change in gpt_like.CASES.values()),
    *(mamba_like.config_of(kind) for kind in mamba_like.OWN),
    *(recurrent.config_of(kind) for kind in recurrent.OWN),
    {"model_type": "rwkv", "vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2},
]
SMALL_CONFIGS: dict[str, dict[str, Any]] = {}
for _config in _ALL:
    SMALL_CONFIGS.setdefault(_config["model_type"], _config)


def auto_of(model_type: str) -> str:
    """Which auto class builds the type where its config names no head."""
    return "causal"


def inputs_of(model_type: str, live: Any, batch: int, tokens: int) -> dict[str, Any]:
    """What the type's forward takes beside token ids."""
    return {}
