"""Small questions to a syntax tree."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterator

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
Function = ast.FunctionDef | ast.AsyncFunctionDef
MASK = re.compile(r"mask|causal|tril|triu", re.I)


def dotted(node: ast.AST) -> str:
    """`self.attn.q` of names and attributes; empty for anything else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return ""
    return ".".join([node.id, *reversed(parts)])


def called(node: ast.Call) -> str:
    """The last word of what is called."""
    function = node.func
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def on_module(node: ast.Call) -> bool:
    """Whether it is a function of torch, not a method: torch.softmax, F.softmax, softmax."""
    function = node.func
    if isinstance(function, ast.Name):
        return True
    base = dotted(function.value) if isinstance(function, ast.Attribute) else ""
    return base in ("torch", "F", "nn.functional", "torch.nn.functional", "functional", "nn", "np")


def keyword(node: ast.Call, name: str) -> ast.expr | None:
    """The value of a keyword argument."""
    return next((k.value for k in node.keywords if k.arg == name), None)


def number(node: ast.AST | None) -> float | None:
    """A literal number, also -inf however it is written, and finfo(...).min."""
    match node:
        case ast.Constant(value=bool()):
            return None
        case ast.Constant(value=int() | float() as value):
            return float(value)
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            negated = number(inner)
            return None if negated is None else -negated
        case ast.Call() if called(node) == "float" and node.args:
            word = node.args[0]
            if isinstance(word, ast.Constant) and isinstance(word.value, str):
                try:
                    return float(word.value)
                except ValueError:
                    return None
        case ast.Call() if called(node) in ("tensor", "full") and node.args:
            return number(node.args[-1])
        case ast.Attribute(attr="inf" | "infty" | "Inf"):
            return math.inf
        case ast.Attribute(attr="min", value=ast.Call() as made) if called(made) == "finfo":
            return -math.inf
    return None


def hides(node: ast.AST | None) -> bool:
    """Whether it is a very negative number."""
    value = number(node)
    return value is not None and value <= -1e3


def functions(tree: ast.AST) -> Iterator[tuple[ast.ClassDef | None, Function]]:
    """Every function with the class it stands in."""

    def walk(
        node: ast.AST, owner: ast.ClassDef | None
    ) -> Iterator[tuple[ast.ClassDef | None, Function]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, FUNCTIONS):
                yield owner, child
                yield from walk(child, owner)
            elif isinstance(child, ast.ClassDef):
                yield from walk(child, child)
            else:
                yield from walk(child, owner)

    yield from walk(tree, None)


def parameters(function: Function) -> list[str]:
    """Names of its parameters."""
    a = function.args
    return [p.arg for p in (*a.posonlyargs, *a.args, *a.kwonlyargs)]


def text(node: ast.AST, most: int = 80) -> str:
    """The source of a node, in one line."""
    words = " ".join(ast.unparse(node).split())
    return words if len(words) <= most else words[: most - 3] + "..."
