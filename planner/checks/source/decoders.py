"""Whether code is a decoder's, and torch's own layers that are called without a mask."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from planner.checks.edges import found
from planner.checks.source.flow import Source
from planner.checks.source.syntax import FUNCTIONS, called, dotted, text
from planner.findings import Finding

DECODER = re.compile(r"Causal|Decoder|GPT|LanguageModel|LM(Head)?(Model)?$|Autoregress", re.I)
ENCODER = re.compile(
    r"Encoder|Bert|ViT|Vision|Image|Cross|Clip|Pool|Audio|Patch|Mask2?Former|MaskDecoder|Detr|Segment",
    re.I,
)
LAYERS = {
    "TransformerEncoder": (("mask", "is_causal"), 1),
    "TransformerEncoderLayer": (("src_mask", "is_causal"), 1),
    "TransformerDecoder": (("tgt_mask", "tgt_is_causal"), 2),
    "TransformerDecoderLayer": (("tgt_mask", "tgt_is_causal"), 2),
    "Transformer": (("tgt_mask", "tgt_is_causal"), 3),
    "MultiheadAttention": (("attn_mask", "is_causal"), 5),
}
"""torch.nn's layers: what masks them, and how many positional arguments do not."""


def is_decoder(source: Source, owner: ast.ClassDef | None) -> bool:
    """By the class's name; or by the file, where it generates or predicts the next token."""
    if owner is not None and ENCODER.search(owner.name):
        return False
    if owner is not None and DECODER.search(owner.name):
        # a name alone is little: a decoder of images or boxes has no order
        return generates(source) or "causal" in owner.name.lower()
    return generates(source) and not any(ENCODER.search(c.name) for c in source.classes)


def generates(source: Source) -> bool:
    """Whether the file samples token after token, or trains on the next one."""
    if source.is_generative is None:
        source.is_generative = _generates(source)
    return source.is_generative


def _generates(source: Source) -> bool:
    for node in ast.walk(source.tree):
        if isinstance(node, FUNCTIONS) and node.name in ("generate", "sample", "generate_text"):
            return True
        if isinstance(node, ast.ClassDef) and re.search(r"CausalLM|GPT|LanguageModel", node.name):
            return True
    cut = {_ends(node) for node in ast.walk(source.tree) if isinstance(node, ast.Subscript)}
    entropy = any(called(call) == "cross_entropy" for call in source.calls)
    return entropy and {"first", "last"} <= cut


def _ends(node: ast.Subscript) -> str:
    """x[:, 1:] cuts the first, x[:, :-1] the last."""
    parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    for part in parts[1:]:
        if isinstance(part, ast.Slice):
            if text(part) == "1:":
                return "first"
            if text(part) == ":-1":
                return "last"
    return ""


def unmasked_modules(source: Source) -> Iterator[Finding]:
    """nn.TransformerEncoder and its like in a decoder, called without a mask."""
    for owner in source.classes:
        kinds = {}
        for node in ast.walk(owner):
            match node:
                case ast.Assign(targets=[ast.Attribute() as target], value=ast.Call() as made):
                    inside = [made, *(n for n in ast.walk(made) if isinstance(n, ast.Call))]
                    names = [called(n) for n in inside[:1]]
                    kinds[dotted(target)] = next((n for n in names if n in LAYERS), "")
        if not any(kinds.values()) or not is_decoder(source, owner):
            continue
        for node in ast.walk(owner):
            if not isinstance(node, ast.Call) or not kinds.get(dotted(node.func)):
                continue
            kind = kinds[dotted(node.func)]
            words, positional = LAYERS[kind]
            starred = any(k.arg is None for k in node.keywords) or any(
                isinstance(a, ast.Starred) for a in node.args
            )
            if starred or any(k.arg in words for k in node.keywords) or len(node.args) > positional:
                continue
            if kind == "MultiheadAttention" and len({text(a) for a in node.args[:2]}) != 1:
                continue  # cross-attention
            yield found(
                "decoder-without-mask",
                f"{text(node)}: nn.{kind} without {words[0]}",
                where=f"{source.file}:{node.lineno}",
                file=source.file,
                line=node.lineno,
            )
