"""norm(x + f(x)) in a decoder's block."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from planner.checks.edges import found
from planner.checks.source.decoders import DECODER, ENCODER, generates
from planner.checks.source.flow import Source
from planner.checks.source.syntax import FUNCTIONS, dotted, text
from planner.findings import Finding

NORM = re.compile(r"norm|(^|[._])ln(_?\d|_?[a-z]+)?$", re.I)


def post_norm(source: Source) -> Iterator[Finding]:
    """Once for each class: x = norm(x + f(x)), in one line or in two."""
    if not generates(source):
        return
    both_ways = any(ENCODER.search(c.name) for c in source.classes)
    for owner in source.classes:
        if ENCODER.search(owner.name) or (both_ways and not DECODER.search(owner.name)):
            continue
        for function in owner.body:
            if isinstance(function, FUNCTIONS) and function.name == "forward":
                node = first_post_norm(function.body)
                if node is not None:
                    yield found(
                        "post-norm-deep",
                        f"{text(node)} in {owner.name}",
                        severity="medium",
                        title="Norm after the residual in a decoder",
                        where=f"{source.file}:{node.lineno}",
                        file=source.file,
                        line=node.lineno,
                    )


def first_post_norm(body: list[ast.stmt]) -> ast.Assign | None:
    """The statement that norms a sum with the residual and goes on with it."""
    assigns = [s for s in body if isinstance(s, ast.Assign) and len(s.targets) == 1]
    for i, statement in enumerate(assigns):
        made = normed(statement.value)
        if made is None:
            continue
        name = dotted(statement.targets[0])
        summed = made
        if isinstance(made, ast.Name):  # h = x + f(x); h = norm(h)
            before = next(
                (a for a in reversed(assigns[:i]) if dotted(a.targets[0]) == made.id), None
            )
            if before is None or assigns.index(before) != i - 1 or made.id != name:
                continue
            summed = before.value
        if not is_residual(summed):
            continue
        after = assigns[i + 1 :]
        goes_on = any(_reads_direct(a.value, name) for a in after)
        if not isinstance(made, ast.Name) or goes_on:
            return statement
    return None


def normed(node: ast.expr) -> ast.expr | None:
    """What a norm module is called on."""
    if isinstance(node, ast.Call) and len(node.args) == 1 and NORM.search(dotted(node.func)):
        return node.args[0]
    return None


def is_residual(node: ast.expr) -> bool:
    """x + f(x), x + h, residual + h: a sum of a name and something made of a sublayer."""
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Add):
        return False
    sides = (node.left, node.right)
    names = [dotted(side) for side in sides if isinstance(side, ast.Name | ast.Attribute)]
    calls = [side for side in sides if isinstance(side, ast.Call)]
    embeds = any("emb" in text(side).lower() or "pos" in text(side).lower() for side in sides)
    return bool(names) and (bool(calls) or len(names) == 2) and not embeds


def _reads_direct(node: ast.expr, name: str) -> bool:
    """Whether a value is taken on as a residual: `residual = x`, or `x + …`."""
    if isinstance(node, ast.Name):
        return node.id == name
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return any(isinstance(s, ast.Name) and s.id == name for s in (node.left, node.right))
    made = normed(node)
    return made is not None and _reads_direct(made, name)
