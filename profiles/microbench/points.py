"""The named list of points, most useful first: a run cut short has still seen every family.

Ceilings, host cost and the graph floor come first: they are few and every estimate needs them. The
other families are then dealt out evenly, each in an order that visits its far corners early, so
that any prefix is spread over all of them. What heats the device comes last. The splits are part of
the points and were written down before anything was measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain

from planner import ConfigError
from planner.errors import check_choice
from profiles.microbench import attention_points as attention
from profiles.microbench import gemm_points as gemm
from profiles.microbench import half_points as half
from profiles.microbench import mixture_points as mixture
from profiles.microbench import other_points as other
from profiles.microbench import scan_points as scan
from profiles.microbench.point import FAMILIES, OpPoint

REPEATED = 12
"""So many of the first interleaved points are measured again when everything else is done."""


def points(device: str, families: Iterable[str] = ()) -> list[OpPoint]:
    """The list for "cuda" or "cpu", in the order it is run; `families` picks some of them."""
    chosen = [check_choice("family", family, FAMILIES) for family in families] or list(FAMILIES)
    if device == "cpu":
        last: Iterator[OpPoint] = iter(())
        first: list[Iterator[OpPoint]] = [
            other.cpu_ceiling_points(),
            other.host_points(ops=other.CPU_HOST_OPS, dtype="fp32"),
        ]
        rest = [
            gemm.cpu_gemm_points(),
            attention.cpu_prefill_points(),
            attention.cpu_decode_points(),
            other.cpu_bandwidth_points(),
            other.cpu_backward_points(),
            other.optimizer_points(largest=2**20, dtype="fp32"),
        ]
    else:
        last = chain(other.sustained_points(), half.half_sustained_points())
        first = [
            other.ceiling_points(),
            half.half_ceiling_points(),
            other.graph_points(),
            other.unlike_graph_points(),
            other.host_points(),
        ]
        rest = [
            gemm.gemm_points(),
            attention.prefill_points(),
            attention.decode_points(),
            attention.masked_points(),
            other.bandwidth_points(),
            other.routing_points(),
            other.strided_points(),
            other.cat_points(),
            other.backward_points(),
            gemm.moe_points(),
            attention.masked_backward_points(),
            half.half_gemm_points(),
            half.bias_points(),
            half.fp32_gemm_points(),
            half.half_attention_points(),
            half.half_byte_points(),
            scan.scan_points(),
            scan.whole_scan_points(),
            mixture.few_rows_points(),
            mixture.dealing_points(),
            mixture.whole_mixture_points(),
            mixture.router_points(),
            mixture.latent_points(),
            other.optimizer_points(),
            other.allocator_points(),
        ]
    leading = [p for family in first for p in family if p.family in chosen]
    spread = [[p for p in family if p.family in chosen] for family in rest]
    following = _once(_deal([_far_first(family) for family in spread]))
    found = [*leading, *following, *(p for p in last if p.family in chosen)]
    if not found:
        raise ConfigError(f"family={', '.join(chosen)} has no points on a {device}")
    return [*found, *(replace(point, repeat=1) for point in following[:REPEATED])]


def _once(items: Iterable[OpPoint]) -> list[OpPoint]:
    """Each key once: sizes that are rounded to whole rows can coincide."""
    return list({point.key: point for point in items}.values())


def _far_first(items: Sequence[OpPoint]) -> list[OpPoint]:
    """First every eighth or so, then between them: strides that halve, as a binary search goes."""
    order: list[OpPoint] = []
    seen: set[int] = set()
    stride = 1
    while stride * 2 < len(items):
        stride *= 2
    while stride:
        for index in range(0, len(items), stride):
            if index not in seen:
                seen.add(index)
                order.append(items[index])
        stride //= 2
    return order


def _deal(families: Sequence[Sequence[OpPoint]]) -> Iterator[OpPoint]:
    """One list out of many: each gives its points at an even rate, all end together."""
    places = [
        ((index + 0.5) / len(family), number, point)
        for number, family in enumerate(families)
        for index, point in enumerate(family)
    ]
    for _, _, point in sorted(places, key=lambda place: place[:2]):
        yield point
