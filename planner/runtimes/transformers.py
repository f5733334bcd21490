"""The `transformers` runtime, version 5.23: what a plain forward or `generate` holds.

Cache rules: cache_utils.py. A DynamicCache grows by `cat`; a sliding layer keeps W − 1 tokens. A
StaticCache is allocated once, sliding layers for at most W tokens.
"""

from __future__ import annotations

from dataclasses import replace

from planner.catalog.gpus import Gpu
from planner.dtypes import element_bytes
from planner.errors import ConfigError
from planner.kv_cache import Kept, layer_rows
from planner.layers import GQA, MLA, ALiBi, Layer, MoE, RoPE
from planner.ledger import Row, buffer_row
from planner.model import Model
from planner.parallel import Share
from planner.program import Dims, Number, Program, minimum
from planner.runtimes.base import (
    Phase,
    Pool,
    Setting,
    check_cache_kind,
    check_kv_dtype,
    choose_attention,
    clock_capacity,
    one_share,
    static_capacity,
    whole,
)
from planner.runtimes.quantised_cache import (
    QUANTISED_DTYPES,
    check_groups,
    check_quantisable,
    quantised_cache,
    scratch_note,
)
from planner.runtimes.quantised_rows import quantised_rows
from planner.runtimes.transformers_code.families import HELD
from planner.runtimes.transformers_code.forward import SCANNED, check_written, is_held, pass_program
from planner.runtimes.transformers_code.regime import Pass, Regime
from planner.workload import CacheSpec, Inference

EXACT_PEAKS = HELD | {"bamba", "deepseek_v2", "deepseek_v3"}
"""Model types whose inference equals, to the byte, what their classes allocate (tests/)."""


STATIC = HELD - {"bert", "bloom", "gpt_bigcode", "opt", "t5"}
"""Model types whose passes over a StaticCache are held against their classes (tests/)."""

WINDOWED = frozenset(
    (
        "cohere2",
        "deepseek_v4",
        "exaone4",
        "gemma2",
        "gemma3",
        "gemma3_text",
        "gemma3n",
        "gemma3n_text",
        "gemma4",
        "gemma4_text",
        "gemma4_unified",
        "gemma4_unified_text",
        "gpt_oss",
        "lfm3",
        "llama4",
        "llama4_text",
        "minimax",
        "ministral",
        "ministral3",
        "mistral",
        "mixtral",
        "olmo3",
        "phi3",
        "phimoe",
        "qwen2",
        "qwen2_5_vl_text",
        "qwen2_moe",
        "qwen2_vl_text",
        "qwen3",
        "qwen3_moe",
        "recurrent_gemma",
        "smollm3",
        "starcoder2",
    )
)
"""Model types whose classes make masks for sliding or chunked layers."""

FLOAT32_ROUTERS = frozenset(("ernie4_5_moe", "hunyuan_v1_moe"))
"""Model types whose routers stay float32 whatever the dtype (`_keep_in_fp32_modules`)."""

FLOAT32_CORRECTIONS = frozenset(
    ("deepseek_v32", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "lfm2_moe")
)
"""Model types whose routers' correction bias is a float32 buffer, where others' has the dtype."""

EAGER_ONLY = frozenset(
    (
        "bloom",
        "deepseek_v4",
        "falcon_mamba",
        "gemma2",
        "gpt_neo",
        "gpt_oss",
        "gptj",
        "mamba",
        "mamba2",
        "mpt",
        "rwkv",
    )
)
"""Model types whose classes do not support sdpa (`_supports_sdpa`)."""


