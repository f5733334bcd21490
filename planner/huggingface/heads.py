"""Encoders and encoder-decoders: the class that a config names, its labels, its padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from planner.ends import Reads, Step
from planner.errors import ConfigError, check_size, shown
from planner.huggingface.blocks import about
from planner.huggingface.fields import Fields
from planner.layers import Layer, Norm, Positions
from planner.model import Model
from planner.tensors import Parameter, linear

Names = tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """What a class puts on the bare model: a pooler, a language-model head, parameters.

    `names` are the checkpoint names of the language-model head; `reads` and `steps`: Ends.
    """

    pooler: bool = False
    lm_head: bool = False
    parameters: tuple[Parameter, ...] = ()
    names: Names = ()
    reads: Reads = "all"
    steps: tuple[Step, ...] = ()


def named_class(fields: Fields, stem: str, endings: Sequence[str]) -> str:
    """The ending of `architectures[0]` behind the stem; the first one where none is named."""
    _labels(fields)
    allowed = [stem + ending for ending in endings]
    architectures = fields.config.get("architectures") or allowed[:1]
    head = architectures[0] if isinstance(architectures, list) and architectures else architectures
    if head not in allowed:
        raise ConfigError(
            f"architectures[0]={shown(head)} is not read yet: one of {', '.join(allowed)}"
        )
    return str(head).removeprefix(stem)


def label_count(fields: Fields, *, absent: int = 2) -> int:
    """Outputs of a classifier: `num_labels` has the last word, then the entries of `id2label`."""
    labels = _labels(fields)
    if labels is None:
        fields.take_default("num_labels", absent)
    return check_size("num_labels", absent if labels is None else labels)


def _labels(fields: Fields) -> int | None:
    """What the config says of labels: its class reads it whether or not there is a classifier."""
    named = fields.config.get("id2label")
    if named is not None and not (isinstance(named, Mapping) and all(map(_whole, named))):
        raise ConfigError(f"id2label={shown(named)} is not allowed: a name for each number")
    if "num_labels" in fields.config:
        return check_size("num_labels", fields.config["num_labels"], minimum=0)
    return None if named is None else len({int(key) for key in named})


def _whole(key: Any) -> bool:
    return isinstance(key, int) or (isinstance(key, str) and key.strip().isdecimal())


def dense(name: str, *, out: int, into: int, bias: bool = True) -> tuple[Parameter, ...]:
    """A linear layer of a head."""
    return tuple(linear(name, "head", out=out, into=into, bias=bias))


def padding(fields: Fields, *, absent: int | None) -> int | None:
    """`pad_token_id`, a row of the embedding; torch refuses one outside of it."""
    token, V = fields.config.get("pad_token_id", absent), fields.size("vocab_size")
    if token is None:
        return None
    if isinstance(token, bool) or not isinstance(token, int) or not -V <= token < V:
        raise ConfigError(f"pad_token_id={shown(token)} is not allowed: a row of vocab_size={V}")
    return token


def refuse(fields: Fields, **allowed: bool | None) -> None:
    """ConfigError where a field has another value than the one that is read; null is false."""
    for name, value in allowed.items():
        given = fields.raw(name) if value is None else fields.flag(name)
        if given != value:
            raise ConfigError(f"{name}={shown(fields.raw(name))} is not read yet: {value}")


def described(
    fields: Fields,
    *,
    layers: tuple[Layer, ...],
    positions: Positions,
    max_position_embeddings: int | None,
    tie_word_embeddings: bool,
    final_norm: Norm | None = None,
    vocab_size: int | None = None,
    **extra: Any,
) -> Model:
    """The Model of a class that is no causal language model."""
    return Model(
        hidden_size=fields.size("hidden_size"),
        vocab_size=fields.size("vocab_size") if vocab_size is None else vocab_size,
        max_position_embeddings=max_position_embeddings,
        layers=layers,
        final_norm=final_norm,
        positions=positions,
        tie_word_embeddings=tie_word_embeddings,
        **about(fields),
        **extra,
    )
