"""Tables of learned positions that are indexed past their end."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from planner.checks.edges import found
from planner.checks.source.flow import Source
from planner.checks.source.syntax import called, dotted, keyword, number, text
from planner.findings import Finding

POSITIONS = re.compile(r"pos|wpe", re.I)
LENGTH = re.compile(r"len|size|max|block|ctx|context")
BOUNDED = re.compile(r"clamp|clip|min|remainder|fmod|interpolate")


def position_tables(source: Source) -> Iterator[Finding]:
    """A table under self that is looked up by arange(length): nothing bounds it, or an offset."""
    for owner in source.classes:
        tables = dict(position_embeddings(owner))
        if not tables:
            continue
        bounded = bounds_length(owner)
        for function in ast.walk(owner):
            if not isinstance(function, ast.FunctionDef) or function.name == "__init__":
                continue
            yield from lookups(source, function, tables, bounded)


def position_embeddings(owner: ast.ClassDef) -> Iterator[tuple[str, ast.expr]]:
    """(self.name, rows) of nn.Embedding tables for positions."""
    for node in ast.walk(owner):
        match node:
            case ast.Assign(targets=[ast.Attribute() as target], value=ast.Call() as made) if (
                called(made) == "Embedding" and POSITIONS.search(target.attr)
            ):
                rows = made.args[0] if made.args else keyword(made, "num_embeddings")
                if rows is not None and "rel" not in target.attr.lower():
                    yield dotted(target), rows


def lookups(
    source: Source, function: ast.FunctionDef, tables: dict[str, ast.expr], bounded: bool
) -> Iterator[Finding]:
    """Lookups of a function, with the value that their index was last given."""
    given: dict[str, ast.expr] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            given.setdefault(node.targets[0].id, node.value)
    for node in ast.walk(function):
        if not isinstance(node, ast.Call) or dotted(node.func) not in tables or not node.args:
            continue
        rows, index = tables[dotted(node.func)], node.args[0]
        if isinstance(index, ast.Name):
            index = given.get(index.id, index)
        counted = next(
            (n for n in ast.walk(index) if isinstance(n, ast.Call) and called(n) == "arange"), None
        )
        if counted is None or BOUNDED.search(text(index, 400)):
            continue
        seen = ""
        ends = [number(a) for a in counted.args]
        size, offset = number(rows), constant_offset(index)
        if size is not None and ends and ends[-1 if len(ends) < 3 else 1] is not None:
            last = ends[-1 if len(ends) < 3 else 1] or 0
            if last + offset > size:
                seen = f"{text(node)}: {last + offset:.0f} positions in {size:.0f} rows"
        elif offset > 0 and not re.search(r"\+|offset|pad", text(rows, 200)):
            seen = f"{text(node)}: positions start at {offset:.0f}, the table has {text(rows)} rows"
        if seen:
            yield place(source, node, seen, severity="high")
        elif not bounded and length_of_input(counted, given):
            yield place(
                source, node, f"{text(node)} of the input's length, {text(rows)} rows, no check"
            )


def constant_offset(index: ast.expr) -> float:
    """c of arange(…) + c."""
    match index:
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            return (number(left) or 0) + (number(right) or 0)
    return 0


def length_of_input(counted: ast.Call, given: dict[str, ast.expr]) -> bool:
    """arange(x.shape[1]), arange(T) with T from a shape or size."""
    words = [text(a, 200) for a in counted.args]
    for argument in counted.args:
        if isinstance(argument, ast.Name) and argument.id in given:
            words.append(text(given[argument.id], 200))
    return any(re.search(r"\.shape|\.size\(|len\(", w) for w in words)


def bounds_length(owner: ast.ClassDef) -> bool:
    """Whether the class asserts, raises on, or cuts to a length."""
    for node in ast.walk(owner):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.If) and any(isinstance(n, ast.Raise) for n in ast.walk(node)):
            return True
        compares = isinstance(node, ast.If) and isinstance(node.test, ast.Compare)
        if compares and LENGTH.search(text(node.test, 200)):  # type: ignore[attr-defined]
            return True
    return False


def place(source: Source, node: ast.Call, seen: str, **more: str) -> Finding:
    """A finding at a lookup."""
    return found(
        "positions-past-table",
        seen,
        where=f"{source.file}:{node.lineno}",
        file=source.file,
        line=node.lineno,
        **more,  # type: ignore[arg-type]
    )
