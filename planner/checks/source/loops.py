"""Generation without a cache, and caches that grow by concatenation."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from planner.checks.edges import found
from planner.checks.source.flow import Source
from planner.checks.source.syntax import called, dotted, text
from planner.findings import Finding

CACHE = re.compile(r"cache|past|(^|_)kv($|_)|state|memory|hidden|mems", re.I)
KEPT = re.compile(r"(past|cached?|prev)(_|$)|_(past|cached?|prev)$|(past|prev)_", re.I)
KEYS_VALUES = re.compile(r"(^|[^a-z])(k|v|key|value|keys|values|kv)([^a-z]|$)", re.I)
IDS = re.compile(r"id|tok|seq|idx|generated|x$|out|input|ctx|context|prompt", re.I)
TAKEN = re.compile(r"argmax|multinomial|sample|topk|categorical", re.I)


def generation_loops(source: Source) -> Iterator[Finding]:
    """A loop that appends a token and calls the model on everything so far."""
    for loop in ast.walk(source.tree):
        if not isinstance(loop, ast.For | ast.While):
            continue
        inside = [n for s in loop.body for n in ast.walk(s)]
        if not any(isinstance(n, ast.Call) and TAKEN.search(called(n)) for n in inside):
            continue
        grown = {}
        for node in inside:
            match node:
                case ast.Assign(targets=[ast.Name(id=name)], value=ast.Call() as made) if (
                    called(made) in ("cat", "concat", "concatenate", "hstack") and made.args
                ):
                    first = made.args[0]
                    parts = first.elts if isinstance(first, ast.Tuple | ast.List) else []
                    if parts and dotted(parts[0]) == name and IDS.search(name):
                        grown[name] = node
        for name in grown:
            call = whole_call(inside, name)
            if call is not None:
                yield found(
                    "generation-without-cache",
                    f"{text(call)} in a loop that appends to {name}",
                    where=f"{source.file}:{call.lineno}",
                    file=source.file,
                    line=call.lineno,
                )


def whole_call(inside: list[ast.AST], name: str) -> ast.Call | None:
    """The call of a model with the grown ids, cut to a window at most, and without a cache."""
    aliases = {name}
    for node in inside:
        match node:
            case ast.Assign(targets=[ast.Name(id=alias)], value=value) if alias != name:
                kept = value.body if isinstance(value, ast.IfExp) else value
                cut = kept.value if isinstance(kept, ast.Subscript) else None
                window = isinstance(kept, ast.Subscript) and ":-1" not in text(kept.slice)
                last = isinstance(kept, ast.Subscript) and re.search(
                    r"-1:|, -1\b", text(kept.slice)
                )
                if cut is not None and dotted(cut) == name and window and not last:
                    aliases.add(alias)
    for node in inside:
        if not isinstance(node, ast.Call) or not (node.args or node.keywords):
            continue
        function = dotted(node.func)
        model = function.rpartition(".")[2]
        if not re.search(
            r"model|self$|net|decoder|transformer|forward|gpt|lm|llm|^m$", model, re.I
        ):
            continue
        given = [*node.args, *(k.value for k in node.keywords)]
        names = [dotted(a) for a in given] + [k.arg or "" for k in node.keywords]
        if any(CACHE.search(n) for n in names) or any(k.arg is None for k in node.keywords):
            continue
        if any(n in aliases for n in names[: len(given)]):
            return node
    return None


def growing_caches(source: Source) -> Iterator[Finding]:
    """Keys or values appended with torch.cat at every step; once for each function."""
    for _, function in source.functions:
        own = {
            id(node.value): text(node.targets[0], 200)
            for node in ast.walk(function)
            if isinstance(node, ast.Assign)
        }
        for node in ast.walk(function):
            if not isinstance(node, ast.Call) or called(node) not in (
                "cat",
                "concat",
                "concatenate",
            ):
                continue
            parts = node.args[0] if node.args else None
            if not isinstance(parts, ast.Tuple | ast.List) or len(parts.elts) != 2:
                continue
            old, new = (text(p, 200) for p in parts.elts)
            plain = isinstance(parts.elts[0], ast.Name | ast.Attribute | ast.Subscript)
            if not plain or re.search(r"future|repeated|observed", old + new):
                continue
            grows = (
                old.startswith("self.") and own.get(id(node)) == old
            )  # self.k = cat((self.k, k))
            kept = KEPT.search(old.replace("[", "_").replace(".", "_"))
            of_keys = any(KEYS_VALUES.search(t.replace("_", " ")) for t in (old, new))
            if (grows or kept) and not KEPT.search(new) and of_keys:
                yield found(
                    "cache-grows-by-cat",
                    text(node),
                    where=f"{source.file}:{node.lineno}",
                    file=source.file,
                    line=node.lineno,
                )
                break
