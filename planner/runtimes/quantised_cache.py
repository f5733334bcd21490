"""What transformers 5.23 keeps in a QuantizedCache, by backend.

cache_utils.py: the first update quantises the whole prompt and keeps nothing else. Each later one
dequantises all of it, joins it with the residual and the new token, and keeps the new token in the
residual; when `residual_length` tokens are in it, everything is quantised anew.

quanto (optimum-quanto 0.2.7, tensor/grouped.py, packed.py): groups of the flattened tensor, within
a sequence (axis 0) or along a channel (axis −1), uint8 words, a scale and a shift for each group in
the dtype of the model. hqq (0.2.8, core/quantize.py): the same with its axes 1 and 0, also 8, 3
(ten in an int32) and 1 bits. fp8: float8_e4m3fn and one float32 scale for each tensor, no residual.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from planner.errors import ConfigError, check_choice
from planner.kv_cache import mixer_kind
from planner.kv_formats import (
    KvFormat,
    Packing,
    Residual,
    Scales,
    TensorFormat,
    cached_tensors,
)
from planner.layers import GQA, MLA
from planner.model import Model
from planner.workload import QUANTISED_FIELDS, CacheSpec

Backend = Literal["quanto", "hqq", "fp8"]

BACKEND_BITS: dict[Backend, tuple[int, ...]] = {"quanto": (4, 2), "hqq": (8, 4, 3, 2, 1)}
"""Bits that QuantoQuantizedLayer and HQQQuantizedLayer take."""

BACKEND_AXES: dict[Backend, tuple[int, int]] = {"quanto": (0, -1), "hqq": (0, 1)}

QUANTISED_DTYPES = ("fp8", *(f"int{bits}" for bits in BACKEND_BITS["hqq"]))
DEFAULT_DTYPE = "int4"
DEFAULT_GROUP_SIZE, DEFAULT_RESIDUAL_TOKENS = 64, 128


def backends_of(dtype: str) -> tuple[Backend, ...]:
    """Backends with settings of their own that keep `dtype`; none for fp8 and plain dtypes."""
    return tuple(b for b, has in BACKEND_BITS.items() if dtype in {f"int{bits}" for bits in has})


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantisedCache:
    """A QuantizedCache: who quantises, and the format that comes out."""

    backend: Backend
    form: KvFormat


def quantised_cache(cache: CacheSpec | None, dtype: str) -> QuantisedCache:
    """The QuantizedCache that keeps `dtype`; ConfigError for what its backends do not take."""
    cache = cache or CacheSpec(kind="quantised")
    check_choice("kv_dtype", dtype, QUANTISED_DTYPES)
    if dtype == "fp8":
        for field in QUANTISED_FIELDS:
            if getattr(cache, field) is not None:
                raise ConfigError(
                    f"cache.{field}={getattr(cache, field)!r} is not allowed: None in fp8, one "
                    "scale for each tensor"
                )
        tensor = TensorFormat(bits=8, scales=Scales(per="tensor"), floating=True)
        form = KvFormat(name="fp8", keys=tensor, values=tensor)
        return QuantisedCache(backend="fp8", form=form)
    able = backends_of(dtype)
    if cache.backend not in (None, *able):
        raise ConfigError(
            f"cache.backend={cache.backend!r} is not allowed: {' or '.join(able)} in {dtype}"
        )
    backend: Backend = next(b for b in able if cache.backend in (None, b))
    bits = int(dtype.removeprefix("int"))
    tensors = []
    for field in ("axis_key", "axis_value"):
        axis = getattr(cache, field) or 0
        if axis not in BACKEND_AXES[backend]:
            first, second = BACKEND_AXES[backend]
            raise ConfigError(
                f"cache.{field}={axis} is not allowed: {first} or {second} in {backend}"
            )
        tensors.append(_grouped(cache, backend, bits, axis))
        if (bits, backend, axis) == (3, "hqq", 1):
            raise ConfigError(
                f"cache.{field}=1 is not allowed: 0 in int3, hqq does not give the other back"
            )
    form = KvFormat(name=f"{backend} int{bits}", keys=tensors[0], values=tensors[1])
    return QuantisedCache(backend=backend, form=form)


def _grouped(cache: CacheSpec, backend: Backend, bits: int, axis: int) -> TensorFormat:
    # a word holds the same place of several groups where groups are rows, else members of a group
    packed: Packing = "groups" if (backend, axis) in (("quanto", 0), ("hqq", 1)) else "group"
    residual = cache.residual_tokens
    return TensorFormat(
        bits=bits,
        scales=Scales(
            per="flat",
            group_size=cache.q_group_size or DEFAULT_GROUP_SIZE,
            dtype=None,
            zero_dtype="scale",
            lone_per_element=backend == "quanto" and packed == "groups",
        ),
        packed=packed,
        word_bytes=4 if bits == 3 else 1,
        residual=Residual(
            tokens=DEFAULT_RESIDUAL_TOKENS if residual is None else residual, rule="decoded"
        ),
    )


def scratch_note(cache: QuantisedCache, *, device: str) -> str:
    """What has to be said of the scratch in the peak; empty where it is exact."""
    if cache.backend != "hqq" or device == "cpu":
        return ""
    return "approximate: what hqq allocates on a GPU, searching in float16, was not watched"


def check_quantisable(model: Model) -> None:
    """ConfigError for layers that QuantizedCache refuses: all have to attend to everything."""
    refused = None
    for layer in model.layer_kinds():
        match layer.attention:
            case (
                GQA(shares_cache=False, chunked=False, sliding_window=None)
                | MLA(shares_cache=False, indexer=None)
            ):
                if layer.cross_attention is not None:
                    refused = "cross-attention"
                elif layer.beside is not None:
                    refused = "mixers beside attention"
            case GQA() | MLA():
                refused = mixer_kind(layer.attention)
            case mixer:
                refused = "blocks without attention" if mixer is None else mixer.kind
    if not model.is_decoder:
        refused = "encoders"
    if refused is not None:
        raise ConfigError(
            f"cache.kind='quantised' does not take {refused} of model_type={model.model_type}: "
            "QuantizedCache has full attention layers only"
        )


def check_groups(
    cache: QuantisedCache, model: Model, *, batch: int, prompt_tokens: int, decoded_tokens: int = 0
) -> None:
    """ConfigError where backends fail: groups have to come out even whenever all is quantised."""
    if cache.backend == "fp8":
        return
    form, quantised = cache.form, [prompt_tokens]
    every = max(1, form.residual_tokens)
    if decoded_tokens >= every:
        quantised.append(prompt_tokens + every)  # and after each as many again
    for layer in model.layer_kinds():
        assert isinstance(layer.attention, GQA | MLA)
        for tensor, (heads, width), axis in zip(
            (form.keys, form.values),
            cached_tensors(layer.attention),
            ("axis_key", "axis_value"),
            strict=True,
        ):
            for tokens in quantised:
                _check_even(tensor, cache.backend, axis, batch, heads, tokens, width)


def _check_even(
    tensor: TensorFormat, backend: Backend, axis: str, B: int, H: int, S: int, d: int
) -> None:
    assert tensor.scales is not None
    assert tensor.scales.group_size is not None
    g, codes = tensor.scales.group_size, tensor.codes_per_word
    if backend == "quanto":
        whole, what = (
            (H * S * d, "a sequence's") if tensor.packed == "groups" else (B * H * S, "a channel's")
        )
        if whole % g:
            raise ConfigError(
                f"cache.q_group_size={g} does not divide {what} {whole} elements at {S} tokens, "
                "which quanto needs"
            )
        return
    if B * H * S * d % g:
        raise ConfigError(
            f"cache.q_group_size={g} does not divide {B * H * S * d} elements at {S} tokens, which "
            "hqq needs"
        )
    rows = B * H * S * d // g if tensor.packed == "groups" else g
    if rows % codes and tensor.bits != 3:  # those are filled up
        raise ConfigError(
            f"cache.{axis}={int(tensor.packed == 'groups')} packs {codes} codes in a word, which "
            f"does not divide {rows} rows at {S} tokens: hqq loses some"
        )
