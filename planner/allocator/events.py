"""What happens to an allocator, in order: a trace is any iterable of these.

Named tuples and not dataclasses: a trace has up to millions of them, and a tuple is made several
times faster. `id` is any hashable that names a storage while it lives; it may be used again after
its Free. `stream` is a number, 0 the default stream.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple, TypeAlias


class Alloc(NamedTuple):
    """A storage of `size_bytes` is made. 0 bytes take no block, as in torch."""

    id: Hashable
    size_bytes: int
    stream: int = 0


class Free(NamedTuple):
    """The last reference to a storage goes."""

    id: Hashable


class RecordStream(NamedTuple):
    """`Tensor.record_stream`: another stream uses the storage.

    Its block, once freed, waits for the next Synchronize before it can be used again.
    """

    id: Hashable
    stream: int


class Synchronize(NamedTuple):
    """The moment at which all streams have finished what was freed so far."""


class EmptyCache(NamedTuple):
    """`torch.cuda.empty_cache()`: segments without a live block go back to the device."""


class Mark(NamedTuple):
    """A phase begins: its usage is noted and its peaks are counted from here on."""

    name: str


class BeginPool(NamedTuple):
    """From here on a private pool serves all allocations, as while a CUDA graph is captured."""

    pool: Hashable


class EndPool(NamedTuple):
    """The capture ends: the shared pools serve again. The private pool keeps its segments."""


class ReleasePool(NamedTuple):
    """The graph is destroyed: from here on empty_cache and retries may return its segments."""

    pool: Hashable


Event: TypeAlias = (
    Alloc
    | Free
    | RecordStream
    | Synchronize
    | EmptyCache
    | Mark
    | BeginPool
    | EndPool
    | ReleasePool
)