class Transformers:
    """transformers with torch, one process, no compilation."""

    name = "transformers"
    pooled = False
    on_torch = True
    version = "5.23.0"
    kv_dtypes = QUANTISED_DTYPES

    def attention(self, model: Model, name: str | None) -> str:
        """sdpa, or eager for models with a soft cap on the scores, which sdpa refuses.

        A window that a class does not know, in a llama's config say, is refused: the cache is
        clipped by it while no mask is made, and eager attention fails there.
        """
        check_written(self.name, model)
        for layer in () if model.text_type in WINDOWED else model.layer_kinds():
            if isinstance(layer.attention, GQA) and layer.attention.sliding_window is not None:
                raise ConfigError(
                    f"sliding_window={layer.attention.sliding_window} of a {model.text_type} does "
                    "not run in transformers: it clips the cache and masks nothing"
                )
        capped = any(
            isinstance(x.attention, GQA) and x.attention.logit_softcap is not None
            for x in model.layer_kinds()
        )
        # Gemma2PreTrainedModel and GptOssPreTrainedModel do not support sdpa, soft cap or not
        eager_only = capped or model.text_type in EAGER_ONLY
        allowed = ("eager",) if eager_only else ("sdpa", "eager")
        reason = "its class has no sdpa" if eager_only else ""
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
        """numel · itemsize of the cache's tensors after a prefill of `context_tokens`.

        A quantised dtype is kept by a QuantizedCache, which then depends on `decoded_tokens` too.
        """
        kind = cache_kind(cache, dtype, compute_dtype)
        S = context_tokens
        if kind == "quantised":
            quantised = quantised_cache(cache, dtype)
            check_quantisable(model)
            check_groups(
                quantised,
                model,
                batch=batch,
                prompt_tokens=S - decoded_tokens,
                decoded_tokens=decoded_tokens,
            )
            return quantised_rows(
                quantised.form,
                model,
                batch=batch,
                context_tokens=S,
                decoded_tokens=decoded_tokens,
                computed=compute_dtype,
            )
        if kind == "static":
            S = static_capacity(cache, context_tokens)

        def kept(attention: GQA | MLA) -> Kept:
            window = attention.sliding_window if isinstance(attention, GQA) else None
            if kind == "static" and window is not None:
                return minimum(S, window), "min(S, W)", (("S", S), ("W", window))
            if window is not None and window > 1:
                return minimum(S, window - 1), "min(S, W − 1)", (("S", S), ("W", window))
            return S, "S", (("S", S),)

        return layer_rows(
            _as_cached(model),
            batch=batch,
            dtype=dtype,
            kept=kept,
            context_tokens=S,
            encoder_tokens=encoder_tokens,
            static=kind == "static",
        )

    def rank(self, model: Model, tensor_parallel: int) -> Model:
        """All of it: one GPU."""
        return whole(self.name, model, tensor_parallel)

    def shares(
        self, model: Model, tensor_parallel: int, pipeline_parallel: int
    ) -> tuple[Share, ...]:
        """All of it: one GPU."""
        return one_share(self.name, model, tensor_parallel, pipeline_parallel)

    def peak_note(self, model: Model) -> str:
        """Types beyond EXACT_PEAKS run a program of their parts that was not compared yet.

        Mamba-2 layers run as they do where no fused kernels are installed.
        """
        if model.text_type in SCANNED:
            return "of the PyTorch code that runs where mamba_ssm and causal_conv1d are missing"
        if is_held(model) or (model.text_type in EXACT_PEAKS and not model.towers):
            return ""
        return f"approximate: the program of {model.model_type} was not compared with its class"

    def cache_note(self, setting: Setting) -> str:
        """Not every backend of a quantised cache was watched on a GPU."""
        if not is_quantised(setting):
            return ""
        return scratch_note(quantised_cache(setting.cache, setting.kv_dtype), device=setting.device)

    def buffer_rows(self, model: Model, *, dtype: str, capability: str | None = None) -> list[Row]:
        """Rotary tables, gemma's embedding scale, the routers' correction bias, causal masks.

        In the dtype that `from_config(dtype=…)` gives them.
        """
        b = element_bytes(dtype)
        rows = []
        L, S = len(model.layers), model.max_position_embeddings or 0
        if model.text_type == "gptj":  # a sine and cosine table in every layer
            assert isinstance(model.positions, RoPE)
            D = model.positions.rotary_dim
            values = (("S", S), ("d_rot", D))
            rows.append(buffer_row("rotary table", L, "S · d_rot · 4", values, L * S * D * 4))
        elif isinstance(model.positions, RoPE):
            D, tables = model.positions.rotary_dim, 2
            if model.local_positions is not None:  # two for each kind of layer that there is
                tables *= len({_slides(layer) for layer in model.layer_kinds()})
            size = tables * 2 * D
            rows.append(
                buffer_row("rotary frequencies", tables, "d_rot · 2", (("d_rot", D),), size)
            )
        if model.text_type == "falcon" and isinstance(model.positions, ALiBi):  # made, not used
            gqa = model.layers[0].attention
            assert isinstance(gqa, GQA)
            D = gqa.head_dim
            rows.append(buffer_row("rotary frequencies", 2, "d_h · 2", (("d_h", D),), 4 * D))
        if model.embedding_scale is not None and model.text_type.startswith("gemma"):
            rows.append(buffer_row("embedding scale", 1, "b", (("b", b),), b))
        for layer, count in model.layer_kinds().items():
            match layer.feed_forward:
                case MoE(router="sigmoid-groups", num_experts=E):
                    item = 4 if model.text_type in FLOAT32_CORRECTIONS else b
                    values = (("E", E), ("b", item))
                    rows.append(buffer_row("router bias", count, "E · b", values, count * E * item))
        masks = {"gpt_neo": L, "gpt_bigcode": 1}.get(model.text_type, 0)
        if masks:
            rows.append(buffer_row("causal mask", masks, "S · S", (("S", S),), masks * S * S))
        if model.text_type == "bert":
            rows.append(buffer_row("positions and token types", 2, "S · 8", (("S", S),), 2 * S * 8))
        if model.text_type in FLOAT32_ROUTERS and b < 4:
            routed = sum(p.count for p in model.parameters() if p.group == "router")
            values = (("parameters", routed), ("b", b))
            more = routed * (4 - b)
            rows.append(buffer_row("routers in float32", 1, "parameters · (4 − b)", values, more))
        for tower in model.towers:
            if size := tower.buffer_bytes:
                rows.append(buffer_row(f"of the {tower.part} part", 1, "n", (("n", size),), size))
        return rows

    def memory_phases(self, model: Model, work: Inference, setting: Setting) -> list[Phase]:
        """Prefill, the first decode step (sliding layers still whole), the last decode step.

        Of a quantised cache: prefill, the last step that quantises all of it, the last step.
        """
        if not model.is_decoder and work.output_tokens > 1:
            raise ConfigError(
                f"output_tokens={work.output_tokens} is not allowed: 1, {model.model_type} is an "
                "encoder, which runs once over its prompt"
            )
        if is_quantised(setting):
            return self._quantised_phases(model, work, setting)
        if is_static(setting):
            return self._static_phases(model, work, setting)
        dims = _prefill_dims(model, work)
        phases = [Phase(name="prefill", program=self.prefill(model, work, setting), dims=dims)]
        if work.output_tokens > 1:
            dims = _decode_dims(model, work, work.prompt_tokens + 1)
            first = _program(model, work, setting, dims, kind="decode", held_whole=True)
            phases.append(Phase(name="first decode step", program=first, dims=dims))
        if work.output_tokens > 2:
            phases.append(
                Phase(
                    name="last decode step",
                    program=self.decode(model, work, setting),
                    dims=_decode_dims(model, work, work.context_tokens),
                )
            )
        return phases

    def alike(self, model: Model, work: Inference) -> Number:
        """A number for each cell of a grid: those of the same one run the same programs."""
        passes = [_prefill_dims(model, work)]
        if work.output_tokens > 1:
            ends = (work.prompt_tokens + 1, work.context_tokens)
            passes += [_decode_dims(model, work, context) for context in ends]
        bits = Regime.bits(model)
        code: Number = 0
        for dims in passes:
            code = code * 2**bits + Regime.codes(model, dims)
        return code

    def _static_phases(self, model: Model, work: Inference, setting: Setting) -> list[Phase]:
        """Prefill, the first decode step and the last, whose windows may be full."""
        if model.text_type not in STATIC or isinstance(model.positions, ALiBi):
            raise ConfigError(
                f"cache.kind='static' of model_type={model.model_type} is not planned for "
                f"runtime=transformers yet: dynamic (kv_cache_bytes counts both), or "
                f"{', '.join(sorted(STATIC))}"
            )
        capacity = static_capacity(setting.cache, work.context_tokens)
        passes = [("prefill", "prefill", _prefill_dims(model, work))]
        for step, name in {work.output_tokens - 1: "last", 1: "first"}.items():
            if 1 <= step < work.output_tokens:
                dims = _decode_dims(model, work, work.prompt_tokens + step)
                passes.insert(1, (f"{name} decode step", "decode", dims))
        phases = []
        for name, kind, dims in passes:
            dims = replace(dims, capacity=capacity)
            program = _program(model, work, setting, dims, kind=kind)
            phases.append(Phase(name=name, program=program, dims=dims))
        return phases

    def _quantised_phases(self, model: Model, work: Inference, setting: Setting) -> list[Phase]:
        prompt, steps = work.prompt_tokens, work.output_tokens - 1
        window = max(1, quantised_cache(setting.cache, setting.kv_dtype).form.residual_tokens)

        def phase(name: str, step: int) -> Phase:
            """`step` 0 is the prefill; before step i, i − 1 tokens came one at a time."""
            dims = _decode_dims(model, work, prompt + step) if step else _prefill_dims(model, work)
            program = _program(
                model,
                work,
                setting,
                dims,
                kind="decode" if step else "prefill",
                residual_tokens=max(0, step - 1) % window,
            )
            return Phase(name=name, program=program, dims=dims)

        phases = [phase("prefill", 0)]
        full = steps - steps % window
        if full:
            phases.append(phase("last step that quantises anew", full))
        if steps > full:
            phases.append(phase("last decode step", steps))
        return phases

    def pool(
        self, share: Share, setting: Setting, gpu: Gpu, *, budget_bytes: int, held_bytes: int
    ) -> Pool | None:
        """None: the cache is allocated as needed."""
        return None

    def prefill(self, model: Model, work: Inference, setting: Setting) -> Program:
        """The whole prompt in one forward."""
        dims = _prefill_dims(model, work)
        return _program(model, work, setting, _held(dims, work, setting), kind="prefill")

    def decode(self, model: Model, work: Inference, setting: Setting) -> Program:
        """One token for every sequence; over a quantised cache, the step after it was filled."""
        dims = _decode_dims(model, work, work.context_tokens)
        return _program(model, work, setting, _held(dims, work, setting), kind="decode")


