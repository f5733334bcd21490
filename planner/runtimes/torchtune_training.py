"""A training step of torchtune as a program: recipes/{full,lora}_finetune_single_device.py.

torchtune/modules/{transformer,attention,feed_forward,rms_norm}.py and modules/loss/
ce_chunked_output_loss.py at 1814feb17 (November 2024), eager: line by line on tensors without
contents (`planner/autograd`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from planner.autograd.aten import Sizes
from planner.autograd.fused_attention import fused_kernel, kernel_note
from planner.autograd.layouts import is_contiguous
from planner.autograd.passes import PassWriter
from planner.autograd.tensors import Dims, Tensor
from planner.dtypes import element_bytes
from planner.errors import ConfigError
from planner.layers import GQA, Dense, Layer, RoPE
from planner.model import Model
from planner.program import B, Extent, Program, Symbol, T, visible_pairs
from planner.program import Dims as Point
from planner.runtimes.base import Phase, Setting, check_step
from planner.runtimes.writer import BOOL, FLOAT32, INT64
from planner.workload import LoRA, Training

SOME_BATCH = 999_983
"""A prime that stands for any number of sequences above 1 where strides are compared."""
TYPES = ("llama", "mistral")
"""Model types whose torchtune modules are those that are written here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """Which training step; `chunk_tokens`: logits of so many tokens at a time, None: of all."""

    dtype: str
    device: str
    several_batches: bool
    tokens: int
    capability: str | None = None
    multiprocessors: int = 0
    optimizer: str | None = None
    optimizer_impl: str = "foreach"
    checkpointed: bool = False
    chunk_tokens: int | None = None
    lora: LoRA | None = None


def training_phase(model: Model, work: Training, setting: Setting) -> Phase:
    """One step's program and sizes; ConfigError for what is not planned."""
    check_step(
        "torchtune",
        work,
        method=("full", "lora"),
        precision=("pure",),
        checkpointing=("none", "full"),
        checkpoint_every=(1,),
    )
    if model.quantization is not None:
        raise ConfigError("quantised weights are not planned for runtime=torchtune: plain ones")
    if work.adapters is not None and work.adapters.dora:
        raise ConfigError("lora.dora=True is not planned for runtime=torchtune: False")
    if setting.device == "cuda" and setting.dtype == "fp32":
        raise ConfigError("dtype='fp32' on a GPU is not planned for runtime=torchtune: bf16")
    tokens = work.sequence_tokens
    step = Step(
        dtype=setting.dtype,
        device=setting.device,
        several_batches=work.batch > 1,
        tokens=tokens,
        capability=setting.capability,
        multiprocessors=setting.multiprocessors,
        optimizer=work.optimizer,
        optimizer_impl=work.optimizer_impl,
        checkpointed=work.checkpointing == "full",
        chunk_tokens=work.loss_chunk_tokens,
        lora=work.adapters,
    )
    return Phase(
        name="training step",
        program=step_program(model, step),
        dims=Point(batch=work.batch, tokens=tokens, context=tokens),
        note=kernel_note(setting.device, setting.capability, setting.dtype),
    )


def as_torchtune(model: Model) -> Model:
    """The model; ConfigError where it is none of torchtune's llamas."""
    if model.model_type not in TYPES:
        raise ConfigError(
            f"model_type={model.model_type} is not planned for runtime=torchtune: "
            f"{', '.join(TYPES)}"
        )
    for layer in model.layer_kinds():
        gqa, dense = layer.attention, layer.feed_forward
        match gqa, dense:
            case GQA(qkv_bias=False, o_bias=False, sliding_window=None), Dense(bias=False):
                continue
        raise ConfigError(
            f"this {model.model_type} has layers that torchtune's llama has not: biases, or windows"
        )
    return model


@lru_cache(maxsize=64)
def step_program(model: Model, step: Step) -> Program:
    """Forward and backward of [B, T] ids and labels."""
    return _Recipe(model, step).write_step(
        "torchtune training step", step.optimizer, step.optimizer_impl
    )


