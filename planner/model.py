"""A model, described once: what is predicted, traced, built and measured is this object."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

from planner.dtypes import element_bytes
from planner.errors import MAX_LAYERS, ConfigError, check_size
from planner.layers import Layer, LearnedPositions, MoE, Norm, Positions, RoPE
from planner.parameters import Parameter, layer_parameters, norm_parameters

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A decoder-only language model.

    `layers` lists every block; hybrids are blocks that differ. `parameter_names` translates module
    names from the llama family's to this family's, most specific first; `extra_parameters` stand
    outside the blocks and no field describes them; `logit_scale` multiplies the logits (cohere);
    `transposed_linears` says that its linear weights are [in, out] (GPT-2's Conv1D).
    `local_positions` are those of sliding layers where they differ (gemma-3). `mask_windows` are
    the masks that its class makes, where they are not those of its layers. `embedding_size`: width
    of embedding and head where it is not hidden_size; a linear leads in and another out (opt-350m).
    `defaults` are the config fields that were absent and took their class's default; `config_json`
    is the config it was read from.
    """

    name: str
    model_type: str
    hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    layers: tuple[Layer, ...]
    final_norm: Norm | None
    positions: Positions
    tie_word_embeddings: bool
    dtype: str
    lm_head: bool = True
    lm_head_bias: bool = False
    extra_parameters: tuple[Parameter, ...] = ()
    embedding_scale: float | None = None
    logit_scale: float | None = None
    final_logit_softcapping: float | None = None
    local_positions: RoPE | None = None
    parameter_names: tuple[tuple[str, str], ...] = ()
    transposed_linears: bool = False
    mask_windows: tuple[int | None, ...] | None = None
    embedding_size: int | None = None
    defaults: tuple[str, ...] = ()
    quantization: str | None = None
    config_json: str = field(default="{}", repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("hidden_size", "vocab_size", "max_position_embeddings"):
            check_size(name, getattr(self, name))
        check_size("num_hidden_layers", len(self.layers), maximum=MAX_LAYERS)
        element_bytes(self.dtype)

    @property
    def config(self) -> dict[str, Any]:
        """The config.json this model was read from."""
        return dict(json.loads(self.config_json))

    def layer_groups(self) -> Iterator[tuple[int, int, Layer]]:
        """Runs of equal neighbouring blocks: (index of the first, how many, the block)."""
        start = 0
        for layer, run in groupby(self.layers):
            count = sum(1 for _ in run)
            yield start, count, layer
            start += count

    def layer_kinds(self) -> dict[Layer, int]:
        """How many blocks of each kind there are, wherever they stand."""
        kinds: dict[Layer, int] = {}
        for _, count, layer in self.layer_groups():
            kinds[layer] = kinds.get(layer, 0) + count
        return kinds

    def _outer_parameters(self) -> Iterator[Parameter]:
        """Embeddings, last norm and head: what stands outside the blocks, tied weights once."""
        V, h = self.vocab_size, self.hidden_size
        width = self.embedding_size or h
        yield Parameter(name="embed_tokens.weight", group="embedding", layer=None, shape=(V, width))
        if isinstance(self.positions, LearnedPositions):
            shape = (self.max_position_embeddings + self.positions.offset, h)
            yield Parameter(
                name="embed_positions.weight", group="embedding", layer=None, shape=shape
            )
        if self.final_norm is not None:
            yield from norm_parameters(self.final_norm, "norm", h)
        if self.embedding_size is not None:
            for name, group, shape in (
                ("project_in", "embedding", (h, self.embedding_size)),
                ("project_out", "head", (self.embedding_size, h)),
            ):
                yield Parameter(name=f"{name}.weight", group=group, layer=None, shape=shape)  # type: ignore[arg-type]
        if self.lm_head and not self.tie_word_embeddings:
            yield Parameter(name="lm_head.weight", group="head", layer=None, shape=(V, width))
        if self.lm_head and self.lm_head_bias:
            yield Parameter(name="lm_head.bias", group="head", layer=None, shape=(V,))
        yield from self.extra_parameters

    def parameters(self) -> Iterator[Parameter]:
        """Every trained tensor once, in the llama family's names and [out, in] shapes."""
        yield from self._outer_parameters()
        for index, layer in enumerate(self.layers):
            for p in layer_parameters(layer, self.hidden_size):
                yield replace(p, name=f"layers.{index}.{p.name}", layer=index)

    def parameter_groups(self) -> dict[str, tuple[int, int]]:
        """(tensors, elements) of every group of parameters."""
        groups: dict[str, tuple[int, int]] = {}

        def add(parameters: Iterable[Parameter], times: int) -> None:
            for p in parameters:
                tensors, elements = groups.get(p.group, (0, 0))
                groups[p.group] = (tensors + times, elements + times * p.count)

        add(self._outer_parameters(), 1)
        for layer, count in self.layer_kinds().items():
            add(layer_parameters(layer, self.hidden_size), count)
        return groups

    @property
    def parameter_count(self) -> int:
        """Trained elements: tied weights once, buffers not counted."""
        return sum(elements for _, elements in self.parameter_groups().values())

    @property
    def active_parameter_count(self) -> int:
        """Parameters one token meets: all of them, routed experts × top_k / experts."""
        idle = 0
        for layer, count in self.layer_kinds().items():
            match layer.feed_forward:
                case MoE(num_experts=E, num_experts_per_tok=k):
                    routed = sum(
                        p.count
                        for p in layer_parameters(layer, self.hidden_size)
                        if p.group == "experts"
                    )
                    idle += count * (routed - routed * k // E)
        return self.parameter_count - idle

    def checkpoint_parameters(self) -> Iterator[Parameter]:
        """Every trained tensor with the name and shape it has in this family's checkpoints."""
        for p in self.parameters():
            swap = self.transposed_linears and len(p.shape) == 2 and p.layer is not None
            yield replace(p, name=self.checkpoint_name(p.name), shape=p.shape[:: -1 if swap else 1])

    def checkpoint_name(self, name: str) -> str:
        """A parameter's name in this family's checkpoints, from its name in `parameters()`."""
        for ours, theirs in self.parameter_names:
            name = _replace_path(name, ours, theirs)
        return name

    def parameter_table(self) -> pd.DataFrame:
        """A row for each trained tensor: name, group, layer, shape, count."""
        import pandas as pd

        rows = [
            {"name": p.name, "group": p.group, "layer": p.layer, "shape": p.shape, "count": p.count}
            for p in self.checkpoint_parameters()
        ]
        table = pd.DataFrame(rows, columns=["name", "group", "layer", "shape", "count"])
        return table.astype({"layer": "Int64", "group": "category"})

    def check_positions(self, tokens: int) -> None:
        """ConfigError if a sequence of `tokens` tokens reaches beyond the model's positions."""
        if tokens > self.max_position_embeddings:
            raise ConfigError(
                f"prompt_tokens + output_tokens - 1 = {tokens} reaches beyond "
                f"max_position_embeddings={self.max_position_embeddings} of {self.name}"
            )


def _replace_path(name: str, ours: str, theirs: str) -> str:
    """Replace the dotted path `ours` in a dotted name, only at whole words."""
    return f".{name}.".replace(f".{ours}.", f".{theirs}.").strip(".")
