"""fp8 weights: block-wise (DeepSeek-V3, arXiv:2412.19437) and per tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from planner.quantization.base import Quantization

METHODS: dict[str, Callable[[Mapping[str, Any]], Quantization]] = {}
