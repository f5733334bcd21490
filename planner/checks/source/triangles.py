"""Causal masks as triangles: which side is true, and where its edge lies.

"upper" with "at:k" is true where key − query ≥ k, "lower" with "at:k" where key − query ≤ k. A mask
that hides is right as upper at 1, one that keeps as lower at 0.
"""

from __future__ import annotations

import ast

from planner.checks.source.syntax import keyword, number, on_module

SIDES = ("lower", "upper")


def edge_tag(node: ast.Call) -> list[str]:
    """["at:k"] of torch.triu(x, diagonal=k); empty where k is computed."""
    given = keyword(node, "diagonal")
    if given is None:
        rest = node.args[1:] if on_module(node) else node.args
        given = rest[0] if rest else None
    if given is None:
        return ["at:0"]
    k = number(given)
    return [] if k is None or k != int(k) else [f"at:{int(k)}"]


def edge_of(tags: frozenset[str]) -> int | None:
    """k, where there is one and no more."""
    edges = [tag for tag in tags if tag.startswith("at:")]
    return int(edges[0][3:]) if len(edges) == 1 else None


def changed(tags: frozenset[str], *, negated: bool) -> frozenset[str]:
    """Tags of the mask negated, or turned by a transposition."""
    side = [s for s in SIDES if s in tags]
    k = edge_of(tags)
    kept = {t for t in tags if t not in SIDES and not t.startswith("at:")}
    if len(side) != 1:
        return frozenset(kept | set(side))
    (was,) = side
    kept.add("upper" if was == "lower" else "lower")
    if k is not None:
        moved = -k if not negated else k + 1 if was == "lower" else k - 1
        kept.add(f"at:{moved}")
    return frozenset(kept)


def off_by(tags: frozenset[str], *, hides: bool) -> int:
    """How many keys ahead of the query are left visible; −1: the query itself is hidden too.

    Larger offsets to that side are bands, not mistakes; 0 where it is right or not known.
    """
    k = edge_of(tags)
    if k is None or ("upper" if hides else "lower") not in tags:
        return 0
    ahead = k - 1 if hides else k
    return ahead if ahead >= -1 else 0
