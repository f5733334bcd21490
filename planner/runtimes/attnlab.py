"""The `attnlab` runtime: our own transformer, whose cache is allocated once at full length."""

from __future__ import annotations

from planner.errors import ConfigError
from planner.kv_cache import Kept, layer_rows
from planner.layers import GQA, ALiBi, Dense, Layer, LearnedPositions, RoPE
from planner.ledger import Row
from planner.model import Model
from planner.program import Dims, Program
from planner.runtimes.attnlab_program import Pass, forward_program
from planner.runtimes.base import (
    Phase,
    Pool,
    Setting,
    check_cache_kind,
    choose_attention,
    static_capacity,
)
from planner.workload import CacheSpec, Inference


class Attnlab:
    """kernels/attnlab of this version of the project."""

    name = "attnlab"
    pooled = False
    version = "0.1.0"

    def attention(self, model: Model, name: str | None) -> str:
        """sdpa, or naive for models with a soft cap on the scores."""
        for layer in model.layer_kinds():
            if not isinstance(layer.attention, GQA) or not isinstance(layer.feed_forward, Dense):
                what = "MLA" if not isinstance(layer.attention, GQA) else "mixtures of experts"
                raise ConfigError(
                    f"runtime=attnlab does not run {what} of {model.model_type} yet: "
                    "transformers or vllm"
                )
            gqa = layer.attention
            extras = (
                gqa.qk_norm,
                gqa.sinks,
                not gqa.rope,
                gqa.chunked,
                gqa.clip_qkv,
                gqa.interleaved_qkv,
                gqa.masked_window,
                layer.residual_multiplier,
            )
            layernorm_1p = layer.norm.kind == "layernorm" and layer.norm.plus_one
            if (
                any(extras)
                or layernorm_1p
                or layer.placement not in ("pre", "sandwich")
                or not layer.norm.weight
            ):
                raise ConfigError(
                    f"runtime=attnlab does not run the blocks of {model.model_type} yet: "
                    "transformers or vllm"
                )
        unknown_positions = isinstance(model.positions, ALiBi) or (
            isinstance(model.positions, RoPE) and model.positions.interleaved
        )
        if isinstance(model.positions, LearnedPositions) and model.positions.offset:
            unknown_positions = True
        head = model.lm_head_bias or model.logit_scale is not None
        head = head or model.local_positions is not None
        head = head or model.final_norm is None or model.embedding_size is not None
        if unknown_positions or head or model.extra_parameters:
            raise ConfigError(
                f"runtime=attnlab does not run the positions or head of {model.model_type} yet: "
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
        self, model: Model, *, batch: int, context_tokens: int, dtype: str, cache: CacheSpec | None
    ) -> list[Row]:
        """One tensor a layer, full length for sliding layers too: their window is a mask."""
        self.attention(model, None)
        check_cache_kind(self.name, cache, ("static",))
        C = static_capacity(cache, context_tokens)

        def kept(layer: Layer) -> Kept:
            return C, "C", (("C", C),)

        return layer_rows(model, batch=batch, dtype=dtype, kept=kept)

    def peak_note(self, model: Model) -> str:
        """Nothing: the program is exact for all that attnlab runs."""
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
