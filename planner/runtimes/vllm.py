"""The `vllm` runtime, version 0.19: a pool of KV blocks out of what everything else leaves.

Blocks (v1/core/single_type_kv_cache_manager.py): a full or latent layer holds ⌈S / block⌉; a
sliding one drops the blocks that lie wholly before its window, ⌊max(0, S − W) / block⌋ of them
after the step that makes S tokens.
Groups (v1/core/kv_cache_utils.py): layers of different kinds share one pool of block ids, so the
kinds are cut into groups of g layers; a group that is short of layers is charged in full.
Pool (v1/worker/gpu_worker.py): utilisation × memory − weights − profile-run peak − what is not
torch's.
"""

from __future__ import annotations

from functools import lru_cache

from planner.catalog.gpus import Gpu
from planner.dtypes import element_bytes
from planner.kv_cache import attention_cache_elements, mixer_kind
from planner.layers import GQA, MLA, Dense, Layer, MoE, RoPE
from planner.ledger import Row
from planner.model import Model
from planner.program import (
    B,
    Buffer,
    Dims,
    Extent,
    Program,
    S,
    Shape,
    Symbol,
    T,
    minimum,
    visible_pairs,
)
from planner.runtimes.base import (
    Phase,
    Pool,
    Setting,
    check_cache_kind,
    check_kv_dtype,
    check_planned,
    choose_attention,
)
from planner.runtimes.writer import FLOAT32, Writer, layer_label
from planner.workload import CacheSpec, Inference

DEFAULT_BLOCK_TOKENS = 16

NON_TORCH_BYTES = int(0.25 * 2**30)
"""Growth outside torch while profiling: the median of vLLM 0.19's start-up logs on one H100 (18
published runs of one GPU, 0.24–0.26 GiB in 17 of them; llm-d-planner@d3121e059da8)."""


def batch_defaults(gpu: Gpu) -> tuple[int, int]:
    """(tokens a pass, sequences) that `vllm serve` takes: more from 70 GiB on, A100 apart.

    engine/arg_utils.py EngineArgs.get_batch_defaults, vLLM 0.19.
    """
    large = gpu.memory_bytes >= 70 * 2**30 and not gpu.name.startswith("a100")
    return (8192, 1024) if large else (2048, 256)


