"""What every cache is: what each layer keeps of every token, appended to, and where each stands.

A layer keeps streams: keys and values (GQA), or one latent that is both (MLA). Recurrent layers
keep states of a fixed size instead, which they write in place. A pass is `begin` (how many tokens
come, of which sequences), an `append` in every layer that attends, `advance`.
Sequences of a batch may differ in length: then a pass brings T tokens of each, of which only the
first `tokens[b]` are real. The rest is padding behind them, which causality hides from the real
ones; no cache lets a later query see it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from attnlab.codec import Codec
from attnlab.masks import Keys, Pattern
from attnlab.states import new_states
from planner.errors import ConfigError, check_size
from planner.kv_formats import KvFormat
from planner.layers import GQA, MLA, Layer
from planner.mixers import Mixer
from planner.model import Model

# Shapes.  B batch · G kv heads · T new tokens · S keys · D width of a stream


class Stream(NamedTuple):
    """One tensor that a layer keeps of every token: [heads, width]."""

    heads: int
    width: int
    dtype: torch.dtype


def streams(attention: GQA | MLA | None, dtype: torch.dtype) -> list[Stream]:
    """Keys and values; of MLA the latent with the rotary key behind it; nothing without either."""
    match attention:
        case GQA(num_key_value_heads=G, head_dim=D):
            return [Stream(G, D, dtype), Stream(G, D, dtype)]
        case MLA(kv_lora_rank=d_c, qk_rope_head_dim=d_rope):
            return [Stream(1, d_c + d_rope, dtype)]
    return []


def attention_of(layer: Layer) -> GQA | MLA | None:
    """The attention of a layer that keeps tokens, wherever it stands."""
    return next((x for x in (layer.attention, layer.beside) if isinstance(x, GQA | MLA)), None)


class Cache(ABC):
    """What is kept of up to `capacity_tokens` tokens a sequence (None: no limit).

    `layers[index]`: a tensor for each stream; `states[index]`: a recurrent layer's, whole batch
    first, zeros before the first token; `cross[index]`: an encoder's keys and values [B, G, S, D],
    put there by cross-attention, and `cross_real`, bool [B, S], which of them are no padding (None:
    all are real). The dtype is the cache's own (states that are summed up stay in float32);
    attention converts what it reads. `form`: keys and values are kept as codes and scales
    (codec.py), which are streams themselves. `lengths` are the tokens held of each sequence. No
    gradient flows through a cache.
    """

    fixed_shapes = False
    """Whether lengths are known to the device alone."""

    def __init__(
        self,
        model: Model,
        *,
        batch: int,
        capacity_tokens: int | None,
        dtype: torch.dtype,
        device: torch.device | str,
        form: KvFormat | None = None,
    ) -> None:
        self.batch = check_size("batch", batch)
        if capacity_tokens is not None:
            check_size("capacity_tokens", capacity_tokens)
        if not dtype.is_floating_point:
            raise ConfigError(f"dtype={dtype} is not allowed for a cache: a floating-point dtype")
        self.capacity_tokens, self.dtype, self.device = capacity_tokens, dtype, torch.device(device)
        self.attentions = [attention_of(layer) for layer in model.layers]
        self.form = form
        self.codecs = [
            None if form is None or attention is None else Codec(form, attention)
            for attention in self.attentions
        ]
        self.streams = [
            streams(attention, dtype)
            if codec is None
            else [Stream(*s) for s in codec.streams(dtype)]
            for attention, codec in zip(self.attentions, self.codecs, strict=True)
        ]
        self.layers: list[list[Tensor]] = [[] for _ in model.layers]
        mixers = [
            next((x for x in (layer.attention, layer.beside) if isinstance(x, Mixer)), None)
            for layer in model.layers
        ]
        self.states = [new_states(mixer, batch, dtype, self.device) for mixer in mixers]
        self.cross: list[tuple[Tensor, Tensor] | None] = [None] * len(model.layers)
        self.cross_real: Tensor | None = None
        self.lengths = [0] * batch
        self.new_tokens = [0] * batch  # real tokens of the pass that is under way
        self.real: Tensor | None = None  # which those are, bool [B, T]; None: all of them
        self.T = 0

    @property
    def length(self) -> int:
        """Tokens held of the longest sequence."""
        return max(self.lengths)

    @property
    def ragged(self) -> bool:
        """Whether sequences differ in length, before or after the pass that is under way."""
        return len(set(self.lengths)) > 1 or any(n != self.T for n in self.new_tokens)

    @property
    def ends(self) -> list[int]:
        """Tokens of each sequence after the pass that is under way."""
        return [n + new for n, new in zip(self.lengths, self.new_tokens, strict=True)]

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept; tables that say what lies where are not in it."""
        held = [*self.layers, *self.states, *(pair for pair in self.cross if pair is not None)]
        return sum(t.nbytes for tensors in held for t in tensors)

    def begin(self, T: int, *, batch: int, tokens: Sequence[int] | None = None) -> Tensor:
        """A pass of T tokens begins; the positions of its queries, [T] or, if ragged, [B, T].

        `tokens`: how many of the T are real in each sequence; None: all. Raises ConfigError when
        they do not fit; nothing is changed then.
        """
        if batch != self.batch:
            raise ConfigError(f"ids have batch={batch}, the cache has batch={self.batch}")
        real = check_real_tokens(tokens, T=T, batch=batch)
        for held, new in zip(self.lengths, real, strict=True):
            if self.capacity_tokens is not None and held + new > self.capacity_tokens:
                raise ConfigError(
                    f"{held} cached + {new} new tokens = {held + new} do not fit "
                    f"capacity_tokens={self.capacity_tokens}"
                )
        self.T, self.new_tokens = T, real
        self.real = real_mask(real, T, self.device)
        if self.ragged:
            positions = self._starts()[:, None] + torch.arange(T, device=self.device)
        else:
            positions = torch.arange(self.length, self.length + T, device=self.device)
        self._prepare()
        return positions

    @abstractmethod
    def _prepare(self) -> None:
        """Work out what is the same in all layers of the pass; `advance` drops it."""

    @abstractmethod
    def keys(self, pattern: Pattern) -> Keys:
        """Where the keys stand that `append` returns in a layer of this pattern."""

    def append(self, index: int, *new_BGTD: Tensor) -> tuple[Tensor, ...]:
        """Keep the pass's streams in layer `index`; all to attend to, [B, G, S, D] each."""
        codec = self.codecs[index]
        if codec is None:
            return self._keep(index, *new_BGTD)
        return codec.decode(self._keep(index, *codec.encode(*new_BGTD)), new_BGTD[0].dtype)

    @abstractmethod
    def _keep(self, index: int, *new_BGTD: Tensor) -> tuple[Tensor, ...]:
        """`append` of what is stored, quantised or not."""

    def advance(self) -> None:
        """The pass ends: its real tokens count as held."""
        self.lengths = self.ends

    def reset(self) -> None:
        """Forget all tokens."""
        self.lengths = [0] * self.batch
        self.cross, self.cross_real = [None] * len(self.cross), None
        for state in (t for states in self.states for t in states):
            state.zero_()

    def _zeros(self, index: int, *shape: int) -> list[Tensor]:
        """A tensor of zeros for each stream of a layer; -2 and -1 stand for its heads and width.

        Streams that are alike lie in one piece of memory, behind one another.
        """
        made: list[Tensor] = []
        for stream, run in groupby(self.streams[index]):
            sizes = [{-2: stream.heads, -1: stream.width}.get(n, n) for n in shape]
            count = len(list(run))
            made += torch.zeros((count, *sizes), dtype=stream.dtype, device=self.device).unbind(0)
        return made

    def _starts(self) -> Tensor:
        return torch.tensor(self.lengths, device=self.device)

    def _real(self) -> tuple[Tensor, Tensor, Tensor]:
        """(sequence, place among the T, position) of each real token of the pass."""
        sequences = [b for b, n in enumerate(self.new_tokens) for _ in range(n)]
        places = [t for n in self.new_tokens for t in range(n)]
        positions = [self.lengths[b] + t for b, t in zip(sequences, places, strict=True)]
        b, t, p = torch.tensor([sequences, places, positions], device=self.device)
        return b, t, p


def zero_padding(x_BGTD: Tensor, real_BT: Tensor | None) -> Tensor:
    """Zeros behind the real tokens: a hidden key weighs nothing, and nothing times NaN is NaN.

    Padding that sees no key at all is NaN in every later layer.
    """
    return x_BGTD if real_BT is None else x_BGTD.masked_fill(~real_BT[:, None, :, None], 0)


def real_mask(tokens: Sequence[int], T: int, device: torch.device) -> Tensor | None:
    """Which of T places hold a sequence's first `tokens`, bool [B, T]; None: all of them."""
    if all(n == T for n in tokens):
        return None
    return torch.arange(T, device=device) < torch.tensor(tokens, device=device)[:, None]


def check_real_tokens(tokens: Sequence[int] | None, *, T: int, batch: int) -> list[int]:
    """How many of T tokens are real in each sequence; ConfigError for counts that cannot be."""
    if tokens is None:
        return [T] * batch
    real = [int(n) for n in tokens]
    if len(real) != batch or not all(0 <= n <= T for n in real) or not any(real):
        raise ConfigError(
            f"tokens={real} are not allowed: for each of batch={batch} a count from 0 to {T}, one "
            "at least above 0"
        )
    return real
