"""Masks: masking_utils.create_causal_mask and create_sliding_window_causal_mask.

A mask is made once for each kind of layer, one for all sequences and heads; for sdpa it is bool,
for eager attention a number to add, one for each sequence.
"""

from __future__ import annotations

from planner.autograd.aten import ONE
from planner.autograd.tensors import Dims, Tensor
from planner.program import B, Extent, S, T
from planner.runtimes.transformers_code.positions import PositionWriter
from planner.runtimes.transformers_code.regime import window_of
from planner.runtimes.writer import BOOL, INT64

FULL_MASKS = frozenset(("exaone4", "qwen2", "qwen3", "smollm3"))
"""Types that make the mask of full layers though there be none."""


class MaskWriter(PositionWriter):
    """What queries may see."""

    def masks_of_layers(self) -> dict[int | None, Tensor | None]:
        """By window, those of full layers first."""
        model = self.model
        windows = set(model.mask_windows or map(window_of, model.layer_kinds()))
        if model.text_type in FULL_MASKS:
            windows.add(None)
        ordered = sorted(windows, key=lambda window: (window is not None, window or 0))
        return {window: self._mask(window) for window in ordered}

    def _mask(self, window: int | None) -> Tensor | None:
        """sdpa_mask where it cannot do without (_ignore_causal_mask_sdpa), eager_mask."""
        needed = (window is not None and window in self.regime.masked) or self.code.masked
        needed = needed or (self.what.static and self.aten.sizes(((T,),)) == (1,))
        eager, aten = self.what.attention == "eager", self.aten
        if not eager and not needed and not self.what.padded:
            return None
        padding: list[Tensor] = []
        if self.what.padded:  # the caller's mask as bool
            padding.append(aten.new("_to_copy", "padding", ((B,), (S,)), BOOL))
        visible = self._visible(window)
        if padding:
            visible = self._and_no_padding(visible)
        padding.clear()
        if not eager:
            return visible
        reads = (visible, *(aten.number("mask", self.b) for _ in ("0", "least")))
        return aten.new("where.self", "mask", ((B,), *visible.dims[1:]), self.b, reads=reads)

    def padding_alone(self) -> Tensor:
        """create_bidirectional_mask of a padding mask: what is hidden from all queries."""
        aten = self.aten
        padding = aten.new("_to_copy", "padding", ((B,), (T,)), BOOL)
        named = [aten.new("arange", "mask", ((n,),), INT64) for n in (B, 1)]
        queries, keys = (
            aten.elementwise("add.Tensor", "mask", aten.new("arange", "mask", ((T,),), INT64))
            for _ in ("queries", "keys")
        )
        rows: Dims = (ONE, ONE, (T,), ONE)
        every = aten.new("new_ones", "mask", (), BOOL)
        rule = aten.new("ge.Scalar", "mask", rows, BOOL, reads=(queries,))
        visible = aten.new("bitwise_and.Tensor", "mask", rows, BOOL, reads=(every, rule))
        del rule, every
        shown = aten.new("index.Tensor", "padding", ((B,), ONE, ONE, (T,)), BOOL)
        dims: Dims = ((B,), ONE, (T,), (T,))
        visible = aten.new("bitwise_and.Tensor", "mask", dims, BOOL, reads=(visible, shown))
        del shown, named, queries, keys
        if self.what.attention != "eager":
            return visible
        reads = (visible, *(aten.number("mask", self.b) for _ in ("0", "least")))
        made = aten.new("where.self", "mask", dims, self.b, reads=reads)
        del padding
        return made

    def _and_no_padding(self, visible: Tensor) -> Tensor:
        """and_masks of what was visible and padding_mask_function: one mask for each sequence."""
        aten, (_, one, rows, keys) = self.aten, visible.dims
        both = aten.new("bitwise_and.Tensor", "mask", visible.dims, BOOL, reads=(visible,))
        del visible
        shown = aten.new("index.Tensor", "padding", ((B,), ONE, ONE, keys), BOOL)
        dims: Dims = ((B,), one, rows, keys)
        return aten.new("bitwise_and.Tensor", "mask", dims, BOOL, reads=(both, shown))

    def _visible(self, window: int | None) -> Tensor:
        """bool [1, 1, T, keys], from the places of queries and keys."""
        aten, keys = self.aten, self._keys(window)
        named = [aten.new("arange", "mask", ((n,),), INT64) for n in (B, 1)]
        queries = aten.elementwise("add.Tensor", "mask", aten.new("arange", "mask", ((T,),), INT64))
        seen = aten.elementwise("add.Tensor", "mask", aten.new("arange", "mask", ((keys,),), INT64))
        square: Dims = (ONE, ONE, (T,), (keys,))
        if window is None:
            visible = aten.new("le.Tensor", "mask", square, BOOL, reads=(seen, queries))
        else:
            visible = aten.new("new_ones", "mask", (), BOOL)
            for kernel in ("gt.Tensor", "le.Tensor"):
                visible = self._and(visible, kernel, queries, seen, square)
        del named, queries, seen
        return visible

    def _and(
        self, visible: Tensor, kernel: str, queries: Tensor, keys: Tensor, square: Dims
    ) -> Tensor:
        """and_masks: what was visible and is by the next rule, too."""
        aten = self.aten
        if kernel == "gt.Tensor":  # keys later than query − W
            queries = aten.elementwise("sub.Tensor", "mask", queries)
        rule = aten.new(kernel, "mask", square, BOOL, reads=(keys, queries))
        del queries
        return aten.new("bitwise_and.Tensor", "mask", square, BOOL, reads=(visible, rule))

    def _keys(self, window: int | None) -> Extent:
        """As many as the first layer of this kind gets; without one, the first of all."""
        windows = [window_of(layer) for layer in self.model.layer_kinds()]
        return self.keys_of(window if window in windows else windows[0])

    def biased_mask(self, mask: Tensor, biases: Tensor, heads: int) -> Tensor:
        """FalconModel.forward: ALiBi and mask in one tensor [B, H, T, keys]."""
        aten = self.aten
        if mask.itemsize == BOOL:
            reads = (mask, *(aten.number("mask", self.b) for _ in ("0", "least")))
            mask = aten.new("where.self", "mask", ((B,), *mask.dims[1:]), self.b, reads=reads)
        scaled = aten.elementwise("div.Tensor", "alibi", biases)
        hidden = aten.elementwise("lt.Scalar", "mask", mask, itemsize=BOOL)
        dims: Dims = ((B,), (heads,), *mask.dims[2:])
        return aten.new("masked_fill.Scalar", "mask", dims, self.b, reads=(scaled, hidden))
