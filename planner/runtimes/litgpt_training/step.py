"""One step of lit-gpt's finetuning scripts as a program (finetune/lora.py).

The forward is written as lit_gpt/model.py has it, line by line, on tensors without contents
(`planner/autograd`); the backward follows from what it recorded.
"""

from __future__ import annotations

from functools import lru_cache

from planner.autograd.tensors import Dims, Tensor
from planner.layers import Dense, Layer, RoPE
from planner.model import Model
from planner.program import B, Extent, Program, Symbol, T
from planner.runtimes.litgpt_training.attention import AttentionWriter
from planner.runtimes.litgpt_training.regime import Regime, Shared, Step, gqa_of
from planner.runtimes.writer import BOOL, FLOAT32, INT64

CHUNK_TOKENS = 128
"""`lm_head_chunk_size` of the scripts."""


@lru_cache(maxsize=64)
def step_program(model: Model, step: Step, regime: Regime) -> Program:
    """Forward and backward of [B, T] ids and labels, in one regime of sizes."""
    return _Finetuning(model, step, regime).write_step(
        "litgpt training step", step.optimizer, step.optimizer_impl
    )


class _Finetuning(AttentionWriter):
    """Runs the body of the scripts' loop."""

    def embed(self) -> Tensor:
        """GPT.forward before its blocks."""
        model, f = self.model, self.f
        rope = model.positions
        assert isinstance(rope, RoPE)
        width = rope.rotary_dim
        self.tables = Shared(
            cos=self.given("cos", ((T,), (width,)), FLOAT32),
            sin=self.given("sin", ((T,), (width,)), FLOAT32),
        )
        table = self.weight("embed_tokens", model.vocab_size, model.hidden_size)
        ids = self.given("token ids", ((B,), (T,)), INT64)
        return f.embedding(table, ids, "hidden states")

    def shared(self, layer: Layer) -> Shared:
        """The rotary tables."""
        return self.tables

    def block(self, layer: Layer, x: Tensor, given: Shared) -> Tensor:
        """Block.forward."""
        f, norm, gqa = self.f, layer.norm, gqa_of(layer)
        assert isinstance(layer.feed_forward, Dense)
        dense = layer.feed_forward
        n_1 = self.norm(norm, x, "attention norm", "norm_1")
        attended = self.attention(gqa, n_1, given)
        if layer.placement == "pre":
            x = f.add(attended, x, "residual")
            return f.add(
                self.feed_forward(dense, self.norm(norm, x, "feed-forward norm", "norm_2")),
                x,
                "hidden states",
            )
        n_2 = n_1
        if layer.placement == "parallel-two":
            n_2 = self.norm(norm, x, "feed-forward norm", "norm_2")
        return f.add(f.add(self.feed_forward(dense, n_2), attended, "residual"), x, "hidden states")

    def feed_forward(self, dense: Dense, x: Tensor) -> Tensor:
        """GptNeoxMLP.forward, LLaMAMLP.forward."""
        f, i, h = self.f, dense.intermediate_size, self.model.hidden_size
        if not dense.gated:
            hidden = self.linear(x, "up_proj", i, bias=dense.bias)
            hidden = f.pointwise(hidden, "activation", "gelu", saves="input")
            return self.linear(hidden, "down_proj", h, bias=dense.bias)
        gate = self.linear(x, "gate_proj", i, bias=dense.bias)
        up = self.linear(x, "up_proj", i, bias=dense.bias)
        product = f.mul(f.pointwise(gate, "activation", "silu", saves="input"), up, "gate · up")
        return self.linear(product, "down_proj", h, bias=dense.bias)

    def head(self, hidden: list[Tensor]) -> Tensor:
        """Last norm, logits of so many tokens at a time, all in float32, and the loss."""
        model, f = self.model, self.f
        assert model.final_norm is not None
        x = self.norm(model.final_norm, hidden.pop(), "final norm", "ln_f")
        if self.step.method == "full":
            logits = [self.linear(x, "lm_head", model.vocab_size, bias=model.lm_head_bias)]
            del x
            return self._loss_of_all(logits)
        lengths = self._chunks()
        parts = f.split(x, lengths, 1)
        del x
        logits = [
            self.linear(part, "lm_head", model.vocab_size, bias=model.lm_head_bias)
            for part in parts
        ]
        del parts
        wide = [f.cast(chunk, FLOAT32, "float32 logits") for chunk in logits]  # convert_output
        del logits
        return self._loss(wide, lengths)

    def _chunks(self) -> list[Extent]:
        """Tokens of each: `x.split(128, dim=1)`."""
        whole = (self.regime.tokens - 1) // CHUNK_TOKENS
        if not whole:
            return [T]
        before = whole * CHUNK_TOKENS
        last = Symbol(f"(T − {before})", lambda d: d.tokens - before)
        return [*[CHUNK_TOKENS] * whole, last]

    def _loss(self, logits: list[Tensor], lengths: list[Extent]) -> Tensor:
        """The last token predicts none; chunked_cross_entropy, over the steps that accumulate."""
        f, aten, V = self.f, self.aten, (self.model.vocab_size,)
        less = _one_less(lengths[-1])
        logits[-1] = f.narrow(logits[-1], less, -2)
        self.with_loss += [chunk.detach() for chunk in logits]  # the loop's own name for them
        rows = [*lengths[:-1], less]
        flat: list[Dims] = [((B, n), V) for n in rows if aten.sizes(((n,),)) != (0,)]
        chunks = [f.view(x, dims) for x, dims in zip(logits, flat, strict=False)]
        labels = [self._labels(dims) for dims in flat]
        losses = [
            f.nll_losses(f.softmax(x, "log-probabilities", kernel="_log_softmax"), y)
            for x, y in zip(chunks, labels, strict=True)
        ]
        whole: Dims = ((B, _one_less(T)),)
        mask = aten.new("ne.Scalar", "labels that count", ((B,), (_one_less(T),)), BOOL)
        count = aten.new("sum", "labels that count", (), INT64, reads=(mask,))
        del mask
        total = f.total(f.cat(losses, whole, "losses", dim=0), "loss")
        aten.new("gt.Scalar", "labels that count", (), BOOL, reads=(count,))  # max(1, count)
        loss = f.divide_by_count(total, count, "loss")
        del chunks, labels, losses, count, total
        self.with_loss.append(loss.detach())
        return f.scale(loss, "loss", kernel="div.Tensor")

    def _loss_of_all(self, logits: list[Tensor]) -> Tensor:
        """finetune/full.py has all logits at once: chunked_cross_entropy(…, chunk_size=0)."""
        f, less = self.f, _one_less(T)
        wide = f.cast(logits.pop(), FLOAT32, "float32 logits")
        self.with_loss.append(wide.detach())
        rows: Dims = ((B, less), (self.model.vocab_size,))
        flat = f.view(f.narrow(wide, less, -2), rows)
        labels = self._labels(rows)
        loss = f.nll_loss(f.softmax(flat, "log-probabilities", kernel="_log_softmax"), labels)
        del flat, labels
        self.with_loss.append(loss.detach())
        return f.scale(loss, "loss", kernel="div.Tensor")

    def _labels(self, dims: Dims) -> Tensor:
        """targets.split(…)[i].reshape(-1): a copy where there are several sequences."""
        if self.regime.several_batches:
            return self.aten.new("clone", "labels", dims[:1], INT64)
        return self.given("labels", dims[:1], INT64)


def _one_less(extent: Extent) -> Extent:
    if isinstance(extent, int):
        return extent - 1
    return Symbol(f"({extent.name} − 1)", lambda d: extent.of(d) - 1)
