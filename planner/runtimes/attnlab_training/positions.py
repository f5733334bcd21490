"""positions.py, alibi.py and masks.py of attnlab: what is made once a step, and the rotation."""

from __future__ import annotations

from planner.autograd.aten import ONE
from planner.autograd.tensors import Dims, Tensor
from planner.layers import GQA, ALiBi, LearnedPositions, RoPE
from planner.program import T
from planner.runtimes.attnlab_training.norms import NormWriter
from planner.runtimes.attnlab_training.regime import gqa_of, window_of
from planner.runtimes.writer import BOOL, FLOAT32, INT64

Mask = Tensor | None
"""A bool table, a bias, or nothing where a kernel is told "causal"."""


class PositionWriter(NormWriter):
    """Tables, masks and rotations of one step."""

    def start(self) -> None:
        """What the step's positions are, before the embedding."""
        self.rotations: dict[bool, tuple[Tensor, Tensor]] = {}  # of full and of sliding layers
        self.masks: dict[tuple[int | None, bool], Mask] = {}
        self.positions: Tensor | None = self.aten.new("arange", "positions", ((T,),), INT64)

    def finish(self) -> None:
        """`del rotations, masks`."""
        self.rotations, self.masks, self.positions = {}, {}, None

    def learned_positions(self, x: Tensor, learned: LearnedPositions) -> Tensor:
        """x + embed_positions(rows)."""
        assert self.positions is not None
        rows = self.positions
        if learned.offset:
            rows = self.aten.elementwise("add.Tensor", "positions", rows)
        limit = (self.model.max_position_embeddings or 0) + learned.offset
        table = self.weight("embed_positions", limit, self.model.hidden_size)
        return self.f.add(x, self.f.embedding(table, rows, "position embeddings"), "hidden states")

    def sinusoids(self, x: Tensor) -> Tensor:
        """x + positions.sinusoids(...): sines and cosines of as many angles each."""
        aten, name, h = self.aten, "sinusoids", self.model.hidden_size
        half: int = -(-h // 2)
        assert self.positions is not None
        exponents = aten.new("arange.start_step", name, ((half,),), FLOAT32)
        exponents = aten.elementwise("div.Tensor", name, exponents)
        wide = aten.new("_to_copy", name, ((T,), ONE), FLOAT32, reads=(self.positions,))
        base = aten.elementwise("pow.Scalar", name, exponents)
        angles = aten.new("div.Tensor", name, ((T,), (half,)), FLOAT32, reads=(wide, base))
        del wide, base
        parts = [aten.elementwise(kernel, name, angles) for kernel in ("sin", "cos")]
        joined = aten.new("cat", name, ((T,), (2 * half,)), FLOAT32, reads=parts)
        del parts
        table = joined if 2 * half == h else aten.narrow(joined, -1, h)
        del joined
        table = aten.cast(table, self.b, name)
        del angles, exponents
        return self.f.add(x, table, "hidden states")

    def rotary_tables(self, rope: RoPE) -> tuple[Tensor, Tensor]:
        """positions.RotaryTables.forward: cos and sin, each [T, 1, R].

        Left out: the few numbers of stretched frequencies, and the product with a factor for
        attention, which are gone before the first layer.
        """
        aten, name, R = self.aten, "rotary tables", rope.rotary_dim
        assert self.positions is not None
        wide = aten.new("_to_copy", name, ((T,), ONE), FLOAT32, reads=(self.positions,))
        freqs = aten.new("mul.Tensor", name, ((T,), (R // 2,)), FLOAT32, reads=(wide,))
        del wide
        twice: Dims = ((T,), ONE, (R,))  # of each angle two, beside or behind one another
        if not rope.interleaved:
            angles = aten.new("cat", name, twice, FLOAT32, reads=(freqs,))
        elif R > 2:
            angles = aten.new("clone", name, twice, FLOAT32, reads=(freqs,))
        else:
            angles = aten.expand(aten.reshape(freqs, ((T,), ONE, ONE)), twice)
        cos, sin = (
            aten.cast(aten.elementwise(kernel, name, angles), self.b, name)
            for kernel in ("cos", "sin")
        )
        del freqs
        return cos, sin

    def rotate(self, x_BTHD: Tensor, rotation: tuple[Tensor, Tensor], name: str) -> Tensor:
        """positions.rotate."""
        f = self.f
        cos, sin = rotation
        R, D = cos.sizes[-1], x_BTHD.sizes[-1]
        x = f.narrow(x_BTHD, R)
        assert isinstance(self.model.positions, RoPE)
        if self.model.positions.interleaved:
            turned = f.add(
                f.mul(x, cos, f"{name} · cos"), self._swapped(x, sin, name), f"rotated {name}"
            )
        else:
            x1, x2 = f.split(x, (R // 2, R // 2))
            turned = f.add(
                f.mul(x, cos, f"{name} · cos"), self._turned(x1, x2, sin, name), f"rotated {name}"
            )
        if R == D:
            return turned
        return f.cat((turned, f.narrow(x_BTHD, D - R)), x_BTHD.dims, f"rotated {name}")

    def _turned(self, x1: Tensor, x2: Tensor, sin: Tensor, name: str) -> Tensor:
        f, R = self.f, sin.dims[-1]
        halves = (f.scale(x2, f"{name}, negated", kernel="neg"), x1)
        whole = f.cat(halves, (*x1.dims[:-1], R), f"{name} turned")
        del halves
        return f.mul(whole, sin, f"{name} turned · sin")

    def _swapped(self, x: Tensor, sin: Tensor, name: str) -> Tensor:
        """Neighbours, the second one negated, first."""
        f = self.f
        second = f.scale(f.every_second(x), f"{name}, negated", kernel="neg")
        pairs = f.stack((second, f.every_second(x)), -1, f"{name} turned")
        del second
        return f.mul(f.view(pairs, x.dims), sin, f"{name} turned · sin")

    # masks

    @property
    def is_biased(self) -> bool:
        """Whether masks are biases to be added."""
        return isinstance(self.model.positions, ALiBi)

    def make_masks(self) -> None:
        """Transformer._masks: one for each pattern of layers."""
        model, aten = self.model, self.aten
        slopes = None
        if isinstance(model.positions, ALiBi):
            H = gqa_of(model.layers[0]).num_attention_heads
            item = FLOAT32 if self.step.attention == "naive" else self.b
            slopes = aten.elementwise(
                "mul.Tensor", "slopes", aten.new("lift_fresh", "slopes", ((H,),), item)
            )
        for layer in model.layer_kinds():
            gqa = gqa_of(layer)
            window = window_of(gqa)
            if (window, gqa.chunked) not in self.masks:
                self.masks[window, gqa.chunked] = self._mask(gqa, slopes)

    def _mask(self, gqa: GQA, slopes: Tensor | None) -> Mask:
        """masks.make_mask of a whole sequence without a cache."""
        window = window_of(gqa)
        masked = window in self.regime.masked
        if slopes is None:
            return self.visible(self.positions, window, chunked=gqa.chunked) if masked else None
        visible = None
        if masked or self.regime.several_tokens:
            visible = self.visible(self.positions, window, chunked=gqa.chunked)
        bias = self._bias(slopes)
        return bias if visible is None else self.aten.where(visible, bias, "bias")

    def _bias(self, slopes: Tensor) -> Tensor:
        """alibi.bias: slope · (key − query), [1, H, T, T]."""
        aten, name, (H,) = self.aten, "bias", slopes.dims
        assert self.positions is not None
        distance = aten.new("sub.Tensor", name, ((T,), (T,)), INT64, reads=(self.positions,))
        cast = aten.new("_to_copy", name, ((T,), (T,)), slopes.itemsize, reads=(distance,))
        return aten.new(
            "mul.Tensor", name, (ONE, H, (T,), (T,)), slopes.itemsize, reads=(slopes, cast)
        )

    def visible(
        self, positions: Tensor | None, window: int | None, *, chunked: bool = False
    ) -> Tensor:
        """masks.visibility: a bool for each pair of a query and a key."""
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
