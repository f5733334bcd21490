"""The oracle of quantised caches: the live layers of transformers and what they hold."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import QuantizedCache

from profiles.meters import LiveTensorMeter

needs_hqq = pytest.mark.skipif(
    importlib.util.find_spec("hqq") is None, reason="hqq is not installed"
)
DTYPES = {"fp8": None, "int8": 8, "int4": 4, "int3": 3, "int2": 2, "int1": 1}


def inner_tensors(value: Any) -> Iterator[torch.Tensor]:
    """The plain tensors inside wrapper subclasses, tuples and dictionaries."""
    if isinstance(value, torch.Tensor):
        if type(value) is torch.Tensor:
            yield value
        else:
            for name in value.__tensor_flatten__()[0]:
                yield from inner_tensors(getattr(value, name))
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from inner_tensors(item)


def held_bytes(layer: Any) -> int:
    """numel · itemsize of everything that one cache layer keeps."""
    tensors = {id(t): t for t in inner_tensors(vars(layer))}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def live_quantised_cache(
    config: Any, dtype: str, *, backend: str = "quanto", **options: Any
) -> Any:
    """A QuantizedCache by our names."""
    if dtype == "fp8":
        return QuantizedCache("fp8", config)
    named = {k.replace("residual_tokens", "residual_length"): v for k, v in options.items()}
    return QuantizedCache(backend, config, nbits=DTYPES[dtype], **named)


class QuantisedMeter(LiveTensorMeter):
    """A meter that looks into quanto's quantisation, which is python and no kernel."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run what the op is made of inside the meter."""
        if func.name() == "quanto::quantize_affine":
            with self:
                key = torch._C.DispatchKey.CompositeExplicitAutograd
                return func._op_dk(key, *args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)
