"""Which class is run, and its program."""

from __future__ import annotations

from functools import lru_cache

from planner.errors import ConfigError
from planner.layers import GQA
from planner.mixers.mamba import Mamba2
from planner.model import Model
from planner.program import Program
from planner.runtimes.base import check_planned
from planner.runtimes.transformers_code.bert import MaskedLM
from planner.runtimes.transformers_code.blocks import BlockWriter
from planner.runtimes.transformers_code.causal_lm import CausalLM
from planner.runtimes.transformers_code.families import HELD
from planner.runtimes.transformers_code.regime import Pass, Regime
from planner.runtimes.transformers_code.t5 import Seq2SeqLM

SCANNED = frozenset(("bamba",))
"""Types whose Mamba-2 layers are written, as their classes run without fused kernels."""
WRITERS: dict[str, type[BlockWriter]] = {"bert": MaskedLM, "t5": Seq2SeqLM}
"""By model type; every other one is a causal language model."""


def is_held(model: Model) -> bool:
    """Whether a test holds this model's programs, forward and back, against its class."""
    if model.text_type in WRITERS:
        return _unwritten_head(model) is None
    return model.text_type in HELD and not model.towers


def check_written(runtime: str, model: Model) -> None:
    """ConfigError for a model, or a head, whose passes are not written as programs yet."""
    if model.text_type not in WRITERS:
        check_planned(runtime, model, (Mamba2,) if model.text_type in SCANNED else ())
        _check_attends(model)
        return
    head = _unwritten_head(model)
    if head is not None:
        raise ConfigError(
            f"runtime={runtime} does not plan {head} of model_type={model.model_type} yet: "
            "parameters and kv_cache_bytes are known, `planner estimate --traced` has the peak"
        )


def _check_attends(model: Model) -> None:
    """ConfigError for a hybrid of Mamba-2 layers alone: its class asks attention for the length."""
    if model.text_type in SCANNED and not any(isinstance(x.attention, GQA) for x in model.layers):
        raise ConfigError(
            f"attn_layer_indices=[] of a {model.text_type} does not run in transformers: one "
            "layer that attends, or more (its cache counts tokens there)"
        )


def _check_padded(model: Model, what: Pass) -> None:
    """ConfigError where a padding mask is not written: types that count or bias by it, caches."""
    if model.text_type in (*SCANNED, "t5"):
        raise ConfigError(
            f"padded=True of model_type={model.model_type} is not planned for "
            "runtime=transformers yet: False"
        )
    if what.static or what.quantised is not None:
        raise ConfigError("padded=True is not planned yet for cache.kind='static' or 'quantised'")


def _unwritten_head(model: Model) -> str | None:
    """What of the class is not written, in a word: BertModel and heads for words are."""
    if model.text_type == "t5":
        return None if model.lm_head and model.is_seq2seq else "classes without a head for words"
    known = ("embeddings.", "cls.predictions." if model.lm_head else "pooler.")
    beside = [
        p for p in model.extra_parameters if not p.name.removeprefix("bert.").startswith(known)
    ]
    pooled = any("pooler." in p.name for p in model.extra_parameters)
    return "this head" if beside or pooled == model.lm_head else None


@lru_cache(maxsize=256)
def pass_program(model: Model, what: Pass, regime: Regime) -> Program:
    """One pass in one regime of sizes."""
    if model.text_type == "t5" and what.held_dtype == "fp16":
        raise ConfigError(
            "dtype='fp16' is not planned for t5 in runtime=transformers: bf16 or fp32 (its class "
            "keeps its last products in float32 then)"
        )
    if what.padded:
        _check_padded(model, what)
    if what.float32_logits and model.text_type in WRITERS:
        raise ConfigError(
            f"float32_logits=True is not what a {model.text_type} did in any version: False"
        )
    writer = WRITERS.get(model.text_type, CausalLM)(model, what, regime)
    writer.before()
    if what.kind == "training":
        return writer.write_step("transformers training step", what.optimizer, what.optimizer_impl)
    return writer.write_forward(f"transformers {what.kind}")