class Vllm:
    """vLLM's V1 engine on one GPU."""

    name = "vllm"
    pooled = True
    on_torch = True
    version = "0.19"
    kv_dtypes = ("fp32", "bf16", "fp16", "fp8")

    def attention(self, model: Model, name: str | None) -> str:
        """Its own fused kernels; which one it picks does not change what it holds."""
        check_planned(self.name, model)
        return choose_attention(self.name, model, name, ("flash",))

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
        """Blocks that `batch` requests hold, each after the step that made `context_tokens`."""
        check_planned(self.name, model)
        check_cache_kind(self.name, cache, ("paged",))
        check_kv_dtype(self.name, dtype, self.kv_dtypes)
        block = (cache.block_tokens if cache else None) or DEFAULT_BLOCK_TOKENS
        b = element_bytes(dtype)
        kinds = _kinds(model)
        size = group_size([count for _, count in kinds])
        rows = []
        for layer, count in kinds:
            groups = -(-count // size)
            held = held_blocks(layer, context_tokens, block)
            page = attention_cache_elements(_cached(layer), tokens=block) * b
            rows.append(
                Row(
                    component="kv_cache",
                    item=f"{mixer_kind(_cached(layer))}, blocks of {block}",
                    count=groups,
                    formula="B · g · blocks · page",
                    values=(("B", batch), ("g", size), ("blocks", held), ("page", page)),
                    size_bytes=groups * batch * size * held * page,
                    note=f"{groups} group(s) of {size} layers for {count}; vLLM {self.version}",
                )
            )
        return rows

    def peak_note(self, model: Model) -> str:
        """Written from the source, not traced."""
        beside = "; without the profile run of its encoders" if model.towers else ""
        return f"uncalibrated: written from vLLM's source, not traced{beside}"

    def cache_note(self, setting: Setting) -> str:
        """Nothing."""
        return ""

    def buffer_rows(self, model: Model, *, dtype: str) -> list[Row]:
        """vLLM's rotary table: cos and sin of every position, in the model's dtype."""
        if not isinstance(model.positions, RoPE):
            return []
        rows = model.max_position_embeddings or 0
        D, b = model.positions.rotary_dim, element_bytes(dtype)
        return [
            Row(
                component="weights",
                item="rotary table (buffer)",
                count=1,
                formula="positions · d_rot · b",
                values=(("positions", rows), ("d_rot", D), ("b", b)),
                size_bytes=rows * D * b,
            )
        ]

    def memory_phases(self, model: Model, work: Inference, setting: Setting) -> list[Phase]:
        """The profile run at start-up, whatever the workload: it sets the pool."""
        tokens, rows = setting.max_batched_tokens, setting.max_sequences
        rows = min(rows, tokens)
        program = _program(
            model, setting.dtype, setting.kv_dtype, rows, min(rows, setting.multiprocessors)
        )
        dims = Dims(batch=1, tokens=tokens, context=tokens)
        return [Phase(name="profile run", program=program, dims=dims)]

    def pool(
        self, model: Model, setting: Setting, *, budget_bytes: int, held_bytes: int
    ) -> Pool | None:
        """Whole blocks out of budget − weights − profile-run peak − what grows outside torch.

        The context is not subtracted: 0.19 snapshots the device after creating it.
        """
        outside = NON_TORCH_BYTES if setting.device == "cuda" else 0
        available = budget_bytes - held_bytes - outside
        kinds = _kinds(model)
        size, block = group_size([count for _, count in kinds]), setting.block_tokens
        page = max(attention_cache_elements(_cached(layer), tokens=block) for layer, _ in kinds)
        each = size * page * element_bytes(setting.kv_dtype)
        blocks = max(0, available) // each
        groups = sum(-(-count // size) for _, count in kinds)
        return Pool(
            size_bytes=blocks * each, tokens=blocks // groups * block, available_bytes=available
        )

    def prefill(self, model: Model, work: Inference, setting: Setting) -> Program:
        """The whole prompt, logits of each sequence's last token."""
        return _program(model, setting.dtype, setting.kv_dtype)

    def decode(self, model: Model, work: Inference, setting: Setting) -> Program:
        """One token for every sequence over the paged cache."""
        return _program(model, setting.dtype, setting.kv_dtype)


def group_size(counts: list[int]) -> int:
    """Layers of one KV-cache group: the smallest count, or the largest if nearly equal.

    _get_kv_cache_groups_uniform_page_size, vLLM 0.19.
    """
    least, most = min(counts), max(counts)
    return most if most < 1.5 * least else least


def held_blocks(layer: Layer, tokens: int, block: int) -> int:
    """Blocks of one request in one layer after `tokens` tokens."""
    blocks = -(-tokens // block)
    match layer.attention:
        case GQA(sliding_window=int(window)):
            return blocks - max(0, tokens - window) // block
    return blocks


def _cached(layer: Layer) -> GQA | MLA:
    """The attention of a block that `check_planned` let through."""
    assert isinstance(layer.attention, GQA | MLA)
    return layer.attention


def _kinds(model: Model) -> list[tuple[Layer, int]]:
    """Layers that differ in what they cache: attention's shape and window."""
    kinds: dict[object, tuple[Layer, int]] = {}
    for layer, count in model.layer_kinds().items():
        first, seen = kinds.get(layer.attention, (layer, 0))
        kinds[layer.attention] = (first, seen + count)
    return list(kinds.values())


@lru_cache(maxsize=128)
def _program(
    model: Model, dtype: str, kv_dtype: str, rows: int | None = None, sorters: int = 0
) -> Program:
    return _Profile(model, dtype, kv_dtype, rows, sorters).write()


class _Profile(Writer):
    """A pass of vLLM: fused norms in place, one buffer for gate and up, sampler on float32 logits.

    Logits of `rows` sequences, or of the batch's (None); `sorters` blocks of top-k, one float32
    row each. What lives is taken from its layer code, not traced: uncalibrated.
    """

    def __init__(
        self, model: Model, dtype: str, kv_dtype: str, rows: int | None, sorters: int
    ) -> None:
        super().__init__(model, dtype)
        self.sorters = sorters
        self.rows, self.kv_b = rows, element_bytes(kv_dtype)

    def write(self) -> Program:
        """Embedding, layers, logits and sampler."""
        model, tape, b, h = self.model, self.tape, self.b, self.model.hidden_size
        shape = (B, T, h)
        with tape.segment("embedding"):
            residual = tape.new("residual", shape, b, moved=((B, T, h, b),))
        for start, count, layer in model.layer_groups():
            label = layer_label(layer)
            if not tape.again(label, count=count, first_layer=start):
                with tape.segment(label, count=count, first_layer=start):
                    self._layer(layer, residual)
        with tape.segment("sampler"):
            # the start-up logs of four models show a second [T, h] beside the sampler's tensors
            hidden = tape.new("final norm", shape, b, reads=(residual,))
            if model.lm_head:
                self._sampler(hidden)
            tape.free(hidden, residual)
        return tape.program("vllm")

    def _layer(self, layer: Layer, residual: Buffer) -> None:
        tape, b, h = self.tape, self.b, self.model.hidden_size
        shape = (B, T, h)
        normed = tape.new("attention norm", shape, b, reads=(residual,), weight_bytes=h * b)
        match _cached(layer):
            case GQA(num_attention_heads=H, num_key_value_heads=G, head_dim=D, sliding_window=W):
                qkv = self.linear("qkv_proj", normed, (H + 2 * G) * D)
                flops: Shape = (4 * D, B, H, visible_pairs(W))
                kept: Extent = (
                    S if W is None else Symbol(f"min(S, {W})", lambda d: minimum(d.context, W))
                )
                read: Shape = (2, B, G, kept, D, self.kv_b)
                width = H * D
            case MLA(num_attention_heads=H, kv_lora_rank=d_c, qk_rope_head_dim=d_rope) as mla:
                down = self.linear("qkv_a_proj", normed, (mla.q_lora_rank or 0) + d_c + d_rope)
                q_in = mla.q_lora_rank or h
                qkv = tape.new(
                    "q_b_proj",
                    (B, T, H * mla.qk_head_dim),
                    b,
                    flops=(2, B, T, q_in, H * mla.qk_head_dim),
                    weight_bytes=(
                        q_in * H * mla.qk_head_dim
                        + d_c * H * (mla.qk_nope_head_dim + mla.v_head_dim)
                    )
                    * b,
                )
                tape.free(down)
                flops = (2 * (2 * d_c + d_rope), B, H, visible_pairs(None))
                read = (B, S, d_c + d_rope, self.kv_b)
                width = H * mla.v_head_dim
        tape.free(normed)
        out = tape.new("attention", (B, T, width), b, flops=flops, reads=(qkv,), moved=(read,))
        tape.free(qkv)
        attended = self.linear("o_proj", out, h)
        tape.free(out)
        match layer.feed_forward:
            case Dense() as dense:
                fed = self._dense(dense, attended)
            case MoE() as moe:
                fed = self._experts(moe, attended)
            case _:
                raise AssertionError("refused by check_planned")
        tape.free(attended, fed)

    def _dense(self, dense: Dense, x: Buffer) -> Buffer:
        i = dense.intermediate_size
        both = self.linear("gate_up_proj", x, 2 * i if dense.gated else i, bias=dense.bias)
        active = self.tape.new("activation", (B, T, i), self.b, reads=(both,))
        self.tape.free(both)
        out = self.linear("down_proj", active, self.model.hidden_size, bias=dense.bias)
        self.tape.free(active)
        return out

    def _experts(self, moe: MoE, x: Buffer) -> Buffer:
        tape, b, h = self.tape, self.b, self.model.hidden_size
        k, i = moe.num_experts_per_tok, moe.moe_intermediate_size
        tape.free(self.linear("router", x, moe.num_experts))
        flat: Shape = (B, T, k)
        reached = Symbol(
            f"min({moe.num_experts}, {k} · B · T)",
            lambda d: minimum(moe.num_experts, k * d.batch * d.tokens),
        )
        both = tape.new(
            "experts gate_up",
            (*flat, 2 * i),
            b,
            flops=(2, *flat, h, 2 * i),
            reads=(x,),
            moved=((reached, 2 * i * h * b),),
        )
        active = tape.new("experts activation", (*flat, i), b, reads=(both,))
        down = tape.new(
            "experts down",
            (*flat, h),
            b,
            flops=(2, *flat, i, h),
            reads=(active,),
            moved=((reached, i * h * b),),
        )
        out = tape.new("experts output", (B, T, h), b, reads=(down,))
        tape.free(both, active, down)
        if moe.shared is not None:
            tape.free(self._dense(moe.shared, x))
        return out

    def _sampler(self, hidden: Buffer) -> None:
        """Logits, float32 copy, probabilities and noise: rows · V · (b + 12) (vLLM 0.19, V1)."""
        tape, b, V, h = self.tape, self.b, self.model.vocab_size, self.model.hidden_size
        rows: Extent = B if self.rows is None else self.rows
        shape: Shape = (rows, V)
        logits = tape.new(
            "logits", shape, b, flops=(2, rows, h, V), reads=(hidden,), weight_bytes=h * V * b
        )
        held = [logits]
        for name in ("float32 logits", "probabilities", "sampling noise"):
            held.append(tape.new(name, shape, FLOAT32, reads=(held[-1],)))
        held.append(tape.new("top-k rows", (self.sorters, V), FLOAT32))
        tape.free(*held)
