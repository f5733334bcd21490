"""<Type>ForCausalLM.forward: embedding, masks, positions, layers, head, loss.

A training step is in train mode with dropout 0, without a cache; of its output only the loss is
kept. Inference is in eval mode under no_grad; it returns logits and cache.
"""

from __future__ import annotations

from planner.autograd.aten import ONE
from planner.autograd.tensors import Dims, Tensor
from planner.layers import GQA, ALiBi, Layer, LearnedPositions, RoPE
from planner.program import B, S, T
from planner.runtimes.transformers_code.blocks import BlockWriter
from planner.runtimes.transformers_code.masks import MaskWriter
from planner.runtimes.transformers_code.regime import T_AND_ONE, Shared, window_of
from planner.runtimes.writer import FLOAT32, INT64


class CausalLM(BlockWriter, MaskWriter):
    """Runs a causal language model."""

    def embed(self) -> Tensor:
        """<Type>Model.forward before its layers."""
        model, f = self.model, self.f
        width = model.embedding_size or model.hidden_size
        self.table = self.weight("embed_tokens", model.vocab_size, width)
        self.labels = self.given("labels", ((B,), (T,)), INT64) if self.trains else None
        ids = self.given("token ids", ((B,), (T,)), INT64)
        x = f.embedding(self.table, ids, "input embeddings")
        scaled_inside = model.text_type.startswith("gemma")
        if not scaled_inside:
            self.ask_gradient(x)
        if model.embedding_scale is not None:
            x = self._scaled_embedding(x)
        if scaled_inside:
            self.ask_gradient(x)
        self.named = [x.detach()]  # by the model's forward until it returns
        self.ids: Tensor | None = None
        if self.code.block == "opt":
            x = self._opt_positions(x)
        elif model.embedding_norm is not None:
            x = self.norm(model.embedding_norm, x, "hidden states", "embed_norm")
        else:
            self.ids = self.position_ids()
            if isinstance(model.positions, LearnedPositions):
                x = self._learned(x, self.ids, (ONE, (T,)))
            elif model.embedding_size is not None:
                x = self._projected_in(x)
        self.alibis: Tensor | None = None
        H = getattr(model.layers[0].attention, "num_attention_heads", 1)
        if isinstance(model.positions, ALiBi) and self.code.block in ("bloom", "falcon"):
            self.alibis = self.alibi(H)
            if self.code.block == "falcon" and not self.what.padded:  # in a mask that it keeps
                self.named.append(self.aten.new("ones", "mask of ones", ((B,), (S,)), INT64))
                self.slopes = None
        self.masks = self.masks_of_layers()
        if self.code.block == "falcon" and self.alibis is not None:
            mask = self.masks[None]
            assert mask is not None
            self.masks[None] = self.biased_mask(mask, self.alibis, H)
            del mask
        self.rotations: dict[bool, tuple[Tensor, ...]] = {}
        for layer in model.layer_kinds():
            slides = self._slides(layer)
            rope = model.local_positions if slides else model.positions
            if slides not in self.rotations and isinstance(rope, RoPE):
                self.rotations[slides] = self.rotary_tables(rope)
        if self.code.block == "falcon" and isinstance(model.positions, ALiBi):  # made, not used
            gqa = model.layers[0].attention
            assert isinstance(gqa, GQA)
            unused = RoPE(rope_theta=1.0, rotary_dim=gqa.head_dim)
            self.rotations[False] = self.rotary_tables(unused)
        return x

    def _scaled_embedding(self, x: Tensor) -> Tensor:
        """Gemma's factor is a buffer in the dtype of the weights as they are kept."""
        held = self.b if self.gathering is None else self.gathering.sharding.held_bytes
        if held == self.b or not self.model.text_type.startswith("gemma"):
            return self.f.scale(x, "input embeddings")
        factor = self.aten.new("_to_copy", "embedding scale", (), self.b)
        return self.f.mul(x, factor, "input embeddings")

    def _projected_in(self, x: Tensor) -> Tensor:
        projected = self.linear(x, "project_in", self.model.hidden_size, bias=False)
        self.named[0] = projected.detach()
        return projected

    def _learned(self, x: Tensor, ids: Tensor, lead: Dims) -> Tensor:
        """A row of the table for each position, added to the embedding."""
        model, f, h = self.model, self.f, self.model.hidden_size
        positions = model.positions
        assert isinstance(positions, LearnedPositions)
        rows = (model.max_position_embeddings or 0) + positions.offset
        table = self.weight("embed_positions", rows, h)
        seen = self.aten.as_view(ids, lead)
        assert seen is not None
        embedded = f.embedding(table, seen, "position embeddings")
        if model.embedding_size is not None:
            x = self._projected_in(x)
        self.named.append(embedded.detach())
        return f.add(x, embedded, "hidden states")

    def _opt_positions(self, x: Tensor) -> Tensor:
        """OPTDecoder.forward: positions are counted in a mask of ones."""
        counted, ones = self.counted_ids()
        self.ids = counted
        self.named.append(ones)
        shifted = self.aten.new("add.Tensor", "positions", ((B,), (T,)), INT64, reads=(counted,))
        return self._learned(x, shifted, shifted.dims)

    def _slides(self, layer: Layer) -> bool:
        """Whether the layer turns by positions of its own, as gemma3's sliding ones."""
        return self.model.local_positions is not None and window_of(layer) is not None

    def shared(self, layer: Layer) -> Shared:
        """The rotation and the mask of this kind of layer."""
        rotation = self.rotations.get(self._slides(layer))
        return Shared(
            rotation=rotation,
            mask=self.masks[window_of(layer)],
            alibi=self.alibis,
            position_ids=self.ids if self.code.hands_positions else None,
        )

    def head(self, hidden: list[Tensor]) -> Tensor:
        """Last norm, head, ForCausalLMLoss."""
        model, f = self.model, self.f
        x, V = hidden.pop(), model.vocab_size
        if model.final_norm is not None:
            x = self.norm(model.final_norm, x, "final norm", "norm")
        if model.embedding_size is not None:
            x = self.linear(x, "project_out", model.embedding_size, bias=False)
        self._return()
        if not model.lm_head:
            self.kept.append(x.detach())
            return x
        head = self.table if model.tie_word_embeddings else self.weight("lm_head", V, x.sizes[-1])
        bias = self.weight("lm_head.bias", V) if model.lm_head_bias else None
        seen = f.narrow(x, 1, 1) if self.what.logits == "last" else x
        logits = f.linear(seen, head, bias, "logits")
        del seen
        if model.logit_scale is not None:
            logits = f.scale(logits, "logits")
        if model.final_logit_softcapping is not None:
            logits = f.scale(logits, "logits", kernel="div.Tensor")
            logits = f.pointwise(logits, "logits", "tanh", saves="result")
            logits = f.scale(logits, "logits")
        if self.trains:
            return self._loss(logits)
        if self.what.float32_logits:
            logits = f.cast(logits, FLOAT32, "float32 logits")
        self.kept.append(logits)
        return logits

    def _return(self) -> None:
        """The model's forward returns: what it named goes, in the order of the names."""
        self.ids = None
        self.named = []
        self.masks = {}
        self.alibis = self.slopes = self.looped = None
        self.rotations = {}

    def _loss(self, logits: Tensor) -> Tensor:
        """loss_utils.ForCausalLMLoss."""
        f = self.f
        wide = f.cast(logits, FLOAT32, "float32 logits")
        padded = self.aten.new("constant_pad_nd", "padded labels", ((B,), (T_AND_ONE,)), INT64)
        shifted = padded  # of one sequence the slice behind the first is contiguous
        if self.regime.several_batches:
            shifted = self.aten.new("clone", "shifted labels", ((B,), (T,)), INT64, reads=(padded,))
        wide = f.view(wide, ((B, T), (self.model.vocab_size,)))
        loss = f.cross_entropy(wide, shifted)
        del shifted, padded
        return loss
