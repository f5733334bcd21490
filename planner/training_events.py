"""Training steps as a trace for torch's allocator: ids and labels, two steps, states in between.

The optimizer makes its states in its first step, when all gradients are there (torch/optim/adam.py,
_init_group), those of master weights' copies included; Muon's stand before those of its AdamW,
whose step is a second one. cuBLAS gives each thread a handle with a workspace of its own, and the
backward has a thread on a GPU. Of several batches a step whose gradients add up the first and the
last are played: the first makes the gradients that the others find.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Set
from dataclasses import replace

from planner.allocator import Alloc, Event, Free
from planner.autograd.master_weights import IN_FLOAT32
from planner.model import Model
from planner.module_order import module_order
from planner.pass_events import PassScript, script, workspace_events
from planner.program import BACKWARD, FORWARD, OPTIMIZER_STEP, Dims, Program
from planner.runtimes.base import Setting
from planner.runtimes.writer import FLOAT32, INT64
from planner.trained.loss_scaling import HELD_BYTES
from planner.trained.optimizer_parts import is_hidden
from planner.trained.optimizers import states, stepped_bytes, trainable, trained
from planner.training import PLANNED
from planner.workload import Training

TRAINING_STEPS = 2


def training_events(
    model: Model,
    work: Training,
    setting: Setting,
    runtime: str,
    *,
    workspace_bytes: int,
    there: Set[Hashable] = frozenset(),
) -> Iterator[Event]:
    """What two steps ask for after the weights are there; without an optimizer a single one.

    Master weights are copied when the optimizer is made. `there`: workspaces that were made before.
    """
    if work.steps_copies:
        copied = module_order(trainable(model, work), model, runtime=runtime)
        yield from (Alloc(("master", i), p.count * FLOAT32) for i, p in enumerate(copied))
    read = work.sequence_tokens
    if model.is_seq2seq:
        read = model.encoder_length(work.encoder_tokens, read)
    for name, tokens in (("token ids", read), ("labels", work.sequence_tokens)):
        yield Alloc(name, INT64 * work.batch * tokens)
    phase = PLANNED[runtime](model, work, setting)
    played = script(phase.program, continues=False)
    several = work.accumulation_steps > 1
    first = _without_optimizer(model, work, setting, runtime) if several else None
    for step in range(TRAINING_STEPS if work.optimizer else 1):
        inserted: dict[int, list[Event]] = {}
        begun = inserted
        if step == 0:
            begun = workspace_events(played if first is None else first, workspace_bytes, there)
            if work.scales_loss(setting.dtype):
                scaler = [Alloc(("scaler", place), size) for place, size in enumerate(HELD_BYTES)]
                where = played if first is None else first
                begun.setdefault(where.starts[BACKWARD], []).extend(scaler)
            inserted = begun if first is None else inserted
            for place, made in _states(model, work, setting, runtime, played):
                inserted.setdefault(place, []).extend(made)
        if first is None:
            yield from _step(played, phase.dims, step, inserted)
            continue
        found = Found()
        yield from _step(first, phase.dims, (step, "first"), begun, left=found)
        yield from _step(played, phase.dims, step, inserted, found=found)


class Found:
    """Gradients that a batch leaves to the next, by their size: they all go together."""

    def __init__(self) -> None:
        self._by_size: dict[int, list[Hashable]] = defaultdict(list)

    def put(self, size: int, name: Hashable) -> None:
        """One that is there."""
        self._by_size[size].append(name)

    def take(self, size: int) -> Hashable | None:
        """One of this size; None where there is none."""
        names = self._by_size.get(size)
        return names.pop() if names else None


def _without_optimizer(model: Model, work: Training, setting: Setting, runtime: str) -> PassScript:
    """The first of several batches: forward and backward, which make the gradients."""
    alone = replace(work, accumulation_steps=1)
    whole = PLANNED[runtime](model, alone, setting).program
    segments = tuple(s for s in whole.segments if s.phase != OPTIMIZER_STEP)
    return script(Program(name=whole.name, segments=segments), continues=False)


def _step(
    played: PassScript,
    dims: Dims,
    step: Hashable,
    inserted: dict[int, list[Event]],
    *,
    left: Found | None = None,
    found: Found | None = None,
) -> Iterator[Event]:
    """One batch, and the optimizer where it is the last; `left` takes the gradients that stay, all
    else goes; `found`: those that are there.
    """
    sizes, buffers = played.sizes(dims), played.buffers
    opened = played.starts.get(FORWARD, 0)
    there: dict[int, Hashable] = {}
    held: dict[int, None] = {}
    for index, (makes, slot) in enumerate(played.steps):
        yield from inserted.get(index, ())
        size = sizes[buffers[slot]]
        if not size:  # torch asks for nothing where nothing is held
            continue
        if makes and found is not None and index < opened:
            name = found.take(size)
            if name is not None:
                there[slot] = name
                continue
        if makes:
            held[slot] = None
            yield Alloc((step, slot), size, buffers[slot].stream)
        else:
            held.pop(slot, None)
            yield Free(there.pop(slot, (step, slot)))
    for slot in held if left is not None else ():
        if left is not None and buffers[slot].gradient:
            left.put(sizes[buffers[slot]], (step, slot))
        else:
            yield Free((step, slot))


def _states(
    model: Model, work: Training, setting: Setting, runtime: str, played: PassScript
) -> Iterator[tuple[int, list[Event]]]:
    """What the first step makes for each parameter, and before which of the script's steps."""
    places = [place for (phase, label), place in played.labels.items() if _steps(phase, label)]
    if not places:
        return
    b = stepped_bytes(work, setting.dtype, setting.sharding)
    parameters = module_order(trained(model, work, setting.sharding), model, runtime=runtime)
    hidden = [p for p in parameters if work.optimizer == "muon" and is_hidden(p.shape, p.layer)]
    own = set(hidden)
    adamw = [
        place
        for (phase, label), place in played.labels.items()
        if _steps(phase, label) and not label.startswith("Muon")
    ]
    others = [p for p in parameters if p not in own]
    for place, group in ((min(places), hidden), (min(adamw, default=min(places)), others)):
        yield (
            place,
            [
                Alloc(("state", p, number), size)
                for p in group
                for number, (_, size) in enumerate(states(p, work, b, setting.device))
            ],
        )


def _steps(phase: str, label: str) -> bool:
    """Whether the optimizer is at work: copies have their gradients by then."""
    return phase == OPTIMIZER_STEP and not label.startswith(IN_FLOAT32)
