"""fp16's range, and outputs that depend on the batch."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import nn

from attnlab.probes.quiet import mode
from attnlab.probes.subject import Probed
from attnlab.probes.watch import watch
from planner.checks.edges import found
from planner.findings import Finding

FP16_MAX = 65_504.0
MOST_PARAMETERS = 50_000_000
NEAR = 8


def fp16_hazards(probed: Probed) -> Iterator[Finding]:
    """The largest scores against fp16's 65 504, and a copy of the module run in fp16.

    Scores are taken before softmax and, where they can be followed, before they are scaled. It can
    miss values that training makes, other inputs' values, overflow in gradients, and modules of
    over 50 million parameters, which are not copied, or whose operations lack fp16 on this device.
    """
    inputs = probed.draw(2, probed.tokens, seed=12)
    with mode(probed.module, training=False):
        out, attentions = watch(probed, inputs)
        if not out.isfinite().all():
            return
        largest, layer = 0.0, 0
        for index, attention in enumerate(attentions):
            seen = attention.scores[attention.scores > -1e4].double().abs()
            most = float(seen.max()) if seen.numel() else 0.0
            if attention.origin is not None and attention.origin.after:
                most = max(most, most / abs(attention.origin.after))
            if most > largest:
                largest, layer = most, index
        if largest > FP16_MAX / NEAR:
            yield found(
                "fp16-overflow",
                f"q·k reaches {largest:,.0f} in attention {layer}, fp16 ends at 65 504",
                where=f"attention {layer}",
                severity="high" if largest > FP16_MAX else "medium",
            )
            return
        if overflows(probed, inputs):
            yield found(
                "fp16-overflow",
                "a copy in fp16 gives NaN or inf where the module itself does not",
                severity="high",
            )


def overflows(probed: Probed, inputs: torch.Tensor) -> bool:
    """Whether a copy of the module in fp16 is not finite, or says that a number does not fit."""
    from dataclasses import replace

    if probed.dtype is torch.float16:
        return False
    if sum(p.numel() for p in probed.module.parameters()) > MOST_PARAMETERS:
        return False
    try:
        half: nn.Module = copy.deepcopy(probed.module).half()
        if hasattr(half, "dtype") and isinstance(vars(half).get("dtype"), torch.dtype):
            half.dtype = torch.float16  # type: ignore[assignment]
        given = inputs.half() if inputs.is_floating_point() else inputs
        out = replace(probed, module=half).outputs(given)
    except RuntimeError as error:
        return "without overflow" in str(error)
    except Exception:  # not to be copied, or run in fp16
        return False
    return not bool(out.isfinite().all())


def batch_dependence(probed: Probed) -> Iterator[Finding]:
    """The same sequence alone, beside others, and in another row of the batch.

    In eval mode. It can miss what only larger batches do (expert capacity that is not reached with
    four sequences of 23 tokens) and differences within rounding (1e-5 of the largest output).
    """
    with mode(probed.module, training=False):
        inputs = probed.draw(4, probed.tokens, seed=13)
        together, alone = probed.outputs(inputs), probed.outputs(inputs[:1])
        swapped = probed.outputs(inputs.flip(0))[-1:]
        neighbours = inputs.clone()
        neighbours[1:] = probed.draw(4, probed.tokens, seed=14)[1:]
        beside = probed.outputs(neighbours)[:1]
    scale = float(alone.abs().max().clamp_min(1e-30))
    for how, other in (
        ("beside three others", together[:1]),
        ("beside other neighbours", beside),
        ("in the last row", swapped),
    ):
        moved = float((other.double() - alone.double()).abs().max()) / scale
        if moved > 10 * probed.tolerance:
            yield found(
                "batch-dependence",
                f"a sequence {how} moves by {moved:.2g} of the largest output against itself alone",
            )
            return
