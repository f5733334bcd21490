"""What peft does on the device when it puts DoRA's magnitudes beside weights that are there.

m = ‖W + s·B·A‖ of every adapted layer, in the weights' dtype (peft 0.21, tuners/lora/dora.py,
update_layer). B·A is the first product of the process: cuBLAS has torch make its workspace then,
not in the first step, in whatever lies cached at that moment. There it stays.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from math import prod

from planner.allocator import Alloc, EmptyCache, Event, Free
from planner.dtypes import element_bytes
from planner.model import Model
from planner.module_order import module_order
from planner.trained.lora import adapted, module_of
from planner.workload import LoRA, Training

WORKSPACE = ("cuBLAS", "forward")
"""The id that a training step gives to it where the step makes it."""


def makes_magnitudes(model: Model, work: object, workspace_bytes: int) -> bool:
    """Whether it is planned: with cuBLAS, of weights that are not quantised."""
    if not isinstance(work, Training) or work.adapters is None or model.quantization is not None:
        return False
    return work.adapters.dora and workspace_bytes > 0


def magnitude_events(
    model: Model, lora: LoRA, *, dtype: str, runtime: str, workspace_bytes: int, from_config: bool
) -> Iterator[Event]:
    """B·A, s·B·A and their sum with W, layer by layer; the magnitudes themselves are adapters.

    `from_config`: the class was built on the device, so a head was made there that went when it was
    tied, and what is cached is given back before the first step, as before those of the records.
    """
    b = element_bytes(dtype)
    if from_config and model.tie_word_embeddings and model.lm_head:
        head = "head that is tied"
        yield Alloc(head, b * model.vocab_size * (model.embedding_size or model.hidden_size))
        yield Free(head)
    modules, first = adapted(model, lora), True
    for p in module_order(model.parameters(), model, runtime=runtime):
        if not p.linear or module_of(p) not in modules:
            continue
        size = b * prod(p.shape)
        names: list[Hashable] = [(what, p) for what in ("B · A", "s · B · A", "W + s · B · A")]
        product, scaled, whole = names
        yield Alloc(product, size)
        if first:
            yield Alloc(WORKSPACE, workspace_bytes)
        first = False
        yield from (Alloc(scaled, size), Alloc(whole, size), Free(scaled), Free(whole))
        yield Free(product)
    if from_config:
        yield EmptyCache()
