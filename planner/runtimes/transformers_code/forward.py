"""Which class is run, and its program."""

from __future__ import annotations

from functools import lru_cache

from planner.model import Model
from planner.program import Program
from planner.runtimes.transformers_code.bert import MaskedLM
from planner.runtimes.transformers_code.blocks import BlockWriter
from planner.runtimes.transformers_code.causal_lm import CausalLM
from planner.runtimes.transformers_code.regime import Pass, Regime
from planner.runtimes.transformers_code.t5 import Seq2SeqLM

WRITERS: dict[str, type[BlockWriter]] = {"bert": MaskedLM, "t5": Seq2SeqLM}
"""By model type; every other one is a causal language model."""


@lru_cache(maxsize=256)
def pass_program(model: Model, what: Pass, regime: Regime) -> Program:
    """One pass in one regime of sizes."""
    writer = WRITERS.get(model.text_type, CausalLM)(model, what, regime)
    writer.before()
    if what.kind == "training":
        return writer.write_step("transformers training step", what.optimizer, what.optimizer_impl)
    return writer.write_forward(f"transformers {what.kind}")
