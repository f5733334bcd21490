"""What a pass finds in the cache, appends to it and gets from it: cache_utils.py."""

from __future__ import annotations

from dataclasses import replace

from planner.autograd.layouts import contiguous, is_contiguous
from planner.autograd.tensors import Dims, Storage, Tensor
from planner.dtypes import element_bytes
from planner.layers import GQA, MLA, Layer
from planner.mixers.mamba import Mamba2
from planner.program import PAST, B, Extent, S, T
from planner.runtimes.quantised_program import QuantisedLayer
from planner.runtimes.transformers_code.kernels import KernelWriter
from planner.runtimes.transformers_code.regime import kept_tokens, static_tokens, window_of
from planner.runtimes.writer import FLOAT32, INT64


class CacheWriter(KernelWriter):
    """DynamicCache and QuantizedCache."""

    past: dict[str, tuple[Tensor, Tensor]]
    quantised: dict[str, QuantisedLayer]
    kept: list[Tensor]
    """What lives on after the pass."""

    def before(self) -> None:
        """What was cached before: old keys and values, an int64 for each sliding layer."""
        self.past, self.quantised, self.kept = {}, {}, []
        if self.trains:
            return
        for part in self.parts():
            if part.layer_kind is None or part.stack == "encoder":
                continue
            label = f"cache of {part.label}"
            if not self.tape.again(label, count=part.count, first_layer=part.layer):
                with self.tape.segment(label, count=part.count, first_layer=part.layer):
                    self._open(part.label, part.layer_kind)

    def _open(self, label: str, layer: Layer) -> None:
        window = window_of(layer)
        if isinstance(layer.attention, Mamba2):
            self._open_states(label, layer.attention)
            return
        if self.what.static:
            self._open_static(label, layer)
            return
        if window is not None:
            self.kept.append(self.aten.new("tensor", "window size", ((1,),), INT64))
        decodes = self.what.kind == "decode"
        if self.what.quantised is not None:
            assert isinstance(layer.attention, GQA | MLA), "refused by check_quantisable"
            self.quantised[label] = QuantisedLayer(
                self.tape,
                self.what.quantised,
                layer.attention,
                itemsize=self.b,
                residual_tokens=self.what.residual_tokens,
                on_cpu=self.what.device == "cpu",
            )
            if decodes:
                self.quantised[label].open()
        elif decodes:
            # right after prefill: all of it; later: the last step's cat, one token more than kept
            whole = self.what.held_whole or window in (None, 1)
            tokens: Extent = PAST if whole else kept_tokens((window or 0) + 1, PAST)
            keys, values = self._cached(layer, tokens)
            self.past[label] = keys, values

    def _open_states(self, label: str, mixer: Mamba2) -> None:
        """LinearAttentionLayer: after the prefill its states, which are overwritten in place."""
        if self.what.kind != "decode":
            return
        inputs: Dims = ((B,), (mixer.conv_dim,), (mixer.conv_kernel,))
        state: Dims = ((B,), (mixer.num_heads,), (mixer.head_dim,), (mixer.state_size,))
        self.past[label] = (
            self._marked(self.aten.new("zeros", "convolution state", inputs, self.b)),
            self._marked(self.aten.new("zeros_like", "recurrent state", state, FLOAT32)),
        )
        self.kept += self.past[label]

    def _open_static(self, label: str, layer: Layer) -> None:
        """StaticLayer.__init__: how many tokens there are; after the prefill keys and values."""
        length = self.aten.new("tensor", "cached tokens", (), INT64)
        length.storage.known_as(replace(length.storage.buffer, lasting=True))
        self.kept.append(length)
        if self.what.kind == "decode":
            held = static_tokens(window_of(layer))
            keys, values = (self._lasting(x) for x in self._cached(layer, held))
            self.past[label] = keys, values
            self.kept += (keys, values)

    def _lasting(self, x: Tensor) -> Tensor:
        x.storage.known_as(replace(x.storage.buffer, cache=True, lasting=True))
        return x

    def _static(self, layer: Layer, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """StaticLayer.update, StaticSlidingWindowLayer.update: new tokens are copied into the old.

        A prompt longer than the window is attended to as it came, its newest tokens are copied;
        behind a full window all that is cached moves up by one and is copied back.
        """
        aten, window = self.aten, window_of(layer)
        if self.walking in self.past:
            keys, values = self.past[self.walking]
        else:
            held = (static_tokens(window),)
            keys, values = (
                self._lasting(aten.new("zeros", name, (*x.dims[:2], held, x.dims[3]), self.b))
                for x, name in ((k, "cached keys"), (v, "cached values"))
            )
            self.kept += (keys, values)
        if window in self.regime.exceeded:
            if self.what.kind == "prefill":
                for kept in (keys, values):
                    self._written("copy_", kept, loop="strided")
                return k, v
            moved = [
                aten.new("roll", f"moved {x.name}", x.dims, self.b, reads=(x,), loop="strided")
                for x in (keys, values)
            ]
            index = aten.new("tensor", "last place", ((1,),), INT64)
            for new in (k, v):
                self._written("index_put_", new)
            for kept in (keys, values):
                self._written("copy_", kept, loop="whole")
            del moved, index
            return keys, values
        index = aten.new("arange", "places in the cache", ((T,),), INT64)
        place = aten.elementwise("add.Tensor", "places in the cache", index)
        self.tape.run("cached tokens", moved=((1, INT64), (1, INT64)), kernel="add_", loop="whole")
        for new in (k, v):  # index_copy_, which takes an offset for each element
            self._written("copy_", new, loop="strided")
        del index, place
        return keys, values

    def _written(self, kernel: str, x: Tensor, *, loop: str = "") -> None:
        """As much as x read and written in place."""
        each = (*x.shape, x.itemsize)
        self.tape.run(f"written {x.name}", moved=(each, each), kernel=kernel, loop=loop)

    def _cached(self, layer: Layer, tokens: Extent) -> tuple[Tensor, Tensor]:
        """Keys and values, or latents and rotated keys, of so many tokens."""
        match layer.attention:
            case GQA(num_key_value_heads=G, head_dim=D, cache_heads=cached):
                heads, widths = cached or G, (D, D)
            case MLA(kv_lora_rank=d_c, qk_rope_head_dim=d_rope):
                heads, widths = 1, (d_c, d_rope)
            case _:
                raise AssertionError("refused by check_planned")
        element = element_bytes(self.what.kv_dtype or self.what.dtype)
        made = []
        for name, width in zip(("cached keys", "cached values"), widths, strict=True):
            dims: Dims = ((B,), (heads,), (tokens,), (width,))
            made.append(self._marked(self.aten.new("cat", name, dims, element)))
        keys, values = made
        return keys, values

    def _marked(self, x: Tensor) -> Tensor:
        x.storage.known_as(replace(x.storage.buffer, cache=True))
        return x

    def update(self, layer: Layer, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Cache.update: what attention gets of keys and values."""
        if self.trains:
            return k, v
        if self.what.static:
            return self._static(layer, k, v)
        if self.walking in self.quantised:
            return self._quantised(k, v)
        keys, values = self._joined_with_past(layer, k, v)
        self.kept += (keys, values)
        return keys, values

    def _joined_with_past(self, layer: Layer, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """torch.cat of old and new. A sliding layer drops the old ones when both are there."""
        window = window_of(layer)
        old = list(self.past.pop(self.walking, ()))
        keys = self._cat(old[:1], k, window, "cached keys")
        if old and window is None:
            old[0] = old[1]
        values = self._cat(old[1:], v, window, "cached values")
        return keys, values

    def _cat(self, old: list[Tensor], new: Tensor, window: int | None, name: str) -> Tensor:
        seen = self.keys_of(window)
        dims = (*new.dims[:2], (S if seen == T else seen,), new.dims[3])
        return self._marked(self.aten.cat((*old, new), -2, dims, name, first=not old))

    def _quantised(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """QuantizedCache.update: attention gets tensors that are no part of it."""
        layer = self.quantised[self.walking]
        if self.what.kind == "prefill":
            copied_k, copied_v = (0 if is_contiguous(x.sizes, x.strides) else 1 for x in (k, v))
            layer.prefill(k.storage.buffer, v.storage.buffer, copies=(copied_k, copied_v))
            return k, v
        got = []
        for x, buffer in zip((k, v), layer.decode(k.storage.buffer, v.storage.buffer), strict=True):
            dims = (*x.dims[:2], (S,), x.dims[3])
            sizes = self.aten.sizes(dims)
            storage = Storage(buffer, self.tape)
            got.append(Tensor(storage, dims, sizes, contiguous(sizes), self.b, buffer.name))
        keys, values = got
        return keys, values
