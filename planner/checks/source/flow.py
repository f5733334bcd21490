"""What a value is on its way through a function: scores, scaled, masked, probabilities.

A function is read from top to bottom, branches one after the other; what may have been done counts
as done, so that a doubt is no finding.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import cached_property

from planner.checks.source.syntax import (
    FUNCTIONS,
    MASK,
    Function,
    called,
    dotted,
    functions,
    hides,
    keyword,
    number,
    on_module,
    parameters,
    text,
)
from planner.checks.source.triangles import changed, edge_tag, off_by
from planner.checks.source.values import Event, Value

SCALE = re.compile(r"scal|temp|factor|sqrt|norm|inv|alpha|coef|mult|d_k|dim|tau|beta|gain", re.I)
NO_SCALE = re.compile(r"cos|sin|mask|gate|bias|pos|rot", re.I)
ROTATES = re.compile(r"rot|rope|pos", re.I)
QUERY_KEY = re.compile(
    r"(^|[^a-z])x?(q|k|query|queries|key|keys|query_\w+|key_\w+|q_\w+|k_\w+)([^a-z]|$)", re.I
)
TRIANGLES = ("lower", "upper", "hides-lower", "hides-upper")
KEEPS = {
    "view", "reshape", "contiguous", "float", "to", "type", "type_as", "unsqueeze", "squeeze",
    "half", "flatten", "unflatten", "expand", "clone", "dropout", "Dropout", "detach", "bfloat16",
    "double", "bool", "long", "int", "repeat", "repeat_interleave", "cast", "cpu", "cuda", "split",
    "chunk", "unbind", "narrow", "index_select", "attn_dropout", "attention_dropout", "attn_drop",
    "drop", "checkpoint_name",
}  # fmt: skip
TRANSPOSES = {"transpose", "permute", "swapaxes", "swapdims", "movedim", "t", "mT"}
LAST_TWO = {(-1, -2), (-2, -1), (2, 3), (3, 2), (1, 2), (2, 1)}
TO_KEYS_LAST = {(0, 2, 3, 1), (0, 1, 3, 2), (0, 2, 1), (1, 0)}


@dataclass
class Source:
    """A parsed file and what the rules share of it."""

    tree: ast.Module
    file: str
    attends: bool = True
    is_generative: bool | None = None

    @cached_property
    def functions(self) -> list[tuple[ast.ClassDef | None, Function]]:
        """All functions."""
        return list(functions(self.tree))

    @cached_property
    def flows(self) -> list[Flow]:
        """All functions, read; none where the file has no softmax at all."""
        if not self.attends:
            return []
        owners = {id(owner): owner for owner, _ in self.functions}
        attributes = {key: self._attributes(owner) for key, owner in owners.items()}
        return [Flow(f, owner, attributes[id(owner)]) for owner, f in self.functions]

    @cached_property
    def classes(self) -> list[ast.ClassDef]:
        """All classes."""
        return [node for node in ast.walk(self.tree) if isinstance(node, ast.ClassDef)]

    @cached_property
    def calls(self) -> list[ast.Call]:
        """All calls."""
        return [node for node in ast.walk(self.tree) if isinstance(node, ast.Call)]

    def _attributes(self, owner: ast.ClassDef | None) -> dict[str, Value]:
        """What a class keeps under self: masks, factors."""
        kept: dict[str, Value] = {}
        if owner is None:
            return kept
        reader = Flow.__new__(Flow)
        reader.names, reader.events, reader.first, reader.methods = {}, [], "", set()
        reader._read = {}
        for node in ast.walk(owner):
            reader._read.clear()
            match node:
                case ast.Assign(targets=[ast.Attribute() as target], value=value):
                    name = dotted(target)
                case ast.Call(args=[ast.Constant(value=str() as buffer), value, *_]) if (
                    called(node) == "register_buffer"
                ):
                    name = f"self.{buffer}"
                case _:
                    continue
            tags = reader.of(value)
            if root_factor(value):
                tags = tags.plus("root")
            kept[name] = kept.get(name, Value()) | Value(tags.tags)
        return kept


def root_factor(node: ast.AST) -> bool:
    """Whether an expression is a root: sqrt, rsqrt, ** -0.5."""
    for part in ast.walk(node):
        if isinstance(part, ast.Call) and called(part) in ("sqrt", "rsqrt"):
            return True
        if isinstance(part, ast.BinOp) and isinstance(part.op, ast.Pow):
            power = number(part.right)
            if power is not None and abs(power) == 0.5:
                return True
    return False


class Flow:
    """A function, read once: `events` in their order."""

    def __init__(
        self, function: Function, owner: ast.ClassDef | None, attributes: dict[str, Value]
    ) -> None:
        self.function, self.owner = function, owner
        self.parameters = parameters(function)
        self.methods = {f.name for f in owner.body if isinstance(f, FUNCTIONS)} if owner else set()
        self.first = self.parameters[0] if owner is not None and self.parameters else ""
        self.names: dict[str, Value] = dict(attributes)
        for name in self.parameters:
            if name != self.first:
                self.names[name] = Value(origins=frozenset({name}))
        self.events: list[Event] = []
        self._read: dict[int, tuple[ast.AST, Value]] = {}
        self._body(function.body)

    def _body(self, statements: list[ast.stmt]) -> None:
        for statement in statements:
            self._statement(statement)

    def _statement(self, statement: ast.stmt) -> None:
        self._read.clear()
        match statement:
            case ast.Assign(targets=targets, value=value):
                self._assign(targets, value)
            case ast.AnnAssign(target=target, value=value) if value is not None:
                self._assign([target], value)
            case ast.AugAssign(target=target, op=op, value=value):
                made = self.of(ast.copy_location(ast.BinOp(_loaded(target), op, value), statement))
                self.names[dotted(target)] = made
            case ast.If(test=test, body=body, orelse=orelse):
                self.of(test)
                self._either(body, orelse)
            case ast.For(iter=over, body=body, orelse=orelse):
                self.of(over)
                self._either(body, orelse)
            case ast.While(body=body) | ast.With(body=body) | ast.AsyncWith(body=body):
                self._body(body)
            case ast.Try(body=body, handlers=handlers, orelse=orelse, finalbody=final):
                self._body([*body, *(s for h in handlers for s in h.body), *orelse, *final])
            case ast.Return(value=value) | ast.Expr(value=value) if value is not None:
                self.of(value)

    def _either(self, body: list[ast.stmt], orelse: list[ast.stmt]) -> None:
        """What may be done in one branch counts as done."""
        before = dict(self.names)
        self._body(body)
        after, self.names = self.names, before
        self._body(orelse)
        for name, value in after.items():
            self.names[name] = self.names[name] | value if name in self.names else value

    def _assign(self, targets: list[ast.expr], value: ast.expr) -> None:
        made = self.of(value)
        for target in targets:
            if isinstance(target, ast.Tuple | ast.List):
                several = isinstance(value, ast.Tuple | ast.List)
                parts = value.elts if isinstance(value, ast.Tuple | ast.List) else []
                fits = several and len(parts) == len(target.elts)
                values = [self.of(p) for p in parts] if fits else [made] * len(target.elts)
                for one, its in zip(target.elts, values, strict=True):
                    self.names[dotted(one)] = its
            elif isinstance(target, ast.Subscript):
                name = dotted(target.value)
                self.names[name] = self.names.get(name, Value()).plus("touched", "masked")
            else:
                self.names[dotted(target)] = made

    def of(self, node: ast.AST | None) -> Value:
        """The value of an expression; read once in each statement."""
        if node is None:
            return Value()
        read = self._read.get(id(node))
        if read is None or read[0] is not node:
            read = self._read[id(node)] = node, self._of(node)
        return read[1]

    def _of(self, node: ast.AST) -> Value:
        match node:
            case ast.Name(id=name):
                return self.names.get(name, Value())
            case ast.Attribute(value=base, attr=attr):
                name = dotted(node)
                if name in self.names:
                    return self.names[name]
                return self._turned(self.of(base)) if attr in ("T", "mT") else self.of(base)
            case ast.BinOp():
                return self._binary(node)
            case ast.Call():
                return self._call(node)
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                return self._compare(left, op, right)
            case ast.UnaryOp(op=ast.Invert() | ast.Not(), operand=inner):
                return _inverted(self.of(inner))
            case ast.UnaryOp(operand=inner) | ast.Starred(value=inner) | ast.Await(value=inner):
                return self.of(inner)
            case ast.Subscript(value=base):
                return self.of(base)
            case ast.IfExp(body=body, orelse=orelse):
                return self.of(body) | self.of(orelse)
            case ast.Tuple(elts=parts) | ast.List(elts=parts):
                return _joined([self.of(p) for p in parts])
            case ast.BoolOp(values=parts):
                return _joined([self.of(p) for p in parts])
            case ast.NamedExpr(target=target, value=inner):
                made = self.of(inner)
                self.names[target.id] = made
                return made
        return Value()

    def _turned(self, value: Value) -> Value:
        tags = changed(value.tags, negated=False)
        return Value(tags ^ {"turned"} if "turned" in tags else tags | {"turned"}, value.origins)

    def _compare(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> Value:
        value, against = self.of(left), number(right)
        if against == 0 and isinstance(op, ast.Eq):
            return _inverted(value)
        if isinstance(op, ast.Lt) and against is not None:
            return _inverted(value)
        return value

    def _binary(self, node: ast.BinOp) -> Value:
        left, right = self.of(node.left), self.of(node.right)
        match node.op:
            case ast.MatMult():
                return self._product(node, node.left, node.right)
            case ast.Mult() | ast.Div() | ast.FloorDiv():
                return self._times(node, left, right)
            case ast.Add() | ast.Sub() | ast.BitOr() | ast.BitAnd():
                return self._plus(node, left, right)
        return left | right

    def _times(self, node: ast.BinOp, left: Value, right: Value) -> Value:
        """Scaled, unless by 1 or by what rotates."""
        scores_right = right.has("scores", "softmax") and not left.has("scores", "softmax")
        value, other, by = (right, left, node.left) if scores_right else (left, right, node.right)
        if isinstance(node.op, ast.Mult) and number(node.left) is not None:
            value, other, by = right, left, node.left
        if other.has("scores", "softmax"):
            return value | other.plus("touched")
        if hides(by) and value.has("lower"):
            return value.minus("lower").plus("hides-lower")
        if number(by) == 1:
            return value
        words = text(by, 200)
        if NO_SCALE.search(words) and not SCALE.search(words):
            return value | Value(origins=other.origins)
        tags = ["scaled"]
        if root_factor(by) or other.has("root"):
            tags.append("root-twice" if value.has("root-scaled") else "root-scaled")
        return Value(value.tags, value.origins | other.origins).plus(*tags)

    def _plus(self, node: ast.BinOp, left: Value, right: Value) -> Value:
        for one, other, by in ((left, right, node.right), (right, left, node.left)):
            mask = other.has(*TRIANGLES) or MASK.search(text(by, 200))
            if one.has("softmax") and not one.has("spent") and mask and not other.has("softmax"):
                self.events.append(Event("added", node, one, other))
            if one.has("scores"):
                if other.has("hides-lower") and not other.has("touched"):
                    self.events.append(Event("inverted", node, one, other))
                if other.has("hides-upper") and not other.has("hides-lower", "lower"):
                    self._shifted(node, one, other, off_by(other.tags | {"upper"}, hides=True))
                if number(by) is None and not ROTATES.search(text(by, 200).replace("pose", "")):
                    one = one.plus("masked")
                made = one | Value(origins=other.origins)
                return made.plus("masked") if mask else made
        either = left | right
        return either.minus("softmax", "scores", "turned", "spent").plus("sum")

    def _product(
        self, node: ast.AST, left: ast.expr, right: ast.expr, *, turned: bool = False
    ) -> Value:
        a, b = self.of(left), self.of(right)
        if a.has("softmax") or b.has("softmax"):
            self.events.append(Event("product", node, a if a.has("softmax") else b))
            return Value(origins=a.origins | b.origins)
        named = QUERY_KEY.search(text(left, 300)) and QUERY_KEY.search(text(right, 300))
        if (turned or self._is_turned(right)) and named:
            kept = (a.tags | b.tags) & {"scaled", "root-scaled", "root-twice", "touched"}
            if a.has("root-scaled") and b.has("root-scaled"):
                kept -= {"root-twice"}  # d^-1/4 on each side, or the like: no claim
                kept |= {"touched"}
            shared = {f"from:{name}" for name in a.origins & b.origins}
            return Value(frozenset({"scores", *kept, *shared}), a.origins | b.origins)
        return Value(origins=a.origins | b.origins)

    def _is_turned(self, node: ast.expr) -> bool:
        """Whether keys stand with their last two dimensions swapped."""
        match node:
            case ast.Call(func=ast.Attribute(value=base, attr=attr)) if attr in KEEPS:
                return self._is_turned(base)
        return self.of(node).has("turned")

    def _call(self, node: ast.Call) -> Value:
        name, method = called(node), isinstance(node.func, ast.Attribute) and not on_module(node)
        base = self.of(node.func.value) if method and isinstance(node.func, ast.Attribute) else None
        args = [self.of(a) for a in node.args]
        values = args if base is None else [base, *args]
        subject = values[0] if values else Value()
        if name in ("softmax", "Softmax", "softmax_", "stable_softmax", "masked_softmax"):
            return self._softmax(node, subject if not method or not dotted(node.func).startswith(
                f"{self.first}.") else (args[0] if args else Value()), name)  # fmt: skip
        if name in ("matmul", "bmm", "mm") and len(values) >= 2:
            operands = [node.func.value, *node.args] if base is not None else node.args  # type: ignore[attr-defined]
            return self._product(node, operands[0], operands[1])
        if name == "baddbmm" and len(node.args) >= 2:
            pair = [a for a in [*node.args, *(k.value for k in node.keywords)]][-2:]
            made = self._product(node, pair[0], pair[1])
            return made.plus("masked", "scaled") if made.has("scores") else made
        if name == "einsum" and len(node.args) >= 3:
            return self._product(
                node, node.args[1], node.args[2], turned=_contracts_last(node.args[0])
            )
        if name in ("scaled_dot_product_attention", "sdpa") and len(node.args) >= 2:
            self.events.append(Event("attention", node, args[0], args[1]))
            return Value(origins=_joined(values).origins)
        if name in TRANSPOSES and values:
            return self._transposed(node, subject, method=base is not None)
        if name in ("masked_fill", "masked_fill_") and len(values) >= 2:
            return self._filled(node, subject, values[1], node.args[-1])
        if name == "where" and len(node.args) == 3:
            return self._where(node, args)
        if name in ("tril", "triu"):
            return self._triangle(node, name)
        if name in ("logical_not", "bitwise_not"):
            return _inverted(subject)
        if name in ("eq",) and number(node.args[-1] if node.args else None) == 0:
            return _inverted(subject)
        if (
            name in ("mul", "mul_", "div", "div_", "multiply", "divide", "true_divide")
            and node.args
        ):
            by = node.args[-1]
            operand = node.func.value if base is not None else node.args[0]  # type: ignore[attr-defined]
            op: ast.operator = ast.Div() if "div" in name else ast.Mult()
            return self._times(
                ast.copy_location(ast.BinOp(operand, op, by), node), subject, args[-1]
            )
        if name in ("add", "add_") and node.args:
            operand = node.func.value if base is not None else node.args[0]  # type: ignore[attr-defined]
            summed = ast.copy_location(ast.BinOp(operand, ast.Add(), node.args[-1]), node)
            return self._plus(summed, subject, args[-1])
        if name in KEEPS or name.endswith(("dropout", "_drop")):
            return (args[0] if args and not method else subject) if name != "to" else subject
        return self._unknown(node, name, values)

    def _unknown(self, node: ast.Call, name: str, values: list[Value]) -> Value:
        """A projection, a norm, a function of one's own."""
        more = [self.of(k.value) for k in node.keywords]
        joined = _joined([*values, *more])
        words = dotted(node.func)
        if re.search(r"norm|(^|[._])ln", words, re.I) and not words.endswith("linalg.norm"):
            tags = {"scaled"} | ({"normed-sum"} if joined.has("sum") else set())
            return Value(frozenset(tags), joined.origins)
        if joined.has("scores", "softmax"):
            return joined.plus("touched", "masked", "scaled")
        kept = joined.tags & {"scaled", "root-scaled", "touched"}
        layer = words.startswith("self.") and words.removeprefix("self.") not in self.methods
        if name[:1].isupper() or (layer and not ROTATES.search(words)):
            kept = frozenset()  # what comes out of a layer is fresh
        return Value(kept, joined.origins)

    def _softmax(self, node: ast.Call, value: Value, name: str) -> Value:
        if name == "masked_softmax":
            value = value.plus("masked", "touched")
        if value.has("scores"):
            self.events.append(Event("softmax", node, value))
        kept = value.tags & {"masked", "touched", "scores"}
        tags = {"softmax", *({"was-masked"} if kept & {"masked", "touched"} else ())}
        tags |= {"of-scores"} if value.has("scores") else set()
        return Value(frozenset(tags), value.origins)

    def _transposed(self, node: ast.Call, value: Value, *, method: bool) -> Value:
        given = node.args if method else node.args[1:]
        if len(given) == 1 and isinstance(given[0], ast.Tuple | ast.List):
            given = given[0].elts
        at = tuple(int(n) for a in given if (n := number(a)) is not None)
        name = called(node)
        if name in ("t", "mT") or (name != "permute" and at in LAST_TWO):
            return self._turned(value)
        if name == "permute" and at in TO_KEYS_LAST:
            return self._turned(value)
        if name == "transpose" and at == (0, 1):
            return self._turned(value)
        return value

    def _filled(self, node: ast.Call, value: Value, mask: Value, fill: ast.expr) -> Value:
        given = keyword(node, "value")
        fill = given if given is not None else fill
        if value.has("softmax"):
            self.events.append(
                Event("filled", node, value, mask, "hide" if hides(fill) else "zero")
            )
            return value.plus("was-masked")
        if value.has("scores"):
            if hides(fill) and mask.has("lower") and not mask.has("upper", "touched"):
                self.events.append(Event("inverted", node, value, mask))
            if hides(fill):
                self._shifted(node, value, mask, off_by(mask.tags, hides=True))
            if number(fill) == 0:
                return value.plus("zeroed")
            return value.plus("masked")
        if hides(fill) and mask.has("lower") and not mask.has("upper"):
            return value.plus("hides-lower")
        if hides(fill) and mask.has("upper") and not mask.has("lower"):
            return value.plus("hides-upper", *(t for t in mask.tags if t.startswith("at:")))
        return value | Value(origins=mask.origins)

    def _shifted(self, node: ast.AST, value: Value, mask: Value, ahead: int) -> None:
        """A triangle whose edge is not the diagonal."""
        if ahead and not mask.has("touched", "lower" if mask.has("upper") else "upper"):
            self.events.append(Event("shifted", node, value, mask, str(ahead)))

    def _where(self, node: ast.Call, args: list[Value]) -> Value:
        condition, one, other = args
        for value, fill, keeps in ((one, node.args[2], True), (other, node.args[1], False)):
            if not value.has("scores"):
                continue
            wrong = condition.has("upper" if keeps else "lower")
            right = condition.has("lower" if keeps else "upper")
            if hides(fill) and wrong and not right:
                self.events.append(Event("inverted", node, value, condition))
            elif hides(fill):
                self._shifted(node, value, condition, off_by(condition.tags, hides=not keeps))
            return value.plus("masked")
        return one | other

    def _triangle(self, node: ast.Call, name: str) -> Value:
        inner = self.of(node.args[0]) if on_module(node) and node.args else Value()
        filled = (
            node.args[0] if on_module(node) and node.args else getattr(node.func, "value", None)
        )
        full = isinstance(filled, ast.Call) and called(filled) in ("full", "full_like")
        if full and isinstance(filled, ast.Call) and any(hides(a) for a in filled.args[1:]):
            if name == "tril":
                return inner.plus("hides-lower")
            return inner.plus("hides-upper", *edge_tag(node))
        side = "lower" if name == "tril" else "upper"
        return Value(origins=inner.origins).plus(side, *edge_tag(node))


def _loaded(target: ast.expr) -> ast.expr:
    """A target of an assignment as a value."""
    made = ast.parse(ast.unparse(target), mode="eval").body
    return ast.copy_location(made, target)


def _inverted(value: Value) -> Value:
    return Value(changed(value.tags, negated=True), value.origins)


def _joined(values: list[Value]) -> Value:
    made = Value()
    for value in values:
        made = made | value
    return made


def _contracts_last(node: ast.expr) -> bool:
    """ "bhqd,bhkd->bhqk": the last letter of both is summed over, two sequences stay."""
    if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
        return False
    inputs, _, out = node.value.replace(" ", "").partition("->")
    parts = inputs.split(",")
    if len(parts) != 2 or not all(parts) or not out:
        return False
    one, other = parts
    alone = (set(one) - set(other)) & set(out), (set(other) - set(one)) & set(out)
    return one[-1] == other[-1] and one[-1] not in out and all(alone)
