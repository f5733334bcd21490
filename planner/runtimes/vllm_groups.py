"""How vLLM cuts layers of different kinds into groups that share one pool of block ids.

v1/core/kv_cache_utils.py of vLLM 0.19.1. All layers alike, or all of them keeping the same tokens
(get_kv_cache_groups): one group, each layer with a page of its own size. Else every page gets the
size of the largest, by longer blocks (unify_kv_cache_spec_page_size), and the kinds are cut into
groups of g layers; a group that is short of layers is charged in full
(_get_kv_cache_groups_uniform_page_size). Where states stand beside attention, its blocks are made
long enough for a state to fit and the state is padded to them
(HybridAttentionMambaModelConfig, model_executor/models/config.py).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from planner.errors import ConfigError
from planner.model import Model
from planner.runtimes.vllm_specs import (
    SPARSE_BLOCK_TOKENS,
    SPARSE_TYPES,
    Spec,
    layer_specs,
    specs_of_layer,
)

DEFAULT_BLOCK_TOKENS = 16  # CacheConfig.DEFAULT_BLOCK_SIZE
ALIGNMENT_TOKENS, LATENT_ALIGNMENT_TOKENS = 16, 64  # of attention's blocks beside states


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """The layers of one spec: `groups` of them, blocks of `block_tokens` (None: a state).

    A block takes `page_bytes` in one layer, of which `own_bytes` are the layer's.
    """

    spec: Spec
    layers: int
    groups: int
    block_tokens: int | None
    own_bytes: int
    page_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """The pool of one model: kinds of layers in groups of `group_layers`.

    `one_group`: a block takes the page of every layer, not `group_layers` times the same page.
    """

    kinds: tuple[Kind, ...]
    group_layers: int
    one_group: bool

    @property
    def groups(self) -> int:
        """Block tables of a request."""
        return 1 if self.one_group else sum(kind.groups for kind in self.kinds)

    @property
    def block_bytes(self) -> int:
        """What one block id takes in all layers that it stands for."""
        if self.one_group:
            return sum(kind.layers * kind.page_bytes for kind in self.kinds)
        return self.group_layers * self.kinds[0].page_bytes

    def tokens(self, blocks: int, *, longest_tokens: int) -> int:
        """The tokens of a pool as vLLM prints them: of one sequence that keeps all of them.

        A state counts as a block of the longest sequence, `longest_tokens`
        (_report_kv_cache_config).
        """
        return blocks // self.groups * self.shortest_block(longest_tokens)

    def shortest_block(self, longest_tokens: int) -> int:
        """Tokens of the shortest block of any kind."""
        return min(kind.block_tokens or longest_tokens for kind in self.kinds)

    def longest_blocks(self, tokens: int, *, batched_tokens: int) -> int:
        """Block ids that one request of `tokens` tokens may need at once.

        get_max_concurrency_for_kv_cache_config divides the pool by it.
        """
        needed = [
            kind.spec.most_blocks(tokens, kind.block_tokens or 1, batched_tokens=batched_tokens)
            for kind in self.kinds
        ]
        if self.one_group:
            return max(needed)
        return sum(kind.groups * blocks for kind, blocks in zip(self.kinds, needed, strict=True))


def default_block_tokens(model: Model) -> int:
    """The block that vLLM takes: 16 tokens, 64 for sparse latents.

    Platform.update_block_size_for_backend.
    """
    return SPARSE_BLOCK_TOKENS if model.text_type in SPARSE_TYPES else DEFAULT_BLOCK_TOKENS


def layout(model: Model, *, block: int, kv_dtype: str, compute_dtype: str) -> Layout | None:
    """The pool of `model` with blocks of `block` tokens; None for one that caches nothing.

    ConfigError for layers that vLLM 0.19 does not serve or cannot lay into one pool.
    """
    specs = layer_specs(model, kv_dtype=kv_dtype, compute_dtype=compute_dtype)
    if not specs:
        return None
    if model.text_type in SPARSE_TYPES and block % SPARSE_BLOCK_TOKENS:
        raise ConfigError(
            f"block_tokens={block} is not what vLLM 0.19 has a sparse kernel for: a multiple of "
            f"{SPARSE_BLOCK_TOKENS}"
        )
    block = _beside_states(list(specs), block)
    own = {spec: spec.state_bytes or block * spec.token_bytes for spec in specs}
    if _keep_the_same(list(specs)):
        kinds = [
            Kind(
                spec=spec,
                layers=count,
                groups=1,
                block_tokens=None if spec.keeps == "state" else block,
                own_bytes=own[spec],
                page_bytes=own[spec],
            )
            for spec, count in specs.items()
        ]
        return Layout(kinds=tuple(kinds), group_layers=sum(specs.values()), one_group=True)
    page = max(own.values())
    g = group_size(list(specs.values()))
    return Layout(
        kinds=tuple(_kind(model, spec, n, g, block, page) for spec, n in specs.items()),
        group_layers=g,
        one_group=False,
    )


def stage_layout(
    model: Model, blocks: tuple[int, int] | None, *, block: int, kv_dtype: str, compute_dtype: str
) -> Layout | None:
    """The pool on a pipeline stage with the given blocks of `model`; None where nothing is cached.

    Groups are those of the whole model, layer j of a kind in group j mod groups; a stage keeps what
    it has of each (get_kv_cache_configs, _project_kv_cache_groups_to_worker).
    """
    pool = layout(model, block=block, kv_dtype=kv_dtype, compute_dtype=compute_dtype)
    if pool is None or blocks is None or blocks == (0, len(model.layers)):
        return pool
    places: dict[Spec, list[int]] = {}
    for index, layer in enumerate(model.layers):
        for spec in specs_of_layer(model, layer, kv_dtype, compute_dtype):
            places.setdefault(spec, []).append(index)
    first, end = blocks
    held: list[Kind] = []
    fullest = 0
    for kind in pool.kinds:
        mine = [j for j, index in enumerate(places[kind.spec]) if first <= index < end]
        held.append(replace(kind, layers=len(mine)))
        in_group = Counter(j % kind.groups for j in mine)
        fullest = max(fullest, *in_group.values(), 0)
    kept = sum(kind.layers for kind in held)
    if not kept:
        return None
    return replace(pool, kinds=tuple(held), group_layers=kept if pool.one_group else fullest)


def _kind(model: Model, spec: Spec, layers: int, g: int, block: int, page: int) -> Kind:
    """One kind among others: blocks long enough to fill the common page, states padded to it."""
    groups = -(-layers // g)
    if spec.keeps == "state":
        return Kind(
            spec=spec,
            layers=layers,
            groups=groups,
            block_tokens=None,
            own_bytes=spec.state_bytes,
            page_bytes=page,
        )
    if page % (block * spec.token_bytes):
        raise ConfigError(
            f"runtime=vllm does not serve the layers of {model.model_type} from one pool (0.19): "
            f"{spec.kind} takes {block * spec.token_bytes} bytes a block, no part of {page}"
        )
    return Kind(
        spec=spec,
        layers=layers,
        groups=groups,
        block_tokens=page // spec.token_bytes,
        own_bytes=page,
        page_bytes=page,
    )


def group_size(counts: list[int]) -> int:
    """Layers of one group: the smallest count, or the largest if nearly equal.

    _get_kv_cache_groups_uniform_page_size, vLLM 0.19.1.
    """
    least, most = min(counts), max(counts)
    return most if most < 1.5 * least else least


def _beside_states(specs: list[Spec], block: int) -> int:
    """Attention's block: as it is, or the least that a state beside it fits into."""
    state = max((spec.state_bytes for spec in specs if spec.keeps == "state"), default=0)
    attention = [spec for spec in specs if spec.keeps != "state"]
    if not state or not attention:
        return block
    aligned = LATENT_ALIGNMENT_TOKENS if attention[0].latent else ALIGNMENT_TOKENS
    return max(block, aligned * -(-state // (aligned * attention[0].token_bytes)))


def _keep_the_same(specs: list[Spec]) -> bool:
    """Whether all layers need the same slots (UniformTypeKVCacheSpecs.is_uniform_type)."""
    return len({(spec.keeps, spec.span) for spec in specs}) == 1
