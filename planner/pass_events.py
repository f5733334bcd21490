"""Programs as traces: what one pass after another asks of the allocator.

A program says which buffers live when; here every one of them gets an identity, the caches of one
pass are those of the next, and what a pass leaves behind (the logits) is dropped once the next
token's ids are made, as a greedy loop does.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Hashable, Set
from dataclasses import dataclass
from itertools import chain

from planner.allocator import Alloc, Event, Free
from planner.program import FORWARD, OPENING, OPTIMIZER_STEP, Buffer, Dims, Program
from planner.runtimes.writer import INT64

BIASED = "addmm"
"""The product with a bias, which torch has cuBLASLt do."""

LT_WORKSPACE_BYTES = 2**20
"""ATen/cuda/CUDABlas.cpp, CUBLASLT_WORKSPACE_SIZE; seen on an H200 (profiles/data/overheads)."""


@dataclass(frozen=True, slots=True)
class PassScript:
    """The allocations of a program in order, every instance of a buffer a slot of its own.

    `buffers` are what the slots hold, `distinct` each of them once. `steps` are (made, slot) or
    (freed, slot). `found` are the slots that the pass before left; `caches` those that live on, in
    order; `left` what is dropped. `starts` has the step that each phase begins with, `labels` that
    of each kind of segment in a phase; before step
    `gemms[phase]` its first matrix product runs, before `biased_gemms[phase]` the first with a
    bias: what they take, they take behind their output.
    """

    buffers: tuple[Buffer, ...]
    distinct: frozenset[Buffer]
    steps: tuple[tuple[bool, int], ...]
    found: tuple[int, ...]
    caches: tuple[int, ...]
    left: tuple[int, ...]
    starts: dict[str, int]
    labels: dict[tuple[str, str], int]
    gemms: dict[str, int]
    biased_gemms: dict[str, int]

    def sizes(self, dims: Dims) -> dict[Buffer, int]:
        """Bytes of every buffer."""
        return {buffer: buffer.nbytes(dims) for buffer in self.distinct}


def script(program: Program, *, continues: bool) -> PassScript:
    """Write a program down for repeated playing; `continues`: a pass before it left the caches.

    Of several instances of one buffer the oldest is freed first: a layer's input, the cache of the
    first layer that still has its old one. What another phase made goes in reverse: the backward
    comes through the layers the other way, and the optimizer back again.
    """
    buffers: list[Buffer] = []
    steps: list[tuple[bool, int]] = []
    found: list[int] = []
    alive: dict[Buffer, deque[int]] = defaultdict(deque)
    born: dict[Buffer, str] = {}
    starts: dict[str, int] = {}
    labels: dict[tuple[str, str], int] = {}
    gemms: dict[str, int] = {}
    biased: dict[str, int] = {}
    for segment in program.segments:
        phase = segment.phase
        starts.setdefault(phase, len(steps))
        labels.setdefault((phase, segment.label), len(steps))
        opening = continues and segment.label.startswith(OPENING)
        for op in chain.from_iterable([segment.ops] * segment.count):
            for buffer in op.allocates:
                slot = len(buffers)
                buffers.append(buffer)
                alive[buffer].append(slot)
                born[buffer] = phase
                if opening:
                    found.append(slot)
                else:
                    steps.append((True, slot))
            if op.flops is not None:
                gemms.setdefault(phase, len(steps))
            if op.kernel == BIASED:
                biased.setdefault(phase, len(steps))
            for buffer in op.frees:
                same = born[buffer] == phase
                steps.append((False, alive[buffer].popleft() if same else alive[buffer].pop()))
    living = sorted(slot for slots in alive.values() for slot in slots)
    kept = {slot for slot in living if buffers[slot].cache} | set(found)
    opened = _opened(program)

    def lasting(slot: int) -> bool:
        """What is made anew in every pass comes first, each in the order of the layers."""
        return buffers[slot].lasting

    return PassScript(
        buffers=tuple(buffers),
        distinct=frozenset(buffers),
        steps=tuple(steps),
        found=tuple(sorted(found, key=lasting)),
        caches=tuple(sorted((s for s in living if s in kept or buffers[s] in opened), key=lasting)),
        left=tuple(slot for slot in living if slot not in kept and buffers[slot] not in opened),
        starts=starts,
        labels=labels,
        gemms=gemms,
        biased_gemms=biased,
    )


def _opened(program: Program) -> set[Buffer]:
    """What the next pass finds besides keys and values: a layer's window size, encoder states."""
    return {
        buffer
        for segment in program.segments
        for op in segment.ops
        for buffer in op.allocates
        if buffer.lasting or segment.label.startswith(OPENING)
    }


