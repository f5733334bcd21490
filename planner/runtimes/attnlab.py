"""The `attnlab` runtime: our own transformer over the cache that a CacheSpec names."""

from __future__ import annotations

import numpy as np

from planner.catalog.gpus import Gpu
from planner.errors import ConfigError
from planner.kv_cache import Kept, layer_rows
from planner.layers import (
    GQA,
    MLA,
    ALiBi,
    Layer,
    LearnedPositions,
    MoE,
    NoPositions,
    RelativeBias,
    RoPE,
    Sinusoidal,
)
from planner.ledger import Row, buffer_row
from planner.mixers import Mixer
from planner.mixers.linear import GatedDeltaNet, KimiDelta
from planner.mixers.mamba import Mamba, Mamba2
from planner.mixers.recurrent import RGLRU, ShortConv
from planner.model import Model
from planner.parallel import Share, tensor_parallel_share
from planner.program import Dims, Number, Program, minimum
from planner.quantization.torchao import TorchAO
from planner.runtimes.attnlab_formats import (
    PLAIN_DTYPES,
    check_quantisable,
    format_rows,
    kv_format,
)
from planner.runtimes.attnlab_program import Pass, forward_program
from planner.runtimes.base import (
    Phase,
    Pool,
    Setting,
    check_cache_kind,
    check_one_gpu,
    check_planned,
    choose_attention,
    static_capacity,
)
from planner.runtimes.vllm_ranks import mixer_share
from planner.workload import CacheSpec, Inference

CACHE_KINDS = ("static", "dynamic", "ring", "paged", "quantised")
QUANTISED = "quantised weights"
BIAS_TABLE = "self_attn.relative_attention_bias.weight"
RECURRENT = Mamba, Mamba2, GatedDeltaNet, KimiDelta, RGLRU, ShortConv
"""Mixers that run (kernels/attnlab/mixers.py)."""
DEFAULT_BLOCK_TOKENS = 16
"""A block of a paged cache, where none is named."""


