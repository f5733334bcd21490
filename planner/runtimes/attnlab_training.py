"""Training steps of attnlab (kernels/attnlab/training.py) as programs.

The forward is written as attnlab's own, line by line and `del` by `del`, on tensors without
contents (`planner/autograd`); the backward follows from what it recorded. The first layer of each
kind is written apart from those like it: it comes last on the way back, and frees what they share
(rotary tables, masks).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from planner.autograd.aten import ONE
from planner.autograd.step import StepWriter
from planner.autograd.tensors import Tensor
from planner.dtypes import element_bytes
from planner.errors import ConfigError
from planner.layers import GQA, Dense, Layer, LearnedPositions, Norm, RoPE
from planner.model import Model
from planner.program import B, Dims, Program, Shape, T, visible_pairs
from planner.runtimes.base import Phase, Setting
from planner.runtimes.writer import BOOL, FLOAT32, INT64
from planner.workload import Training

SOME_BATCH, SOME_TOKENS = 999_983, 1_000_003
"""Primes that stand for any size above 1 where strides are compared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Regime:
    """What of the sizes decides which copies are made: whether they are 1, and the masks.

    `masked` are the windows shorter than the sequence.
    """

    several_batches: bool
    several_tokens: bool
    masked: frozenset[int]

    @staticmethod
    def of(model: Model, dims: Dims) -> Regime:
        """The regime of one point."""
        windows = {_window(_gqa(layer)) for layer in model.layer_kinds()}
        return Regime(
            several_batches=dims.batch > 1,
            several_tokens=dims.tokens > 1,
            masked=frozenset(w for w in windows if w is not None and w < dims.tokens),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """Which training step."""

    attention: Literal["sdpa", "naive"]
    dtype: str
    device: str
    optimizer: str | None = None
    optimizer_impl: str = "foreach"


NOTE = (
    "approximate: written from the source of torch and its flash attention, not measured on a GPU"
)


def training_phase(model: Model, work: Training, setting: Setting) -> Phase:
    """One step's program and sizes; ConfigError for what is not planned."""
    for field, planned in (("method", "full"), ("checkpointing", "none"), ("precision", "pure")):
        if getattr(work, field) != planned:
            raise ConfigError(
                f"{field}={getattr(work, field)!r} is not planned for runtime=attnlab yet: "
                f"{planned}"
            )
    check_trained(model)
    tokens = work.sequence_tokens
    dims = Dims(batch=work.batch, tokens=tokens, context=tokens)
    regime = Regime.of(model, dims)
    if setting.device == "cuda" and setting.attention == "sdpa":
        _check_flash(model, setting.dtype, regime)
    step = Step(
        attention=setting.attention,  # type: ignore[arg-type]
        dtype=setting.dtype,
        device=setting.device,
        optimizer=work.optimizer,
        optimizer_impl=work.optimizer_impl,
    )
    note = NOTE if setting.device == "cuda" else ""
    program = step_program(model, step, regime)
    return Phase(name="training step", program=program, dims=dims, note=note)


def check_trained(model: Model) -> None:
    """ConfigError for parts that attnlab runs and whose way back is not written down yet."""
    positions = [p for p in (model.positions, model.local_positions) if p is not None]
    ropes = [p for p in positions if isinstance(p, RoPE)]
    known = all(isinstance(p, RoPE | LearnedPositions) for p in positions)
    wanted = {
        type(model.positions).__name__: not known,
        "interleaved rotary positions": any(rope.interleaved for rope in ropes),
    }
    for layer in model.layer_kinds():
        gqa, dense = _gqa(layer), layer.feed_forward
        assert isinstance(dense, Dense)
        wanted |= {
            "attention sinks": gqa.sinks,
            "clipped queries and keys": gqa.clip_qkv is not None,
            "interleaved fused projections": gqa.interleaved_qkv,
            "norms of each head": gqa.qk_norm is not None
            and gqa.qk_norm.width not in ("head", "full"),
            "the activation gelu_fast": dense.activation == "gelu_fast",
        }
        for part, there in wanted.items():
            if there:
                raise ConfigError(
                    f"training with {part} is not planned for runtime=attnlab yet: without"
                )


def _check_flash(model: Model, dtype: str, regime: Regime) -> None:
    """ConfigError where CUDA's flash attention does not run: torch's choice then is unknown."""
    widths = {_gqa(layer).head_dim for layer in model.layer_kinds()}
    why = {
        "in fp32": dtype == "fp32",
        f"over a window of {max(regime.masked, default=0)} tokens": bool(regime.masked),
        f"of head_dim={max(widths)}": any(D % 8 or D > 256 for D in widths),
    }
    for part, refused in why.items():
        if refused:
            raise ConfigError(
                f"attention=sdpa {part} is not planned for training on a GPU yet: naive"
            )


@lru_cache(maxsize=128)
def step_program(model: Model, step: Step, regime: Regime) -> Program:
    """Forward and backward of [B, T] ids and labels, in one regime of sizes."""
    return _Training(model, step, regime).write(
        "attnlab training step", step.optimizer, step.optimizer_impl
    )


class _Training(StepWriter):
    """Runs attnlab's training_step."""

    def __init__(self, model: Model, step: Step, regime: Regime) -> None:
        numbers = {
            B: SOME_BATCH if regime.several_batches else 1,
            T: SOME_TOKENS if regime.several_tokens else 1,
        }
        super().__init__(model, element_bytes(step.dtype), numbers)
        self.step, self.regime = step, regime
        self.rotations: dict[bool, tuple[Tensor, Tensor]] = {}  # of full and of sliding layers
        self.masks: dict[tuple[int | None, bool], Tensor | None] = {}
        self.positions: Tensor | None = None

    # Transformer.forward

    def embed(self) -> Tensor:
        """Token embeddings, positions, rotary tables and masks."""
        model, f, h = self.model, self.f, self.model.hidden_size
        self.table = self.weight("embed_tokens", model.vocab_size, model.embedding_size or h)
        self.positions = self.aten.new("arange", "positions", ((T,),), INT64)
        x = f.embedding(self.table, self.given("token ids", ((B,), (T,)), INT64), "hidden states")
        if model.embedding_norm is not None:
            x = self._norm(model.embedding_norm, x, "hidden states", "embed_norm")
        if model.embedding_size is not None:
            x = self._linear(x, "project_in", h, bias=False, name="hidden states")
        if model.embedding_scale is not None:
            x = f.scale(x, "hidden states")
        if isinstance(model.positions, LearnedPositions):
            x = self._learned_positions(x, model.positions)
        for sliding, positions in ((False, model.positions), (True, model.local_positions)):
            if isinstance(positions, RoPE):
                self.rotations[sliding] = self._rotary_tables(positions.rotary_dim)
        for layer in model.layer_kinds():
            gqa = _gqa(layer)
            window = _window(gqa)
            if (window, gqa.chunked) not in self.masks:
                masked = window in self.regime.masked
                self.masks[window, gqa.chunked] = (
                    self._visible(window, chunked=gqa.chunked) if masked else None
                )
        return x

    def _learned_positions(self, x: Tensor, learned: LearnedPositions) -> Tensor:
        assert self.positions is not None
        rows = self.positions
        if learned.offset:
            rows = self.aten.elementwise("add.Tensor", "positions", rows)
        limit = (self.model.max_position_embeddings or 0) + learned.offset
        table = self.weight("embed_positions", limit, self.model.hidden_size)
        return self.f.add(x, self.f.embedding(table, rows, "position embeddings"), "hidden states")

    def _rotary_tables(self, D: int) -> tuple[Tensor, Tensor]:
        """positions.RotaryTables.forward: cos and sin, each [T, 1, D].

        Left out: the few numbers of stretched frequencies, and the product with a factor for
        attention, which are gone before the first layer.
        """
        aten, name = self.aten, "rotary tables"
        assert self.positions is not None
        wide = aten.new("_to_copy", name, ((T,), ONE), FLOAT32, reads=(self.positions,))
        freqs = aten.new("mul.Tensor", name, ((T,), (D // 2,)), FLOAT32, reads=(wide,))
        del wide
        angles = aten.new("cat", name, ((T,), ONE, (D,)), FLOAT32, reads=(freqs,))
        cos, sin = (
            aten.cast(aten.elementwise(kernel, name, angles), self.b, name)
            for kernel in ("cos", "sin")
        )
        del freqs
        return cos, sin

    def _visible(self, window: int | None, *, chunked: bool = False) -> Tensor:
        """masks.visibility: a bool for each pair of a query and a key."""
        positions = self.positions
        assert positions is not None
        causal = self._compare("le.Tensor", positions)
        if window is None:
            return causal
        first = positions
        if chunked:
            first = self.aten.elementwise("remainder.Scalar", "mask", positions)
        first = self.aten.elementwise("sub.Tensor", "mask", first)
        near = self._compare("ge.Tensor", first)
        del first
        return self._compare("bitwise_and.Tensor", causal, near)

    def _compare(self, kernel: str, *given: Tensor) -> Tensor:
        return self.aten.new(kernel, "mask", ((T,), (T,)), BOOL, reads=given)

    def loss(self, hidden: list[Tensor]) -> Tensor:
        """Last norm, head, caps, cross-entropy in float32."""
        model, f = self.model, self.f
        self.rotations, self.masks, self.positions = {}, {}, None
        x, V = hidden.pop(), model.vocab_size
        if model.final_norm is not None:
            x = self._norm(model.final_norm, x, "final norm", "norm")
        if model.embedding_size is not None:
            x = self._linear(x, "project_out", model.embedding_size, bias=False)
        head = self.table if model.tie_word_embeddings else self.weight("lm_head", V, x.sizes[-1])
        bias = self.weight("lm_head.bias", V) if model.lm_head_bias else None
        logits = f.linear(x, head, bias, "logits")
        del x
        if model.logit_scale is not None:
            logits = f.scale(logits, "logits")
        if model.final_logit_softcapping is not None:
            logits = f.scale(logits, "logits", kernel="div.Tensor")
            logits = f.pointwise(logits, "logits", "tanh", saves="result")
            logits = f.scale(logits, "logits")
        wide = f.view(f.cast(logits, FLOAT32, "float32 logits"), ((B, T), (V,)))
        del logits
        return f.nll_loss(f.softmax(wide, "log-probabilities", kernel="_log_softmax"))

    # Block.forward

    def block(self, layer: Layer, x: Tensor) -> Tensor:
        """block.Block.forward, by where its norms stand."""
        f = self.f
        assert isinstance(layer.feed_forward, Dense)
        gqa, dense = _gqa(layer), layer.feed_forward

        def norm(x: Tensor, name: str) -> Tensor:
            return self._norm(layer.norm, x, name, name)

        def before(x: Tensor) -> Tensor:
            return norm(x, "attention norm")

        def after(x: Tensor) -> Tensor:
            return norm(x, "feed-forward norm")

        def post(x: Tensor) -> Tensor:
            return norm(x, "post norm")

        def scaled(x: Tensor) -> Tensor:
            return x if layer.residual_multiplier is None else f.scale(x, "scaled")

        match layer.placement:
            case "pre":
                x = f.add(x, scaled(self._attention(gqa, before(x))), "residual")
                return f.add(x, scaled(self._feed_forward(dense, after(x))), "hidden states")
            case "post":
                x = f.add(x, scaled(post(self._attention(gqa, x))), "residual")
                return f.add(x, scaled(post(self._feed_forward(dense, x))), "hidden states")
            case "post-sum":
                out = f.add(x, scaled(self._attention(gqa, x)), "residual")
                x = before(out)
                del out
                out = f.add(x, scaled(self._feed_forward(dense, x)), "residual")
                return norm(out, "hidden states")
            case "sandwich":
                out = post(self._attention(gqa, before(x)))
                x = f.add(x, scaled(out), "residual")
                del out
                out = post(self._feed_forward(dense, after(x)))
                return f.add(x, scaled(out), "hidden states")
            case "parallel":
                normed = before(x)
                out = f.add(x, scaled(self._attention(gqa, normed)), "residual")
                return f.add(out, scaled(self._feed_forward(dense, normed)), "hidden states")
            case _:  # parallel-two
                out = f.add(x, scaled(self._attention(gqa, before(x))), "residual")
                return f.add(out, scaled(self._feed_forward(dense, after(x))), "hidden states")

    def _norm(self, norm: Norm, x: Tensor, name: str, module: str) -> Tensor:
        """norms.RMSNorm.forward, op by op, or LayerNorm."""
        f, b, h = self.f, self.b, x.sizes[-1]
        weights = [self.weight(f"{module}.weight", h)] if norm.weight else []
        if norm.kind == "layernorm":
            if norm.plus_one:
                weights = [f.shift(weight, f"{name}, 1 + weight") for weight in weights]
            if norm.bias:
                weights.append(self.weight(f"{module}.bias", h))
            kept = FLOAT32 if self.step.device == "cuda" else b  # CPUs keep the input's dtype
            return f.layer_norm(x, weights, name, statistics_bytes=kept)
        wide = f.cast(x, FLOAT32, f"{name}, float32")
        wide = f.mul(wide, self._inverse_rms(wide, name), f"{name}, normalised")
        if not norm.weight:
            return f.cast(wide, b, name)
        if norm.plus_one:
            scale = f.shift(f.cast(weights[0], FLOAT32), f"{name}, 1 + weight")
            return f.cast(f.mul(wide, scale, f"{name}, scaled"), b, name)
        return f.mul(weights[0], f.cast(wide, b, f"{name}, normalised"), name)

    def _inverse_rms(self, wide: Tensor, name: str) -> Tensor:
        f, column = self.f, f"{name}, mean square"
        mean = f.mean(f.power(wide, f"{name}, squares"), column)
        mean = f.shift(mean, column)
        return f.rsqrt(mean, f"{name}, 1 / rms")

    def _linear(self, x: Tensor, module: str, out: int, *, bias: bool, name: str = "") -> Tensor:
        weight = self.weight(f"{module}.weight", out, x.sizes[-1])
        biases = self.weight(f"{module}.bias", out) if bias else None
        return self.f.linear(x, weight, biases, name or module)

    # Attention.forward

    def _attention(self, gqa: GQA, x: Tensor) -> Tensor:
        f, h = self.f, self.model.hidden_size
        H, G, D = gqa.num_attention_heads, gqa.num_key_value_heads, gqa.head_dim
        if gqa.fused_qkv:
            qkv = self._linear(x, "qkv_proj", (H + 2 * G) * D, bias=gqa.qkv_bias)
            q, k, v = f.split(qkv, (H * D, G * D, G * D))
            del qkv
        else:
            q, k, v = (
                self._linear(
                    x,
                    f"{letter}_proj",
                    heads * D,
                    bias=gqa.qkv_bias and letter not in gqa.unbiased,
                )
                for letter, heads in (("q", H), ("k", G), ("v", G))
            )
        across = gqa.qk_norm is not None and gqa.qk_norm.width == "full"
        if gqa.qk_norm is not None and across:
            q, k = self._normed(gqa.qk_norm.norm, q, k)
        q, k, v = (
            f.view(part, ((B,), (T,), (heads,), (D,))) for part, heads in ((q, H), (k, G), (v, G))
        )
        if gqa.qk_norm is not None and not across:
            q, k = self._normed(gqa.qk_norm.norm, q, k)
        sliding = gqa.sliding_window is not None and True in self.rotations
        rotation = self.rotations.get(sliding) if gqa.rope else None
        if rotation is not None:
            q = self._rotate(q, rotation, "query")
            k = self._rotate(k, rotation, "key")
        q, k, v = f.transpose(q, 1, 2), f.transpose(k, 1, 2), f.transpose(v, 1, 2)
        attend = self._naive if self.step.attention == "naive" else self._sdpa
        out = attend(gqa, q, k, v)
        del q, k, v
        out = f.view(f.transpose(out, 1, 2), ((B,), (T,), (H * D,)))
        return self._linear(out, "o_proj", h, bias=gqa.o_bias)

    def _normed(self, norm: Norm, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Both, before the projections go."""
        normed = self._norm(norm, q, "query norm", "q_norm")
        return normed, self._norm(norm, k, "key norm", "k_norm")

    def _rotate(self, x_BTHD: Tensor, rotation: tuple[Tensor, Tensor], name: str) -> Tensor:
        """positions.rotate."""
        f = self.f
        cos, sin = rotation
        R, D = cos.sizes[-1], x_BTHD.sizes[-1]
        x = f.narrow(x_BTHD, R)
        x1, x2 = f.split(x, (R // 2, R // 2))
        turned = f.add(
            f.mul(x, cos, f"{name} · cos"), self._turned(x1, x2, sin, name), f"rotated {name}"
        )
        if R == D:
            return turned
        rest = f.narrow(x_BTHD, D - R)
        return f.cat((turned, rest), x_BTHD.dims, f"rotated {name}")

    def _turned(self, x1: Tensor, x2: Tensor, sin: Tensor, name: str) -> Tensor:
        f, R = self.f, sin.dims[-1]
        halves = (f.scale(x2, f"{name}, negated", kernel="neg"), x1)
        whole = f.cat(halves, (*x1.dims[:-1], R), f"{name} turned")
        del halves
        return f.mul(whole, sin, f"{name} turned · sin")

    def _naive(self, gqa: GQA, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """attention.naive: float32 throughout, scores [B, G, H/G·T, T] kept in full."""
        f, window = self.f, _window(gqa)
        H, G, D = gqa.num_attention_heads, gqa.num_key_value_heads, gqa.head_dim
        visible = self.masks[window, gqa.chunked]
        if visible is None and self.regime.several_tokens:
            visible = self._visible(None)
        wide = f.scale(f.cast(q, FLOAT32, "float32 query"), "float32 query")
        rows: Shape = (H // G, T)
        folded = f.view(wide, ((B,), (G,), rows, (D,)))
        del wide
        keys = f.transpose(f.cast(k, FLOAT32, "float32 keys"), -2, -1)
        scores = self._pairs(folded, keys, "scores")
        del folded, keys
        if gqa.logit_softcap is not None:
            scores = f.pointwise(scores, "softcap", "tanh", saves="result")
            scores = f.scale(scores, "softcap")
        if visible is not None:
            seen = f.view(scores, ((B,), (H,), (T,), (T,)))
            scores = f.where(visible, seen, "masked scores")
            del seen
        scores = f.softmax(f.view(scores, ((B,), (G,), rows, (T,))), "softmax")
        out = self._pairs(scores, f.cast(v, FLOAT32, "float32 values"), "attention")
        out = f.view(out, ((B,), (H,), (T,), (D,)))
        return f.cast(out, self.b, "attention")

    def _pairs(self, a: Tensor, b: Tensor, name: str) -> Tensor:
        """a @ b of [B, G, …] tensors: one product for each of B · G (torch.matmul)."""
        f, pairs = self.f, (*a.dims[0], *a.dims[1])
        flat_a = f.view(a, (pairs, *a.dims[2:]))
        flat_b = f.view(b, (pairs, *b.dims[2:]))
        out = f.matmul(flat_a, flat_b, name, kernel="bmm")
        return f.view(out, (*a.dims[:-1], b.dims[-1]))

    def _sdpa(self, gqa: GQA, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """scaled_dot_product_attention, flash where it is allowed to."""
        window = _window(gqa)
        visible, additive = self.masks[window, gqa.chunked], None
        if visible is not None:  # aten turns a bool mask into one of q's dtype
            reads = (visible, *(self.aten.number("mask", self.b) for _ in ("0", "-inf")))
            additive = self.aten.new("where.self", "mask", visible.dims, self.b, reads=reads)
            del reads
        pairs = visible_pairs(window)
        cuda = self.step.device == "cuda"
        return self.f.flash_attention(q, k, v, additive, "attention", pairs=pairs, cuda=cuda)

    # FeedForward.forward

    def _feed_forward(self, dense: Dense, x: Tensor) -> Tensor:
        f, i, h = self.f, dense.intermediate_size, self.model.hidden_size
        act, bias = dense.activation, dense.bias
        if dense.fused_gate_up:
            gate, up = f.split(self._linear(x, "gate_up_proj", 2 * i, bias=bias), (i, i))
            product = f.mul(self._activate(act, gate), up, "gate · up")
            del gate, up
        elif dense.gated:
            active = self._activate(act, self._linear(x, "gate_proj", i, bias=bias))
            product = f.mul(active, self._linear(x, "up_proj", i, bias=bias), "gate · up")
            del active
        else:
            product = self._activate(act, self._linear(x, "up_proj", i, bias=bias))
        return self._linear(product, "down_proj", h, bias=bias)

    def _activate(self, activation: str, x: Tensor) -> Tensor:
        """feed_forward.ACTIVATIONS; gelu_new op by op."""
        f, name = self.f, "activation"
        match activation:
            case "relu2":
                return f.power(f.pointwise(x, name, "relu", saves="result"), name)
            case "quick_gelu":
                sigmoid = f.pointwise(f.scale(x, name), name, "sigmoid", saves="result")
                return f.mul(x, sigmoid, name)
            case "gelu_new":
                return self._gelu_new(x)
            case "relu":
                return f.pointwise(x, name, "relu", saves="result")
        return f.pointwise(x, name, activation.split("_")[0], saves="input")

    def _gelu_new(self, x: Tensor) -> Tensor:
        """0.5·x·(1 + tanh(√(2/π)·(x + 0.044715·x³)))."""
        f, name = self.f, "activation"
        cubic = f.add(x, f.scale(f.power(x, "gelu_new"), "gelu_new"), "gelu_new")
        inner = f.scale(cubic, "gelu_new")
        del cubic
        half = f.scale(x, "gelu_new, half")
        tanh = f.pointwise(inner, "gelu_new, tanh", "tanh", saves="result")
        return f.mul(half, f.shift(tanh, "gelu_new, 1 + tanh"), name)


def _gqa(layer: Layer) -> GQA:
    assert isinstance(layer.attention, GQA)
    return layer.attention


def _window(gqa: GQA) -> int | None:
    """masks.pattern_of: a window that is only a mask is one too."""
    windows = [w for w in (gqa.sliding_window, gqa.masked_window) if w is not None]
    return min(windows, default=None)