def workspace_events(
    script: PassScript, workspace_bytes: int, there: Set[Hashable] = frozenset()
) -> dict[int, list[Event]]:
    """Before which step cuBLAS and cuBLASLt have torch allocate a workspace; none where none is.

    Each thread has its own, and the way back has a thread, an optimizer that multiplies none: the
    ids are (library, phase). `there`: those that a pass before this one made.
    """
    found: dict[int, list[Event]] = defaultdict(list)
    if not workspace_bytes:
        return found
    for name, size, places in (
        ("cuBLAS", workspace_bytes, script.gemms),
        ("cuBLASLt", LT_WORKSPACE_BYTES, script.biased_gemms),
    ):
        for phase, place in places.items():
            if phase == OPTIMIZER_STEP and FORWARD in places:
                continue
            if (name, phase) not in there:
                found[place].append(Alloc((name, phase), size))
    return found


class PassWriter:
    """Turns scripts into events, one pass after another."""

    def __init__(self, *, batch: int, prompt_tokens: int, workspace_bytes: int) -> None:
        self._batch = batch
        self._workspace_bytes, self._workspaces = workspace_bytes, set[Hashable]()
        self._caches: list[tuple[bool, Hashable]] = []
        self._made = 0
        self.token: Hashable = None  # the id of the last token's ids
        self.opening: list[Event] = [Alloc("prompt", INT64 * batch * prompt_tokens)]

    def write(self, script: PassScript, dims: Dims) -> list[Event]:
        """The pass, its greedy token, the end of what it left."""
        sizes = script.sizes(dims)
        names = self._named(script)
        events: list[Event] = []
        workspaces = workspace_events(script, self._workspace_bytes, self._workspaces)
        self._workspaces |= {
            e.id for made in workspaces.values() for e in made if isinstance(e, Alloc)
        }
        for index, (makes, slot) in enumerate(script.steps):
            events += workspaces.get(index, ())
            size = sizes[script.buffers[slot]]
            if size:  # torch asks for nothing where nothing is held
                events.append(Alloc(names[slot], size) if makes else Free(names[slot]))
        token = ("token", self._made)
        events.append(Alloc(token, INT64 * self._batch))
        events += [Free(names[slot]) for slot in script.left]
        if self.token is not None:
            events.append(Free(self.token))
        self.token = token
        return events

    def write_only(self, script: PassScript, dims: Dims, only: frozenset[Buffer]) -> list[Event]:
        """What some buffers do in a pass: those of one pool, where the other one is at rest."""
        sizes = script.sizes(dims)
        names = self._named(script)
        buffers = script.buffers
        events: list[Event] = [
            Alloc(names[slot], sizes[buffers[slot]]) if makes else Free(names[slot])
            for makes, slot in script.steps
            if buffers[slot] in only and sizes[buffers[slot]]
        ]
        return events + [Free(names[slot]) for slot in script.left if buffers[slot] in only]

    @property
    def cache_names(self) -> list[Hashable]:
        """The ids of what the last pass left for the next one."""
        return [name for _, name in self._caches]

    def _named(self, script: PassScript) -> list[Hashable]:
        """An id for every slot: what it was called where it was found, else a new number."""
        start = self._made
        self._made += len(script.buffers)
        names: list[Hashable] = list(range(start, self._made))
        for cache in (True, False):
            slots = [slot for slot in script.found if script.buffers[slot].cache == cache]
            before = [name for is_cache, name in self._caches if is_cache == cache]
            for slot, name in zip(slots, before, strict=True):
                names[slot] = name
        self._caches = [(script.buffers[slot].cache, names[slot]) for slot in script.caches]
        return names
