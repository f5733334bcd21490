"""What one of several GPUs holds of a model: a Model again, with a share of the layers or of each.

Tensor parallelism as Megatron-LM cuts it (arXiv:1909.08053, §3): the first matrix of a pair by its
outputs, with its bias, the second by its inputs, its bias and all norms whole. Attention goes by
heads, a feed-forward by its intermediate size, each routed expert like a feed-forward, routers
stay whole; of a latent (MLA) the heads go, down-projections and cache stay. Shapes of a share are
those of a smaller layer, so that scales and groups of quantised weights follow by themselves.

Pipeline parallelism: runs of layers. Which runs, which stage has the embedding and the head, how
the vocabulary is cut and whether a token mixer may be is the runtime's to say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from planner.errors import ConfigError
from planner.layers import GQA, Dense, Layer, MoE, QKNorm
from planner.model import Model, Tower
from planner.parameters import norm_parameters
from planner.tensors import Parameter


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """What one GPU holds: `model`, the blocks of stage `stage` of `stages`, cut `tensor_parallel`
    ways. `whole` is the same cut of all blocks; the other GPUs of a stage hold as much. Of each of
    the model's parameters it keeps one of `shards` shards, and gathers the others when needed.
    """

    model: Model
    whole: Model
    stage: int = 0
    stages: int = 1
    tensor_parallel: int = 1
    shards: int = 1

    @property
    def blocks(self) -> tuple[int, int]:
        """The first block and the one after the last."""
        first = self.model.first_layer
        return first, first + len(self.model.layers)

    @property
    def in_words(self) -> str:
        """Which GPU it is, for people; empty where there is one."""
        parts = []
        if self.tensor_parallel > 1:
            parts.append(f"one of {self.tensor_parallel} tensor-parallel GPUs")
        if self.stages > 1:
            first, end = self.blocks
            parts.append(f"stage {self.stage + 1} of {self.stages}, layers {first}–{end - 1}")
        if self.shards > 1:
            parts.append(f"the first of {self.shards} data-parallel shards, a batch each")
        return ", ".join(parts)


MixerShare = Callable[[Any, int], Any]
"""One GPU's part of a token mixer, or ConfigError if it cannot be shared by so many."""


def share(field: str, count: int, gpus: int) -> int:
    """`count` / `gpus`; ConfigError if it does not divide."""
    if count % gpus:
        raise ConfigError(
            f"{field}={count} is not a multiple of tensor_parallel={gpus}: vLLM asks for it"
        )
    return count // gpus


@lru_cache(maxsize=256)
def tensor_parallel_share(model: Model, gpus: int, mixer_share: MixerShare) -> Model:
    """The layers of one of `gpus` GPUs; embedding and head are the caller's to cut.

    Towers go by heads too where these divide; what stands outside their blocks stays whole.
    """
    if gpus == 1:
        return model
    kinds = {kind: layer_share(kind, gpus, mixer_share) for kind in model.layer_kinds()}
    return replace(
        model,
        layers=tuple(kinds[layer] for layer in model.layers),
        towers=tuple(_tower_share(tower, gpus, mixer_share) for tower in model.towers),
    )


def layer_share(layer: Layer, gpus: int, mixer_share: MixerShare) -> Layer:
    """One GPU's part of a block."""
    attention, whole = layer.attention, layer.extra_parameters
    if isinstance(attention, GQA) and attention.qk_norm and attention.qk_norm.width == "full":
        # a norm over all heads at once needs all of its scale
        whole = (*whole, *_full_norms(attention, attention.qk_norm))
        attention = replace(attention, qk_norm=None)
    return replace(
        layer,
        attention=mixer_share(attention, gpus),
        beside=mixer_share(layer.beside, gpus),
        cross_attention=mixer_share(layer.cross_attention, gpus),
        feed_forward=_feed_forward_share(layer.feed_forward, gpus),
        extra_parameters=whole,
    )


def _full_norms(attention: GQA, qk_norm: QKNorm) -> tuple[Parameter, ...]:
    heads = {"q": attention.num_attention_heads}
    if not attention.shares_cache:
        heads["k"] = attention.num_key_value_heads
    return tuple(
        p
        for letter, count in heads.items()
        for p in norm_parameters(
            qk_norm.norm, f"self_attn.{letter}_norm", count * attention.head_dim
        )
    )


def _feed_forward_share(feed_forward: Dense | MoE | None, gpus: int) -> Dense | MoE | None:
    match feed_forward:
        case Dense(intermediate_size=i):
            return replace(feed_forward, intermediate_size=share("intermediate_size", i, gpus))
        case MoE(moe_intermediate_size=i, shared=shared):
            divided = share("moe_intermediate_size", i, gpus)
            both = None if shared is None else _feed_forward_share(shared, gpus)
            assert not isinstance(both, MoE)
            return replace(feed_forward, moe_intermediate_size=divided, shared=both)
    return None


def _tower_share(tower: Tower, gpus: int, mixer_share: MixerShare) -> Tower:
    try:
        layers = tuple(layer_share(layer, gpus, mixer_share) for layer in tower.layers)
    except ConfigError:  # each GPU runs all of it
        return tower
    return replace(tower, layers=layers)


def pipeline_stage(model: Model, first: int, end: int, *, outer_everywhere: bool) -> Model:
    """Blocks `first` to `end` − 1; the embedding with the first ones, norm and head with the last.

    A tied head needs the embedding's weights. What stands outside the blocks and is described by
    no field goes with the first stage. `outer_everywhere`: embedding and head lie on every stage,
    on most of them without use, as extra parameters.
    """
    starts, ends = first == 0, end == len(model.layers)
    head = model.lm_head and ends
    stage = replace(
        model,
        layers=model.layers[first:end],
        first_layer=model.first_layer + first,
        token_embedding=model.token_embedding and (starts or (head and model.tie_word_embeddings)),
        lm_head=head,
        final_norm=model.final_norm if ends else None,
        embedding_norm=model.embedding_norm if starts else None,
        extra_parameters=model.extra_parameters if starts else (),
        mask_windows=None,
    )
    if not outer_everywhere:
        return stage
    held = {p.name for p in stage.outer_parameters()}
    idle = (p for p in model.outer_parameters() if p.group in ("embedding", "head"))
    unused = tuple(p for p in idle if p.name not in held)
    return replace(stage, extra_parameters=(*stage.extra_parameters, *unused))
