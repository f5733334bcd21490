"""Attention in source: unscaled or scaled twice, masks in the wrong place or the wrong way."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from planner.checks.edges import found
from planner.checks.source.decoders import is_decoder
from planner.checks.source.flow import TRIANGLES, Flow, Source, root_factor
from planner.checks.source.syntax import MASK, called, dotted, keyword, number, text
from planner.checks.source.values import Event
from planner.findings import Finding

QUERY_WEIGHT = re.compile(r"(^|[._])(q|query|q_proj|wq|query_proj)\.weight(\.data)?$", re.I)


def attention_rules(source: Source) -> Iterator[Finding]:
    """What goes into softmax, what is done to its result, and whether a decoder masks."""
    for flow in source.flows:
        used = any(event.kind == "product" for event in flow.events)
        attends = any(event.kind == "softmax" for event in flow.events)  # not a pointer's scores
        for event in flow.events:
            match event.kind:
                case "softmax" if used:
                    yield from into_softmax(source, flow, event)
                case "added" if of_scores(event):
                    yield at(source, event, "mask-after-softmax", "is added to probabilities")
                case "filled":
                    yield from filled(source, event)
                case "inverted" if attends:
                    yield at(source, event, "mask-inverted", "hides the lower triangle: the past")
                case "shifted" if attends:
                    yield shifted(source, event)
                case "attention":
                    yield from fused(source, flow, event)


def at(source: Source, event: Event, edge: str, what: str, **more: str) -> Finding:
    """A finding at an event's line."""
    line = getattr(event.node, "lineno", 1)
    return found(
        edge,
        f"{text(event.node)}: {what}" if what else text(event.node),
        where=f"{source.file}:{line}",
        file=source.file,
        line=line,
        **more,  # type: ignore[arg-type]
    )


def into_softmax(source: Source, flow: Flow, event: Event) -> Iterator[Finding]:
    """Scores that reach softmax."""
    value = event.value
    if not value.has("scaled", "touched") and not scaled_elsewhere(source, flow):
        yield at(source, event, "attention-unscaled", "q·k goes into softmax as it is")
    if value.has("root-twice") and not value.has("touched"):
        yield at(source, event, "attention-scaled-twice", "multiplied by 1/√d twice")
    if value.has("zeroed") and not value.has("masked", "touched"):
        yield at(
            source, event, "mask-inverted", "scores were masked with 0, which softmax takes for one"
        )
    if not value.has("masked", "touched", "zeroed") and unmasked(source, flow, event):
        yield at(source, event, "decoder-without-mask", "no mask reaches these scores")


def shifted(source: Source, event: Event) -> Finding:
    """A causal mask whose edge is not the diagonal."""
    ahead = int(event.extra)
    if ahead < 0:
        return at(source, event, "self-masked", "the diagonal is hidden too: diagonal=1 with triu")
    seen = f"{ahead} ahead of the query not hidden"
    return at(source, event, "causal-leak", seen, title=f"The causal mask is {ahead} off")


def of_scores(event: Event) -> bool:
    """Whether the probabilities are those of q·k, or what is done to them is a triangle."""
    return event.value.has("of-scores") or event.other.has(*TRIANGLES)


def filled(source: Source, event: Event) -> Iterator[Finding]:
    """masked_fill on probabilities."""
    if event.extra == "hide" and of_scores(event):
        yield at(source, event, "mask-after-softmax", "writes -inf into probabilities")
    elif (
        event.extra == "zero" and event.value.has("of-scores") and not event.value.has("was-masked")
    ):
        masks = event.other.has("lower", "upper") or MASK.search(text(event.node, 300))
        if masks:
            yield at(
                source, event, "mask-after-softmax", "zeroes probabilities that still counted",
                severity="high",
            )  # fmt: skip


def fused(source: Source, flow: Flow, event: Event) -> Iterator[Finding]:
    """scaled_dot_product_attention."""
    node = event.node
    if not isinstance(node, ast.Call) or any(k.arg is None for k in node.keywords):
        return
    scale = keyword(node, "scale")
    either = event.value | event.other
    plain = number(scale) == 1 and not either.has("scaled", "touched")
    if plain and not scaled_elsewhere(source, flow):
        yield at(source, event, "attention-unscaled", "scale=1 and nothing else scales q·k")
    if scale is None and event.value.has("root-scaled") and not event.value.has("touched"):
        yield at(
            source, event, "attention-scaled-twice", "queries are scaled by hand, and again inside"
        )
    mask = keyword(node, "attn_mask") or (node.args[3] if len(node.args) > 3 else None)
    causal = keyword(node, "is_causal") or (node.args[5] if len(node.args) > 5 else None)
    if _none(mask) and _none(causal) and unmasked(source, flow, event):
        yield at(source, event, "decoder-without-mask", "neither attn_mask nor is_causal")


def _none(node: ast.expr | None) -> bool:
    return node is None or (isinstance(node, ast.Constant) and node.value in (None, False))


def unmasked(source: Source, flow: Flow, event: Event) -> bool:
    """Self-attention of a decoder whose function knows no mask at all."""
    if any(MASK.search(name) or "bias" in name for name in flow.parameters):
        return False
    for node in ast.walk(flow.function):
        if isinstance(node, ast.Attribute | ast.Name) and MASK.search(dotted(node)):
            return False
    shared = [tag for tag in event.value.tags if tag.startswith("from:")]
    same = bool(shared) or bool(event.value.origins & event.other.origins)
    return same and is_decoder(source, flow.owner)


def scaled_elsewhere(source: Source, flow: Flow) -> bool:
    """Whether a caller in the file scales, or the initialisation takes the scale's place (T5)."""
    name = flow.function.name
    for other in source.flows:
        for node in ast.walk(other.function):
            if not isinstance(node, ast.Call) or called(node) != name or other is flow:
                continue
            given = [*node.args, *(k.value for k in node.keywords)]
            if any(other.of(a).has("scaled", "touched") for a in given):
                return True
    for call in source.calls:
        if called(call) in ("normal_", "uniform_", "trunc_normal_") and root_factor(call):
            target = call.args[0] if call.args else None
            if isinstance(call.func, ast.Attribute) and not dotted(call.func).startswith(
                ("nn", "init")
            ):
                target = call.func.value
            if target is not None and QUERY_WEIGHT.search(dotted(target)):
                return True
    return False
