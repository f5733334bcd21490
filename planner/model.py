"""A model, described once: what is predicted, traced, built and measured is this object."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

from planner.dtypes import element_bytes
from planner.ends import Ends
from planner.errors import MAX_LAYERS, MAX_SIZE, ConfigError, check_size, shown
from planner.layers import Layer, LearnedPositions, MoE, Norm, Positions, RoPE
from planner.parameters import layer_parameters, norm_parameters
from planner.quantization import Quantization, Stored
from planner.quantization.base import plain
from planner.tensors import Group, Parameter, linear, tensor

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, kw_only=True, slots=True)
class Tower:
    """A part beside the main stack: vision, audio, a sequence-to-sequence model's encoder.

    All its parameters count as `part`. `outer` are those outside its blocks, by their checkpoint
    names; `parameter_names` translates the blocks' names, `layers.0.self_attn.q_proj.weight` say.
    Of an encoder it translates those of `outer` too: `embed_positions`, `norm`, `embed_norm`.
    `buffer_bytes`: what transformers holds for it besides, rotary frequencies or numbered patches.
    An encoder reads the model's embedding, to which `positions` are added, then `embedding_norm`;
    or features through convolutions of these `strides`, `conv1`, `conv2`, ... (whisper).
    """

    part: Literal["encoder", "vision", "audio", "projector"]
    hidden_size: int = 0
    layers: tuple[Layer, ...] = ()
    outer: tuple[Parameter, ...] = ()
    parameter_names: tuple[tuple[str, str], ...] = ()
    buffer_bytes: int = 0
    positions: Positions | None = None
    embedding_norm: Norm | None = None
    final_norm: Norm | None = None
    strides: tuple[int, ...] = ()

    def parameters(self) -> Iterator[Parameter]:
        """Every trained tensor once: an encoder's as in the llama family, behind `encoder.`.

        Another part's by its checkpoint name.
        """
        if self.part != "encoder":
            yield from self.checkpoint_parameters()
            return
        for p in self._own_parameters():
            yield replace(p, name=f"encoder.{p.name}")

    def checkpoint_parameters(self) -> Iterator[Parameter]:
        """Every trained tensor once, by its checkpoint name."""
        for p in self._own_parameters():
            own = self.part == "encoder" or p.layer is not None
            yield replace(p, name=translate(p.name, self.parameter_names)) if own else p

    def _own_parameters(self) -> Iterator[Parameter]:
        for p in self.outer:
            yield replace(p, group=self.part, layer=None)
        for index, layer in enumerate(self.layers):
            for p in layer_parameters(layer, self.hidden_size):
                yield replace(p, name=f"layers.{index}.{p.name}", group=self.part, layer=index)


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A language model, or an encoder of text or images; the main stack and what stands beside it.

    `layers` lists every block; hybrids are blocks that differ. `parameter_names` translates module
    names from the llama family's to this family's, most specific first; `extra_parameters` stand
    outside the blocks and no field describes them; `logit_scale` multiplies the logits (cohere);
    `transposed_linears` says that its linear weights are [in, out] (GPT-2's Conv1D).
    `residual_in_fp32`: blocks add to a float32 stream, whatever their dtype (mamba).
    `embedding_norm` stands behind the token embedding (bloom), or, with `embedding_norm_last`,
    behind the positions too (bart). `final_logits_bias`: a buffer [1, V] is added to the logits,
    zeros unless a checkpoint has others (bart). `local_positions` are those of
    sliding layers where they differ (gemma-3). `mask_windows` are the masks that its class makes,
    where they are not those of its layers. `embedding_size`: width of embedding and head where it
    is not hidden_size; a linear leads in and another out (opt-350m).
    `towers` stand beside the main stack: of a multimodal model, vision; of a sequence-to-sequence
    model, whose `layers` are the decoder's, its encoder. `text_type`: the type of the text model
    inside a multimodal one. `is_decoder=False`: bidirectional attention and no cache; `ends`
    says how its `extra_parameters` are used, None: not described.
    `encoder_tokens`: the encoder's length where the model fixes it (whisper). A `vocab_size` of 0:
    no token embedding (vision); `max_position_embeddings` None: positions without an end.
    What one of several GPUs holds of a model is a Model too (`parallel.py`): `first_layer` is the
    index of its first block in the whole, `token_embedding=False` a pipeline stage without one,
    `embedding_rows` the rows of embedding and head where they are not vocab_size: a share, padded.
    `defaults` are the config fields that were absent and took their class's default; `config_json`
    is the config it was read from.
    """

    name: str
    model_type: str
    hidden_size: int
    vocab_size: int
    max_position_embeddings: int | None
    layers: tuple[Layer, ...]
    final_norm: Norm | None
    positions: Positions
    tie_word_embeddings: bool
    dtype: str
    lm_head: bool = True
    lm_head_bias: bool = False
    extra_parameters: tuple[Parameter, ...] = ()
    embedding_norm: Norm | None = None
    embedding_norm_last: bool = False
    embedding_scale: float | None = None
    final_logits_bias: bool = False
    logit_scale: float | None = None
    residual_in_fp32: bool = False
    final_logit_softcapping: float | None = None
    local_positions: RoPE | None = None
    parameter_names: tuple[tuple[str, str], ...] = ()
    transposed_linears: bool = False
    mask_windows: tuple[int | None, ...] | None = None
    embedding_size: int | None = None
    towers: tuple[Tower, ...] = ()
    text_type: str = ""
    is_decoder: bool = True
    ends: Ends | None = None
    encoder_tokens: int | None = None
    first_layer: int = 0
    token_embedding: bool = True
    embedding_rows: int | None = None
    defaults: tuple[str, ...] = ()
    quantization: Quantization | None = None
    config_json: str = field(default="{}", repr=False, compare=False)

    def __post_init__(self) -> None:
        check_size("hidden_size", self.hidden_size)
        check_size("vocab_size", self.vocab_size, minimum=0)
        if self.max_position_embeddings is not None:
            check_size("max_position_embeddings", self.max_position_embeddings)
        check_size("num_hidden_layers", len(self.layers), maximum=MAX_LAYERS)
        element_bytes(self.dtype)
        if not self.text_type:
            object.__setattr__(self, "text_type", self.model_type)
        one: dict[Layer, Layer] = {}
        object.__setattr__(self, "layers", tuple(one.setdefault(x, x) for x in self.layers))

    @property
    def config(self) -> dict[str, Any]:
        """The config.json this model was read from."""
        return dict(json.loads(self.config_json))

    def layer_groups(self) -> Iterator[tuple[int, int, Layer]]:
        """Runs of equal neighbouring blocks: (index of the first, how many, the block)."""
        start = self.first_layer
        for layer, run in groupby(self.layers):
            count = sum(1 for _ in run)
            yield start, count, layer
            start += count

    def layer_kinds(self) -> dict[Layer, int]:
        """How many blocks of each kind there are, wherever they stand."""
        alike: dict[int, tuple[Layer, int]] = {}  # equal blocks are one object: no comparing here
        for layer in self.layers:
            _, count = alike.get(id(layer), (layer, 0))
            alike[id(layer)] = layer, count + 1
        return dict(alike.values())

    def outer_parameters(self) -> Iterator[Parameter]:
        """Embeddings, last norm and head: what stands outside the blocks, tied weights once."""
        V, h = self.embedding_rows or self.vocab_size, self.hidden_size
        width = self.embedding_size or h
        if V and self.token_embedding:
            yield tensor("embed_tokens.weight", V, width, group="embedding")
        if self.embedding_norm is not None and not self.embedding_norm_last:
            yield from norm_parameters(self.embedding_norm, "embed_norm", width)
        match self.positions:
            case LearnedPositions(offset=offset) if self.token_embedding:
                rows = (self.max_position_embeddings or -offset) + offset
                if rows:
                    yield tensor("embed_positions.weight", rows, h, group="embedding")
        if self.final_norm is not None:
            yield from norm_parameters(self.final_norm, "norm", h)
        if self.embedding_size is not None:
            yield from linear("project_in", "embedding", out=h, into=width, bias=False)
            yield from linear("project_out", "head", out=width, into=h, bias=False)
        if self.lm_head:
            for p in linear("lm_head", "head", out=V, into=width, bias=self.lm_head_bias):
                if not (self.tie_word_embeddings and p.linear):
                    yield p
        if self.embedding_norm is not None and self.embedding_norm_last:
            yield from norm_parameters(self.embedding_norm, "embed_norm", h)
        yield from self.extra_parameters

    def parameters(self) -> Iterator[Parameter]:
        """Every trained tensor once, in the llama family's names and [out, in] shapes.

        Those of the towers come last (Tower.parameters).
        """
        yield from self._own_parameters()
        for tower in self.towers:
            yield from tower.parameters()

    def _own_parameters(self) -> Iterator[Parameter]:
        yield from self.outer_parameters()
        for index, layer in enumerate(self.layers, self.first_layer):
            for p in layer_parameters(layer, self.hidden_size):
                yield replace(p, name=f"layers.{index}.{p.name}", layer=index)

    def parameter_groups(self) -> dict[Group, tuple[int, int]]:
        """(tensors, elements) of every group of parameters."""
        groups: dict[Group, tuple[int, int]] = {}

        def add(parameters: Iterable[Parameter], times: int) -> None:
            for p in parameters:
                tensors, elements = groups.get(p.group, (0, 0))
                groups[p.group] = (tensors + times, elements + times * p.count)

        add(self.outer_parameters(), 1)
        for layer, count in self.layer_kinds().items():
            add(layer_parameters(layer, self.hidden_size), count)
        for tower in self.towers:
            add(tower.parameters(), 1)
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
        for p in self._own_parameters():
            swap = self.transposed_linears and len(p.shape) == 2 and p.layer is not None
            name, shape = self.checkpoint_name(p.name), p.shape[:: -1 if swap else 1]
            yield replace(p, name=name, shape=shape, transposed=p.transposed or (swap and p.linear))
        for tower in self.towers:
            yield from tower.checkpoint_parameters()

    def stored_tensors(self, dtype: str | None = None) -> Iterator[tuple[Parameter, Stored]]:
        """Every tensor of the weights as it lies in memory, beside the parameter it stands for.

        Quantised as `quantization` says, everything else in `dtype` (None: the model's).
        """
        kept, parameters = dtype or self.dtype, list(self.checkpoint_parameters())
        if self.quantization is None:
            yield from ((p, plain(p, kept)) for p in parameters)
            return
        quantization = self.quantization.of(parameters, self.model_type)
        for p in parameters:
            yield from ((p, stored) for stored in quantization.stored(p, kept))

    def weight_table(self, dtype: str | None = None) -> pd.DataFrame:
        """A row for each stored tensor: name, role, dtype, shape, copies, bytes, parameter."""
        import pandas as pd

        rows = [
            [s.name, s.role, s.dtype, s.shape, s.copies, s.size_bytes, p.name]
            for p, s in self.stored_tensors(dtype)
        ]
        columns = ["name", "role", "dtype", "shape", "copies", "bytes", "parameter"]
        return pd.DataFrame(rows, columns=columns)

    def checkpoint_name(self, name: str) -> str:
        """A parameter's name in this family's checkpoints, from its name in `parameters()`."""
        for tower in self.towers:
            if tower.part == "encoder" and name.startswith("encoder."):
                return translate(name.removeprefix("encoder."), tower.parameter_names)
        return translate(name, self.parameter_names)

    def parameter_table(self) -> pd.DataFrame:
        """A row for each trained tensor: name, group, layer, shape, count."""
        import pandas as pd

        rows = [
            {"name": p.name, "group": p.group, "layer": p.layer, "shape": p.shape, "count": p.count}
            for p in self.checkpoint_parameters()
        ]
        table = pd.DataFrame(rows, columns=["name", "group", "layer", "shape", "count"])
        return table.astype({"layer": "Int64", "group": "category"})

    @property
    def is_seq2seq(self) -> bool:
        """Whether an encoder reads tokens that a decoder's cross-attention sees."""
        return any(layer.cross_attention for layer in self.layer_kinds())

    def encoder_length(self, given: int | None, tokens: Any) -> Any:
        """What cross-attention sees: as given, what the model fixes, else as many as `tokens`.

        ConfigError for a length given where there is no cross-attention.
        """
        if given is None:
            return self.encoder_tokens or tokens
        if not self.is_seq2seq:
            raise ConfigError(
                f"encoder_tokens={shown(given)} is not allowed: None for {self.model_type}"
            )
        return check_size("encoder_tokens", given, maximum=self.encoder_tokens or MAX_SIZE)

    def check_positions(self, tokens: int) -> None:
        """ConfigError if a sequence of `tokens` tokens reaches beyond the model's positions."""
        limit = self.max_position_embeddings
        if limit is not None and tokens > limit:
            raise ConfigError(
                f"prompt_tokens + output_tokens - 1 = {tokens} reaches beyond "
                f"max_position_embeddings={limit} of {self.name}"
            )


def translate(name: str, names: Iterable[tuple[str, str]]) -> str:
    """A dotted name with each dotted path of `names` replaced in turn, only at whole words."""
    for ours, theirs in names:
        name = f".{name}.".replace(f".{ours}.", f".{theirs}.").strip(".")
    return name
