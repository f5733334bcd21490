"""The `attnlab` runtime: our own transformer, whose cache is allocated once at full length."""

from __future__ import annotations

from planner.errors import ConfigError
from planner.kv_cache import Kept, layer_rows
from planner.layers import GQA, MLA, ALiBi, Dense, Layer, LearnedPositions, RoPE
from planner.ledger import Row
from planner.model import Model
from planner.program import Dims, Program
from planner.runtimes.attnlab_program import Pass, forward_program
from planner.runtimes.base import (
    Phase,
    Pool,
    Setting,
    check_cache_kind,
    check_kv_dtype,
    choose_attention,
    static_capacity,
    unplanned_part,
)
from planner.workload import CacheSpec, Inference

ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
"""Activations that kernels/attnlab/feed_forward.py has."""


class Attnlab:
    """kernels/attnlab of this version of the project."""

    name = "attnlab"
    pooled = False
    version = "0.1.0"
    kv_dtypes = ("fp32", "bf16", "fp16", "fp8")

    def attention(self, model: Model, name: str | None) -> str:
        """sdpa, or naive for models with a soft cap on the scores.

        Raises ConfigError for a model that attnlab does not run.
        """
        missing = missing_parts(model)
        if missing:
            raise ConfigError(
                f"runtime=attnlab does not run {missing[0]} of {model.model_type} yet: "
                "transformers or vllm"
            )
        capped = any(
            isinstance(x.attention, GQA) and x.attention.logit_softcap is not None
            for x in model.layer_kinds()
        )
        allowed = ("naive",) if capped else ("sdpa", "naive")
        reason = "sdpa has no soft cap" if capped else ""
        return choose_attention(self.name, model, name, allowed, reason=reason)

    def cache_rows(
        self,
        model: Model,
        *,
        batch: int,
        context_tokens: int,
        dtype: str,
        cache: CacheSpec | None,
        encoder_tokens: int,
        compute_dtype: str,
        decoded_tokens: int,
    ) -> list[Row]:
        """One tensor a layer, full length for sliding layers too: their window is a mask."""
        self.attention(model, None)
        check_cache_kind(self.name, cache, ("static",))
        check_kv_dtype(self.name, dtype, self.kv_dtypes)
        C = static_capacity(cache, context_tokens)

        def kept(attention: GQA | MLA) -> Kept:
            return C, "C", (("C", C),)

        return layer_rows(
            model,
            batch=batch,
            dtype=dtype,
            kept=kept,
            context_tokens=C,
            encoder_tokens=encoder_tokens,
            static=True,
        )

    def peak_note(self, model: Model) -> str:
        """Nothing: the program is exact for all that attnlab runs."""
        return ""

    def cache_note(self, setting: Setting) -> str:
        """Nothing."""
        return ""

    def buffer_rows(self, model: Model, *, dtype: str) -> list[Row]:
        """One float32 table of rotary frequencies."""
        if not isinstance(model.positions, RoPE):
            return []
        D = model.positions.rotary_dim
        return [
            Row(
                component="weights",
                item="rotary frequencies (buffer)",
                count=1,
                formula="d_rot · 2",
                values=(("d_rot", D),),
                size_bytes=2 * D,
            )
        ]

    def memory_phases(self, model: Model, work: Inference, setting: Setting) -> list[Phase]:
        """Prefill and the last decode step, both over the cache of the whole generation."""
        B, prompt, context = work.batch, work.prompt_tokens, work.context_tokens
        phases = [
            Phase(
                name="prefill",
                program=self.prefill(model, work, setting),
                dims=Dims(batch=B, tokens=prompt, context=prompt, capacity=context),
            )
        ]
        if work.output_tokens > 1:
            phases.append(
                Phase(
                    name="last decode step",
                    program=self.decode(model, work, setting),
                    dims=Dims(batch=B, tokens=1, context=context, capacity=context),
                )
            )
        return phases

    def pool(
        self, model: Model, setting: Setting, *, budget_bytes: int, held_bytes: int
    ) -> Pool | None:
        """None: the cache is allocated as needed."""
        return None

    def prefill(self, model: Model, work: Inference, setting: Setting) -> Program:
        """The whole prompt in one forward."""
        return _program(model, work, setting, "prefill")

    def decode(self, model: Model, work: Inference, setting: Setting) -> Program:
        """One token for every sequence."""
        return _program(model, work, setting, "decode")


def missing_parts(model: Model) -> list[str]:
    """What of a model attnlab cannot run, in words; empty where it runs all of it."""
    unplanned = unplanned_part(model)
    if unplanned is not None:
        return [unplanned]
    missing = [part for layer in model.layer_kinds() for part in _missing_in(layer)]
    positions = model.positions
    wanted = {
        "ALiBi": isinstance(positions, ALiBi),
        "interleaved rotary positions": isinstance(positions, RoPE) and positions.interleaved,
        "rotary positions of their own for sliding layers": model.local_positions is not None,
        "offset positions": isinstance(positions, LearnedPositions) and bool(positions.offset),
        "parameters outside the blocks": bool(model.extra_parameters),
        "projections around the embedding": model.embedding_size is not None,
        "a model without a last norm": model.final_norm is None,
        "a scale on the logits": model.logit_scale is not None,
        "the bias of the head": model.lm_head_bias,
        "parts beside the decoder": bool(model.towers),
        "quantised weights": model.quantization is not None,
    }
    return [*missing, *(part for part, there in wanted.items() if there)]


def _missing_in(layer: Layer) -> list[str]:
    gqa, feed_forward, norm = layer.attention, layer.feed_forward, layer.norm
    if not isinstance(gqa, GQA):
        return ["MLA"]
    if not isinstance(feed_forward, Dense):
        return ["mixtures of experts"]
    wanted = {
        "norms on queries and keys": gqa.qk_norm is not None,
        "attention sinks": gqa.sinks,
        "layers without positions": not gqa.rope,
        "chunked attention": gqa.chunked,
        "clipped queries and keys": gqa.clip_qkv is not None,
        "interleaved fused projections": gqa.interleaved_qkv,
        "windows that mask and do not clip": gqa.masked_window is not None,
        "scaled residuals": layer.residual_multiplier is not None,
        f"{layer.placement} blocks": layer.placement not in ("pre", "sandwich"),
        "norms without a weight": not norm.weight,
        "LayerNorm scaled by 1 + weight": norm.kind == "layernorm" and norm.plus_one,
        f"the activation {feed_forward.activation}": feed_forward.activation not in ACTIVATIONS,
    }
    return [part for part, there in wanted.items() if there]


def _program(model: Model, work: Inference, setting: Setting, kind: str) -> Program:
    return forward_program(
        model,
        Pass(
            kind=kind,  # type: ignore[arg-type]
            attention=setting.attention,  # type: ignore[arg-type]
            dtype=setting.dtype,
            kv_dtype=setting.kv_dtype,
            logits=work.logits,
        ),
    )
