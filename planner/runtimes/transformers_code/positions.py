"""Positions: rotary tables and rotations, learned rows, ALiBi."""

from __future__ import annotations

from planner.autograd.aten import ONE
from planner.autograd.tensors import Tensor
from planner.layers import RoPE
from planner.program import B, S, T
from planner.runtimes.transformers_code.parts import PartWriter
from planner.runtimes.writer import FLOAT32, INT64

COMPLEX64, BFLOAT16 = 8, 2


class PositionWriter(PartWriter):
    """What tells a model where its tokens stand."""

    def position_ids(self) -> Tensor:
        """torch.arange(T) + past."""
        index = self.aten.new("arange", "positions", ((T,),), INT64)
        if not self.code.counts_past:
            return index
        return self.aten.elementwise("add.Tensor", "positions", index)

    def counted_ids(self) -> tuple[Tensor, Tensor]:
        """OPTDecoder.forward: positions [B, S] counted in the caller's mask, or one of ones."""
        aten, name = self.aten, "positions"
        ones = self.padding_mask()
        if not self.what.padded:
            ones = aten.new("ones", "mask of ones", ones.dims, FLOAT32)
        ids = aten.new("cumsum", name, ones.dims, ones.itemsize, reads=(ones,))
        wide = aten.elementwise("mul.Tensor", name, ids, ones)
        wide = aten.elementwise("sub.Tensor", name, wide)
        del ids
        return aten.cast(wide, INT64, name), ones

    def padding_mask(self) -> Tensor:
        """The caller's attention mask, 0 where there is padding."""
        return self.given("attention mask", ((B,), (S,)), INT64)

    def rotary_tables(self, rope: RoPE) -> tuple[Tensor, ...]:
        """<Type>RotaryEmbedding.forward: cos and sin, times the attention scaling."""
        aten, name, R = self.aten, "rotary tables", rope.rotary_dim
        wide = aten.new("_to_copy", name, (ONE, (T,), ONE), FLOAT32)
        freqs = aten.new("mul.Tensor", name, (ONE, (T,), (R // 2,)), FLOAT32, reads=(wide,))
        del wide
        if self.code.rotary == "complex":
            return (self._polar(freqs),)
        angles = aten.new("cat", name, (ONE, ONE, (T,), (R,)), FLOAT32, reads=(freqs,))
        scaled = [
            aten.elementwise("mul.Tensor", name, aten.elementwise(kernel, name, angles))
            for kernel in ("cos", "sin")
        ]
        kept = FLOAT32 if self.code.float32_tables else self.b
        cos, sin = (aten.cast(table, kept, name) for table in scaled)
        del freqs, angles
        scaled.reverse()  # a list lets go of its last one first
        return cos, sin

    def _polar(self, freqs: Tensor) -> Tensor:
        """DeepseekV2RotaryEmbedding.forward: cos + i · sin, times the attention scaling."""
        aten, name = self.aten, "rotary tables"
        ones = aten.elementwise("ones_like", name, freqs)
        unscaled = aten.elementwise("polar", name, ones, freqs, itemsize=COMPLEX64)
        del ones
        return aten.elementwise("mul.Tensor", name, unscaled)

    def rotated(self, q: Tensor, k: Tensor, rotation: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """apply_rotary_pos_emb; of "held" code the rotation alone."""
        if self.code.rotary == "complex":
            return self._turned_as_complex(q, k, rotation[0])
        cos, sin = rotation
        if self.code.pairs and self.code.block != "cohere":
            cos, sin = (self._twice(table) for table in (cos, sin))
        R, kept = cos.sizes[-1], q.itemsize
        if self.code.rotary == "whole" and q.sizes[-1] == R:
            if self.code.float32_rotary and self.code.block == "cohere":
                q, k = self.f.cast(q, FLOAT32), self.f.cast(k, FLOAT32)
            turned_q = self._turned(q, cos, sin, "query")
            turned_k = self._turned(k, cos, sin, "key")
            if not (self.code.float32_rotary or self.code.float32_tables):
                return turned_q, turned_k
            return self.f.cast(turned_q, kept), self.f.cast(turned_k, kept)
        if self.code.rotary == "joined":
            joined_q = self._joined(q, self._turned(self.f.narrow(q, R), cos, sin, "query"))
            joined_k = self._joined(k, self._turned(self.f.narrow(k, R), cos, sin, "key"))
            return joined_q, joined_k
        turned_q = self._turned(self.f.narrow(q, R), cos, sin, "query")
        turned_k = self._turned(self.f.narrow(k, R), cos, sin, "key")
        if self.code.rotary == "held":
            return turned_q, turned_k
        if self.code.rotary == "returned":
            return self.joined(q, k, (turned_q, turned_k))
        turned_q = self._joined(q, turned_q)
        turned_k = self._joined(k, turned_k)
        return turned_q, turned_k

    def joined(self, q: Tensor, k: Tensor, turned: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """What was rotated with the rest behind it."""
        joined_q = self._joined(q, turned[0])
        joined_k = self._joined(k, turned[1])
        return joined_q, joined_k

    def _turned_as_complex(self, q: Tensor, k: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
        """modeling_deepseek_v2.apply_rotary_emb: both are complex before either is turned."""
        aten, b = self.aten, q.itemsize
        named = [
            aten.as_complex(aten.cast(x, FLOAT32, f"{name}, float32"))
            for x, name in ((q, "query"), (k, "key"))
        ]
        by_head = aten.as_view(turns, (turns.dims[0], ONE, *turns.dims[1:]))
        assert by_head is not None
        turned_q, turned_k = (
            aten.cast(
                aten.as_real(aten.elementwise("mul.Tensor", f"rotated {name}", x, by_head)),
                b,
                f"rotated {name}",
            )
            for x, name in zip(named, ("query", "key"), strict=True)
        )
        named.reverse()  # a list lets go of its last one first
        return turned_q, turned_k

    def _twice(self, table: Tensor) -> Tensor:
        """The first half of a table with every column twice (repeat_interleave)."""
        return self.aten.new("clone", "rotary tables", table.dims, table.itemsize, reads=(table,))

    def _joined(self, x: Tensor, turned: Tensor) -> Tensor:
        f, rest = self.f, x.sizes[-1] - turned.sizes[-1]
        return f.cat((turned, f.narrow(x, rest)), x.dims, turned.name)

    def _turned(self, x: Tensor, cos: Tensor, sin: Tensor, name: str) -> Tensor:
        """x · cos + rotate_half(x) · sin."""
        f = self.f
        if self.code.float32_rotary:  # cohere's are cast already
            return f.add(
                f.mul(f.cast(x, FLOAT32), cos, f"{name} · cos"),
                f.mul(f.cast(self._half(x, name), FLOAT32), sin, f"{name} turned · sin"),
                f"rotated {name}",
            )
        return f.add(
            f.mul(x, cos, f"{name} · cos"),
            f.mul(self._half(x, name), sin, f"{name} turned · sin"),
            f"rotated {name}",
        )

    def _half(self, x: Tensor, name: str) -> Tensor:
        """rotate_half: the second slice, negated, first; or before each other of its pair."""
        f, R = self.f, x.sizes[-1]
        if self.code.pairs:
            first, second = f.every_second(x), f.every_second(x)
            pairs = (f.scale(second, f"{name}, negated", kernel="neg"), first)
            return f.view(f.stack(pairs, -1, f"{name} turned"), x.dims)
        first, second = f.narrow(x, R // 2), f.narrow(x, R // 2)
        halves = (f.scale(second, f"{name}, negated", kernel="neg"), first)
        return f.cat(halves, x.dims, f"{name} turned")

    def alibi(self, heads: int) -> Tensor:
        """BloomModel.forward: [B · H, 1, S]."""
        aten, name = self.aten, "alibi"
        slopes = aten.new("pow", name, ((heads,),), FLOAT32)
        if self.what.padded:
            return self._alibi_of_mask(slopes)
        steps = aten.new("arange", name, ((S,),), INT64)
        biases = aten.new("mul.Tensor", name, ((heads,), ONE, (S,)), FLOAT32, reads=(slopes, steps))
        del steps
        biases = aten.new("repeat", name, ((B, heads), ONE, (S,)), FLOAT32, reads=(biases,))
        self.slopes: Tensor | None = slopes  # by the model's forward until it returns
        return aten.cast(biases, self.b, name)

    def _alibi_of_mask(self, slopes: Tensor) -> Tensor:
        """build_alibi_tensor: places are counted in the caller's mask; falcon's biases in bf16."""
        aten, name = self.aten, "alibi"
        mask = self.padding_mask()
        counted = aten.new("cumsum", name, mask.dims, INT64, reads=(mask,))
        counted = aten.elementwise("sub.Tensor", name, counted)
        counted = aten.elementwise("mul.Tensor", name, counted, mask)
        (heads,) = slopes.dims
        if self.code.block == "falcon":
            slopes = aten.cast(slopes, BFLOAT16, name)
        dims = ((B,), heads, (S,))
        made = aten.new("mul.Tensor", name, dims, slopes.itemsize, reads=(slopes, counted))
        seen = aten.as_view(made, ((B, *heads), ONE, (S,)))
        assert seen is not None
        return aten.cast(seen, self.b, name)
