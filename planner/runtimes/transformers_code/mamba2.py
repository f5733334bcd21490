"""Mamba-2 mixers in the PyTorch code that transformers falls back to: models/bamba.

This is BambaMixer.forward without mamba_ssm and causal_conv1d installed: every step of the scan is
a tensor of its own in float32, among them three of B · T · chunk_size · heads. Their fused kernels
hold none of these and are much faster; they are not planned.

Shapes.  B batch · T tokens · Z chunks · Q tokens of a chunk · H heads · P head dim · N state size
         K width of the convolution; the prompt is padded to Z · Q tokens
"""

from __future__ import annotations

from dataclasses import dataclass

from planner.autograd.aten import ONE
from planner.autograd.layouts import channels_last, is_channels_last, preserved
from planner.autograd.tensors import Dims, Tensor
from planner.mixers.mamba import Mamba2
from planner.program import B, Shape, Symbol, T
from planner.runtimes.transformers_code.cache import CacheWriter
from planner.runtimes.writer import BOOL, FLOAT32


def chunks(size: int) -> Symbol:
    """Chunks of a prompt: ⌈T / Q⌉."""
    return Symbol(f"⌈T / {size}⌉", lambda d: -(-d.tokens // size))


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunked:
    """The prompt in chunks: how many, and of how many tokens each; `ends`: one state more."""

    count: Shape
    ends: Shape
    size: Shape

    @property
    def tokens(self) -> Shape:
        """All tokens, padding included."""
        return (*self.count, *self.size)


class Mamba2Writer(CacheWriter):
    """One Mamba-2 mixer: what it adds to the hidden states."""

    def mamba2(self, mixer: Mamba2, x: Tensor) -> Tensor:
        """BambaMixer.forward."""
        f, width, H = self.f, mixer.intermediate_size, mixer.num_heads
        held = self.past.get(self.walking)  # convolution and recurrent state
        out = width + mixer.conv_dim + H
        projected = self.linear(x, "in_proj", out, bias=mixer.use_bias)
        A = f.scale(
            f.pointwise(self._wide(self.weight("A_log", H)), "−A", "exp", saves="result"),
            "A",
            kernel="neg",
        )
        gate, mixed, dt = f.split(projected, (width, mixer.conv_dim, H))
        mixed = f.transpose(mixed, 1, 2)
        if held is not None:
            mixed = self._conv_update(mixer, mixed, held[0])
        else:
            mixed = self._conv_state(mixer, mixed)
            mixed = self._conv(mixer, mixed)
            mixed = self.aten.narrow(mixed, 2, T)
        mixed = f.transpose(mixed, 1, 2)
        states = mixer.n_groups * mixer.state_size
        hidden, b, c = f.split(mixed, (width, states, states))
        if held is not None:
            scanned = self._state_update(mixer, held[1], hidden, dt, A, b, c)
            result = None
        else:
            result = self._chunk_scan(mixer, hidden, dt, A, b, c)
            final = self._cached_state(result[1], "recurrent state")
            self.kept.append(final)
            scanned = result[0]
        scanned = f.view(scanned, ((B,), (T,), (width,)))
        if mixer.norm:
            scanned = self._gated_norm(mixer, scanned, gate)
        made = self.linear(
            self.aten.cast(scanned, self.b, "scan"),
            "out_proj",
            self.model.hidden_size,
            bias=mixer.out_bias,
        )
        del result
        return made

    def _wide(self, x: Tensor, name: str = "") -> Tensor:
        return self.aten.cast(x, FLOAT32, name or f"float32 {x.name}")

    def _cached_state(self, like: Tensor, name: str) -> Tensor:
        """A state of the cache, copied into from now on."""
        made = self._marked(self.aten.new("zeros", name, like.dims, like.itemsize))
        self.aten.tape.run(name, moved=self._moved(like, made), kernel="copy_")
        return made

    def _moved(self, *tensors: Tensor) -> tuple[Shape, ...]:
        return tuple((*x.shape, x.itemsize) for x in tensors)

    # -- convolution [B, channels, T] -------------------------------------------------------------

    def _conv_state(self, mixer: Mamba2, x: Tensor) -> Tensor:
        """LinearAttentionLayer.update_conv_state of a prompt, padded where it is shorter than K."""
        K, aten = mixer.conv_kernel, self.aten
        held: Dims = (x.dims[0], x.dims[1], (K,))
        state = self._marked(aten.new("zeros", "convolution state", held, x.itemsize))
        self.kept.append(state)
        if not self.regime.fills(K):
            x = aten.new("constant_pad_nd", "padded inputs", held, x.itemsize, reads=(x,))
        aten.tape.run("convolution state", moved=self._moved(state, state), kernel="copy_")
        return x

    def _conv(self, mixer: Mamba2, x: Tensor) -> Tensor:
        """causal_conv1d_fn: padded on both sides, cut on the right."""
        K = mixer.conv_kernel
        (length,) = x.dims[2]
        longer = (
            length + K - 1
            if isinstance(length, int)
            else Symbol(f"({length.name} + {K - 1})", lambda d: length.of(d) + K - 1)
        )
        out = self._convolved(mixer, x, (longer,))
        out = self.aten.narrow(out, 2, length)
        return self.activate(mixer.activation, out)

    def _convolved(self, mixer: Mamba2, x: Tensor, length: Shape) -> Tensor:
        """F.conv1d of each channel alone."""
        reads = [x, self.weight("conv1d.weight", mixer.conv_dim, 1, mixer.conv_kernel)]
        if mixer.use_conv_bias:
            reads.append(self.weight("conv1d.bias", mixer.conv_dim))
        dims: Dims = (x.dims[0], x.dims[1], length)
        return self.aten.new("convolution", "convolution", dims, x.itemsize, reads=reads)

    def _conv_update(self, mixer: Mamba2, x: Tensor, state: Tensor) -> Tensor:
        """causal_conv1d_update: K inputs that were there and the new one."""
        K, aten = mixer.conv_kernel, self.aten
        dims: Dims = (x.dims[0], x.dims[1], (K + 1,))
        joined = aten.cat((state, x), -1, dims, "inputs of the convolution")
        aten.tape.run("convolution state", moved=self._moved(state, state), kernel="copy_")
        out = self._convolved(mixer, joined, (2,))
        out = aten.narrow(out, 2, 1)
        return self.activate(mixer.activation, out)

    # -- one token --------------------------------------------------------------------------------

    def _state_update(
        self, mixer: Mamba2, state: Tensor, x: Tensor, dt: Tensor, A: Tensor, b: Tensor, c: Tensor
    ) -> Tensor:
        """mamba2_selective_state_update: [B, H, P]."""
        f, aten = self.f, self.aten
        H, P, N = mixer.num_heads, mixer.head_dim, mixer.state_size
        by_head: Dims = ((B,), (H,), (P,))
        x = f.view(x, by_head)
        dt = f.expand(f.transpose(dt, 1, 2), by_head)
        bias = f.expand(f.view(self.weight("dt_bias", H), ((H,), ONE)), ((H,), (P,)))
        dt = f.add(dt, bias, "time step")
        dt = f.pointwise(dt, "time step", "softplus", saves="input")
        dt = f.view(dt, (*dt.dims, ONE))
        spread = f.expand(f.view(A, ((H,), ONE, ONE)), ((H,), (P,), (N,)))
        dA = f.pointwise(f.mul(self._wide(dt), spread, "dt · A"), "decay", "exp", saves="result")
        b = self._every_head(mixer, b)
        dB = f.mul(dt, f.view(b, ((B,), (H,), ONE, (N,))), "dt · B")
        dBx = f.mul(dB, f.view(x, (*x.dims, ONE)), "dt · B · x")
        states = f.add(f.mul(state, dA, "decayed state"), dBx, "state")
        aten.tape.run("recurrent state", moved=self._moved(states, state), kernel="copy_")
        c = self._every_head(mixer, c)
        states = aten.cast(states, c.itemsize, "state")
        rows = f.view(states, ((B, H), (P,), (N,)))
        columns = f.view(c, ((B, H), (N,), ONE))
        out = f.view(f.matmul(rows, columns, "scan", kernel="bmm"), by_head)
        skip = f.expand(f.view(self.weight("D", H), ((H,), ONE)), ((H,), (P,)))
        return f.add(out, f.mul(x, skip, "D · x"), "scan")

    def _every_head(self, mixer: Mamba2, x: Tensor) -> Tensor:
        """B or C of each group for each of its heads: a copy where there are several."""
        G, H, N = mixer.n_groups, mixer.num_heads, mixer.state_size
        apart = self.f.view(x, ((B,), (G,), ONE, (N,)))
        return self.f.contiguous(
            self.f.expand(apart, ((B,), (G,), (H // G,), (N,))), f"{x.name} of all heads"
        )

    # -- a prompt ---------------------------------------------------------------------------------

    def _chunk_scan(
        self, mixer: Mamba2, x: Tensor, dt: Tensor, A: Tensor, b: Tensor, c: Tensor
    ) -> tuple[Tensor, Tensor]:
        """mamba2_chunk_scan: ([B, T, H, P], the state behind the prompt)."""
        f, aten = self.f, self.aten
        H, P, Q = mixer.num_heads, mixer.head_dim, self._chunked(mixer)
        x = f.view(x, ((B,), (T,), (H,), (P,)))
        dt = f.add(dt, self.weight("dt_bias", H), "time step")
        dt = f.pointwise(dt, "time step", "softplus", saves="input")
        dt = f.clamp(dt, "time step")
        x = self._wide(x)
        b = self._repeated(mixer, b)
        c = self._repeated(mixer, c)
        skip = f.mul(f.view(self.weight("D", H), ((H,), ONE)), self._padded(x, Q), "D · x")
        x = f.mul(x, self._wide(f.view(dt, (*dt.dims, ONE))), "dt · x")
        A = f.mul(A, self._wide(dt), "dt · A")
        x, A, b, c = self._in_chunks((x, A, b, c), Q)
        A = f.permute(A, (0, 3, 1, 2))
        sums = aten.new("cumsum", "sums of dt · A", A.dims, FLOAT32, reads=(A,))
        decays = f.pointwise(self._segment_sum(A), "decays", "exp", saves="result")
        scores = self._einsum("bzqhn,bzshn->bzqsh", c, b, "C · B")
        masked = f.mul(scores, f.permute(decays, (0, 2, 3, 4, 1)), "C · B, decayed")
        inside = self._einsum("bzqsh,bzshp->bzqhp", masked, x, "scan inside chunks")
        last = aten.narrow(sums, 3, 1)
        left = f.pointwise(
            f.sub(last, sums, "decay of states"), "decay of states", "exp", saves="result"
        )
        spread = f.view(f.permute(left, (0, 2, 3, 1)), (*self._tokens_first(left), ONE))
        decayed = f.mul(b, spread, "B, decayed")
        states = self._einsum("bzqhn,bzqhp->bzhpn", decayed, x, "states of chunks")
        before = aten.narrow(states, 1, 1)
        before = aten.new("zeros_like", "first state", before.dims, FLOAT32)
        joined: Dims = ((B,), Q.ends, *states.dims[2:])
        states = aten.cat((before, states), 1, joined, "states of chunks")
        across = f.transpose(
            f.pointwise(
                self._segment_sum(self._ends(aten.select(sums, 3), Q)),
                "decays between chunks",
                "exp",
                saves="result",
            ),
            1,
            3,
        )
        new = self._einsum("bwzh,bwhpn->bzhpn", across, states, "states")
        states, final = aten.narrow(new, 1, 1), aten.select(new, 1)
        states = self._first_chunks(states, Q)
        grown = f.pointwise(sums, "decay of outputs", "exp", saves="result")
        read = self._einsum("bzqhn,bzhpn->bzqhp", c, states, "C · states")
        spread = f.view(f.permute(grown, (0, 2, 3, 1)), (*self._tokens_first(grown), ONE))
        between = f.mul(read, spread, "scan between chunks")
        out = f.contiguous(f.add(inside, between, "scan"), "scan")
        out = f.view(out, ((B,), Q.tokens, (H,), (P,)))
        out = f.add(out, skip, "scan")
        return aten.narrow(out, 1, T), final

    def _chunked(self, mixer: Mamba2) -> Chunked:
        size = mixer.chunk_size
        if not self.regime.fills(size + 1):
            return Chunked(count=ONE, ends=(2,), size=(size,))
        count = chunks(size)
        ends = Symbol(f"({count.name} + 1)", lambda d: count.of(d) + 1)
        return Chunked(count=(count,), ends=(ends,), size=(size,))

    def _repeated(self, mixer: Mamba2, x: Tensor) -> Tensor:
        """B or C in float32 and of every head (repeat_interleave): a copy in any case."""
        f, G, H, N = self.f, mixer.n_groups, mixer.num_heads, mixer.state_size
        wide = self._wide(f.view(x, ((B,), (T,), (G,), (N,))))
        dims: Dims = ((B,), (T,), (H,), (N,))
        across = is_channels_last(wide.sizes, wide.strides) or wide.strides[-1] != 1
        return self.aten.new(
            "clone",
            f"{x.name} of all heads",
            dims,
            FLOAT32,
            reads=(wide,),
            loop="across" if across else "strided",
        )

    def _padded(self, x: Tensor, Q: Chunked) -> Tensor:
        """pad_tensor_by_size: a copy, padded or not.

        at::constant_pad_nd takes the format that a tensor suggests, so that what looks like an
        image stays one; without padding it clones, and the copy lies as x does.
        """
        dims: Dims = (x.dims[0], Q.tokens, *x.dims[2:])
        sizes, strides, loop = self.aten.sizes(dims), None, ""
        if sizes == x.sizes:
            strides, loop = preserved(x.sizes, x.strides), "whole"
        elif len(sizes) == 4 and is_channels_last(x.sizes, x.strides):
            strides = channels_last(sizes)
        return self.aten.new(
            "constant_pad_nd",
            f"padded {x.name}",
            dims,
            FLOAT32,
            strides=strides,
            reads=(x,),
            loop=loop,
        )

    def _in_chunks(self, tensors: tuple[Tensor, ...], Q: Chunked) -> list[Tensor]:
        """reshape_into_chunks."""
        made = []
        for x in tensors:
            dims: Dims = (x.dims[0], Q.count, Q.size, *x.dims[2:])
            made.append(self.f.view(self._padded(x, Q), dims))
        return made

    def _tokens_first(self, x: Tensor) -> Dims:
        """[B, H, Z, Q] as [B, Z, Q, H]."""
        batch, heads, count, size = x.dims
        return (batch, count, size, heads)

    def _segment_sum(self, x: Tensor) -> Tensor:
        """segment_sum: [..., n] → [..., n, n]."""
        aten, n = self.aten, x.dims[-1]
        square: Dims = (n, n)
        dims: Dims = (*x.dims, n)
        mask = self._lower(square)
        x = self._filled(x, mask, dims)
        sums = aten.new("cumsum", "segment sums", dims, FLOAT32, reads=(x,), loop="down")
        mask = self._lower(square)
        return self._filled(sums, mask, dims)

    def _lower(self, square: Dims) -> Tensor:
        """torch.tril(torch.ones(n, n)) of bools."""
        ones = self.aten.new("ones", "mask", square, BOOL)
        return self.aten.new("tril", "mask", square, BOOL, reads=(ones,))

    def _filled(self, x: Tensor, mask: Tensor, dims: Dims) -> Tensor:
        """x.masked_fill(~mask, number): at::masked_fill copies x, then fills the copy in place."""
        aten, name = self.aten, "segment sums"
        turned = aten.elementwise("bitwise_not", "mask", mask)
        loop = "strided" if len(x.dims) < len(dims) else "whole"
        made = aten.new("masked_fill.Scalar", name, dims, FLOAT32, reads=(x,), loop=loop)
        moved = self._moved(made, made, turned)
        aten.tape.run(name, moved=moved, kernel="masked_fill_", loop="strided")
        return made

    def _ends(self, x: Tensor, Q: Chunked) -> Tensor:
        """F.pad(x, (1, 0)): a chunk more, before the first."""
        dims: Dims = (*x.dims[:-1], Q.ends)
        return self.aten.new("constant_pad_nd", "ends of chunks", dims, FLOAT32, reads=(x,))

    def _first_chunks(self, x: Tensor, Q: Chunked) -> Tensor:
        """new_states[:, :-1]: a state for every chunk."""
        x = x.detach()
        x.dims = (x.dims[0], Q.count, *x.dims[2:])
        x.sizes = self.aten.sizes(x.dims)
        return x

    def _einsum(self, equation: str, a: Tensor, b: Tensor, name: str) -> Tensor:
        """torch.einsum of two tensors as one bmm (ATen/native/Linear.cpp: sumproduct_pair).

        Labels of both and of the result make the pairs; of its other labels the first is the left
        factor's. What cannot be seen as matrices is copied; the result is a permuted view.
        """
        given, out = equation.split("->")
        left, right = given.split(",")
        one_sided = [x for x in out if (x in left) != (x in right)]
        if one_sided and one_sided[0] in right:
            a, b, left, right = b, a, right, left
        where = {x: (left.find(x), right.find(x)) for x in {*left, *right}}
        dims = {x: a.dims[i] if i >= 0 else b.dims[j] for x, (i, j) in where.items()}
        several = {
            x: tuple(at >= 0 and y.sizes[at] != 1 for y, at in zip((a, b), where[x], strict=True))
            for x in where
        }
        pairs = [x for x in out if several[x] == (True, True)]
        mine = [x for x in out if several[x] == (True, False)]
        others = [x for x in out if x not in pairs and x not in mine]
        summed = [x for x in dims if x not in out]

        def matrices(x: Tensor, labels: str, *groups: list[str]) -> Tensor:
            order = [label for group in groups for label in group if label in labels]
            rest = [label for label in labels if label not in order]
            seen = self.f.permute(x, [labels.index(label) for label in (*order, *rest)])
            flat = tuple(
                tuple(e for label in group for e in dims[label]) or ONE for group in groups
            )
            return self.f.view(seen, flat)

        rows = matrices(a, left, pairs, mine, summed)
        columns = matrices(b, right, pairs, summed, others)
        made = self.f.matmul(rows, columns, name, kernel="bmm")
        ordered = [*pairs, *mine, *others]
        made = self.f.view(made, tuple(dims[label] for label in ordered), name)
        return self.f.permute(made, [ordered.index(label) for label in out])

    # -- norm -------------------------------------------------------------------------------------

    def _gated_norm(self, mixer: Mamba2, x: Tensor, gate: Tensor) -> Tensor:
        """BambaRMSNormGated.forward: in groups, of what the gate lets through."""
        f, b, G, name = self.f, x.itemsize, mixer.n_groups, "gated norm"
        width, whole = mixer.intermediate_size, x.dims
        x = self._wide(x, f"{name}, float32")
        x = f.mul(x, f.pointwise(self._wide(gate), "gate", "silu", saves="input"), f"{name}, gated")
        groups = f.view(x, (*whole[:-1], (G,), (width // G,)))
        variance = self._mean_square(groups, name)
        groups = f.mul(
            groups,
            f.rsqrt(f.shift(variance, f"{name}, mean square"), f"{name}, 1 / rms"),
            f"{name}, normalised",
        )
        x = f.view(groups, whole)
        weight = self.weight("gated_norm.weight", width)
        return f.mul(weight, self.aten.cast(x, b, f"{name}, normalised"), name)
