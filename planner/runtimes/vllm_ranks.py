"""What one of several GPUs holds in vLLM: heads and channels, vocabulary, layers of its stage.

vLLM 0.19.1: ModelConfig.get_num_kv_heads (config/model.py), QKVParallelLinear (layers/linear.py),
MambaStateShapeCalculator (layers/mamba/mamba_utils.py), VocabParallelEmbedding
(layers/vocab_parallel_embedding.py) and get_pp_indices (distributed/utils.py).
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

from planner.errors import ConfigError
from planner.layers import GQA, MLA, Layer
from planner.mixers.linear import GatedDeltaNet, KimiDelta, LightningAttention
from planner.mixers.mamba import Mamba, Mamba2
from planner.mixers.recurrent import SharedAttention, ShortConv
from planner.model import Model
from planner.parallel import Share, pipeline_stage, share, tensor_parallel_share
from planner.parameters import layer_parameters
from planner.quantization.base import linears
from planner.quantization.fp8 import BlockFp8

VOCABULARY_MULTIPLE = 64  # DEFAULT_VOCAB_PADDING_SIZE

PARTED_TYPES = frozenset(
    (
        *("afmoe", "bailing_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "ernie4_5_moe"),
        *("exaone", "exaone4", "glm4", "glm4_moe", "granite", "hunyuan_v1_dense", "hunyuan_v1_moe"),
        *("llama", "llama4_text", "mistral", "nemotron", "phi3", "qwen2", "qwen3", "solar"),
    )
)
"""Text types whose classes leave the embedding out of all stages but the first, and the head of all
but the last (`PPMissingLayer` in model_executor/models/); the others hold both on each."""


@lru_cache(maxsize=64)
def shares(model: Model, tensor_parallel: int, pipeline_parallel: int) -> tuple[Share, ...]:
    """One GPU of each pipeline stage, in order; ConfigError for what vLLM cannot share out."""
    if pipeline_parallel > len(model.layers):
        raise ConfigError(
            f"pipeline_parallel={pipeline_parallel} is not allowed: at most the "
            f"{len(model.layers)} layers of {model.name}"
        )
    whole = tensor_parallel_share(model, tensor_parallel, mixer_share)
    _check_blocks(model, whole, tensor_parallel)
    whole = replace(whole, embedding_rows=_vocabulary_rows(model, tensor_parallel))
    if pipeline_parallel == 1:
        return (Share(model=whole, whole=whole, tensor_parallel=tensor_parallel),)
    parted = model.text_type in PARTED_TYPES
    runs = stage_runs(len(model.layers), pipeline_parallel)
    return tuple(
        Share(
            model=pipeline_stage(whole, first, end, outer_everywhere=not parted),
            whole=whole,
            stage=index,
            stages=pipeline_parallel,
            tensor_parallel=tensor_parallel,
        )
        for index, (first, end) in enumerate(runs)
    )


def stage_runs(layers: int, stages: int) -> tuple[tuple[int, int], ...]:
    """[first, end) of each stage: as even as can be, what is left over goes before the last stage.

    get_pp_indices: one more for the stages from the last but one backwards.
    """
    counts = [layers // stages] * stages
    for i in range(layers % stages):
        counts[-(i + 2)] += 1
    ends = [sum(counts[: i + 1]) for i in range(stages)]
    return tuple(zip((0, *ends), ends, strict=False))


def _check_blocks(model: Model, cut: Model, tensor_parallel: int) -> None:
    """ConfigError where a cut goes through blocks of fp8 weights that share a scale.

    validate_fp8_block_shape (quantization/utils/fp8_utils.py) and Fp8MoEMethod.create_weights.
    """
    fp8 = model.quantization
    if tensor_parallel == 1 or not isinstance(fp8, BlockFp8) or fp8.weight_block_size is None:
        return
    block_rows, block_columns = fp8.weight_block_size
    last = {layer: index for index, layer in enumerate(model.layers)}  # one block of each kind
    for kind, index in last.items():
        before = {p.name: p for p in layer_parameters(kind, model.hidden_size)}
        for p in layer_parameters(cut.layers[index], model.hidden_size):
            name = model.checkpoint_name(f"layers.{index}.{p.name}")
            stored = [s.dtype for s in fp8.stored(replace(p, name=name), model.dtype)]
            if "fp8" not in stored:
                continue
            for one, whole in zip(linears(p), linears(before[p.name]), strict=True):
                for field, size, all_of_it, block in (
                    ("outputs", one.out, whole.out, block_rows),
                    ("inputs", one.into, whole.into, block_columns),
                ):
                    if size != all_of_it and size % block:
                        raise ConfigError(
                            f"tensor_parallel={tensor_parallel} is not allowed: {size} {field} of "
                            f"{name} on each GPU are not a multiple of the {block} that share a "
                            "scale (quantization_config.weight_block_size)"
                        )


def _vocabulary_rows(model: Model, tensor_parallel: int) -> int | None:
    """Rows of embedding and head on each GPU: the vocabulary padded to a multiple of 64, cut."""
    if not model.vocab_size:
        return None
    padded = -(-model.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    return share("padded vocab_size", padded, tensor_parallel)


def rank(model: Model, tensor_parallel: int) -> Model:
    """`model` with the heads and channels of one of `tensor_parallel` GPUs in its token mixers.

    Query heads must divide. Of fewer key/value heads than GPUs each GPU keeps one, a copy; else
    they must divide too. A latent has no heads: whole on every GPU. States go by heads or channels.
    """
    if tensor_parallel == 1 or not model.is_decoder:
        return model
    kinds = {layer: _layer(layer, tensor_parallel) for layer in model.layer_kinds()}
    return replace(model, layers=tuple(kinds[layer] for layer in model.layers))


def _layer(layer: Layer, tp: int) -> Layer:
    return replace(
        layer,
        attention=mixer_share(layer.attention, tp),
        beside=mixer_share(layer.beside, tp),
        cross_attention=mixer_share(layer.cross_attention, tp),
    )


def mixer_share(mixer: Any, tp: int) -> Any:
    """The share of one GPU in a token mixer."""

    def divided(*fields: str) -> Any:
        return replace(mixer, **{name: share(name, getattr(mixer, name), tp) for name in fields})

    match mixer:
        case GQA(num_key_value_heads=G):
            heads = share("num_attention_heads", mixer.num_attention_heads, tp)
            return replace(mixer, num_attention_heads=heads, num_key_value_heads=_kv_share(G, tp))
        case SharedAttention(num_key_value_heads=G):
            return replace(mixer, num_key_value_heads=_kv_share(G, tp))
        case MLA() | LightningAttention():
            return divided("num_attention_heads")
        case Mamba():
            return divided("intermediate_size")
        case Mamba2(n_groups=groups):
            # groups that do not divide are copied until each GPU has one
            return replace(divided("num_heads"), n_groups=max(1, groups // tp))
        case GatedDeltaNet():
            return divided("linear_num_key_heads", "linear_num_value_heads")
        case KimiDelta():
            return divided("linear_num_heads")
        case ShortConv():
            return divided("hidden_size")
        case _:  # nothing, or what layer_specs refuses
            return mixer


def _kv_share(heads: int, tp: int) -> int:
    """Key/value heads of one GPU: max(1, H_kv / tp)."""
    if heads % tp and tp % heads:
        raise ConfigError(
            f"num_key_value_heads={heads} and tensor_parallel={tp} do not divide one another: "
            "vLLM asks for it"
        )
    return max(1, heads // tp)
