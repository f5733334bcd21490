"""One small config of every type that has a reader, out of the readers' own tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from tests.planner.configs import TINY
from tests.planner.huggingface import test_readers_encoder_decoders as encoder_decoders
from tests.planner.huggingface import test_readers_encoders as encoders
from tests.planner.huggingface import test_readers_gemma_later as gemma_later
from tests.planner.huggingface import test_readers_gpt_like as gpt_like
from tests.planner.huggingface import test_readers_later_decoders as later
from tests.planner.huggingface import test_readers_linear_attention as linear_attention
from tests.planner.huggingface import test_readers_mamba_like as mamba_like
from tests.planner.huggingface import test_readers_multimodal as multimodal
from tests.planner.huggingface import test_readers_norms_and_mixtures as mixtures
from tests.planner.huggingface import test_readers_recurrent as recurrent
from tests.planner.huggingface import test_readers_sparse_latent as sparse_latent
from tests.planner.huggingface import test_readers_vision as vision


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A small config, and which auto class builds it where it names no head."""

    config: dict[str, Any]
    auto: str = "causal"


def _cases() -> Iterator[Case]:
    for config in TINY.values():
        yield Case(config=config)
    for name in mixtures.CONFIGS:
        yield Case(config=mixtures.config_of(name))
    for kind, change in gpt_like.CASES.values():
        yield Case(config={"model_type": kind, **change})
    sizes = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2}
    yield Case(config={"model_type": "rwkv", **sizes})
    causal: tuple[tuple[Iterable[str], Callable[..., dict[str, Any]]], ...] = (
        (later.TYPES, lambda kind: later.variant(kind, {})),
        (mamba_like.OWN, mamba_like.config_of),
        (recurrent.OWN, recurrent.config_of),
        (sparse_latent.TINY, sparse_latent.tiny),
    )
    for kinds, config_of in causal:
        for kind in kinds:
            yield Case(config=config_of(kind))
    for module in (linear_attention, gemma_later):
        for kind in module.OWN:
            yield Case(config=module.config_of(kind), auto=module.auto_of(kind))
    for kind in multimodal.OWN:
        yield Case(config=multimodal.config_of(kind), auto="image_text")
    for kind in vision.OWN:
        yield Case(config=vision.config_of(kind), auto="model")
    for kind in encoders.TYPES:
        yield Case(config=encoders.tiny(kind), auto="model")
    for kind in encoder_decoders.TYPES:
        auto = "speech" if kind == "whisper" else "seq2seq"
        yield Case(config=encoder_decoders.tiny(kind), auto=auto)


CASES: dict[str, Case] = {}
for _case in _cases():
    CASES.setdefault(_case.config["model_type"], _case)