class _Recipe(PassWriter[Tensor]):
    """Runs a recipe's step; a layer is given the rotary table."""

    def __init__(self, model: Model, step: Step) -> None:
        point = Point(
            batch=SOME_BATCH if step.several_batches else 1,
            tokens=step.tokens,
            context=step.tokens,
        )
        super().__init__(
            model,
            element_bytes(step.dtype),
            Sizes(point),
            checkpointed=int(step.checkpointed),
            lora=step.lora,
        )
        self.step = step
        self.aten.watched = step.device == "cpu"
        self.aten.on_gpu = step.device == "cuda"
        self.aten.multiprocessors = step.multiprocessors

    def embed(self) -> Tensor:
        """TransformerDecoder.forward before its layers."""
        model = self.model
        self.count = self._counted(self.given("labels", ((B,), (T,)), INT64))
        rope = model.positions
        assert isinstance(rope, RoPE)
        self.cache = self.given("rope cache", ((T,), (rope.rotary_dim // 2,), (2,)), FLOAT32)
        self.table = self.weight("embed_tokens", model.vocab_size, model.hidden_size)
        ids = self.given("token ids", ((B,), (T,)), INT64)
        return self.f.embedding(self.table, ids, "hidden states")

    def shared(self, layer: Layer) -> Tensor:
        """The rotary table."""
        return self.cache

    def block(self, layer: Layer, x: Tensor, given: Tensor) -> Tensor:
        """TransformerSelfAttentionLayer.forward."""
        f, gqa, dense = self.f, layer.attention, layer.feed_forward
        assert isinstance(gqa, GQA)
        assert isinstance(dense, Dense)
        h = self.norm(x, "attention norm", "sa_norm")
        attended = self.attention(gqa, h, given)
        h = f.add(attended, x, "residual")
        fed = self.feed_forward(dense, self.norm(h, "feed-forward norm", "mlp_norm"))
        out = f.add(h, fed, "hidden states")
        del attended, fed
        return out

    def norm(self, x: Tensor, name: str, module: str) -> Tensor:
        """RMSNorm.forward."""
        f = self.f
        wide = f.cast(x, FLOAT32, f"{name}, float32")
        normed = f.cast(
            f.mul(wide, self._inverse_rms(wide, name), f"{name}, normalised"),
            x.itemsize,
            f"{name}, normalised",
        )
        return f.mul(normed, self.weight(f"{module}.scale", x.sizes[-1]), name)

    def _inverse_rms(self, wide: Tensor, name: str) -> Tensor:
        f, column = self.f, f"{name}, mean square"
        return f.rsqrt(
            f.shift(f.mean(f.power(wide, f"{name}, squares"), column), column), f"{name}, 1 / rms"
        )

    def linear(self, x: Tensor, module: str, out: int) -> Tensor:
        """nn.Linear.forward, or LoRALinear.forward without dropout."""
        f, name = self.f, f"{module}, adapters"
        result = f.linear(x, self.weight(f"{module}.weight", out, x.sizes[-1]), None, module)
        if module not in self.adapted:
            return result
        assert self.lora is not None
        into = self.adapter(f"{module}.lora_a", self.lora.rank, x.sizes[-1])
        back = self.adapter(f"{module}.lora_b", out, self.lora.rank)
        low = f.linear(x, into, None, name)
        low = f.scale(f.linear(low, back, None, name), name)
        return f.add(result, low, f"{module} with adapters")

    def attention(self, gqa: GQA, x: Tensor, cache: Tensor) -> Tensor:
        """MultiHeadAttention.forward."""
        f, h = self.f, self.model.hidden_size
        H, G, D = gqa.num_attention_heads, gqa.num_key_value_heads, gqa.head_dim
        q = self.linear(x, "q_proj", H * D)
        q = f.view(q, ((B,), (T,), (H,), (D,)))
        q = self.roped(q, cache, "query")
        q = f.transpose(q, 1, 2)
        k = self.linear(x, "k_proj", G * D)
        v = self.linear(x, "v_proj", G * D)
        k = f.view(k, ((B,), (T,), (G,), (D,)))
        v = f.view(v, ((B,), (T,), (G,), (D,)))
        k = self.roped(k, cache, "key")
        k = f.transpose(k, 1, 2)
        v = f.transpose(v, 1, 2)
        if H != G:
            k = self._repeated(k, H // G)
            v = self._repeated(v, H // G)
        out = f.fused_attention(
            q,
            k,
            v,
            None,
            "attention",
            pairs=visible_pairs(None),
            kernel=fused_kernel(self.step.device, self.step.capability, q.itemsize),
            trains=True,
        )
        out = f.contiguous(f.transpose(out, 1, 2), "attention")
        out = f.view(out, ((B,), (T,), (H * D,)))
        return self.linear(out, "o_proj", h)

    def _repeated(self, x: Tensor, times: int) -> Tensor:
        """unsqueeze(2).expand(…).flatten(1, 2)."""
        f, (batch, (heads,), tokens, width) = self.f, x.dims
        assert isinstance(heads, int)
        apart = f.view(x, (batch, (heads,), (1,), tokens, width))
        spread = f.expand(apart, (batch, (heads,), (times,), tokens, width))
        return f.view(spread, (batch, (heads * times,), tokens, width))

    def roped(self, x: Tensor, cache: Tensor, name: str) -> Tensor:
        """Llama3ScaledRoPE.forward: neighbours turn together, in float32."""
        f, aten = self.f, self.aten
        (width,) = x.dims[-1]
        assert isinstance(width, int)
        pairs = f.view(f.cast(x, FLOAT32, f"float32 {name}"), (*x.dims[:-1], (width // 2,), (2,)))
        table = aten.as_view(cache, ((1,), (T,), (1,), (width // 2,), (2,)))
        assert table is not None
        cos, sin = (aten.select(table, -1) for _ in range(2))
        turned = f.stack(
            (
                f.sub(
                    f.mul(f.select(pairs, -1), cos, f"{name} · cos"),
                    f.mul(f.select(pairs, -1), sin, f"{name} · sin"),
                    f"rotated {name}",
                ),
                f.add(
                    f.mul(f.select(pairs, -1), cos, f"{name} · cos"),
                    f.mul(f.select(pairs, -1), sin, f"{name} · sin"),
                    f"rotated {name}",
                ),
            ),
            -1,
            f"rotated {name}",
        )
        turned = f.view(turned, x.dims)
        return f.cast(turned, x.itemsize, f"rotated {name}")

    def feed_forward(self, dense: Dense, x: Tensor) -> Tensor:
        """FeedForward.forward."""
        f, i = self.f, dense.intermediate_size
        h = f.pointwise(self.linear(x, "gate_proj", i), "activation", "silu", saves="input")
        h = f.mul(h, self.linear(x, "up_proj", i), "gate · up")
        return self.linear(h, "down_proj", self.model.hidden_size)

    def head(self, hidden: list[Tensor]) -> Tensor:
        """The last norm, logits, and the loss of what the recipe's _loss_step gives it."""
        model, f, aten = self.model, self.f, self.aten
        V, h = model.vocab_size, model.hidden_size
        x = self.norm(hidden.pop(), "final norm", "norm")
        head = self.table if model.tie_word_embeddings else self.weight("lm_head", V, h)
        lengths = self._chunks()
        if self.step.chunk_tokens is None:
            logits = [self._projected(x, head)]
            logits = [f.cast(logits.pop(), FLOAT32, "float32 logits")]
        else:
            logits = [self._projected(part, head) for part in f.split(x, lengths, 1)]
        del x
        labels = aten.new("cat", "shifted labels", ((B,), (T,)), INT64)
        flat: list[Dims] = [((B, n), (V,)) for n in lengths]
        if self.step.chunk_tokens is None:
            rows = f.view(logits.pop(), flat[0])
            loss = f.nll_loss(f.softmax(rows, "log-probabilities", kernel="_log_softmax"), labels)
            del rows
        else:
            loss = self._chunked(logits, labels, flat)
        del labels
        self.with_loss.append(self.count)
        return f.divide_by_count(loss, self.with_loss[-1], "loss")  # times it: the same ops

    def _projected(self, x: Tensor, head: Tensor) -> Tensor:
        """F.linear of tokens that may not lie together: copied where the weight is trained."""
        f = self.f
        if is_contiguous(x.sizes, x.strides) or head.node is not None:
            return f.linear(x, head, None, "logits")
        turned = f.transpose(head, 0, 1)
        return f.matmul(x, f.expand(turned, (x.dims[0], *turned.dims)), "logits", kernel="bmm")

    def _chunks(self) -> list[Extent]:
        """Tokens of each: `last_hidden_state.chunk(num_output_chunks, dim=1)`."""
        each, tokens = self.step.chunk_tokens, self.step.tokens
        if each is None or each >= tokens:
            return [T]
        whole = (tokens - 1) // each
        before = whole * each
        return [*[each] * whole, Symbol(f"(T − {before})", lambda d: d.tokens - before)]

    def _counted(self, labels: Tensor) -> Tensor:
        """(labels != ignore_index).sum()."""
        mask = self.aten.new("ne.Scalar", "labels that count", labels.dims, BOOL, reads=(labels,))
        return self.aten.new("sum", "labels that count", (), INT64, reads=(mask,))

    def _chunked(self, logits: list[Tensor], labels: Tensor, flat: list[Dims]) -> Tensor:
        """CEWithChunkedOutputLoss.forward: upcast and cross-entropy of one chunk at a time."""
        f, aten, count = self.f, self.aten, self._counted(labels)
        several = self.step.several_batches
        parts = [
            aten.new("clone", "labels", dims[:1], INT64) if several else labels for dims in flat
        ]
        rows = [f.view(x, dims) for x, dims in zip(logits, flat, strict=True)]
        logits.clear()
        total: Tensor | None = None
        for chunk, label in zip(rows, parts, strict=True):
            wide = f.cast(chunk, FLOAT32, "float32 logits")
            part = f.nll_loss(f.softmax(wide, "log-probabilities", kernel="_log_softmax"), label)
            del wide
            total = f.shift(part, "loss") if total is None else f.add_(total, part)
            del part
        assert total is not None
        loss = f.divide_by_count(total, count, "loss")
        del rows, parts, total, count, chunk, label
        return loss