def cache_kind(cache: CacheSpec | None, dtype: str, compute_dtype: str) -> str:
    """The kind of cache: what was asked for, else the one that keeps `dtype`.

    Raises ConfigError where it does not: plain caches keep what was computed.
    """
    if cache is None and dtype in QUANTISED_DTYPES:
        return "quantised"
    kind = check_cache_kind("transformers", cache, ("dynamic", "static", "quantised"))
    if kind == "quantised":
        check_kv_dtype("transformers", dtype, QUANTISED_DTYPES, why=" in a quantised cache")
    elif dtype in QUANTISED_DTYPES:
        raise ConfigError(
            f"kv_dtype={dtype!r} is not kept by cache.kind={kind!r}: 'quantised' does"
        )
    elif dtype != compute_dtype:
        raise ConfigError(
            f"kv_dtype={dtype!r} is not kept by cache.kind={kind!r}: it keeps what is computed, "
            f"{compute_dtype}"
        )
    return kind


def is_quantised(setting: Setting) -> bool:
    """Whether a deployment's cache is quantised."""
    return cache_kind(setting.cache, setting.kv_dtype, setting.dtype) == "quantised"


def is_static(setting: Setting) -> bool:
    """Whether a deployment's cache is allocated once."""
    return cache_kind(setting.cache, setting.kv_dtype, setting.dtype) == "static"


