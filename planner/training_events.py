"""Training steps as a trace for torch's allocator: ids and labels, two steps, states in between.

The optimizer makes its states in its first step, when all gradients are there (torch/optim/adam.py,
_init_group). cuBLAS gives each thread a handle with a workspace of its own, and the backward has a
thread on a GPU.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator

from planner.allocator import Alloc, Event, Free
from planner.model import Model
from planner.module_order import module_order
from planner.pass_events import PassScript, script, workspace_events
from planner.program import Dims
from planner.runtimes.base import Setting
from planner.runtimes.writer import FLOAT32, INT64
from planner.trained.loss_scaling import HELD_BYTES
from planner.trained.optimizer_parts import is_hidden
from planner.trained.optimizers import states, stepped_bytes, trainable, trained
from planner.training import PLANNED
from planner.workload import Training

TRAINING_STEPS = 2


def training_events(
    model: Model, work: Training, setting: Setting, runtime: str, *, workspace_bytes: int
) -> Iterator[Event]:
    """What two steps ask for after the weights are there; without an optimizer a single one.

    Master weights are copied when the optimizer is made.
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
    made = _states(model, work, setting, runtime)
    for step in range(TRAINING_STEPS if work.optimizer else 1):
        inserted: dict[int, list[Event]] = {}
        if step == 0:
            inserted = workspace_events(played, workspace_bytes)
            if "optimizer step" in played.starts:
                inserted.setdefault(played.starts["optimizer step"], []).extend(made)
            if work.scales_loss(setting.dtype):
                scaler = [Alloc(("scaler", place), size) for place, size in enumerate(HELD_BYTES)]
                inserted.setdefault(played.starts["backward"], []).extend(scaler)
        yield from _step(played, phase.dims, step, inserted)


def _step(
    played: PassScript, dims: Dims, step: int, inserted: dict[int, list[Event]]
) -> Iterator[Event]:
    sizes, buffers = played.sizes(dims), played.buffers
    for index, (makes, slot) in enumerate(played.steps):
        yield from inserted.get(index, ())
        name: Hashable = (step, slot)
        if size := sizes[buffers[slot]]:  # torch asks for nothing where nothing is held
            yield Alloc(name, size, buffers[slot].stream) if makes else Free(name)


def _states(model: Model, work: Training, setting: Setting, runtime: str) -> list[Event]:
    """What the first step makes for each parameter; Muon's before those of its AdamW."""
    b = stepped_bytes(work, setting.dtype, setting.sharding)
    parameters = module_order(trained(model, work, setting.sharding), model, runtime=runtime)
    if work.optimizer == "muon":
        parameters.sort(key=lambda p: not is_hidden(p.shape, p.layer))
    return [
        Alloc(("state", number, place), size)
        for number, p in enumerate(parameters)
        for place, (_, size) in enumerate(states(p, work, b, setting.device))
    ]
