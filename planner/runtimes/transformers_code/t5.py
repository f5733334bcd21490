"""models/t5/modeling_t5.py: an encoder and a decoder whose first blocks make the position biases.

Shapes besides those of the package.  E encoder tokens, which cross-attention sees
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from planner.autograd.aten import ONE
from planner.autograd.passes import EMBEDDING, HEAD, Part
from planner.autograd.tensors import Dims, Node, Tensor
from planner.layers import GQA, Dense, Layer
from planner.model import Model
from planner.program import ENCODED, S_ENC, B, Buffer, Extent, S, T, every_pair
from planner.runtimes.transformers_code.blocks import BlockWriter
from planner.runtimes.transformers_code.masks import MaskWriter
from planner.runtimes.transformers_code.regime import Pass, Regime, Shared
from planner.runtimes.writer import BOOL, FLOAT32, INT64
from planner.tensors import Parameter

DECODER = "decoder embedding"


class Seq2SeqLM(BlockWriter, MaskWriter):
    """Runs T5ForConditionalGeneration. A decode step gets the encoder's states as they were."""

    def __init__(self, model: Model, what: Pass, regime: Regime) -> None:
        super().__init__(model, what, regime)
        shape = (B, S_ENC, model.hidden_size)
        names = ("encoder states", "gradient of encoder states")
        hidden, gradient = (
            Buffer(name=name, shape=shape, itemsize=self.b, lasting=name == names[0])
            for name in names
        )
        self.encoder_hidden = hidden, gradient
        self.stack = ""
        self.encoded: Tensor | None = None
        self.biases: dict[str, Tensor] = {}
        self.cross: dict[str, tuple[Tensor, Tensor]] = {}

    # -- parts ------------------------------------------------------------------------------------

    def parts(self) -> Iterator[Part]:
        """Encoder, decoder, head."""
        if self.what.kind != "decode":
            yield Part(EMBEDDING, stack="encoder")
            yield from self._blocks("encoder", self.model.towers[0].layers)
            yield Part(ENCODED, stack="encoder", ends=True)
        yield Part(DECODER, stack="decoder")
        yield from self._blocks("decoder", self.model.layers)
        yield Part(HEAD, stack="decoder")

    def _blocks(self, stack: str, layers: Sequence[Layer]) -> Iterator[Part]:
        """The first block makes what all others are given.

        On the way back nothing waits at the last one yet for the gradients that all add to;
        checkpointed, the second lets go of the biases, which the first one makes again, and where
        no gradient reaches the first one it may let go of what they share.
        """
        ends, last = {1}, len(layers) - 1
        every, before = self.checkpointed, len(self.model.towers[0].layers)
        counted = 0 if stack == "encoder" else before  # modeling_utils.py counts through both
        if self.trains:
            ends |= {2, last} if every or self.lora is not None else {last}
            ends |= set(range(1, len(layers))) if every > 1 else set()
        start = 0
        for end in (*sorted(end for end in ends if end <= last), len(layers)):
            for layer, run in groupby(layers[start:end]):
                count = len(list(run))
                again = every > 0 and (counted + start) % every == 0
                yield Part(f"{stack} {start}", count, start, layer, stack, again=again)
                start += count

    def inside(self, parameters: Iterable[Parameter]) -> Iterable[Parameter]:
        """T5Block's: a norm behind what it stands before."""
        order = (
            "self_attn",
            "input_layernorm",
            "cross_attn",
            "cross_attention_layernorm",
            "mlp",
            "post_attention_layernorm",
        )
        return sorted(parameters, key=lambda p: order.index(p.name.partition(".")[0]))

    def outside(self, part: Part) -> Iterable[Parameter]:
        """The decoder's embedding is the encoder's."""
        if part.label == ENCODED:
            return self.model.towers[0].outer
        return () if part.label == DECODER else super().outside(part)

    def handed(self, part: Part) -> tuple[Buffer, Buffer]:
        """Encoder or decoder states."""
        return self.encoder_hidden if part.stack == "encoder" else super().handed(part)

    def run(self, part: Part, entered: list[Tensor]) -> Tensor:
        """One part, in its stack."""
        self.stack = part.stack
        if part.label == ENCODED:
            return self._end_encoder(entered)
        if part.label == DECODER:
            return self._embed_decoder()
        return super().run(part, entered)

    def before(self) -> None:
        """For a decode step the encoder's states, and every cache with that of cross-attention."""
        if self.what.kind == "decode":
            with self.tape.segment("cache of the encoder"):
                dims: Dims = ((B,), (S_ENC,), (self.model.hidden_size,))
                self.encoded = self.aten.new("mul.Tensor", "encoder states", dims, self.b)
                self.encoded.storage.known_as(self.encoder_hidden[0])
        super().before()

    def _open(self, label: str, layer: Layer) -> None:
        super()._open(label, layer)
        gqa = layer.cross_attention
        if gqa is None or self.what.kind != "decode":
            return
        dims: Dims = ((B,), (gqa.num_key_value_heads,), (S_ENC,), (gqa.head_dim,))
        keys, values = (
            self._lasting(self.aten.new("cat", f"cross {name}", dims, self.b))
            for name in ("keys", "values")
        )
        self.cross[label] = keys, values
        self.kept += (keys, values)

    # -- T5Stack.forward --------------------------------------------------------------------------

    def embed(self) -> Tensor:
        """The encoder's stack before its blocks."""
        model = self.model
        self.table = self.weight("embed_tokens", model.vocab_size, model.hidden_size)
        x = self.f.embedding(self.table, self.given("token ids", ((B,), (S_ENC,)), INT64), "x")
        self.ask_gradient(x)
        self.named = [x.detach()]
        self.masks: dict[int | None, Tensor | None] = {None: None}
        return x

    def _end_encoder(self, entered: list[Tensor]) -> Tensor:
        final = self.model.final_norm
        assert final is not None
        out = self.norm(final, entered.pop(), "encoder states", "encoder.final_layer_norm")
        self.named = []
        self.biases.clear()
        self.encoded = out
        out.storage.known_as(self.encoder_hidden[0])
        if isinstance(out.node, Node):
            self.crossing.append((out.node, self.encoder_hidden[1]))
        return out

    def _embed_decoder(self) -> Tensor:
        model = self.model
        if self.what.kind == "decode":
            self.table = self.weight("embed_tokens", model.vocab_size, model.hidden_size)
        ids = self.given("decoder ids", ((B,), (T,)), INT64)
        self.ids: Tensor | None = self._shift_right() if self.trains else ids
        x = self.f.embedding(self.table, self.ids, "input embeddings")
        self.ask_gradient(x)
        self.named = [x.detach()]
        eager = self.what.attention == "eager"
        self.masks = {None: self._visible_to_add() if eager else None}
        return x

    def _shift_right(self) -> Tensor:
        """Labels one place later, behind the start token."""
        aten, dims = self.aten, ((B,), (T,))
        shifted = aten.new("new_zeros", "decoder ids", dims, INT64)
        aten.new("clone", "decoder ids", dims, INT64)
        aten.new("eq.Scalar", "decoder ids", dims, BOOL)
        return shifted

    def _visible_to_add(self) -> Tensor | None:
        return self._mask(None)

    def shared(self, layer: Layer) -> Shared:
        """Mask, biases of the stack's first block, the encoder's states."""
        decodes = self.stack == "decoder"
        return Shared(
            rotation=None,
            mask=self.masks[None],
            bias=self.biases.get("self"),
            cross_bias=self.biases.get("cross"),
            encoded=self.encoded if decodes else None,
        )

    # -- T5Block.forward --------------------------------------------------------------------------

    def block(self, layer: Layer, x: Tensor, given: Shared) -> Tensor:
        """Self-attention, in the decoder cross-attention, feed-forward."""
        gqa, dense = layer.attention, layer.feed_forward
        assert isinstance(gqa, GQA)
        assert isinstance(dense, Dense)
        self.stack = "encoder" if layer.cross_attention is None else "decoder"  # it may run again
        hidden, bias, weights = self._attended(layer, gqa, x, given, crosses=False)
        self._name_bias("self", bias)
        cross_bias = None
        if layer.cross_attention is not None:
            cross = layer.cross_attention
            hidden, cross_bias, weights = self._attended(layer, cross, hidden, given, crosses=True)
            self._name_bias("cross", cross_bias)
        out = self._fed(layer, dense, hidden)
        del bias, cross_bias, weights
        return out

    def _name_bias(self, name: str, bias: Tensor) -> None:
        """The stack's loop keeps what the first block returned."""
        if name in self.biases or self.known is not None:
            return
        self.biases[name] = bias
        if isinstance(bias.node, Node):
            called = f"gradient of {self.stack} {name} bias"
            waits = Buffer(name=called, shape=bias.shape, itemsize=bias.itemsize)
            self.crossing.append((bias.node, waits))

    def _fed(self, layer: Layer, dense: Dense, x: Tensor) -> Tensor:
        """T5LayerFF.forward."""
        fed = self.norm(layer.norm, x, "feed-forward norm", "feed-forward norm")
        fed = self._dense(dense, fed)
        return self.f.add(x, fed, "hidden states")

    def _dense(self, dense: Dense, x: Tensor) -> Tensor:
        """T5DenseGatedActDense.forward, which names both products; T5DenseActDense.forward."""
        f, i, h = self.f, dense.intermediate_size, self.model.hidden_size
        if not dense.gated:
            hidden = self.linear(x, "up_proj", i, bias=False)
            hidden = self.activate(dense.activation, hidden)
            hidden = f.cast(hidden, self.b, "activation")
            return self.linear(hidden, "down_proj", h, bias=False)
        gate = self.activate(dense.activation, self.linear(x, "gate_proj", i, bias=False))
        up = self.linear(x, "up_proj", i, bias=False)
        hidden = f.mul(gate, up, "gate · up")
        hidden = f.cast(hidden, self.b, "gate · up")
        hidden = self.linear(hidden, "down_proj", h, bias=False)
        del gate, up
        return hidden

    def _attended(
        self, layer: Layer, gqa: GQA, x: Tensor, given: Shared, *, crosses: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """T5LayerSelfAttention.forward, T5LayerCrossAttention.forward."""
        normed = self.norm(layer.norm, x, "attention norm", "attention norm")
        out, bias, weights = self._t5_attention(layer, gqa, normed, given, crosses=crosses)
        out = self.f.add(x, out, "residual")
        del normed
        return out, bias, weights

    def _t5_attention(
        self, layer: Layer, gqa: GQA, x: Tensor, given: Shared, *, crosses: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """T5Attention.forward."""
        f, H, D = self.f, gqa.num_attention_heads, gqa.head_dim
        rows, seen = self._rows()
        q = self._split(self.linear(x, "q_proj", H * D, bias=False), rows, H)
        if crosses and self.walking in self.cross:
            k, v = self.cross[self.walking]
        else:
            read = given.encoded if crosses else x
            assert read is not None
            columns = S_ENC if crosses else rows
            k = self._split(self.linear(read, "k_proj", H * D, bias=False), columns, H)
            v = self._split(self.linear(read, "v_proj", H * D, bias=False), columns, H)
            k, v = self._cached_pair(layer, k, v, crosses=crosses)
        bias = given.cross_bias if crosses else given.bias
        if bias is None:
            keys = S_ENC if crosses else seen
            bias = (
                self._no_bias(H, rows, keys, q.itemsize)
                if crosses
                else self._bias(layer, H, rows, keys)
            )
        mask = None if crosses else given.mask
        out, weights = self._t5_attend(gqa, (q, k, v), mask, bias, crosses=crosses)
        out = f.view(out, ((B,), (rows,), (H * D,)))
        out = self.linear(out, "o_proj", self.model.hidden_size, bias=False)
        return out, bias, weights

    def _rows(self) -> tuple[Extent, Extent]:
        """Queries of this stack, and the keys that they see."""
        if self.stack == "encoder":
            return S_ENC, S_ENC
        return T, S if self.what.kind == "decode" else T

    def _split(self, x: Tensor, rows: Extent, heads: int) -> Tensor:
        width = x.sizes[-1] // heads
        return self.f.transpose(self.f.view(x, ((B,), (rows,), (heads,), (width,))), 1, 2)

    def _cached_pair(
        self, layer: Layer, k: Tensor, v: Tensor, *, crosses: bool
    ) -> tuple[Tensor, Tensor]:
        if self.trains or self.stack == "encoder":
            return k, v
        if not crosses:
            return self.update(layer, k, v)
        keys = self._lasting(self.aten.cat((k,), -2, k.dims, "cross keys", first=True))
        values = self._lasting(self.aten.cat((v,), -2, v.dims, "cross values", first=True))
        self.kept += (keys, values)
        return keys, values

    # -- biases -----------------------------------------------------------------------------------

    def _no_bias(self, heads: int, rows: Extent, keys: Extent, itemsize: int) -> Tensor:
        """Of cross-attention: zeros like the queries, which checkpointing asks a gradient for."""
        dims: Dims = (ONE, (heads,), (rows,), (keys,))
        bias = self.aten.new("zeros", "cross-attention bias", dims, itemsize)
        if self.trains and self.checkpointed:
            bias.node = Node("cross-attention bias", self.keep_with_loss, (), ())
            self.f.graph.nodes.append(bias.node)
            if self.known is None:
                self.with_loss.append(bias.detach())
        return bias

    def _bias(self, layer: Layer, heads: int, rows: Extent, keys: Extent) -> Tensor:
        """compute_bias: [1, H, rows, keys], a view of the rows of a table."""
        aten, f, name = self.aten, self.f, "relative positions"
        table = self.weight("relative_attention_bias", *layer.extra_parameters[0].shape)
        context = aten.new(
            "add.Tensor",
            name,
            ((rows,), ONE),
            INT64,
            reads=(aten.new("arange", name, ((rows,),), INT64),),
        )
        memory = aten.new("arange", name, (ONE, (keys,)), INT64)
        relative = aten.elementwise("sub.Tensor", name, memory, context)
        buckets = self._buckets(relative)
        values = f.embedding(table, buckets, "position bias")
        values = f.permute(values, (2, 0, 1))
        del context, memory, relative, buckets
        return f.view(values, (ONE, (heads,), (rows,), (keys,)))

    def _buckets(self, relative: Tensor) -> Tensor:
        """_relative_position_bucket."""
        aten, name, dims = self.aten, "relative positions", relative.dims

        def each(kernel: str, *reads: Tensor, itemsize: int = INT64) -> Tensor:
            return aten.new(kernel, name, dims, itemsize, reads=reads)

        buckets: Tensor | None = None
        if self.stack == "encoder":
            later = each("_to_copy", each("gt.Scalar", relative, itemsize=BOOL))
            buckets = each("add.Tensor", each("mul.Tensor", later))
            del later
            relative = each("abs", relative)
        else:
            relative = each("neg", each("minimum", relative, each("zeros_like", relative)))
        small = each("lt.Scalar", relative, itemsize=BOOL)
        wide = each("div.Tensor", each("_to_copy", relative, itemsize=FLOAT32), itemsize=FLOAT32)
        wide = each("log", wide, itemsize=FLOAT32)
        wide = each("div.Tensor", wide, itemsize=FLOAT32)
        wide = each("mul.Tensor", wide, itemsize=FLOAT32)
        large = each("add.Tensor", each("_to_copy", wide))
        del wide
        large = each("minimum", large, each("full_like", large))
        picked = each("where.self", small, relative, large)
        if buckets is None:
            buckets = each("add.Tensor", picked)
        del picked
        return buckets

    # -- scores -----------------------------------------------------------------------------------

    def _t5_attend(
        self,
        gqa: GQA,
        qkv: tuple[Tensor, Tensor, Tensor],
        mask: Tensor | None,
        bias: Tensor,
        *,
        crosses: bool,
    ) -> tuple[Tensor, Tensor | None]:
        f, (q, k, v) = self.f, qkv
        if self.what.attention == "eager":
            scores = f.scale(f.pairs(q, f.transpose(k, 2, 3), "scores"), "scores")
            scores = f.add(scores, bias, "biased scores")
            if mask is not None:
                scores = f.add(scores, mask, "masked scores")
            scores = f.softmax(scores, "attention weights")
            out = f.pairs(scores, v, "attention")
            return f.contiguous(f.transpose(out, 1, 2), "attention"), scores
        causal = self.stack == "decoder" and not crosses and q.sizes[2] > 1
        added = self._bias_mask(bias, q, k) if causal else f.contiguous(bias, "position bias")
        if added.node is not None and self.what.device == "cpu":
            lowered = f.lowered(added)
            with f.outside_autocast():
                out = f.math_attention(q, k, v, lowered)
            del lowered
        else:
            hidden = self.stack == "decoder" and not crosses
            pairs = None if hidden else every_pair(self._rows()[0], k.dims[2][0])
            out = self.fused(gqa, q, k, v, added, pairs=pairs)
        return f.contiguous(f.transpose(out, 1, 2), "attention"), None

    def _bias_mask(self, bias: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """create_position_bias_mask: the bias where the past is, the least number elsewhere."""
        aten, f = self.aten, self.f
        dims: Dims = (ONE, ONE, q.dims[2], k.dims[2])
        reads = [aten.new("arange", "mask", (n,), INT64) for n in (q.dims[2], k.dims[2])]
        visible = aten.new("ge.Tensor", "mask", dims, BOOL, reads=reads)
        del reads
        return f.contiguous(f.where(visible, bias, "mask"), "mask")

    # -- T5ForConditionalGeneration.forward -------------------------------------------------------

    def head(self, hidden: list[Tensor]) -> Tensor:
        """Last norm, scale, head, cross-entropy in the model's dtype."""
        model, f = self.model, self.f
        assert model.final_norm is not None
        x = self.norm(model.final_norm, hidden.pop(), "final norm", "norm")
        self.named, self.masks = [], {}
        self.biases.clear()
        seen = x if model.logit_scale is None else f.scale(x, "scaled states")
        logits = f.linear(seen, self.table, None, "logits")
        if not self.trains:
            self.kept += (logits, x)
            if self.encoded is not None:
                self.kept.append(self.encoded)
            return logits
        flat = f.view(logits, ((B, T), (model.vocab_size,)))
        loss = f.cross_entropy(flat)
        self.encoded = self.ids = None
        del x, seen
        return loss