def _as_cached(model: Model) -> Model:
    """The model with the heads that this runtime caches, where they are not the kv heads."""

    def cached(layer: Layer) -> Layer:
        match layer.attention:
            case GQA(cache_heads=int(heads)) as attention:
                return replace(layer, attention=replace(attention, num_key_value_heads=heads))
        return layer

    changed = {layer: cached(layer) for layer in model.layer_kinds()}
    if all(before is after for before, after in changed.items()):
        return model
    return replace(model, layers=tuple(changed[layer] for layer in model.layers))


def _program(
    model: Model,
    work: Inference,
    setting: Setting,
    dims: Dims,
    *,
    kind: str,
    held_whole: bool = False,
    residual_tokens: int = 0,
) -> Program:
    what = Pass(
        kind=kind,  # type: ignore[arg-type]
        attention=setting.attention,  # type: ignore[arg-type]
        dtype=setting.dtype,
        device=setting.device,
        capability=setting.capability,
        multiprocessors=setting.multiprocessors,
        kv_dtype=setting.kv_dtype,
        logits=work.logits,
        held_whole=held_whole,
        quantised=quantised_cache(setting.cache, setting.kv_dtype)
        if is_quantised(setting)
        else None,
        residual_tokens=residual_tokens,
        static=is_static(setting),
        padded=work.padded,
        float32_logits=work.float32_logits,
    )
    return pass_program(model, what, Regime.of(model, dims))


def _prefill_dims(model: Model, work: Inference) -> Dims:
    prompt, encoder = work.prompt_tokens, _encoder(model, work)
    return Dims(batch=work.batch, tokens=prompt, context=prompt, encoder=encoder)


def _decode_dims(model: Model, work: Inference, context: Number) -> Dims:
    return Dims(batch=work.batch, tokens=1, context=context, encoder=_encoder(model, work))


def _held(dims: Dims, work: Inference, setting: Setting) -> Dims:
    """With the room of a static cache, whose masks are as wide."""
    return replace(dims, capacity=clock_capacity(setting, work))


def _encoder(model: Model, work: Inference) -> Number | None:
    if not model.is_seq2seq:
        return None
    return model.encoder_length(work.encoder_tokens, work.prompt_tokens)


def _slides(layer: Layer) -> bool:
    return isinstance(layer.attention, GQA) and layer.attention.sliding_window is not None