class Attnlab:
    """kernels/attnlab of this version of the project."""

    name = "attnlab"
    pooled = False
    on_torch = True
    version = "0.1.0"
    kv_dtypes = (*PLAIN_DTYPES, "int8", "int4")

    def attention(self, model: Model, name: str | None) -> str:
        """sdpa, or naive for models with a soft cap on the scores.

        Raises ConfigError for a model that attnlab does not run, or whose passes are not planned.
        """
        _check_runs(model)
        check_planned(self.name, model)
        unplanned = unplanned_parts(model)
        if unplanned:
            raise ConfigError(
                f"runtime=attnlab runs {unplanned[0]} of model_type={model.model_type} and does "
                "not plan them yet: parameters and kv_cache_bytes are known, or runtime="
                "transformers or vllm"
            )
        attentions = [x.attention for x in model.layer_kinds() if isinstance(x.attention, GQA)]
        naive = any(gqa.logit_softcap is not None or gqa.sinks for gqa in attentions)
        allowed = ("naive",) if naive else ("sdpa", "naive")
        reason = "sdpa has no soft cap and no sinks" if naive else ""
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
        blocks: tuple[int, int] | None = None,
    ) -> list[Row]:
        """Keys and values of the whole capacity (dynamic: of the context), by kind of cache.

        A ring keeps a sliding layer's window, a paged cache whole blocks; else the window is a
        mask and all positions are kept. Quantised: codes and scales apart.
        """
        _check_runs(model)
        kind = check_cache_kind(self.name, cache, CACHE_KINDS, scaled=True)
        form = kv_format(cache, dtype)
        S = context_tokens
        C = S if kind in ("dynamic", "quantised") else static_capacity(cache, S)
        block = (cache.block_tokens if cache else None) or DEFAULT_BLOCK_TOKENS

        def kept(attention: GQA | MLA) -> Kept:
            window = attention.sliding_window if isinstance(attention, GQA) else None
            if kind in ("dynamic", "quantised"):
                return S, "S", (("S", S),)
            if kind == "ring" and window is not None:
                return minimum(C, window), "min(C, W)", (("C", C), ("W", window))
            if kind == "paged":
                return (
                    -(-C // block) * block,
                    "-(-C // block) · block",
                    (("C", C), ("block", block)),
                )
            return C, "C", (("C", C),)

        def quantised(attention: GQA | MLA) -> list[Row]:
            assert form is not None
            return format_rows(
                form, attention, kept(attention), batch=batch, computed=compute_dtype
            )

        if form is not None:
            check_quantisable(form, model)
        return layer_rows(
            model,
            batch=batch,
            dtype=dtype if form is None else compute_dtype,
            kept=kept,
            attention_rows=None if form is None else quantised,
            context_tokens=C,
            encoder_tokens=encoder_tokens,
            static=True,
        )

    def rank(self, model: Model, tensor_parallel: int) -> Model:
        """One GPU's heads and channels; embedding and head whole, as in gpt-fast's tp.py."""
        return tensor_parallel_share(model, tensor_parallel, mixer_share)

    def shares(
        self, model: Model, tensor_parallel: int, pipeline_parallel: int
    ) -> tuple[Share, ...]:
        """One GPU, or one of several that share heads and channels."""
        check_one_gpu(self.name, pipeline_parallel=pipeline_parallel)
        part = self.rank(model, tensor_parallel)
        return (Share(model=part, whole=part, tensor_parallel=tensor_parallel),)

    def peak_note(self, model: Model) -> str:
        """Nothing: the program is exact for all that attnlab runs, quantised weights apart."""
        if model.quantization is None:
            return ""
        return "planned as gpt-fast does it: attnlab itself keeps plain weights"

    def cache_note(self, setting: Setting) -> str:
        """Nothing."""
        return ""

    def buffer_rows(self, model: Model, *, dtype: str, capability: str | None = None) -> list[Row]:
        """Tables of rotary frequencies and the routers' correction, all in float32."""
        rows = []
        for positions in (model.positions, model.local_positions):
            if isinstance(positions, RoPE):
                D = positions.rotary_dim
                rows.append(
                    buffer_row("rotary frequencies", 1, "d_rot · 2", (("d_rot", D),), 2 * D)
                )
        for layer, count in model.layer_kinds().items():
            match layer.feed_forward:
                case MoE(router="sigmoid-groups", num_experts=E, correction_bias=False):
                    rows.append(
                        buffer_row("router bias", count, "E · 4", (("E", E),), count * E * 4)
                    )
        return rows

    def alike(self, model: Model, work: Inference) -> Number:
        """All cells run the same programs, but latent attention absorbs a prompt of one token."""
        return (work.prompt_tokens == 1) * 1 if _latent(model) else 0

    def memory_phases(self, model: Model, work: Inference, setting: Setting) -> list[Phase]:
        """Prefill and the last decode step, both over the cache of the whole generation.

        KIVI's: also the last in which a group of keys is full.
        """
        B, prompt, context = work.batch, work.prompt_tokens, work.context_tokens
        phases = [
            Phase(
                name="prefill",
                program=self.prefill(model, work, setting),
                dims=Dims(batch=B, tokens=prompt, context=prompt, capacity=context),
            )
        ]
        lengths = {"last decode step": context} if work.output_tokens > 1 else {}
        if setting.cache is not None and setting.cache.kind == "quantised":  # keys come together
            form = kv_format(setting.cache, setting.kv_dtype)
            assert form is not None
            filled = context // form.residual_tokens * form.residual_tokens
            if filled > prompt:
                lengths = {"last decode step that quantises keys": filled, **lengths}
        phases += [
            Phase(
                name=name,
                program=self.decode(model, work, setting),
                dims=Dims(batch=B, tokens=1, context=length, capacity=context),
            )
            for name, length in lengths.items()
        ]
        return phases

    def pool(
        self, share: Share, setting: Setting, gpu: Gpu, *, budget_bytes: int, held_bytes: int
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
    if not model.is_decoder:
        return _missing_in_encoder(model)
    if not isinstance(
        model.positions,
        RoPE | LearnedPositions | Sinusoidal | ALiBi | RelativeBias | NoPositions,
    ):
        return [type(model.positions).__name__]
    encoders = [tower for tower in model.towers if model.is_seq2seq and tower.part == "encoder"]
    kinds = [*model.layer_kinds(), *(layer for tower in encoders for layer in tower.layers)]
    missing = [part for layer in dict.fromkeys(kinds) for part in _missing_in(layer)]
    wanted = {
        "queries scaled by their position": isinstance(model.positions, RoPE)
        and bool(dict(model.positions.scaling).get("llama_4_scaling_beta")),
        "rotary tables scaled by short_mscale": isinstance(model.positions, RoPE)
        and "short_mscale" in dict(model.positions.scaling),
        "parameters outside the blocks": bool(model.extra_parameters),
        "parts beside the decoder": len(model.towers) > len(encoders),
        "cross-attention without an encoder": model.is_seq2seq and len(encoders) != 1,
        "layers without cross-attention": model.is_seq2seq
        and not all(layer.cross_attention for layer in model.layer_kinds()),
        "RelativeBias without a table": isinstance(model.positions, RelativeBias)
        and not model.layers[0].extra_parameters,
        QUANTISED: model.quantization is not None,
    }
    return [*missing, *(part for part, there in wanted.items() if there)]


def _missing_in_encoder(model: Model) -> list[str]:
    """What of an encoder by itself is not there to be run (kernels/attnlab/encoder.py)."""
    ends = model.ends
    if ends is None or not model.layers:
        return ["bidirectional encoders"]
    unused = [p.name for p in model.extra_parameters if not ends.uses(p.name)]
    wanted = {
        type(model.positions).__name__: not isinstance(
            model.positions, RoPE | LearnedPositions | NoPositions
        ),
        "other layers than attention in both directions": not all(
            isinstance(layer.attention, GQA) and layer.cross_attention is None
            for layer in model.layer_kinds()
        ),
        "an embedding_size of its own": model.embedding_size is not None,
        "parts beside the encoder": bool(model.towers),
        QUANTISED: model.quantization is not None,
    }
    missing = [part for layer in model.layer_kinds() for part in _missing_in(layer)]
    return [*missing, *(part for part, there in wanted.items() if there), *unused]


def _is_planned(model: Model, part: str) -> bool:
    """Weights that are quantised on loading are planned, though not run."""
    return part == QUANTISED and isinstance(model.quantization, TorchAO)


def _missing_in(layer: Layer) -> list[str]:
    """What of a block is not there to be run."""
    attention, feed_forward = layer.attention, layer.feed_forward
    alone = attention is None or feed_forward is None
    if isinstance(attention, Mixer) and not isinstance(attention, RECURRENT):
        return [f"{attention.kind} layers"]
    wanted = {
        "norms of other names": layer.norms not in _norms_of(layer, alone=alone),
        "a flat decay": isinstance(attention, KimiDelta) and attention.flat_decay,
        "sigmoid routers that weigh what comes out": isinstance(feed_forward, MoE)
        and feed_forward.router == "sigmoid"
        and feed_forward.norm_topk_prob,
        "cross-attention in such a block": layer.cross_attention is not None
        and (layer.placement not in ("pre", "post-sum") or not _is_plain(layer.cross_attention)),
        "blocks with parts of their own": layer.beside is not None
        or any(p.name != BIAS_TABLE for p in layer.extra_parameters),
    }
    match attention:
        case GQA() as gqa:
            wanted |= {
                "caches shared between layers": gqa.shares_cache,
                "normalised values": gqa.v_norm,
                "values that are keys": gqa.attention_k_eq_v,
                "a window that clips beside one that masks": gqa.masked_window is not None
                and gqa.sliding_window is not None,
            }
        case MLA() as mla:
            wanted |= {
                "sparse attention to the picks of an indexer": mla.indexer is not None,
                "caches shared between layers": mla.shares_cache,
            }
    return [part for part, there in wanted.items() if there]


def _norms_of(layer: Layer, *, alone: bool) -> tuple[tuple[str, ...] | None, ...]:
    """What a block may name its norms; the first of modernbert has one alone."""
    if alone:
        return (("input_layernorm",),)
    return (None, ("post_attention_layernorm",)) if layer.placement == "pre" else (None,)


def _is_plain(gqa: GQA) -> bool:
    """Whether there are projections and a scale, as cross-attention has them, and nothing more."""
    return gqa == GQA(
        num_attention_heads=gqa.num_attention_heads,
        num_key_value_heads=gqa.num_key_value_heads,
        head_dim=gqa.head_dim,
        scaling=gqa.scaling,
        qkv_bias=gqa.qkv_bias,
        o_bias=gqa.o_bias,
        unbiased=gqa.unbiased,
    )


def unplanned_parts(model: Model) -> list[str]:
    """What attnlab runs and its programs (attnlab_program.py) do not write, in words."""
    found = ["cross-attention"] * model.is_seq2seq
    for layer in model.layer_kinds():
        match layer.attention:
            case Mixer() as mixer:
                found.append(f"{mixer.kind} layers")
            case GQA(output_gate=True):
                found.append("gated attention")
            case GQA() as gqa if gqa.temperature:
                found.append("queries that grow with their position")
        if layer.attention is None or layer.feed_forward is None:
            found.append("blocks without attention or feed-forward")
    return found


def _check_runs(model: Model) -> None:
    """ConfigError for a model that attnlab does not run."""
    missing = [part for part in missing_parts(model) if not _is_planned(model, part)]
    if missing:
        raise ConfigError(
            f"runtime=attnlab does not run {missing[0]} of {model.model_type} yet: "
            "transformers or vllm"
        )


def _program(model: Model, work: Inference, setting: Setting, kind: str) -> Program:
    spec = setting.cache or CacheSpec(kind="static")
    one = kind == "decode" or (_latent(model) and np.max(work.prompt_tokens) == 1)
    return forward_program(
        model,
        Pass(
            kind=kind,  # type: ignore[arg-type]
            attention=setting.attention,  # type: ignore[arg-type]
            dtype=setting.dtype,
            kv_dtype=setting.kv_dtype,
            logits=work.logits,
            cache=spec.kind,  # type: ignore[arg-type]
            block_tokens=spec.block_tokens or DEFAULT_BLOCK_TOKENS,
            form=kv_format(setting.cache, setting.kv_dtype),
            latent="absorbed" if one else "expanded",
        ),
    )


def _latent(model: Model) -> bool:
    return any(isinstance(layer.attention, MLA) for layer in model.layer_kinds())
