"""models/bert/modeling_bert.py: an encoder, with its head for masked words or its pooler."""

from __future__ import annotations

from collections.abc import Iterable

from planner.autograd.aten import ONE
from planner.autograd.passes import EMBEDDING, Part
from planner.autograd.tensors import Tensor
from planner.layers import GQA, Dense, Layer, Norm
from planner.program import B, T
from planner.runtimes.transformers_code.blocks import BlockWriter
from planner.runtimes.transformers_code.masks import MaskWriter
from planner.runtimes.transformers_code.regime import Shared
from planner.runtimes.writer import INT64
from planner.tensors import Parameter
from planner.trained.optimizer_parts import has_gradient

HEAD_WEIGHT = "lm_head.weight"


class MaskedLM(BlockWriter, MaskWriter):
    """Runs BertForMaskedLM, or BertModel where there is no head. Nothing is cached."""

    mask: Tensor | None = None
    """Of padding, for all layers."""

    def embed(self) -> Tensor:
        """BertEmbeddings.forward."""
        hidden = self._embeddings()
        self.named = [hidden.detach()]  # by BertModel.forward until it returns
        self.mask = self.padding_alone() if self.what.padded else None
        return hidden

    def _embeddings(self) -> Tensor:
        model, f, h = self.model, self.f, self.model.hidden_size
        self.table = self.weight("embed_tokens", model.vocab_size, h)
        positions = self.weight("embed_positions", model.max_position_embeddings or 0, h)
        types = self.weight("token_type_embeddings", *self._shape("token_type_embeddings.weight"))
        kinds = self.aten.new("gather", "token types", (ONE, (T,)), INT64)
        kinds = self.aten.expand(kinds, ((B,), (T,)))
        ids = self.given("token ids", ((B,), (T,)), INT64)
        words = f.embedding(self.table, ids, "input embeddings")
        self.ask_gradient(words)
        typed = f.embedding(types, kinds, "token type embeddings")
        out = f.add(words, typed, "hidden states")
        places = self.given("positions", (ONE, (T,)), INT64)
        placed = f.embedding(positions, places, "position embeddings")
        out = f.add(out, placed, "hidden states")
        out = self.norm(self._norm(), out, "hidden states", "embed_norm")
        del words, typed, placed
        return out

    def inside(self, parameters: Iterable[Parameter]) -> Iterable[Parameter]:
        """BertLayer's: a norm behind each of its two outputs."""
        order = ("self_attn", "post_attention_layernorm", "mlp", "post_feedforward_layernorm")
        return sorted(parameters, key=lambda p: order.index(p.name.partition(".")[0]))

    def outside(self, part: Part) -> Iterable[Parameter]:
        """What stands in BertEmbeddings, and behind the layers; its decoder comes last there."""
        embeds = part.label == EMBEDDING
        outer = (p for p in self.model.outer_parameters() if has_gradient(self.model, p))
        own = (p for p in outer if ("embed" in p.name) == embeds)
        return sorted(own, key=lambda p: (p.name.endswith(".decoder.bias"), p.name == HEAD_WEIGHT))

    def _norm(self) -> Norm:
        return self.model.layers[0].norm

    def _shape(self, name: str) -> tuple[int, ...]:
        """Of a parameter outside the blocks."""
        return next(p.shape for p in self.model.extra_parameters if p.name.endswith(name))

    def shared(self, layer: Layer) -> Shared:
        """The mask of padding."""
        return Shared(rotation=None, mask=self.mask)

    def block(self, layer: Layer, x: Tensor, given: Shared) -> Tensor:
        """BertLayer.forward."""
        gqa, dense = layer.attention, layer.feed_forward
        assert isinstance(gqa, GQA)
        assert isinstance(dense, Dense)
        attended, weights = self._attention(layer, gqa, x, given)
        between = self._intermediate(dense, attended)
        out = self._output(layer, between, attended, "down_proj", "hidden states")
        del weights
        return out

    def _attention(
        self, layer: Layer, gqa: GQA, x: Tensor, given: Shared
    ) -> tuple[Tensor, Tensor | None]:
        """BertAttention.forward."""
        out, weights = self._self_attention(gqa, x, given)
        out = self._output(layer, out, x, "o_proj", "post norm")
        return out, weights

    def _self_attention(self, gqa: GQA, x: Tensor, given: Shared) -> tuple[Tensor, Tensor | None]:
        """BertSelfAttention.forward."""
        H, D = gqa.num_attention_heads, gqa.head_dim
        q, k, v, _ = self._projected(gqa, x)
        out, weights = self.attend(gqa, q, k, v, given)
        out = self.f.view(out, ((B,), (T,), (H * D,)))
        return out, weights

    def _output(self, layer: Layer, x: Tensor, residual: Tensor, module: str, name: str) -> Tensor:
        """BertSelfOutput.forward, BertOutput.forward."""
        hidden = self.linear(x, module, self.model.hidden_size, bias=True)
        return self._summed_norm(layer, hidden, residual, name)

    def _summed_norm(self, layer: Layer, hidden: Tensor, residual: Tensor, name: str) -> Tensor:
        total = self.f.add(hidden, residual, "residual")
        return self.norm(layer.norm, total, name, name)

    def _intermediate(self, dense: Dense, x: Tensor) -> Tensor:
        hidden = self.linear(x, "up_proj", dense.intermediate_size, bias=True)
        hidden = self.activate(dense.activation, hidden)
        return hidden

    def head(self, hidden: list[Tensor]) -> Tensor:
        """BertOnlyMLMHead.forward and cross-entropy in the model's dtype; or BertPooler.forward."""
        model, f = self.model, self.f
        x, V, h = hidden.pop(), model.vocab_size, model.hidden_size
        self.named, self.mask = [], None
        if not model.lm_head:
            first = f.select(x, 1)
            pooled = self.linear(first, "pooler.dense", h, bias=True)
            pooled = f.pointwise(pooled, "pooled", "tanh", saves="result")
            self.kept += (x, pooled)
            return x
        turned = self._transformed(x)
        head = self.table if model.tie_word_embeddings else self.weight("lm_head", V, h)
        logits = f.linear(turned, head, self.weight("lm_head.bias", V), "logits")
        del turned
        if not self.trains:
            self.kept.append(logits)
            return logits
        flat = f.view(logits, ((B, T), (V,)))
        return f.cross_entropy(flat)

    def _transformed(self, x: Tensor) -> Tensor:
        """BertPredictionHeadTransform.forward."""
        h = self.model.hidden_size
        hidden = self.linear(x, "dense", h, bias=True, name="transform.dense")
        dense = self.model.layers[0].feed_forward
        assert isinstance(dense, Dense)
        hidden = self.activate(dense.activation, hidden)
        return self.norm(self._norm(), hidden, "head norm", "transform.LayerNorm")
